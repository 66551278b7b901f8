"""Models and sentences from local folders, or a clear message; what is there already is replaced only where it may be."""

import json
import shutil

import downloads
import helpers
import pytest
import torch
from downloads import WHOLE, smoke, written
from test_gguf import byte_level, llama, logits_of
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import download_model
from compactmind.checkpoint import load_checkpoint
from compactmind.data import load_split
from compactmind.errors import CompactMindError
from compactmind.gguf_export import export_gguf
from compactmind.manifest import read_manifest

wheels, workspace = downloads.wheels, downloads.workspace


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


def test_a_gguf_file_among_the_local_folders_is_a_language_model(workspace, capsys):
    export_gguf(llama(), byte_level(), workspace / "local_assets" / "tiny.gguf", "tiny")
    download_model.main(smoke(llama_name="tiny.gguf"))
    assert "llama: fetching from local folder local_assets/tiny.gguf" in capsys.readouterr().out
    checkpoint = load_checkpoint(workspace / "models" / "llama")
    assert torch.equal(logits_of(checkpoint.model), logits_of(llama())) and checkpoint.manifest["published_as"]["file"] == "tiny.gguf"
    download_model.main(smoke(llama_name="tiny.gguf"))
    assert "llama: models/llama is up to date" in capsys.readouterr().out


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


@pytest.mark.parametrize("made_for", [BertForMaskedLM, BertForSequenceClassification])
def test_an_encoder_may_come_without_a_pooler_but_with_all_else(workspace, made_for):
    folder = workspace / "local_assets" / "tiny-bert"
    model = made_for(helpers.bert_config())
    model.save_pretrained(folder)  # of masked words: no pooler, a head of its own
    download_model.main(smoke())
    table = load_checkpoint(workspace / "models" / "teacher_base").model.embeddings.word_embeddings.weight
    assert torch.equal(table, model.bert.embeddings.word_embeddings.weight)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layer.0.attention.self.key" not in name}
    model.save_pretrained(folder, state_dict=kept)
    lacks = "encoder.layer.0.attention.self.key.bias, encoder.layer.0.attention.self.key.weight: copy"
    with pytest.raises(CompactMindError, match=f"tiny-bert cannot be used as teacher_base: .*whole BertModel: its weights lack {lacks}"):
        download_model.main(smoke())


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
