"""Scores follow their formulas, masks reach the target, and the compacted model is the masked one."""

import copy
import math

import helpers
import pytest
import torch

from compactmind.methods.pruning.encoder import encoder_layers, layer_shapes
from compactmind.methods.pruning.importance import (
    CRITERIA,
    ImportanceScorer,
    LayerScores,
    head_parameters,
    neuron_parameters,
    prunable_parameters,
)
from compactmind.methods.pruning.masks import apply_masks, choose_masks, compact, full_masks, sparsity_of
from compactmind.methods.pruning.schedule import cubic_sparsity

ARCHITECTURES = sorted(helpers.MAKERS)
HEAD = 8 * (4 * 32 + 3)  # head_dim rows of q/k/v with a bias each, head_dim columns of the output projection
NEURON = 32 + 1 + 32  # a row of the up projection with its bias, a column of the down projection
LABELS = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return helpers.MAKERS[request.param]()


def scores_of(model, criterion: str, batches: int = 1, seed: int = 0) -> list[LayerScores]:
    scorer = ImportanceScorer(model, criterion, seed)
    for batch in range(batches):
        model.zero_grad()
        model(**helpers.example_batch(seed=batch), labels=LABELS).loss.backward()
        scorer.observe()
    return scorer.scores()


# -------------------------------------------------------------------------------------------------------------- schedule
def test_the_cubic_schedule_starts_at_zero_and_ends_at_the_target():
    assert cubic_sparsity(0, 10, 50, 0.4) == cubic_sparsity(10, 10, 50, 0.4) == 0.0
    assert cubic_sparsity(50, 10, 50, 0.4) == cubic_sparsity(99, 10, 50, 0.4) == 0.4
    assert cubic_sparsity(30, 10, 50, 0.4) == pytest.approx(0.4 * (1 - 0.5**3))
    steps = [cubic_sparsity(step, 10, 50, 0.4) for step in range(10, 51)]
    gains = [after - before for before, after in zip(steps[:-1], steps[1:], strict=True)]
    assert min(gains) > 0
    assert gains == sorted(gains, reverse=True)  # much early, little late


@pytest.mark.parametrize(
    ("begin", "end", "target"), [(5, 5, 0.2), (6, 5, 0.2), (0, 5, 1.0), (0, 5, -0.1), (0, 5, float("nan"))]
)
def test_a_schedule_that_makes_no_sense_is_refused(begin, end, target):
    with pytest.raises(ValueError, match=r"begin before it ends|in \[0, 1\)"):
        cubic_sparsity(0, begin, end, target)


# ---------------------------------------------------------------------------------------------------------------- counts
def test_parameters_of_structures_against_a_hand_count(model):
    layers = encoder_layers(model)
    for layer in layers:
        assert (layer.num_heads, layer.head_dim, layer.intermediate_size) == (4, 8, 64)
        assert head_parameters(layer) == HEAD
        assert neuron_parameters(layer) == NEURON
    assert prunable_parameters(model) == len(layers) * (4 * HEAD + 64 * NEURON)


def test_compaction_frees_what_was_counted(model):
    masks = helpers.uneven_masks(model)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, compact(model, masks)))
    assert before - after == sum((~m.heads).sum().item() * HEAD + (~m.neurons).sum().item() * NEURON for m in masks)
    assert sparsity_of(model, masks) == pytest.approx((before - after) / prunable_parameters(model))
    assert sparsity_of(model, full_masks(model)) == 0.0


# ---------------------------------------------------------------------------------------------------------------- scores
def mask_gradients(model, batch, labels) -> list[LayerScores]:
    """Return dL/dm for a mask m = 1 on every head's output and every neuron's activation, by autograd."""
    masks, handles = [], []
    for layer in encoder_layers(model):
        heads, neurons = (
            torch.ones(layer.num_heads, requires_grad=True),
            torch.ones(layer.intermediate_size, requires_grad=True),
        )
        masks.append((heads, neurons))

        def scale_heads(_, inputs, mask=heads, head_dim=layer.head_dim):
            return (inputs[0] * mask.repeat_interleave(head_dim),)

        def scale_neurons(_, inputs, mask=neurons):
            return (inputs[0] * mask,)

        handles.append(layer.attention_output.register_forward_pre_hook(scale_heads))
        handles.append(layer.down.register_forward_pre_hook(scale_neurons))
    loss = model(**batch, labels=labels).loss
    gradients = torch.autograd.grad(loss, [mask for pair in masks for mask in pair])
    for handle in handles:
        handle.remove()
    return [LayerScores(gradients[i], gradients[i + 1]) for i in range(0, len(gradients), 2)]


