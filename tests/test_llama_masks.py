"""How much of a Llama goes where: the sparsity is met, the best stays, and what cannot be met is refused before anything is computed."""

import copy
from contextlib import contextmanager

import helpers
import pytest
import torch
from llamas import logits_of, make, make_other

from compactmind.errors import CompactMindError
from compactmind.methods.pruning import llama_pruning
from compactmind.methods.pruning.llama_importance import CRITERIA, score
from compactmind.methods.pruning.llama_masks import PruneRecipe, check_prunable, choose_masks
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.pruning.llama_structure import prunable_parameters
from compactmind.methods.registry import Resources
from compactmind.search.compressor import Measure, read_pipeline, run_pipeline


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("scope", "round_to"), [("uniform", 8), ("global", 4)])
@pytest.mark.parametrize("structures", [("channels",), ("channels", "groups")], ids="+".join)
def test_the_sparsity_is_met_in_multiples(windows, criterion, scope, round_to, structures):
    model = make(intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
    whole = prunable_parameters(model)
    recipe = PruneRecipe(0.3, criterion, scope, structures, round_to=round_to, compensate=False)
    small, done = prune_llama(model, recipe, windows)
    assert abs(1 - prunable_parameters(small) / whole - 0.3) <= 0.01
    assert done["sparsity"] == pytest.approx(1 - prunable_parameters(small) / whole)
    if scope == "uniform":
        assert len(set(done["kept_channels"])) == len(set(done["kept_groups"])) == 1
    else:
        assert all(width % round_to == 0 and width > 0 for width in done["kept_channels"])
    assert ("groups" in structures) or set(done["kept_groups"]) == {4}
    assert torch.isfinite(logits_of(small)).all()


@pytest.mark.parametrize("unimportant", [0, 2])
def test_global_takes_from_where_it_matters_least_and_spares_the_ends(windows, unimportant):
    model = make(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[unimportant].mlp.down_proj.weight.mul_(1e-5)  # its channels hardly reach the loss
    recipe = {"sparsity": 0.15, "scope": "global", "round_to": 4, "compensate": False}
    widths = prune_llama(copy.deepcopy(model), PruneRecipe(**recipe), windows)[1]["kept_channels"]
    assert widths[unimportant] == min(widths) == 4
    protected = prune_llama(copy.deepcopy(model), PruneRecipe(**recipe, protect=1), windows)[1]["kept_channels"]
    assert protected[0] == protected[-1] == 48 and sum(protected) == sum(widths)


def test_the_best_channels_are_the_ones_that_stay(windows):
    model = make()
    scores = score(model, "taylor", windows)
    masks = choose_masks(model, scores, PruneRecipe(0.3, round_to=1))
    for result, mask in zip(scores, masks, strict=True):
        assert result.channels[mask.channels].min() >= result.channels[~mask.channels].max()


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparsity": 1.0}, r"sparsity 1.0 is not in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity -0.1"),
        ({"hidden_sparsity": 1}, r"hidden_sparsity 1 is not in \[0, 1\)"),
        ({"criterion": "magnitude"}, "unknown criterion 'magnitude': choose one of taylor"),
        ({"scope": "local"}, "unknown scope 'local': choose one of uniform, global, measured"),
        ({"structures": ("heads",)}, "unknown structure 'heads': choose one of channels, groups"),
        ({"structures": ()}, "no structures"),
        ({"aggregate": "prod"}, "unknown aggregate 'prod'"),
        ({"round_to": 0}, "round_to"),
        ({"rounds": 0}, "rounds"),
        ({"protect": 1}, "needs scope global"),
    ],
    ids=str,
)
def test_a_recipe_outside_its_range_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        PruneRecipe(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"round_to": 64}, "round_to 64 is more than the FFN width 48"),
        ({"sparsity": 0.95, "round_to": 8}, "sparsity 0.95 cannot be met.*without emptying a block"),
        ({"sparsity": 0.3, "structures": ("groups",), "round_to": 8}, "sparsity 0.3 cannot be met"),
        ({"sparsity": 0.9, "scope": "global", "protect": 1, "round_to": 8}, "cannot be met"),
        ({"sparsity": 0.9, "scope": "global", "rounds": 2, "round_to": 8}, "cannot be met"),
        ({"sparsity": 0.9, "rounds": 3, "round_to": 8, "hidden_sparsity": 0.25}, "cannot be met"),
        (
            {"sparsity": 0.0, "hidden_sparsity": 0.9, "round_to": 24},
            "hidden_sparsity 0.9 would leave less than round_to 24 of 32",
        ),
        ({"sparsity": 0.0, "blocks": 3, "round_to": 8}, "blocks 3 would leave none of the 3"),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_anything_is_computed(windows, settings, expected):
    model = make()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(CompactMindError, match=expected):
        prune_llama(model, PruneRecipe(**settings), windows)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("structures", [("channels",), ("channels", "groups")], ids=str)
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_what_can_be_met_is_not_refused_beforehand(windows, scope, structures, rounds):
    """Whatever `choose_masks` finds possible when it comes to it is possible beforehand too."""
    for sparsity in (0.05, 0.2, 0.35, 0.5, 0.55, 0.6, 0.7, 0.9):
        recipe = PruneRecipe(sparsity, "l2", scope, structures, round_to=1, rounds=rounds, compensate=False)
        try:
            model, checked = make(num_key_value_heads=4), True
            check_prunable(model, recipe)
        except CompactMindError:
            checked = False
        try:
            with monkeypatched(llama_pruning, "check_prunable", lambda *_: None):
                prune_llama(model, recipe, windows)
            done = True
        except CompactMindError:
            done = False
        assert checked == done or (checked and scope == "global")  # there it depends on the scores too


