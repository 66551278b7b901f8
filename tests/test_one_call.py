"""`compactmind.compress`: a model made small in one call."""

import json
import re

import helpers
import pytest
import torch

from compactmind import CompactMindError, compress
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.methods.pruning.masks import compact
from compactmind.methods.registry import METHODS, Method, method_named
from compactmind.search import one_call
from compactmind.search.one_call import _read_text, _windows

TEXT = [sentence.text for sentence in helpers.make_sentences(60, seed=5)]
FEW = {"text": TEXT, "seq_len": 32, "calibration_windows": 4, "eval_windows": 3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with models/llama and its text."""
    helpers.add_llama(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_llama_of_a_given_size_is_saved_measured_and_not_made_twice(here, monkeypatch):
    result = compress("models/llama", 1.6, **FEW)
    assert result.manifest["kind"] == "grouped" and result.manifest["parent"] == "llama"
    saved = load_checkpoint(here / "models" / "llama_gptq_1.6x")
    assert torch.equal(*(each.model(helpers.example_windows()).logits for each in (result, saved)))
    sizes = [(here / "models" / name / "model.safetensors").stat().st_size for name in ("llama", "llama_gptq_1.6x")]
    assert sizes[0] / sizes[1] > 1.5  # the head of the file is not counted, and is large here
    dense, last = result.manifest["pipeline"]
    assert dense["method"] == "dense" and last["method"] == "gptq" and last["params"]["target_compression"] == 1.6
    assert last["divergence"]["mean"] > 0 and last["protocol"]["windows"] == 3
    assert last["against_dense"]["ratio"] == pytest.approx(last["perplexity"] / dense["perplexity"])

    def stop(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(one_call, "run_pipeline", stop)
    assert compress("models/llama", 1.6, **FEW).manifest == result.manifest
    for change in ({"text": TEXT[1:]}, {"eval_windows": 2}, {"force": True}, {"bits_of_what": 1}):
        with pytest.raises((AssertionError, CompactMindError), match="made again|no parameter 'bits_of_what'"):
            compress("models/llama", 1.6, **{**FEW, **change})


def test_a_method_by_name_and_a_pipeline(here):
    steps = [{"method": "prune", "params": {"sparsity": 0.2, "round_to": 8}}, {"method": "w8a8"}]
    folder_of_text = {"text": "wikitext_data", "seq_len": 32, "calibration_windows": 4, "eval_windows": 4}
    result = compress("models/llama", output="models/small", pipeline=steps, **folder_of_text)
    assert [row["method"] for row in result.manifest["pipeline"]] == ["dense", "prune", "w8a8"]
    assert result.manifest["kind"] == "w8a8" and result.manifest["pipeline"][-1]["protocol"]["text"] == "made up, test"
    (here / "some.txt").write_text("\n".join(TEXT), encoding="utf-8")
    again = compress("models/llama", method="nf4", double_quantization=False, **{**FEW, "text": "some.txt"})
    assert again.manifest["quantization"]["double_quantization"] is False
    assert (here / "models" / "llama_nf4" / "manifest.json").is_file()


@pytest.mark.parametrize(("windows", "parts"), [(3, (1, 1, 1)), (8, (5, 1, 2)), (40, (28, 4, 8))])
def test_text_of_one_part_is_divided_and_no_window_is_in_two(windows, parts):
    tokenizer = helpers.make_byte_tokenizer()
    length = 16
    text = _read_text([("abcdefghijklmnopqrs" * windows)[: windows * length - 1]])  # and a begin-of-text token
    ids = tokenizer(text.parts["all"][0])["input_ids"]
    result = _windows(text, tokenizer, length, 8)
    assert tuple(map(len, result)) == parts
    assert torch.cat(result).flatten().tolist() == ids
    with pytest.raises(CompactMindError, match="has 2 window.s. of .* and three are needed"):
        _windows(text, tokenizer, len(ids) // 2, 8)


def test_a_classifier(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("models/big", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage={"script": "x.py"})
    result = compress("models/big")
    assert result.manifest["kind"] == "w8a8" and (tmp_path / "models" / "big_w8a8").is_dir()
    plain, message = (compress("models/big", method="nf4", output=f"models/{n}", text=text) for n, text in (("a", None), ("b", TEXT)))
    batch = helpers.example_batch()
    assert not torch.equal(helpers.logits_of(plain.model, batch), helpers.logits_of(message.model, batch))  # rounding was compensated
    for change, said in (
        ({"method": "gptq"}, "unknown method 'gptq' for a classifier: choose from w8a8, nf4, int8"),
        ({"target_compression": 3}, "has no parameter 'target_compression'"),
        ({"pipeline": []}, "pipelines are for language models"),
    ):
        with pytest.raises(CompactMindError, match=said):
            compress("models/big", **change)


def test_a_pruned_classifier_is_read_without_a_question_about_the_code_beside_it(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    dense = helpers.make_distilbert()
    pruned = compact(dense, helpers.uneven_masks(dense))
    save_checkpoint("models/pruned", pruned, tokenizer, kind="pruned", parent=None, stage={"script": "x.py"})
    assert "auto_map" in json.loads((tmp_path / "models" / "pruned" / "config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert compress("models/pruned").manifest["kind"] == "w8a8"


def test_a_model_that_only_code_beside_it_runs_is_refused_without_a_question(here, monkeypatch):
    config = json.loads((here / "models" / "llama" / "config.json").read_text(encoding="utf-8"))
    other = here / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((here / "models" / "llama" / "model.safetensors").read_bytes())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for task in ("CausalLM", "SequenceClassification"):
        own = {"auto_map": {"AutoConfig": "modeling.Config"}, "model_type": "somebodys", "architectures": [f"SomebodysFor{task}"]}
        (other / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
        with pytest.raises(CompactMindError, match="other runs with code that lies beside its weights alone"):
            compress("other", 2, **FEW) if task == "CausalLM" else compress("other")


def test_a_name_of_the_hub_is_fetched(here, monkeypatch):
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "some/body":
            return str(here / "models" / "llama")
        raise OSError("401 Client Error\nmore of it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert compress("some/body@abc", method="w8a8", output="small", **FEW).manifest["kind"] == "w8a8"
    assert asked == [("some/body", "abc")]
    with pytest.raises(CompactMindError, match="some/one is no folder and could not be fetched from the hub: 401 Client Error$"):
        compress("some/one", 3, **FEW)


REFUSALS = [
    ({"model": "models/nothing here"}, "could not be fetched|no name of the hub"),
    ({"model": "nothing"}, "nothing is no folder, no GGUF file and no name of the hub"),
    ({"model": "models"}, "holds no model"),
    ({"target_compression": None}, "say how small: target_compression=3, or bits=4"),
    ({"method": "shrink"}, "unknown method 'shrink': choose from prune"),
    ({"method": "w8a8"}, "w8a8 does not aim at a size: leave target_compression out, or choose gptq"),
    ({"pipeline": [{"method": "w8a8"}]}, "a pipeline says all: leave out target_compression"),
    ({"pipeline": [{"method": "w8a8"}], "target_compression": None}, "say where its model goes"),
    ({"text": "nowhere.txt"}, "text 'nowhere.txt' is no file and no folder"),
    ({"text": [1]}, "each has to be a str"),
    ({"output": "models/llama"}, "it is the model that is read"),
    ({"target_compression": 500}, "target_compression"),
]
"""What is asked for beside a call that could be done -> what is said."""


@pytest.mark.parametrize(("change", "said"), REFUSALS)
def test_what_makes_no_sense_is_said_before_any_work(here, change, said):
    before = sorted(path.name for path in (here / "models").iterdir())
    with pytest.raises(CompactMindError, match=said):
        compress(**{"model": "models/llama", "target_compression": 1.6, **FEW, **change})
    assert sorted(path.name for path in (here / "models").iterdir()) == before


def test_text_is_asked_for_where_there_is_none(here):
    (here / "wikitext_data").rename(here / "elsewhere")
    with pytest.raises(CompactMindError, match="no text, and there is no wikitext_data/: give text="):
        compress("models/llama", 1.6)


def test_the_manifest_names_the_call_and_every_parameter(here):
    stage = compress("models/llama", bits=4, **FEW).manifest["stage"]
    assert stage["script"] == "compactmind.compress" and stage["config"]["seq_len"] == 32
    assert stage["config"]["pipeline"] == [json.loads(json.dumps({"method": "gptq", "params": vars(method_named("gptq").recipe(bits=4))}))]


def test_the_method_of_the_documentation_is_one_file_and_one_row(here, monkeypatch):
    page = (helpers.REPOSITORY / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    file, row = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"Method": Method, "__name__": "builtins"}  # a module that is there, for dataclasses to look at
    exec(file, names)
    monkeypatch.setitem(METHODS, "magnitude", eval(row, names))
    result = compress("models/llama", method="magnitude", sparsity=0.25, output="models/small", **FEW)
    weight = result.model.model.layers[0].mlp.up_proj.weight
    assert ((weight == 0).sum(dim=1) == weight.shape[1] // 4).all()
    assert result.manifest["pipeline"][-1]["done"] == {"zeros": 0.25}
    with pytest.raises(CompactMindError, match=r"sparsity 1 is not in \[0, 1\)"):
        compress("models/llama", method="magnitude", sparsity=1, output="models/small", **FEW)
