"""Pairs of texts and several classes: every stage knows them, and measures them by their names."""

import copy
import random
import types
from importlib.util import find_spec

import helpers
import pytest
import torch
from accelerate import Accelerator

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.data import EncodedSentences, Sentence, model_inputs
from compactmind.errors import CompactMindError
from compactmind.evaluation import classifiers
from compactmind.evaluation.classifiers import columns_of_labels
from compactmind.forward import predict_logits
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.onnx_export import OnnxClassifier, export_classifier
from compactmind.task import Task

# ----------------------------------------------------------------------------------------------------------------- pairs
PAIRS = [Sentence("a good film", 0, "the plot is bad"), Sentence("a long and boring story with a plot", 1, "dull"), Sentence("a", 2, "the")]


@pytest.fixture
def pairs(tokenizer) -> EncodedSentences:
    return EncodedSentences(tokenizer, PAIRS, max_length=64)


def test_pairs_are_encoded_with_token_types(tokenizer, pairs):
    batch = pairs.collate([0, 1, 2])
    for row, sentence in enumerate(PAIRS):
        alone = tokenizer(sentence.text, sentence.pair)
        length = len(alone["input_ids"])
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert batch[name][row, :length].tolist() == alone[name] and not batch[name][row, length:].any()
    assert pairs.pairs and "token_type_ids" not in EncodedSentences(tokenizer, [Sentence("a", 0)], 64).collate([0])
    with pytest.raises(CompactMindError, match="1 of 2 texts have no second text"):
        EncodedSentences(tokenizer, [Sentence("a", 0), Sentence("a", 0, "b")], 64)


def test_what_is_cut_of_pairs_is_counted_whole(tokenizer):
    encoded = EncodedSentences(tokenizer, PAIRS, max_length=8)
    assert [len(ids) for ids in encoded.input_ids] == [8, 8, 5] and encoded.whole_lengths == [10, 12, 5]
    assert encoded.cut == 2 and "at 12 it would be 1%" in encoded.describe_cut()


