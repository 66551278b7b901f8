"""Models that compute in float32 and are held in fewer bits: the numbers are those of the model in float32."""

import copy

import helpers
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, Qwen2Config, Qwen2ForCausalLM, StableLmConfig, StableLmForCausalLM

from compactmind import forward, precision
from compactmind.checkpoint import MANIFEST, load_any, load_checkpoint, save_checkpoint
from compactmind.evaluation.divergence import measure_logits, measure_windows
from compactmind.formats.table import kernel_of
from compactmind.forward import LogitsOf, next_token_logits
from compactmind.generation import cache_for
from compactmind.methods.pruning.llama_importance import score
from compactmind.methods.pruning.llama_masks import PruneRecipe
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.registry import METHODS, Resources
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.loss import TeacherStates
from compactmind.methods.retraining.recipe import RetrainRecipe, windows_seen
from compactmind.precision import WidenedLinear, is_widened, widen, work_in_float32

WINDOWS = helpers.example_windows(6, 12)
SETTINGS = helpers.llama_settings()
MODELS = {
    "llama": lambda: helpers.make_llama(attention_bias=True, mlp_bias=True),
    "tied": lambda: helpers.make_llama(tie_word_embeddings=True),
    "granite": lambda: helpers.randomize(GraniteForCausalLM(GraniteConfig(**SETTINGS, logits_scaling=3.0, residual_multiplier=0.5))),
    "qwen2": lambda: helpers.randomize(Qwen2ForCausalLM(Qwen2Config(**SETTINGS))),
    "stablelm": lambda: helpers.randomize(StableLmForCausalLM(StableLmConfig(**SETTINGS))),
}


def held_in(dtype: torch.dtype, model):
    """Return the model held in a dtype, and one that is float32 with the same values."""
    model = helpers.cast_parameters(model, dtype)
    return model, helpers.cast_parameters(copy.deepcopy(model), torch.float32)


