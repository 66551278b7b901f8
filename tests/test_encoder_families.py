"""Every family of FAMILIES through every stage: its layers, students, pruning, quantization, ONNX, and what is refused by name."""

import copy

import helpers
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.classify import classify
from compactmind.data import EncodedSentences, Sentence, load_split
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import gflops
from compactmind.limits import positions_of
from compactmind.methods.distillation.student import alternate_layers, student_from_teacher
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.encoder import encoder_layers, family_of, layer_shapes
from compactmind.methods.pruning.importance import ImportanceScorer
from compactmind.methods.pruning.masks import apply_masks, choose_masks, compact, full_masks
from compactmind.methods.pruning.modeling_pruned_encoder import FAMILIES
from compactmind.methods.quantization.packed_model import linears_to_quantize, skipped_modules
from compactmind.methods.quantization.w8a8_encoder import W8A8EncoderBlock, quantize_encoder
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.vocabulary import same_tokenizer

OTHERS = [name for name in FAMILIES if name not in ("bert", "distilbert")]
"""Those that no other file of tests looks at."""
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 400}
LABELS = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture(params=OTHERS)
def model(request):
    return helpers.make_encoder(request.param)


@pytest.fixture
def pruned(model):
    apply_masks(model, masks := helpers.uneven_masks(model))
    return compact(model, masks)


def save(directory, model, tokenizer, kind, quantization=None):
    save_checkpoint(directory, model, tokenizer, kind=kind, parent=None, stage={}, quantization=quantization)
    return load_checkpoint(directory).model


def test_a_row_says_where_everything_is(model):
    layers = encoder_layers(model)
    assert layer_shapes(model) == [{"num_heads": 4, "head_dim": 8, "intermediate_size": 64}] * 4
    inside = {id(module) for layer in layers for module in vars(layer).values() if isinstance(module, torch.nn.Linear)}
    assert {id(linear) for _, linear in linears_to_quantize(model)} == inside and len(inside) == 6 * 4
    hidden, logits = (model.get_submodule(name) for name in family_of(model).head)
    assert hidden.out_features == logits.in_features == 32 and logits.out_features == 2
    assert set(family_of(model).head) <= set(skipped_modules(model))


def test_the_compacted_model_is_the_masked_one(model):
    whole = helpers.logits_of(model)
    apply_masks(model, masks := helpers.uneven_masks(model))
    smaller = compact(model, masks)
    torch.testing.assert_close(helpers.logits_of(smaller), helpers.logits_of(model), atol=1e-5, rtol=0)
    assert (helpers.logits_of(model) - whole).abs().max() > 0.01
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_operations_of_all_its_parts_are_counted():
    model, tokens = helpers.make_encoder("electra"), 16
    block = 4 * 32 * 32 + 2 * 32 * 64 + 2 * tokens * 32  # a token's products with the linears, with keys and with values
    assert gflops(model, tokens) == pytest.approx(2e-9 * (tokens * (4 * block + 16 * 32) + 32 * 32 + 32 * 2))


def test_gradients_rank_its_structures(model):
    scorer = ImportanceScorer(model, "taylor")
    model(**helpers.example_batch(), labels=LABELS).loss.backward()
    scorer.observe()
    scores = scorer.scores()
    assert all(score.heads.min() > 0 for score in scores)
    assert any((~mask.neurons).any() for mask in choose_masks(model, scores, full_masks(model), 0.3))


def test_a_pruned_checkpoint_reloads_here_and_without_this_project(pruned, tokenizer, tmp_path):
    expected = helpers.logits_of(pruned)
    loaded = save(tmp_path / "m", pruned, tokenizer, "pruned")
    assert type(loaded) is type(pruned) and torch.equal(helpers.logits_of(loaded), expected)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", trust_remote_code=True, output_loading_info=True
    )
    assert type(theirs) is not type(pruned) and type(theirs).__name__ == type(pruned).__name__
    assert not any(report.values()) and torch.equal(helpers.logits_of(theirs), expected)


