"""What a stage may replace and what it takes, by what lies there: nothing is lost, and what does not fit is named before it is loaded."""

import json
from pathlib import Path

import helpers
import pytest
import torch
from transformers import BertModel, MistralConfig, MistralModel

from compactmind.checkpoint import load_any, load_as_released, save_checkpoint, skeleton_of
from compactmind.errors import CompactMindError
from compactmind.guards import check_one_dtype, check_outputs, check_parent, check_tokenizer
from compactmind.manifest import MANIFEST
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.sources.models import load_llama

SCRIPT = "1_distill.py"


def save(directory, model, tokenizer, kind="dense", **changes):
    save_checkpoint(
        directory, model, tokenizer, **{"kind": kind, "parent": "teacher_base", "stage": {"script": SCRIPT}} | changes
    )
    return directory


@pytest.fixture
def teacher(tmp_path, tokenizer, bert):
    return save(tmp_path / "teacher", bert, tokenizer)


def refused(*outputs, match: str, inputs=(), models_dir=None, script=SCRIPT) -> None:
    with pytest.raises(CompactMindError, match=match):
        check_outputs(outputs, script, inputs, models_dir)


def test_an_empty_place_and_an_earlier_result_may_be_replaced(tmp_path, teacher):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(teacher)
    check_outputs([tmp_path / "new", tmp_path / "empty", teacher], SCRIPT, [tmp_path / "teacher_base"], tmp_path)
    check_outputs([tmp_path / "link"], SCRIPT, [], tmp_path)
    (teacher / "model.onnx").touch(), (teacher / ".DS_Store").touch()  # made from it, and made by nobody
    check_outputs([teacher], SCRIPT, [], tmp_path)
    (teacher / MANIFEST).write_text("{")  # a damaged one is mended by making it again
    check_outputs([teacher], SCRIPT, [], tmp_path)


def test_nothing_else_is_replaced(tmp_path, teacher, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").touch()
    refused(own, match="own cannot be written to: it holds files that are no checkpoint of this project .thesis.tex")
    refused(own / "thesis.tex", match="it is a file")
    refused(teacher, match="it is the model that is read", inputs=[teacher])
    (tmp_path / "link").symlink_to(teacher)
    refused(tmp_path / "link", match="it is the model that is read", inputs=[teacher])
    refused(tmp_path, match="inside the other", inputs=[teacher])
    refused(teacher / "new", match="inside the other", inputs=[teacher])
    refused(tmp_path, match="the checkpoints lie in it", models_dir=tmp_path)
    refused(tmp_path.parent, match="the checkpoints lie in it", models_dir=tmp_path)
    refused(tmp_path / "a", tmp_path / "b" / ".." / "a", match="are one place, but two models are written")
    refused(teacher, match="it is a checkpoint made by 1_distill.py", script="3_quantize.py")
    refused(tmp_path / "llama", match="that is the name of what `python download_model.py` makes", models_dir=tmp_path)
    (teacher / "notes.txt").touch()
    refused(teacher, match="it holds files of your own .notes.txt., which would be lost")
    monkeypatch.chdir(own)
    for here in (".", "..", own, own.parent):
        refused(Path(here), match="cannot be written to")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, tokenizer):
    """A directory with a checkpoint of every kind a stage may be given by mistake."""
    folder = tmp_path_factory.mktemp("zoo")
    for method in ("nf4", "int8"):
        model = helpers.make_distilbert()
        save(
            folder / f"student_{method}", model, tokenizer, method, quantization=quantize_model(model, method), parent="student"
        )
    save(folder / "student", helpers.make_distilbert(), tokenizer)
    save(folder / "teacher_base", BertModel(helpers.bert_config()), tokenizer)
    save(folder / "llama", helpers.make_llama(), helpers.make_byte_tokenizer())
    return folder


def test_what_a_stage_takes_is_checked_by_what_it_is(zoo):
    assert check_parent(zoo / "student", "--parent", "classifier")["kind"] == "dense"
    for name, match in {
        "student_nf4": r"student_nf4 is quantized already \(nf4\): --parent takes a model that is dense or pruned, for example student",
        "student_int8": r"is quantized already \(int8\)",
        "llama": r"llama is a language model \(LlamaForCausalLM\): --parent takes a classifier",
        "teacher_base": "teacher_base is a BertModel, a model without a head: --parent takes a classifier",
    }.items():
        with pytest.raises(CompactMindError, match=match):
            check_parent(zoo / name, "--parent", "classifier")
    with pytest.raises(CompactMindError, match="student is a classifier .*--model_path takes a language model"):
        load_as_released(zoo / "student")


