"""The distillation loss follows its formula, and a student starts as the layers it was copied from."""

from pathlib import Path

import helpers
import numpy
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from compactmind.data import EncodedSentences
from compactmind.forward import predict_logits
from compactmind.methods.distillation import teacher_logits
from compactmind.methods.distillation.schedules import linear_anneal
from compactmind.methods.distillation.soft_targets import distillation_loss, hidden_state_loss, soft_target_loss
from compactmind.methods.distillation.student import alternate_layers, student_from_teacher
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits


def softmax(logits: numpy.ndarray) -> numpy.ndarray:
    powers = numpy.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 2, generator=generator, dtype=torch.float64), torch.randn(
        6, 2, generator=generator, dtype=torch.float64
    )


# ---------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_the_soft_target_loss_is_the_scaled_divergence(logits, temperature):
    student, teacher = logits
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = temperature**2 * (p * (numpy.log(p) - numpy.log(q))).sum(axis=1).mean()
    assert soft_target_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert soft_target_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def test_the_factor_keeps_the_size_of_the_gradient(logits):
    student, teacher = (part - part.mean(dim=1, keepdim=True) for part in logits)

    def gradient(temperature: float) -> torch.Tensor:
        leaf = student.clone().requires_grad_(True)
        soft_target_loss(leaf, teacher, temperature).backward()
        return leaf.grad

    # Hinton et al. 2015, equation 4: at high temperature the gradient is (student - teacher) / classes, whatever it is.
    limit = (student - teacher) / 2 / len(student)
    torch.testing.assert_close(gradient(1000.0), limit, atol=1e-6, rtol=1e-3)
    ratio = gradient(10.0).norm() / gradient(100.0).norm()
    assert 0.95 < ratio < 1.05  # without the factor it would be 100


def test_without_a_teacher_or_alpha_it_is_cross_entropy(logits):
    student, teacher = logits
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = -numpy.log(softmax(student.numpy())[numpy.arange(6), labels.numpy()]).mean()
    assert distillation_loss(student, None, labels, 5.0, 0.9).item() == pytest.approx(expected)
    assert distillation_loss(student, teacher, labels, 5.0, 0.0).item() == pytest.approx(expected)


def test_alpha_weighs_teacher_against_labels(logits):
    student, teacher = logits
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    soft, hard = soft_target_loss(student, teacher, 3.0).item(), distillation_loss(student, None, labels, 3.0, 0.0).item()
    assert distillation_loss(student, teacher, labels, 3.0, 0.3).item() == pytest.approx(0.3 * soft + 0.7 * hard)
    assert distillation_loss(student, teacher, labels, 3.0, 1.0).item() == pytest.approx(soft)