def test_a_model_gets_the_token_types_it_has(pairs):
    batch = pairs.collate([0, 1])
    bert, distilbert = helpers.make_bert(num_labels=3), helpers.make_distilbert(num_labels=3)
    assert set(model_inputs(batch, bert)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(model_inputs(batch, distilbert)) == {"input_ids", "attention_mask"}
    assert set(model_inputs(batch, helpers.make_bert(type_vocab_size=1))) == {"input_ids", "attention_mask"}  # as RoBERTa's
    wrapped = torch.nn.Module()
    wrapped.module = bert
    assert "token_type_ids" in model_inputs(batch, wrapped)
    alone = torch.cat([helpers.logits_of(bert, model_inputs(pairs.collate([row]), bert)) for row in range(3)])
    assert torch.allclose(predict_logits(bert, pairs, 2), alone, atol=1e-5)
    batch.pop("token_type_ids")
    assert not torch.allclose(helpers.logits_of(bert, model_inputs(batch, bert)), alone[:2], atol=1e-3)


def test_a_model_of_pairs_and_one_of_texts_take_their_own_only(tokenizer, pairs):
    single, task = EncodedSentences(tokenizer, [Sentence("a good film", 0)], 64), Task(("a", "b", "c"), True, "x")
    model = helpers.make_distilbert(num_labels=3)
    task.mark(model.config)
    smaller = compact(model, helpers.uneven_masks(model))
    for each in (model, smaller):  # what is made of a model keeps the note
        assert predict_logits(each, pairs, 2).shape == (3, 3)
        with pytest.raises(CompactMindError, match="trained on pairs of texts and was given single ones"):
            predict_logits(each, single, 2)
    Task(("a", "b", "c"), False, "x").mark(model.config)
    with pytest.raises(CompactMindError, match="trained on single texts and was given pairs"):
        predict_logits(model, pairs, 2)
    sentiment = helpers.make_distilbert()
    Task().mark(sentiment.config)
    assert not hasattr(sentiment.config, "sentence_pairs")


def test_head_settings_name_every_class():
    settings = Task(("a", "b", "c")).head_settings()
    assert settings == {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


# ---------------------------------------------------------------------------------------------------------- measuring it
def named(*names: str, **changes):
    return helpers.make_distilbert(**Task(names).head_settings() | changes)


def test_the_model_s_classes_are_found_by_their_names():
    mnli = ("entailment", "neutral", "contradiction")
    assert columns_of_labels(named("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), mnli) == [2, 1, 0]
    assert columns_of_labels(named("a", "A"), ("a", "A")) == [0, 1]
    assert columns_of_labels(named("LABEL_0", "LABEL_1", "LABEL_2"), mnli) == [0, 1, 2]  # a model without names
    assert columns_of_labels(named("ham", "spam"), ("0", "1")) == [0, 1]  # data without names
    assert columns_of_labels(named("POSITIVE", "NEGATIVE"), ("negative", "positive")) == [1, 0]
    assert columns_of_labels(named("possible", "no"), ("no", "possible")) == [1, 0]
    for model, labels in ((named("a", "b"), mnli), (named("a", "b", "c"), mnli), (named("1", "2"), ("0", "2"))):
        with pytest.raises(CompactMindError, match="classes apart"):
            columns_of_labels(model, labels)


def test_a_row_of_the_report_counts_what_is_right_by_name_and_what_was_cut(tmp_path, tokenizer):
    task = Task(("a", "b", "c"), True, "x")
    models = {"as_is": named(*task.labels, scale=0.6), "turned": named("c", "a", "b", scale=0.6)}
    with torch.no_grad():  # the same function, its classes in another order
        models["turned"].load_state_dict(models["as_is"].state_dict())
        for name in ("weight", "bias"):
            getattr(models["turned"].classifier, name).copy_(getattr(models["as_is"].classifier, name)[[2, 0, 1]])
    source, rows = random.Random(0), {}
    texts = [" ".join(source.choices(helpers.NEUTRAL, k=9)) for _ in range(40)]
    asked = [Sentence(text, source.randrange(3), source.choice(helpers.POSITIVE)) for text in texts]
    for name, model in models.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
        rows[name] = {"name": name, "directory": str(tmp_path / name)}
        checkpoint = types.SimpleNamespace(model=model, tokenizer=tokenizer)
        classifiers.measure_accuracy(rows[name], checkpoint, asked, task, 12, 8)
    right = predict_logits(models["as_is"], EncodedSentences(tokenizer, asked, 12), 8).argmax(-1) == torch.tensor([s.label for s in asked])
    for row in rows.values():
        assert row["accuracy"] == right.double().mean().item() and classifiers.correct_rows(row).tolist() == right.tolist()
        assert row["cut"] == {"rows": 40, "share": 1.0, "length_of_99": 13}
    assert rows["as_is"]["confusion_matrix"] == rows["turned"]["confusion_matrix"]


@pytest.mark.parametrize("kind", ["dense", "w8a8", "nf4"])
@pytest.mark.parametrize("maker", ["bert", "distilbert"])
def test_four_classes_of_pairs_quantize_and_reload(tmp_path, tokenizer, pairs, kind, maker):
    task = Task(("food", "law", "space", "sport"), True, "x")
    model = helpers.MAKERS[maker](seed=3, scale=0.6, **task.head_settings())
    task.mark(model.config)
    before, quantization = predict_logits(model, pairs, 2), None
    if kind == "w8a8":
        quantization = quantize_encoder(model)
    elif kind == "nf4":
        quantization = quantize_model(model, "nf4", calibration=pairs.evaluation_batches(2))
    after = predict_logits(model, pairs, 2)
    save_checkpoint(tmp_path / "m", model, tokenizer, kind=kind, parent=None, stage={}, quantization=quantization)
    loaded = load_checkpoint(tmp_path / "m").model
    assert after.shape == (3, 4) and torch.allclose(predict_logits(loaded, pairs, 2), after, atol=1e-5)
    assert (after - before).norm() < 0.6 * before.norm()
    assert list(loaded.config.id2label.values()) == list(task.labels) and loaded.config.sentence_pairs
    with pytest.raises(CompactMindError, match="trained on pairs"):
        predict_logits(loaded, EncodedSentences(tokenizer, [Sentence("a", 0)], 64), 2)


@pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="requirements-export.txt")
def test_a_model_of_pairs_as_onnx_takes_token_types(tmp_path, pairs):
    task = Task(("a", "b", "c", "d"), True, "x")
    model = helpers.make_bert(scale=0.6, num_hidden_layers=1, **task.head_settings())
    task.mark(model.config)
    export_classifier(model, tmp_path / "model.onnx")
    exported = OnnxClassifier(tmp_path / "model.onnx")
    assert len(exported.session.get_inputs()) == 3
    for rows in ([0], [0, 1, 2]):
        given = model_inputs(pairs.collate(rows), model)
        assert torch.allclose(exported(**given), helpers.logits_of(model, given), atol=1e-4)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert exported(input_ids=ids, attention_mask=ids).shape == (2, 4)  # as latency is measured


def test_logits_that_are_kept_are_of_the_same_token_types(tmp_path, pairs):
    bert, accelerator = helpers.make_bert(num_labels=3), Accelerator(cpu=True)
    others = copy.copy(pairs)
    others.token_type_ids = [[0] * len(types) for types in pairs.token_type_ids]
    for sentences in (pairs, others, pairs):
        kept = cached_teacher_logits(bert, "weights", sentences, 2, tmp_path, accelerator)
        assert torch.allclose(kept, predict_logits(bert, sentences, 2), atol=1e-5)
    assert len(list(tmp_path.glob(".teacher_logits_*"))) == 2
