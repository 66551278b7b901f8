"""The loss of retraining: the plain formula in every dtype with its gradient, and states of a teacher that ran once."""

import helpers
import pytest
import torch
import torch.nn.functional as F

from compactmind.methods.distillation.soft_targets import distillation_loss
from compactmind.methods.retraining import loss as module
from compactmind.methods.retraining.loss import RetrainingLoss, TeacherStates, token_loss
from compactmind.methods.retraining.recipe import RetrainRecipe


# -------------------------------------------------------------------------------------------------------------- a token
def make_logits(tokens: int = 11, vocabulary: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_the_loss_of_the_tokens_is_the_plain_formula_with_the_same_gradient(monkeypatch, chunk_tokens, alpha):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    student, teacher, labels = make_logits()
    loss = token_loss(student, teacher, labels, 2.5, alpha)
    (gradient,) = torch.autograd.grad(3 * loss, student)  # three times: what comes from above counts
    p, q = (logits.double() / 2.5 for logits in (teacher, student))
    divergence = (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)
    likelihood = student.double().softmax(-1)[range(11), labels].log()
    expected = (alpha * 2.5**2 * divergence - (1 - alpha) * likelihood).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(distillation_loss(student, teacher, labels, 2.5, alpha).item(), rel=1e-5)


def test_the_loss_of_the_tokens_without_a_teacher_is_the_cross_entropy():
    student, _, labels = make_logits()
    loss = token_loss(student, None, labels, 2.0, 0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = F.cross_entropy(student, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-7)


def test_a_token_that_was_thought_impossible_costs_a_finite_loss():
    logits, labels = torch.tensor([[0.0, 500.0]], requires_grad=True), torch.tensor([0])
    loss = token_loss(logits, torch.tensor([[500.0, 0.0]]), labels, 1.0, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(500)
    assert logits.grad.tolist() == [[-1, 1]]


def test_low_precision_logits_are_compared_in_float32():
    student, teacher, labels = make_logits()
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    loss = token_loss(student, teacher, labels, 2.0, 0.5)
    assert loss.item() == pytest.approx(distillation_loss(student.float(), teacher.float(), labels, 2.0, 0.5).item(), rel=1e-5)
    loss.backward()
    assert student.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("upstream", [1.0, 65536.0])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (0.5, 2.0), (1.0, 4.0), (1.0, 0.01)])
def test_the_gradient_of_fp16_logits_neither_vanishes_nor_overflows(alpha, temperature, upstream):
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary = 70, 20_000  # a mean over many tokens, spread over many words: entries of 1e-7 and less
    student, teacher = ((3 * torch.randn(tokens, vocabulary, generator=generator)).half() for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    (token_loss(student, teacher, labels, temperature, alpha) * upstream).backward()

    exact = student.detach().double().requires_grad_()
    loss = (1 - alpha) * F.cross_entropy(exact, labels)
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher.double(), exact))
    (loss + alpha * temperature**2 * (p.exp() * (p - q)).sum(-1).mean()).backward()
    expected = exact.grad * upstream
    assert student.grad.dtype == torch.float16 and torch.isfinite(student.grad).all()
    # What fp16 itself can hold, rounded twice: 11 bits, and steps of 2^-24 below 2^-14; and the float32 it is computed in.
    torch.testing.assert_close(student.grad.double(), expected, rtol=2**-9, atol=2**-23 + 1e-11 * upstream)
    representable = expected.abs() > 2**-23
    assert not (student.grad[representable] == 0).any()
    if upstream > 1 and temperature > 1:
        assert representable.double().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_other_logits_is_that_of_the_plain_chunks(dtype):
    student, teacher, labels = make_logits(tokens=50)
    student = student.detach().to(dtype).requires_grad_()
    (token_loss(student, teacher, labels, 2.0, 0.25) * 3).backward()
    chunks = []
    for rows in torch.arange(50).split(module.CHUNK_TOKENS):
        change = student.detach()[rows].float().log_softmax(-1).exp()
        change[range(len(rows)), labels[rows]] -= 1
        soft, ours = ((logits[rows].float() / 2.0).log_softmax(-1).exp() for logits in (teacher, student.detach()))
        chunks.append((0.75 * change).add_(ours - soft, alpha=0.25 * 2.0) / 50)
    assert torch.equal(student.grad, torch.cat(chunks).to(dtype) * 3)


