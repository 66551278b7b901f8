"""Pruning a Llama as a whole: rounds, blocks and hidden channels, and what is refused."""

import copy

import llamas
import pytest
import torch
from llamas import WHOLE_HEADS, logits_of, make, make_other, save

from compactmind.checkpoint import load_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning import llama_pruning
from compactmind.methods.pruning.llama_importance import hidden_importance, score
from compactmind.methods.pruning.llama_masks import PruneRecipe
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.pruning.llama_structure import rebuilt, remove_hidden_channels

windows = llamas.windows


# ---------------------------------------------------------------------------------------------------- rounds, blocks, stream
def test_known_scores_are_used_once_and_only_for_the_model_they_are_of(windows, monkeypatch):
    calls = []
    monkeypatch.setattr(llama_pruning, "score", lambda *args, **options: calls.append(1) or score(*args, **options))
    known = score(make(), "taylor", windows)
    for changes, expected in (({}, 0), ({"rounds": 2}, 1), ({"blocks": 1}, 1), ({"hidden_sparsity": 0.25}, 1)):
        calls.clear()
        recipe = PruneRecipe(sparsity=0.3, round_to=4, **changes)
        _, with_known = prune_llama(make(), recipe, windows, known)
        assert len(calls) == expected, changes
        assert with_known == prune_llama(make(), recipe, windows)[1]


def test_the_hidden_channels_that_go_are_the_ones_the_norms_pass_least_of(windows):
    model = make()
    with torch.no_grad():
        for block in llama_blocks(model):
            block.input_norm.weight[[3, 17]] = 1e-4
            block.post_norm.weight[[3, 17]] = 1e-4
        model.model.norm.weight[[3, 17]] = 1e-4
    importance = hidden_importance(model, windows)
    assert set(importance.argsort()[:2].tolist()) == {3, 17}
    hidden, before = model.config.hidden_size, logits_of(model)
    recipe = PruneRecipe(sparsity=0, hidden_sparsity=2 / hidden, round_to=1, compensate=False)
    small, done = prune_llama(copy.deepcopy(model), recipe, windows)
    assert done["hidden_size"] == small.config.hidden_size == hidden - 2
    assert done["sparsity"] == pytest.approx(2 / hidden)
    change = (logits_of(small) - before).norm() / before.norm()
    with torch.no_grad():
        keep = torch.ones(hidden, dtype=torch.bool)
        keep[[5, 6]] = False
        other = copy.deepcopy(model)
        remove_hidden_channels(other, keep)
    assert change < 0.5 * (logits_of(rebuilt(other)) - before).norm() / before.norm()


@pytest.mark.parametrize(("scope", "round_to", "hidden_size"), [("uniform", 4, 24), ("global", 2, 26)])
@pytest.mark.parametrize("kind", ["llama", *WHOLE_HEADS])
def test_hidden_channels_blocks_and_widths_go_together_and_reload(windows, kind, scope, round_to, hidden_size, tmp_path):
    share = 1 - hidden_size / 32  # 26 is no multiple of the heads
    recipe = PruneRecipe(
        0.25, scope=scope, hidden_sparsity=share, blocks=1, round_to=round_to, structures=("channels", "groups")
    )
    model, done = prune_llama(make_other(kind), recipe, windows)
    assert done["hidden_size"] == hidden_size
    assert len(done["removed_blocks"]) == 1
    save(model, tmp_path / "small")
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "small").model), logits_of(model))


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_several_rounds_meet_the_same_sparsity_and_score_anew(windows, scope):
    recipe = {"sparsity": 0.3, "scope": scope, "round_to": 4, "compensate": False}
    once, in_three = (prune_llama(make(), PruneRecipe(**recipe, rounds=rounds), windows) for rounds in (1, 3))
    assert once[1]["sparsity"] == pytest.approx(0.3, abs=0.01) == in_three[1]["sparsity"]
    assert not torch.equal(logits_of(once[0]), logits_of(in_three[0]))


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("settings", [{}, {"compensate": False}, {"criterion": "l2"}], ids=str)
def test_without_text_the_error_says_so(settings):
    with pytest.raises(CompactMindError, match="calibration text"):
        prune_llama(make(), PruneRecipe(round_to=8, **settings))


def test_l2_without_compensation_needs_no_text():
    assert prune_llama(make(), PruneRecipe(0.3, "l2", round_to=8, compensate=False))[1]["sparsity"] == pytest.approx(
        0.3, abs=0.01
    )


def test_damaged_weights_are_named(windows):
    model = make()
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] = float("nan")
    with pytest.raises(CompactMindError, match="model.layers.1"):
        prune_llama(model, PruneRecipe(criterion="activation", round_to=8, compensate=False), windows)