def test_taylor_is_the_squared_gradient_of_a_mask(model):
    batches = [helpers.example_batch(seed=seed) for seed in range(3)]
    expected = [mask_gradients(model, batch, LABELS) for batch in batches]
    scores = scores_of(model, "taylor", batches=3)
    for index, score in enumerate(scores):
        heads = sum(one[index].heads ** 2 for one in expected) / HEAD
        neurons = sum(one[index].neurons ** 2 for one in expected) / NEURON
        torch.testing.assert_close(score.heads, heads, rtol=1e-3, atol=1e-10)
        torch.testing.assert_close(score.neurons, neurons, rtol=1e-3, atol=1e-10)
        assert score.heads.min() > 0


def test_taylor_forgets_on_reset_and_needs_gradients(model):
    scorer = ImportanceScorer(model, "taylor")
    with pytest.raises(RuntimeError, match="after backward"):
        scorer.observe()
    model(**helpers.example_batch(), labels=LABELS).loss.backward()
    scorer.observe()
    once = scorer.scores()
    scorer.observe()
    torch.testing.assert_close(scorer.scores()[0].heads, 2 * once[0].heads)
    scorer.reset()
    assert not any(score.heads.any() or score.neurons.any() for score in scorer.scores())
    scorer.observe()
    assert all(torch.equal(now.neurons, then.neurons) for now, then in zip(scorer.scores(), once, strict=True))


def test_taylor_takes_the_loss_scale_out_and_leaves_overflown_batches_out(model):
    expected = scores_of(model, "taylor")
    scorer = ImportanceScorer(model, "taylor")
    for scale in (1024.0, math.inf, 4.0):
        model.zero_grad()
        (model(**helpers.example_batch(), labels=LABELS).loss * scale).backward()
        scorer.observe(scale)
    for ours, theirs in zip(scorer.scores(), expected, strict=True):
        torch.testing.assert_close(ours.heads, 2 * theirs.heads)
        torch.testing.assert_close(ours.neurons, 2 * theirs.neurons)


def test_l2_against_a_loop(model):
    for layer, score in zip(encoder_layers(model), scores_of(model, "l2"), strict=True):
        for head in range(4):
            rows = range(8 * head, 8 * head + 8)
            squares = 0.0
            for linear in (layer.query, layer.key, layer.value):
                squares += sum(linear.weight[row].square().sum().item() + linear.bias[row].item() ** 2 for row in rows)
            squares += sum(layer.attention_output.weight[:, row].square().sum().item() for row in rows)
            assert score.heads[head].item() == pytest.approx((squares / HEAD) ** 0.5, rel=1e-5)
        for neuron in range(64):
            squares = (
                layer.up.weight[neuron].square().sum()
                + layer.up.bias[neuron] ** 2
                + layer.down.weight[:, neuron].square().sum()
            )
            assert score.neurons[neuron].item() == pytest.approx((squares.item() / NEURON) ** 0.5, rel=1e-5)


def test_random_is_decided_by_the_seed_and_does_not_change(model):
    scorer = ImportanceScorer(model, "random", seed=1)
    first = [score.neurons.clone() for score in scorer.scores()]
    scorer.reset()
    assert all(torch.equal(score.neurons, then) for score, then in zip(scorer.scores(), first, strict=True))
    same, other = scores_of(model, "random", seed=1), scores_of(model, "random", seed=2)
    assert all(torch.equal(score.neurons, then) for score, then in zip(same, first, strict=True))
    assert not any(torch.equal(score.neurons, then) for score, then in zip(other, first, strict=True))