def test_the_hidden_state_loss_compares_mapped_layers_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    teacher = tuple(torch.randn(2, 3, 4, generator=generator) for _ in range(5))  # embeddings and 4 layers
    student = tuple(torch.randn(2, 3, 4, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    squares = []
    for ours, theirs in ((student[1], teacher[1]), (student[2], teacher[3])):  # layer_map [0, 2]
        kept = [
            ((ours[row, position] - theirs[row, position]) ** 2).tolist() for row, position in ((0, 0), (0, 1), (0, 2), (1, 0))
        ]
        squares.append(numpy.mean(kept))
    assert hidden_state_loss(student, teacher, [0, 2], mask).item() == pytest.approx(numpy.mean(squares), rel=1e-6)
    loss = hidden_state_loss(student, teacher, [0, 2], mask)
    for states in (student, teacher):
        for state in states:
            state[1, 1:] = 1e6
    assert torch.equal(hidden_state_loss(student, teacher, [0, 2], mask), loss)


def test_half_precision_hidden_states_are_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([400 * torch.randn(2, 3, 4, generator=generator) for _ in range(2)] for _ in range(2))
    mask = torch.ones(2, 3, dtype=torch.int64)
    expected = hidden_state_loss([s.half().float() for s in student], [t.half().float() for t in teacher], [0], mask)
    loss = hidden_state_loss([s.half() for s in student], [t.half() for t in teacher], [0], mask)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)  # squares beyond 65504, the largest number of fp16


@pytest.mark.parametrize(("progress", "value"), [(-1, 10), (0, 10), (0.25, 8), (0.5, 6), (1, 2), (7, 2)])
def test_linear_anneal_is_a_straight_line_with_ends(progress, value):
    assert linear_anneal(10.0, 2.0, progress) == pytest.approx(value)


# --------------------------------------------------------------------------------------------------------------- student
def test_alternate_layers_are_evenly_spaced_from_the_first():
    assert alternate_layers(12, 6) == [0, 2, 4, 6, 8, 10]
    assert alternate_layers(6, 3) == [0, 2, 4]
    assert alternate_layers(6, 4) == [0, 1, 3, 4]
    assert alternate_layers(5, 1) == [0]
    assert alternate_layers(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("student_layers", [0, -1, 7])
def test_a_number_of_layers_the_teacher_does_not_have_is_refused(student_layers):
    with pytest.raises(ValueError, match=f"between 1 and 6.*not {student_layers}"):
        alternate_layers(6, student_layers)


@torch.no_grad()
def states_of(model, batch):
    return model.eval()(**batch, output_hidden_states=True).hidden_states


def test_a_student_with_every_layer_is_the_teacher(bert):
    student = student_from_teacher(bert, [0, 1, 2, 3])
    batch = helpers.example_batch()
    kept = batch["attention_mask"].bool()
    for ours, theirs in zip(states_of(student, batch), states_of(bert, batch), strict=True):
        torch.testing.assert_close(ours[kept], theirs[kept], atol=1e-5, rtol=0)
    assert bert.bert.embeddings.token_type_embeddings.weight[0].abs().max() > 0.1  # folded in, or the embeddings would differ
    assert torch.equal(student.pre_classifier.weight, bert.bert.pooler.dense.weight)
    assert torch.equal(student.classifier.weight, bert.classifier.weight)


def test_a_student_of_alternate_layers_is_the_teacher_without_the_others(bert):
    student = student_from_teacher(bert, [0, 2])
    assert (student.config.n_layers, student.config.dim, student.config.hidden_dim) == (2, 32, 64)
    assert student.config.id2label == bert.config.id2label
    before = helpers.logits_of(bert)
    helpers.randomize(student, seed=9)
    assert torch.equal(helpers.logits_of(bert), before)  # a copy: training the student leaves the teacher alone
    student = student_from_teacher(bert, [0, 2])
    bert.bert.encoder.layer = torch.nn.ModuleList([bert.bert.encoder.layer[0], bert.bert.encoder.layer[2]])
    batch = helpers.example_batch()
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(states_of(student, batch)[-1][kept], states_of(bert, batch)[-1][kept], atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------- teacher logits
@pytest.fixture
def cache(tmp_path):
    """Return a function (seed of the teacher, sentences) -> (logits, number of forward passes), with one shared cache."""

    def fetch(seed: int, encoded: EncodedSentences):
        model = helpers.make_bert(seed=seed)
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        logits = cached_teacher_logits(model, f"teacher {seed}", encoded, 8, tmp_path, Accelerator(cpu=True))
        return logits, len(calls)

    return fetch


def test_teacher_logits_are_computed_once(cache, encoded, tmp_path):
    logits, calls = cache(1, encoded)
    assert calls == 8  # 60 sentences in batches of 8
    again, calls = cache(1, encoded)
    assert calls == 0
    assert torch.equal(again, logits)
    assert torch.allclose(logits, predict_logits(helpers.make_bert(seed=1), encoded, 8), atol=1e-6)
    assert len(list(tmp_path.glob(".teacher_logits_*"))) == 1


def test_teacher_logits_of_another_teacher_or_other_sentences_are_computed_anew(cache, encoded, tokenizer, sentences, tmp_path):
    first, _ = cache(1, encoded)
    other_teacher, calls = cache(2, encoded)
    assert calls == 8 and not torch.allclose(other_teacher, first)
    fewer = EncodedSentences(tokenizer, sentences[:-1], 64)
    other_rows, calls = cache(2, fewer)
    assert calls == 8 and other_rows.shape == (59, 2)
    shorter, calls = cache(2, EncodedSentences(tokenizer, sentences, 8))
    assert calls == 8 and not torch.allclose(shorter, other_teacher)
    assert len(list(tmp_path.glob(".teacher_logits_*"))) == 3  # those of the first teacher are swept
    _, calls = cache(2, encoded)
    assert calls == 0  # another run with other sentences may be about to read them: they stay


def test_teacher_logits_that_vanish_or_are_damaged_are_computed_again(cache, encoded, tmp_path, monkeypatch):
    logits, _ = cache(1, encoded)
    (path,) = tmp_path.glob(".teacher_logits_*")
    whole = path.read_bytes()
    for content in (whole[:-8], b"", b"no safetensors"):
        path.write_bytes(content)
        again, calls = cache(1, encoded)
        assert calls == 8 and torch.equal(again, logits) and path.read_bytes() == whole
    is_file = Path.is_file  # another run sweeps the file at the worst moment: after it was seen
    monkeypatch.setattr(Path, "is_file", lambda each: is_file(each) and (each != path or each.unlink() is None))
    again, _ = cache(1, encoded)
    assert torch.equal(again, logits)


def test_a_teacher_that_cannot_be_asked_reads_all_tokens_again(encoded, tmp_path):
    model, batch = helpers.make_bert().eval(), helpers.example_batch()
    hook = model.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached_teacher_logits(model, "teacher", encoded, 8, tmp_path, Accelerator(cpu=True))
    hook.remove()
    assert states_of(model, batch)[-1].shape[1] == batch["input_ids"].shape[1] > 1
    assert not list(tmp_path.glob(".teacher_logits_*"))


def test_two_runs_can_write_the_teacher_logits_at_once(cache, encoded, tmp_path, monkeypatch):
    original, others = teacher_logits.save_file, []

    def save_and_be_overtaken(tensors, path):
        original(tensors, path)
        if not others:
            others.append(None)
            others[0], _ = cache(1, encoded)

    monkeypatch.setattr(teacher_logits, "save_file", save_and_be_overtaken)
    logits, _ = cache(1, encoded)
    assert torch.equal(others[0], logits)
    (path,) = tmp_path.glob(".teacher_logits_*")
    assert torch.equal(load_file(path)["logits"], logits)