def test_a_quantized_llama_is_not_called_damaged(tmp_path):
    model = helpers.make_llama()
    description = quantize_model(model, "nf4", embeddings="float32")
    directory = save(
        tmp_path / "llama_nf4", model, helpers.make_byte_tokenizer(), "nf4", quantization=description, parent="llama"
    )
    with pytest.raises(CompactMindError, match="llama_nf4 is quantized already .nf4.*for example llama"):
        load_as_released(directory)
    (directory / MANIFEST).unlink()  # somebody else's
    config = helpers.read_json(directory / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (directory / "config.json").write_text(json.dumps(config))
    for load in (load_as_released, load_llama):
        with pytest.raises(CompactMindError, match="is quantized already .bitsandbytes.: give the dense model"):
            load(directory)


def test_weights_of_several_dtypes_a_missing_shard_and_a_damaged_file_are_refused_before_they_are_loaded(tmp_path):
    model, tokenizer = helpers.make_llama(), helpers.make_byte_tokenizer()
    for name in ("sound", "mixed", "lacking", "damaged"):
        if name == "mixed":
            model.model.layers[1].mlp.up_proj.to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        tokenizer.save_pretrained(tmp_path / name)
    files = sorted((tmp_path / "sound").glob("*.safetensors"))
    assert len(files) > 2
    check_one_dtype(tmp_path / "sound")
    (tmp_path / "lacking" / files[1].name).unlink()
    (tmp_path / "damaged" / files[1].name).write_bytes(b"{}")
    for name, match in {
        "mixed": r"mixed holds weights of several dtypes, BF16 \(model.layers.1.mlp.up_proj.weight\), F32 \(.*save it in one",
        "lacking": f"names {files[1].name}, which is not there: copy the folder again",
        "damaged": f"{files[1].name} is damaged .*copy or download it again",
    }.items():
        for load in (load_as_released, load_llama):
            with pytest.raises(CompactMindError, match=match):
                load(tmp_path / name)


def test_frequencies_beside_the_weights_are_no_weights(tmp_path):
    """Conversions of older releases hold them in float32, and transformers passes them over."""
    model = helpers.cast_parameters(helpers.make_llama(), torch.float16)
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | frequencies)
    helpers.make_byte_tokenizer().save_pretrained(tmp_path)
    for load in (load_as_released, load_llama):
        loaded, _ = load(tmp_path)
        assert loaded.dtype == torch.float16 and torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("load", [load_as_released, load_llama, lambda path: (load_any(path).model, None)])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_keep_the_dtype_of_their_file_whatever_the_configuration_says(tmp_path, load, sharded):
    model = helpers.make_llama()
    model.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    helpers.make_byte_tokenizer().save_pretrained(tmp_path)
    for key in ("dtype", "torch_dtype"):
        config = {name: value for name, value in helpers.read_json(tmp_path / "config.json").items() if not name.endswith("dtype")}
        (tmp_path / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
        loaded, _ = load(tmp_path)
        assert loaded.dtype == loaded.config.dtype == torch.float32
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert skeleton_of(tmp_path).dtype == torch.float32


def test_the_shapes_of_a_model_in_pickles_are_read(tmp_path):
    model = helpers.make_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert skeleton_of(tmp_path).num_parameters() == model.num_parameters()
    helpers.make_byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CompactMindError, match="could not be loaded"):
        load_as_released(tmp_path)


def saved_without(folder, model, *left_out):
    """Save a model as Hugging Face does, in shards, without the tensors whose names hold one of `left_out`."""
    kept = {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in left_out)}
    model.save_pretrained(folder, state_dict=kept, max_shard_size="50KB")
    helpers.make_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_as_released, load_llama])
def test_a_tensor_that_is_not_there_never_becomes_random_numbers(tmp_path, load):
    for left_out, lacks in {
        "lm_head": "lm_head.weight: copy",
        "layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj.weight: copy",
        "mlp": "model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, ... [(]6[)]",
    }.items():
        folder = saved_without(tmp_path / f"no_{left_out}", helpers.make_llama(), left_out)
        with pytest.raises(CompactMindError, match=f"^{folder} holds no whole LlamaForCausalLM: its weights lack {lacks}"):
            load(folder)
    MistralModel(MistralConfig(**helpers.llama_settings())).save_pretrained(tmp_path / "headless")
    helpers.make_byte_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(CompactMindError, match="headless holds no whole MistralForCausalLM: its weights lack lm_head.weight: "):
        load(tmp_path / "headless")


@pytest.mark.parametrize("load", [load_as_released, load_llama])
def test_a_head_that_is_the_table_is_not_missed(tmp_path, load):
    model = helpers.make_llama(tie_word_embeddings=True)
    loaded, _ = load(saved_without(tmp_path / "tied", model, "lm_head"))
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tokenizer_of_another_model_and_one_without_padding_are_named(tmp_path, tokenizer):
    check_tokenizer(helpers.make_bert(), tokenizer, tmp_path, padding=True)
    with pytest.raises(CompactMindError, match=f"token ids up to {len(helpers.VOCABULARY) - 1}, the model knows 0 to 19"):
        check_tokenizer(helpers.make_bert(vocab_size=20), tokenizer, tmp_path)
    with pytest.raises(CompactMindError, match="its tokenizer has no pad token"):
        check_tokenizer(helpers.make_llama(), helpers.make_byte_tokenizer(), tmp_path, padding=True)
    directory = save(tmp_path / "llama", helpers.make_llama(vocab_size=100), helpers.make_byte_tokenizer())
    with pytest.raises(CompactMindError, match="token ids up to 256, the model knows 0 to 99"):
        load_as_released(directory)