def test_an_unknown_criterion_names_the_known_ones(model):
    with pytest.raises(ValueError, match=f"'magnitude'.*{', '.join(CRITERIA)}"):
        ImportanceScorer(model, "magnitude")


# ----------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("target", [0.05, 0.3, 0.6])
def test_the_target_is_reached_and_exceeded_by_less_than_one_structure(model, target, round_to):
    masks = choose_masks(model, helpers.random_scores(model), full_masks(model), target, round_to)
    excess = sparsity_of(model, masks) - target
    assert 0 <= excess < max(HEAD, round_to * NEURON) / prunable_parameters(model)
    for mask in masks:
        assert mask.heads.any() and mask.neurons.any()
        assert mask.neurons.sum().item() % round_to == 0


def test_the_least_important_go_first_whatever_their_layer(model):
    scores = helpers.random_scores(model)
    masks = choose_masks(model, scores, full_masks(model), 0.3)
    pruned, kept = [], []
    for score, mask in zip(scores, masks, strict=True):
        for values, keep in ((score.heads, mask.heads), (score.neurons, mask.neurons)):
            pruned += values[~keep].tolist()
            best = values.max().item()  # the best of a layer stays however low it is
            kept += [value for value in values[keep].tolist() if value < best]
    assert max(pruned) < min(kept)


def test_an_unimportant_layer_loses_more(model):
    scores = helpers.random_scores(model)
    scores[1].heads *= 0.01
    scores[1].neurons *= 0.01
    masks = choose_masks(model, scores, full_masks(model), 0.2)
    removed = [(~mask.neurons).sum().item() for mask in masks]
    assert removed[1] > 10 * max(removed[0], removed[2])


def test_every_layer_keeps_one_head_and_one_group(model):
    scores = helpers.random_scores(model)
    for score in scores[1:]:
        score.heads *= 0.0
        score.neurons *= 0.0
    target = 0.98 * (len(scores) - 1) / len(scores) * (1 - (HEAD + 8 * NEURON) / (4 * HEAD + 64 * NEURON))
    for mask in choose_masks(model, scores, full_masks(model), target, round_to=8)[1:]:
        assert mask.heads.sum() >= 1 and mask.neurons.sum() >= 8


def test_masks_only_shrink_and_the_input_stays_as_it_was(model):
    masks = full_masks(model)
    for step, target in enumerate((0.1, 0.3, 0.5)):
        before = copy.deepcopy(masks)
        tighter = choose_masks(model, helpers.random_scores(model, seed=step), masks, target, round_to=4)
        for old, new, unchanged in zip(masks, tighter, before, strict=True):
            assert not (new.heads & ~old.heads).any() and not (new.neurons & ~old.neurons).any()
            assert torch.equal(old.heads, unchanged.heads) and torch.equal(old.neurons, unchanged.neurons)
        assert sparsity_of(model, tighter) >= target
        masks = tighter
    assert sparsity_of(model, choose_masks(model, helpers.random_scores(model, seed=9), masks, 0.2)) == sparsity_of(model, masks)


def test_a_width_that_is_no_multiple_becomes_one():
    model = helpers.make_distilbert(hidden_dim=60)
    masks = choose_masks(model, helpers.random_scores(model), full_masks(model), 0.5, round_to=16)
    widths = [mask.neurons.sum().item() for mask in masks]
    assert min(widths) < 60
    assert all(width % 16 == 0 or width == 60 for width in widths)


@pytest.mark.parametrize("target", [1.0, 1.2, -0.1, float("nan")])
def test_a_target_outside_the_range_is_refused(model, target):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        choose_masks(model, helpers.random_scores(model), full_masks(model), target)


def test_a_target_that_cannot_be_reached_says_what_can(model):
    most = 1 - (HEAD + 8 * NEURON) / (4 * HEAD + 64 * NEURON)
    with pytest.raises(ValueError, match=f"0.95 cannot be reached.*8 neurons.*{most:.3f}"):
        choose_masks(model, helpers.random_scores(model), full_masks(model), 0.95, round_to=8)
    with pytest.raises(ValueError, match="round_to must be at least 1, not 0"):
        choose_masks(model, helpers.random_scores(model), full_masks(model), 0.2, round_to=0)