def test_the_first_token_alone_gives_the_same_logits_and_gradients(pruned):
    def asked():
        pruned.zero_grad()
        output = pruned(**helpers.example_batch(), labels=LABELS)
        output.loss.backward()
        return [output.logits.detach(), *(p.grad.clone() for p in pruned.parameters() if p.grad is not None)]

    expected, widths = asked(), []
    norm = encoder_layers(pruned)[-1].output_norm
    norm.register_forward_hook(lambda module, given, output: widths.append(output.shape[1]))
    read_first_token_only(pruned)
    torch.testing.assert_close(asked(), expected, atol=1e-5, rtol=1e-4)
    read_all_tokens(pruned)
    asked()
    assert widths == [1, 12]


def test_a_student_has_alternate_layers_of_its_teacher(model):
    layer_map = alternate_layers(4, 2)
    student = student_from_teacher(model, layer_map)
    assert type(student) is type(model) and student.config.num_hidden_layers == 2
    theirs = copy.deepcopy(model)  # the same function as the teacher without the other blocks
    blocks = theirs.base_model.encoder.layer
    theirs.base_model.encoder.layer = torch.nn.ModuleList([blocks[index] for index in layer_map])
    assert torch.equal(helpers.logits_of(student), helpers.logits_of(theirs))
    assert model.config.num_hidden_layers == 4
    with torch.no_grad():  # nothing is shared
        before = helpers.logits_of(model)
        next(student.parameters()).zero_()
    assert torch.equal(helpers.logits_of(model), before)


def test_w8a8_is_near_the_float_model_and_reloads(pruned, tokenizer, tmp_path):
    expected = helpers.logits_of(pruned)
    small = copy.deepcopy(pruned)
    description = quantize_encoder(small)
    blocks = [module for module in small.modules() if isinstance(module, W8A8EncoderBlock)]
    assert len(blocks) == 4 and sum(isinstance(module, W8A8Linear) for module in small.modules()) == 24
    assert 0 < (helpers.logits_of(small) - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(helpers.logits_of(save(tmp_path / "m", small, tokenizer, "w8a8", description)), helpers.logits_of(small))


def test_positions_of_roberta_begin_behind_its_padding(tmp_path):
    tokenizer = helpers.make_byte_bpe(tmp_path)
    model = helpers.make_encoder("roberta", vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2)
    assert positions_of(model) == 62 == positions_of(student_from_teacher(model, [0, 2]))
    batch = tokenizer(["good film", "a long and tedious story of the old director"], padding=True, return_tensors="pt")
    smaller = compact(model, full_masks(model))
    alone = {name: values[:1, : int(batch["attention_mask"][0].sum())] for name, values in batch.items()}
    for each in (model, smaller):
        assert torch.allclose(helpers.logits_of(each, batch)[0], helpers.logits_of(each, alone)[0], atol=1e-5)


def test_other_encoders_are_refused_by_name():
    deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES))
    for ask in (encoder_layers, read_first_token_only, quantize_encoder, lambda model: student_from_teacher(model, [0])):
        with pytest.raises(CompactMindError, match="'deberta-v2' model: bert, .*electra can be distilled and compressed"):
            ask(deberta)


def test_tokenizers_are_the_same_whatever_was_asked_of_them(tokenizer, tmp_path):
    again = helpers.make_tokenizer(tmp_path)
    again(["good film", "bad"], padding=True, truncation=True, max_length=3)
    assert same_tokenizer(tokenizer, again) and not same_tokenizer(tokenizer, helpers.make_byte_bpe(tmp_path / "bpe"))