def test_mixed_precision_does_not_round_the_loss_of_the_tokens():
    student, teacher, labels = make_logits(tokens=200)
    expected = token_loss(student, teacher, labels, 2.0, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_loss(student, teacher, labels, 2.0, 1.0).item() == expected.item()


# --------------------------------------------------------------------------------------------------------------- a batch
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_loss_of_a_batch_predicts_the_next_token_and_compares_matching_layers(layers):
    teacher = helpers.make_llama(seed=1, num_hidden_layers=4)
    student = helpers.make_llama(seed=2, num_hidden_layers=layers)
    windows = helpers.example_windows(3, 16)
    recipe = RetrainRecipe(temperature=3.0, alpha=0.25, hidden_loss_weight=0.7)
    loss = RetrainingLoss(student, teacher, recipe)(windows).item()
    with torch.no_grad():
        ours, theirs = (model(input_ids=windows, output_hidden_states=True) for model in (student, teacher))
    labels = F.cross_entropy(ours.logits[:, :-1].reshape(45, -1), windows[:, 1:].reshape(45))
    p, q = ((output.logits[:, :-1] / 3.0).log_softmax(-1) for output in (theirs, ours))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    matches = {1: [(1, 4)], 2: [(1, 2), (2, 4)], 4: [(1, 1), (2, 2), (3, 3), (4, 4)]}[layers]  # embeddings are state 0
    squares = [(ours.hidden_states[i][:, :-1] - theirs.hidden_states[j][:, :-1]).square().mean() for i, j in matches]
    expected = 0.25 * 9 * divergence + 0.75 * labels + 0.7 * torch.stack(squares).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_only_the_student_is_trained_and_none_of_the_teacher_is_registered():
    student, teacher = helpers.make_llama(seed=1), helpers.make_llama(seed=2)
    objective = RetrainingLoss(student, teacher, RetrainRecipe(hidden_loss_weight=0.1))
    assert set(objective.parameters()) == set(student.parameters())
    objective(helpers.example_windows(2, 16)).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ------------------------------------------------------------------------------------------------------ the teacher's states
def test_a_teacher_that_has_read_a_window_is_not_run_again_and_its_logits_stay_the_same(monkeypatch):
    teacher, windows = helpers.make_llama().eval(), helpers.example_windows(count=4, length=12)
    states = TeacherStates()
    with torch.no_grad():
        wanted = teacher(input_ids=windows).logits
    assert torch.equal(states.logits(teacher, windows[:2]), wanted[:2])
    monkeypatch.setattr(teacher.model, "forward", lambda **_: pytest.fail("it was run again"))
    torch.testing.assert_close(states.logits(teacher, windows[[1, 0]]), wanted[[1, 0]])
    kept = sum(tensor.numel() for tensor in states.kept.values())
    assert kept == 2 * 12 * teacher.config.hidden_size and not states.logits(teacher, windows[:1]).requires_grad


def test_states_are_kept_within_their_limit_and_only_where_the_head_makes_the_logits():
    teacher, windows = helpers.make_llama().eval(), helpers.example_windows(count=4, length=12)
    states = TeacherStates(limit_bytes=3 * 12 * 4 * teacher.config.hidden_size)
    for _ in range(2):
        torch.testing.assert_close(states.logits(teacher, windows), teacher(input_ids=windows).logits)
    assert len(states.kept) == 3
    scaled = TeacherStates()
    teacher.register_forward_hook(lambda _, arguments, output: output.__setitem__("logits", output.logits / 8))
    for _ in range(2):
        torch.testing.assert_close(scaled.logits(teacher, windows), teacher(input_ids=windows).logits)
    assert not scaled.kept