def test_applying_masks_zeroes_the_structures_and_nothing_else(model):
    masks = helpers.uneven_masks(model)
    before = copy.deepcopy(model.state_dict())
    apply_masks(model, masks)
    for layer, mask in zip(encoder_layers(model), masks, strict=True):
        rows = mask.heads.repeat_interleave(8)
        for linear in (layer.query, layer.key, layer.value):
            assert not linear.weight[~rows].any() and not linear.bias[~rows].any()
        assert not layer.attention_output.weight[:, ~rows].any()
        assert not layer.up.weight[~mask.neurons].any() and not layer.up.bias[~mask.neurons].any()
        assert not layer.down.weight[:, ~mask.neurons].any()
    after = model.state_dict()
    zeroed = sum(int((after[name] != before[name]).sum()) for name in before)
    assert zeroed == round(sparsity_of(model, masks) * prunable_parameters(model))
    assert all((after[name][after[name] != before[name]] == 0).all() for name in before)
    once = copy.deepcopy(after)
    apply_masks(model, masks)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_a_pruned_structure_stays_zero_through_training(model):
    masks = helpers.uneven_masks(model)
    apply_masks(model, masks)
    smaller = compact(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(**helpers.example_batch(), labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        apply_masks(model, masks)
    assert (helpers.logits_of(model) - helpers.logits_of(smaller)).abs().max() > 0.01  # it did train
    torch.testing.assert_close(helpers.logits_of(compact(model, masks)), helpers.logits_of(model), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ compaction
def test_the_compacted_model_is_the_masked_one(model):
    masks = helpers.uneven_masks(model)
    whole = helpers.logits_of(model)
    apply_masks(model, masks)
    smaller = compact(model, masks)
    torch.testing.assert_close(helpers.logits_of(smaller), helpers.logits_of(model), atol=1e-5, rtol=0)
    assert (helpers.logits_of(model) - whole).abs().max() > 0.1  # the pruned structures did matter
    assert [(shape["num_heads"], shape["intermediate_size"]) for shape in layer_shapes(smaller)] == [
        (int(mask.heads.sum()), int(mask.neurons.sum())) for mask in masks
    ]
    assert {shape["head_dim"] for shape in layer_shapes(smaller)} == {8}


def test_compaction_needs_no_zeroed_weights(model):
    masks = helpers.uneven_masks(model)
    smaller = compact(model, masks)  # the pruned rows still hold their weights
    apply_masks(model, masks)
    torch.testing.assert_close(helpers.logits_of(smaller), helpers.logits_of(model), atol=1e-5, rtol=0)


def test_compaction_leaves_the_input_as_it_was(model):
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    smaller = compact(model, helpers.uneven_masks(model))
    helpers.randomize(smaller, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_a_compacted_model_can_be_compacted_again(model):
    first = compact(model, helpers.uneven_masks(model, seed=1))
    masks = choose_masks(first, helpers.random_scores(first), full_masks(first), 0.3, round_to=4)
    second = compact(first, masks)
    assert type(second) is type(first)
    apply_masks(first, masks)
    torch.testing.assert_close(helpers.logits_of(second), helpers.logits_of(first), atol=1e-5, rtol=0)
    assert prunable_parameters(second) < prunable_parameters(first)


def test_compaction_with_full_masks_changes_nothing(model):
    assert torch.equal(helpers.logits_of(compact(model, full_masks(model))), helpers.logits_of(model))


def test_a_compacted_model_keeps_its_mode_and_what_is_frozen(model):
    model.get_input_embeddings().weight.requires_grad_(False)
    masks = helpers.uneven_masks(model)
    smaller = compact(model.train(), masks)
    assert smaller.training
    assert [name for name, p in smaller.named_parameters() if not p.requires_grad] == [
        name for name, p in model.named_parameters() if not p.requires_grad
    ]
    assert not compact(model.eval(), masks).training
    assert smaller.config.id2label == model.config.id2label