# ------------------------------------------------------------------------------------------------------------- scripts
@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a small RoBERTa and its tokenizer, a smaller ELECTRA with another one, and sentences."""
    folder = helpers.make_workspace(tmp_path_factory.mktemp("families"), train_rows=120, dev_rows=30)
    bpe, words = helpers.make_byte_bpe(folder / "bpe"), helpers.make_tokenizer(folder / "words")
    torch.manual_seed(0)
    of_bpe = {"vocab_size": len(bpe), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 66}
    for name, tokenizer, config in (
        ("tiny-roberta", bpe, helpers.encoder_config("roberta", **of_bpe)),
        ("tiny-electra", words, helpers.encoder_config("electra", num_hidden_layers=2)),
    ):
        AutoModel.from_config(config).save_pretrained(folder / "local_assets" / name)
        tokenizer.save_pretrained(folder / "local_assets" / name)
    for name, model in (
        ("deberta", DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, pad_token_id=1))),
        ("modernbert", ModernBertForSequenceClassification(ModernBertConfig(**SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2))),
    ):
        helpers.randomize(model).save_pretrained(folder / "others" / name)
        bpe.save_pretrained(folder / "others" / name)
    return folder


def test_a_roberta_goes_through_every_stage(workspace, run_here):
    def run(*command):
        status, output = run_here(*command, cwd=workspace)
        assert status == 0, output
        return output

    run("download_model.py", "--teacher_name", "tiny-roberta")
    run("1_distill.py", "--student_layers", 2, "--student_epochs", 1, "--students", "student_distilled")
    run("2_prune_finetune.py")
    small = ("--vocabulary_coverage", 0.9, "--embeddings", "int8", "--method", "w8a8", "--parents", "student_pruned")
    output = run("3_quantize.py", *small)
    assert output.count("reloads with equal logits") == 2 and "student_pruned_small " in output
    assert run("3_quantize.py", *small).count("up to date") == 3
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        pass
    else:
        run("export_onnx.py", "--models", "student_pruned_small_w8a8")
    own = [f"{name}={workspace / 'others' / name}" for name in ("deberta", "modernbert")]
    run("6_evaluate_report.py", "--models", *own)
    report = helpers.read_json(workspace / "results" / "final_report.json")
    result = {row["name"]: row for row in report["models"] if row["status"] == "measured"}
    made = {f"student_pruned{cut}{method}" for cut in ("", "_small") for method in ("", "_w8a8")}
    assert result.keys() == made | {"teacher", "student_distilled", "deberta", "modernbert"}
    assert result["teacher"]["architecture"] == "RobertaForSequenceClassification"
    assert result["student_pruned"]["architecture"] == "PrunedRobertaForSequenceClassification"
    assert result["student_pruned"]["gflops"] < result["student_distilled"]["gflops"] < result["teacher"]["gflops"]
    assert all("latency" in row and not row.get("left_out") for row in result.values())
    assert result["student_pruned_small_w8a8"]["size_mb"] < result["student_pruned_w8a8"]["size_mb"]
    cut = result["student_pruned_small"]["stage_metrics"]
    assert cut["vocabulary"] < cut["parent_vocabulary"] and 0 <= cut["agreement_with_parent"] <= 1
    small = load_checkpoint(workspace / "models" / "student_pruned_small_w8a8")
    assert small.model.config.vocab_size == len(small.tokenizer) == cut["vocabulary"]
    (answer,) = classify(small.model, small.tokenizer, [Sentence("a good film", 0)], 128)  # more than it has positions for
    assert answer["label"] in ("negative", "positive")


def test_a_student_with_another_tokenizer_reads_with_its_own(workspace, run_here):
    status, output = run_here("download_model.py", "--teacher_name", "tiny-roberta", "--student_name", "tiny-electra", cwd=workspace)
    assert status == 0, output
    arguments = ("1_distill.py", "--students", "student_distilled", "--student_epochs", 1)
    status, output = run_here(*arguments, "--hidden_loss_weight", 0.5, cwd=workspace)
    assert status == 1 and "student and teacher with one tokenizer" in output
    status, output = run_here(*arguments, "--force", "True", cwd=workspace)
    assert status == 0, output
    student = load_checkpoint(workspace / "models" / "student_distilled")
    assert type(student.model).__name__ == "ElectraForSequenceClassification" and student.model.config.num_hidden_layers == 2
    assert student.tokenizer.get_vocab() == helpers.make_tokenizer(workspace / "words").get_vocab()
    (cached,) = (workspace / "models").glob(".teacher_logits_*")
    status, output = run_here("2_prune_finetune.py", "--output_dir", "electra_pruned", cwd=workspace)
    assert status == 0, output
    assert list((workspace / "models").glob(".teacher_logits_*")) == [cached]  # the teacher has read with its own tokenizer again
    teacher = load_checkpoint(workspace / "models" / "teacher")
    own = EncodedSentences(teacher.tokenizer, load_split(workspace / "sst2_data", "train"), 64)
    assert max(map(max, own.input_ids)) < teacher.model.config.vocab_size