@contextmanager
def monkeypatched(module, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, value)
        yield


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


ELSE = ".*expected a Llama-like causal LM, of type llama, mistral, qwen2"


REFUSED = {
    "helium, groups": (
        "helium",
        {},
        {"structures": ("groups",)},
        "'helium' cannot be pruned of key-value groups:.*structures channels",
    ),
    "stablelm, hidden": (
        "stablelm",
        {},
        {"hidden_sparsity": 0.25},
        "'stablelm' cannot be pruned of hidden channels:.*hidden_sparsity 0",
    ),
    "gemma": ("gemma", {"head_dim": 4}, {}, "model_type 'gemma'\\) has these parts and computes something else" + ELSE),
    "gemma2": ("gemma2", {"head_dim": 4}, {}, "model_type 'gemma2'\\) has these parts" + ELSE),
    "phi3": ("phi3", {"pad_token_id": 0}, {}, "model_type 'phi3'.*q_proj" + ELSE),
    "mixtral": ("mixtral", {"num_local_experts": 4}, {}, "model_type 'mixtral', a mixture of experts" + ELSE),
    "qwen3_moe": ("qwen3_moe", EXPERTS, {}, "model_type 'qwen3_moe', a mixture of experts" + ELSE),
    "qwen2_moe without experts": (
        "qwen2_moe",
        {**EXPERTS, "decoder_sparse_step": 9},
        {},
        "'qwen2_moe', a mixture of experts" + ELSE,
    ),
}


@pytest.mark.parametrize("whole", [True, False], ids=["alone", "after another step"])
@pytest.mark.parametrize(("kind", "changes", "settings", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_a_model_type_does_not_take_is_refused_before_anything_is_computed(
    windows, kind, changes, settings, expected, whole
):
    model = make_other(kind, **changes)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    prune = {"method": "prune", "params": {"sparsity": 0.2, "round_to": 8, **settings}}
    with pytest.raises(CompactMindError, match=expected) as caught:
        prune_llama(model, PruneRecipe(**prune["params"]), windows)
    assert "\n" not in str(caught.value)
    resources = Resources(windows, windows, windows[:2], lambda: model)
    steps = read_pipeline([prune] if whole else [{"method": "smooth"}, prune, {"method": "nf4"}])
    with pytest.raises(CompactMindError, match=expected):
        run_pipeline(steps, resources, Measure("none", lambda _: pytest.fail("it was measured")), show=False)