def matrices_of(model) -> set[torch.dtype]:
    """Return the dtypes that its matrices are held in."""
    return {parameter.dtype for parameter in model.parameters() if parameter.ndim == 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_widened_model_gives_the_logits_of_float32_and_keeps_its_weights(name, dtype):
    model, wide = held_in(dtype, MODELS[name]())
    widen(model)
    assert torch.equal(next_token_logits(model, WINDOWS[0]), next_token_logits(wide, WINDOWS[0]))
    assert model.lm_head.weight.dtype == model.model.layers[0].mlp.down_proj.weight.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")


def test_a_matrix_is_widened_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(precision, "ROWS_BYTES", 4 * 32 * 5)
    model, wide = held_in(torch.bfloat16, helpers.make_llama(attention_bias=True))
    x, y = (torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    linear = widen(model).requires_grad_(False).model.layers[0].self_attn.q_proj
    y.data.copy_(x.data)
    result, wanted = linear(x), wide.model.layers[0].self_attn.q_proj(y)
    result.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.allclose(result, wanted, atol=1e-6) and torch.allclose(x.grad, y.grad, atol=1e-5)
    assert x.grad.abs().max() > 0.1


def test_weights_held_in_fewer_bits_are_not_trained():
    model, _ = held_in(torch.bfloat16, helpers.make_llama())
    linear = widen(model).model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match="not trained: make the model float32 first"):
        linear(torch.ones(1, 32, requires_grad=True)).sum().backward()


def test_only_large_models_are_widened(monkeypatch):
    small = work_in_float32(held_in(torch.bfloat16, helpers.make_llama())[0])
    assert not is_widened(small) and {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    monkeypatch.setattr(precision, "SMALL_BYTES", 0)
    large = work_in_float32(held_in(torch.bfloat16, helpers.make_llama())[0])
    assert is_widened(large) and matrices_of(large) == {torch.bfloat16}


@pytest.mark.parametrize("criterion", ["taylor", "activation", "variance", "l2"])
def test_a_widened_model_is_scored_as_in_float32(criterion):
    model, wide = held_in(torch.bfloat16, helpers.make_llama())
    for result, wanted in zip(score(widen(model), criterion, WINDOWS), score(wide, criterion, WINDOWS), strict=True):
        assert torch.allclose(result.channels, wanted.channels, rtol=1e-5) and torch.allclose(result.groups, wanted.groups, rtol=1e-5)


@pytest.mark.parametrize("structures", [("channels",), ("channels", "groups")])
def test_a_widened_model_is_pruned_as_in_float32_but_for_the_rounding_of_what_is_refitted(structures):
    model, wide = held_in(torch.bfloat16, helpers.make_llama())
    recipe = PruneRecipe(sparsity=0.3, round_to=8, structures=structures, scope="global")
    (result, done), (wanted, also) = prune_llama(widen(model), recipe, WINDOWS), prune_llama(wide, recipe, WINDOWS)
    assert done == also and is_widened(result)
    assert result.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    far = next_token_logits(result, WINDOWS[0]) - next_token_logits(wanted, WINDOWS[0])
    assert 0 < far.norm() < 0.02 * next_token_logits(wanted, WINDOWS[0]).norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_checkpoint_is_held_as_its_file_and_gives_the_same_logits_and_tokens(tmp_path, monkeypatch, dtype):
    model, wide = held_in(getattr(torch, dtype), helpers.make_llama())
    save_checkpoint(tmp_path / "llama", model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={}, dtype=dtype)
    wanted, logits = generated(wide), next_token_logits(wide, WINDOWS[0])
    for load in (load_checkpoint, load_any):
        monkeypatch.setattr(precision, "SMALL_BYTES", 0)
        result = load(tmp_path / "llama").model
        assert result.lm_head.weight.dtype == getattr(torch, dtype) and kernel_of(result, "dense") == "float32"
        assert torch.equal(next_token_logits(result, WINDOWS[0]), logits) and torch.equal(generated(result), wanted)
        (tmp_path / "llama" / MANIFEST).unlink(missing_ok=True)  # the second time it is a folder of somebody else
    monkeypatch.undo()
    assert load_any(tmp_path / "llama").model.lm_head.weight.dtype == torch.float32


def generated(model) -> torch.Tensor:
    return model.generate(
        WINDOWS[:1], attention_mask=torch.ones_like(WINDOWS[:1]), past_key_values=cache_for(model), max_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- retraining
def recipe_for(**changes) -> RetrainRecipe:
    return RetrainRecipe(**{"mode": "lora", "tokens": 96, "evaluations": 1, "lr": 5e-3, "gradient_checkpointing": True, **changes})


def test_adapters_beside_weights_of_bf16_are_trained_as_beside_float32():
    teacher = helpers.make_llama(seed=1)
    result = {}
    for name, model in zip(("held", "wide"), held_in(torch.bfloat16, helpers.make_llama()), strict=True):
        if name == "held":
            widen(model)
        done = retrain_causal_lm(model, WINDOWS, WINDOWS[:2], recipe_for(), teacher=teacher)
        assert done["kept_step"] and not any("lora" in each for each, _ in model.named_parameters())
        result[name] = (done, model)
    held, wide = (result[name][0] for name in ("held", "wide"))
    assert held["loss_before"] == wide["loss_before"] > held["loss_after"] + 0.1
    assert held["loss_after"] == pytest.approx(wide["loss_after"], abs=0.01)  # its adapters start rounded
    held, wide = (result[name][1].model.layers[0].mlp.down_proj.weight for name in ("held", "wide"))
    before = helpers.make_llama().model.layers[0].mlp.down_proj.weight.bfloat16()
    assert held.dtype == torch.bfloat16 and not torch.equal(held, before)
    assert (held.float() - wide).norm() < 0.1 * (wide - before.float()).norm()


def test_a_teacher_that_has_read_the_text_is_not_needed_while_a_model_trains(monkeypatch):
    monkeypatch.setattr(forward, "MEMORY_TO_KEEP", 0)  # what it reads lies in a file
    teacher, losses, recipe = helpers.make_llama(seed=1), [], recipe_for()
    states = TeacherStates()
    states.read(teacher, windows_seen(WINDOWS, recipe))
    for arguments in ({"teacher": teacher}, {"teacher_states": states}):
        model = helpers.make_llama()
        losses.append(retrain_causal_lm(model, WINDOWS, WINDOWS[:2], recipe, **arguments)["loss_after"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_has_not_been_read_needs_the_teacher():
    states = TeacherStates()
    states.read(helpers.make_llama(seed=1), WINDOWS[:3])
    assert states.holds(WINDOWS[:3]) and not states.holds(WINDOWS)
    with pytest.raises(Exception, match="distillation needs a teacher"):
        retrain_causal_lm(helpers.make_llama(), WINDOWS, WINDOWS[:2], recipe_for(tokens=1000), teacher_states=states)


def test_a_large_teacher_goes_before_the_model_is_made_and_is_not_loaded_again_to_retrain(monkeypatch):
    monkeypatch.setattr(precision, "SMALL_BYTES", 0)
    loaded = []

    def dense():
        loaded.append(1)
        return work_in_float32(held_in(torch.bfloat16, helpers.make_llama())[0])

    resources, recipe = Resources(WINDOWS, WINDOWS, WINDOWS[:2], dense, torch.bfloat16), recipe_for()
    METHODS["retrain"].beforehand(resources, recipe)
    resources.release_teacher()
    assert not resources.remembered.get(((), "teacher"))
    model, done = METHODS["retrain"].apply(dense(), resources, recipe)
    assert len(loaded) == 2 and done["tokens_seen"] >= 96
    full, _ = METHODS["retrain"].apply(dense(), resources, recipe_for(mode="full", lr=1e-3))
    for each in (model, full):
        assert matrices_of(each) == {torch.bfloat16}


@torch.no_grad()
def test_a_large_model_is_smoothed_in_the_dtype_it_is_held_in_and_says_the_same(monkeypatch):
    monkeypatch.setattr(precision, "SMALL_BYTES", 0)
    dense = work_in_float32(held_in(torch.bfloat16, helpers.make_llama(scale=0.5))[0])
    wanted, before = dense(WINDOWS).logits, dense.model.layers[0].mlp.down_proj.weight.clone()
    resources = Resources(WINDOWS, WINDOWS, WINDOWS[:2], lambda: dense, torch.bfloat16)
    model, _ = METHODS["smooth"].apply(dense, resources, METHODS["smooth"].parameters({"alpha": 0.7}))
    after = model.model.layers[0].mlp.down_proj.weight
    assert matrices_of(model) == {torch.bfloat16} and not torch.equal(before, after)
    result = model(WINDOWS).logits
    assert (result - wanted).norm() < 0.02 * wanted.norm()  # what bfloat16 rounds


# ------------------------------------------------------------------------------------------------------------ dense logits
def with_other_logits():
    """A model that does more to its head's products than dividing them."""

    def capped(_, arguments, output):
        output.logits = output.logits.tanh()
        return output

    model = MODELS["llama"]()
    model.register_forward_hook(capped)
    return model


@pytest.mark.parametrize("name", ["llama", "granite", "other"])
def test_logits_are_the_same_whether_they_are_kept_or_made_again_in_memory_or_in_a_file(monkeypatch, name):
    model = with_other_logits() if name == "other" else MODELS[name]()
    wanted = [next_token_logits(model, window) for window in WINDOWS]
    for logits, memory in ((2**31, 2**28), (0, 2**28), (0, 0)):
        monkeypatch.setattr(forward, "LOGITS_TO_KEEP", logits)
        monkeypatch.setattr(forward, "MEMORY_TO_KEEP", memory)
        result = LogitsOf(model, WINDOWS)
        assert len(result) == len(WINDOWS) and all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
        assert (result.made is None) == (logits > 0 or name == "other")


@pytest.mark.parametrize("few", [True, False])
def test_what_a_head_has_read_is_read_by_a_later_run_if_the_first_window_says_the_same(monkeypatch, tmp_path, few):
    monkeypatch.setattr(forward, "LOGITS_TO_KEEP", 2**31 if few else 0)
    model, place, reads = MODELS["llama"](), tmp_path / "new" / "states.safetensors", []
    model.register_forward_hook(lambda *_: reads.append(1))
    wanted = [next_token_logits(model, window) for window in WINDOWS]

    def read(expected: int, model=model, wanted=wanted) -> None:
        reads.clear()
        result = LogitsOf(model, WINDOWS, place)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(result, wanted, strict=True)) and len(reads) == expected

    read(len(WINDOWS))
    read(1)
    other = MODELS["llama"]()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.01)
    other.register_forward_hook(lambda *_: reads.append(1))
    theirs = [next_token_logits(other, window) for window in WINDOWS]
    read(len(WINDOWS), other, theirs)  # of another model: it is not believed, and replaced
    read(1, other, theirs)
    place.write_bytes(place.read_bytes()[:-100])
    read(len(WINDOWS), other, theirs)
    place.unlink()
    place.parent.rmdir()
    place.parent.write_text("a file where the directory should be")
    read(len(WINDOWS), other, theirs)  # nothing can be left there, and nothing is lost
    assert len(LogitsOf(with_other_logits(), WINDOWS, tmp_path / "none")) == len(WINDOWS) and not (tmp_path / "none").exists()


def test_the_dense_model_is_measured_of_its_logits_as_by_running_it():
    model = helpers.make_llama()
    result, wanted = measure_logits(LogitsOf(model, WINDOWS), WINDOWS), measure_windows({"": model}, WINDOWS, "")[""]
    assert torch.equal(result["losses"], wanted["losses"])
    assert result["divergence"]["mean"] == 0 and result["divergence"]["same_top"] == 1


def test_a_widened_linear_follows_autocast():
    model, _ = held_in(torch.float16, helpers.make_llama())
    linear = widen(model).model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(linear, WidenedLinear) and linear(torch.ones(1, 32)).dtype == torch.bfloat16
