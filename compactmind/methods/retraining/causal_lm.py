"""Retrain a pruned Llama as a causal language model, on text alone or distilled from the dense model it was cut from.

The loss of a predicted token is alpha * T^2 * KL(dense || pruned) at temperature T + (1 - alpha) * cross-entropy with the
token that really follows (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), if wanted with the mean squared error
between the hidden states of both models on top. All weights are trained, or low-rank adapters beside the seven linears of
each block (Hu et al. 2021, https://arxiv.org/abs/2106.09685), which are added into the weights before the model is returned; while they are
trained, the weights beside them may be 4-bit ones (nf4_base.py).

A loss is in nats and a mean over predicted tokens, seq_len - 1 per window. Held-out text decides which weights are kept, and
the weights that came in take part: the model is never returned worse than it came. Every process holds all of the model, or in full
training its share of it (sharding.py). Left out: packing of documents with masks between them.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.forward import LARGEST_LOSS, HeadInputs, room_for, window_losses
from compactmind.methods.distillation.soft_targets import hidden_state_loss
from compactmind.methods.distillation.student import alternate_layers, matching_layers
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.pruning.two_of_four import HeldZeros, names_of_held
from compactmind.methods.retraining.nf4_base import NF4Base
from compactmind.methods.retraining.sharding import (
    autocast,
    check_sharding,
    gather,
    load_own_moments,
    own_moments,
    own_share,
    shard,
)
from compactmind.precision import is_widened
from compactmind.training import Progress, TrainingState, are_finite, cpu_copy, make_accelerator, make_optimizer, trains_sharded

MODES = ("full", "lora")
BASES = ("as_released", "nf4")
OPTIMIZERS = ("adamw", "adamw_8bit")
CHUNK_TOKENS = 32
"""Tokens whose logits are turned into float32 and softened at a time: 6 MB per tensor with a vocabulary of 50,000."""


# --------------------------------------------------------------------------------------------------------------- recipe
@dataclass(frozen=True)
class RetrainRecipe:
    """How to retrain; every value is checked when it is set. Raises ValueError naming the value and the valid range."""

    mode: str = "full"
    """full trains every weight; lora trains adapters of a few percent of the size: less memory, smaller steps away."""
    tokens: int = 75_000
    """Training tokens to see in all, rounded up to whole steps; text shorter than that is repeated in a new order."""
    batch_size: int = 2
    """Windows per device whose activations are in memory at once."""
    accumulation: int = 1
    """Batches whose gradients are averaged before one optimizer step: a larger batch without its memory."""
    lr: float = 1e-4
    """Peak learning rate of AdamW: 1e-5 to 3e-4 for full; adapters take about ten times as much."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit: its moments in 8 bits, a third of what training every weight takes beside the weights."""
    weight_decay: float = 0.01
    """AdamW weight decay of the matrices, 0 to 0.1."""
    warmup_ratio: float = 0.05
    """Fraction of the steps over which the rate rises from 0 to lr; it falls as a cosine to 0 over the rest. In [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients with a larger 2-norm are scaled down to it, so that one odd window cannot throw the weights off."""
    distillation: bool = True
    """Learn from the dense model's predictions as well as from the text."""
    temperature: float = 2.0
    """Softens both distributions before they are compared, 1 to 4: the improbable tokens say more; distillation only."""
    alpha: float = 0.5
    """Weight of the dense model's predictions in [0, 1]; the text has 1 - alpha; distillation only."""
    hidden_loss_weight: float = 0.0
    """Weight of the mean squared error between hidden states, 0 to 1; above 0 distillation is on and both have one hidden size."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass: memory of one block, about a third more time."""
    lora_rank: int = 16
    """Rank of the adapters, 4 to 64; mode lora only."""
    lora_alpha: int = 32
    """The adapters' output is multiplied by lora_alpha / lora_rank; mode lora only."""
    base: str = "as_released"
    """What the adapters are trained beside: the weights as_released, or nf4 in a quarter of their memory; mode lora only."""
    evaluations: int = 4
    """How often the held-out loss is measured, evenly spaced, after the last step too: each costs a pass over that text."""
    seed: int = 42
    """Decides the order of the windows and the adapters' start, 0 to 2^31."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.base not in BASES:
            raise ValueError(f"base {self.base!r} is not one of {', '.join(BASES)}")
        if self.base != "as_released" and self.mode != "lora":
            raise ValueError(f"base {self.base!r} keeps its weights as they are, which mode {self.mode!r} trains: set mode to 'lora'")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        for name in ("tokens", "batch_size", "accumulation", "lora_rank", "lora_alpha", "evaluations"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        for name in ("lr", "temperature", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not above 0 and finite")
        for name in ("weight_decay", "hidden_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 0 and finite")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} is not in [0, 1)")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} is not in [0, 1]")
        if not 0 <= self.seed <= 2**31:
            raise ValueError(f"seed {self.seed} is not in [0, 2^31]")
        if self.hidden_loss_weight > 0 and not self.distillation:
            raise ValueError(
                f"hidden_loss_weight {self.hidden_loss_weight} compares with the dense model, which distillation False leaves out: "
                "set distillation to True or hidden_loss_weight to 0"
            )


def plan_steps(recipe: RetrainRecipe, seq_len: int, processes: int = 1) -> int:
    """Return the number of optimizer steps in which at least `recipe.tokens` tokens are seen, by all processes together."""
    return math.ceil(recipe.tokens / (recipe.batch_size * recipe.accumulation * processes * seq_len))


def windows_seen(windows: torch.Tensor, recipe: RetrainRecipe, processes: int = 1) -> torch.Tensor:
    """Return those of `windows` (windows, seq_len) that `retrain_causal_lm` trains on."""
    size = recipe.batch_size * recipe.accumulation * processes
    steps = range(1, plan_steps(recipe, windows.shape[1], processes) + 1)
    return windows[torch.cat([batch_rows(len(windows), step, size, recipe.seed) for step in steps]).unique()]


def batch_rows(windows: int, step: int, size: int, seed: int) -> torch.Tensor:
    """Return which of `windows` windows the optimizer step number `step` (from 1) trains on: int64 (size,).

    The steps read one endless stream: all windows in random order, then all again in another order. It depends on the
    arguments alone, so a resumed run goes on where the stream was.
    """
    first = (step - 1) * size
    passes = range(first // windows, (first + size - 1) // windows + 1)
    orders = [torch.randperm(windows, generator=torch.Generator().manual_seed(seed + number)) for number in passes]
    return torch.cat(orders)[first % windows :][:size]


def cosine_decay_with_warmup(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return a schedule rising from 0 to the peak over `warmup_steps`, then falling as half a cosine to 0 at `total_steps`.

    Loshchilov & Hutter 2017 (https://arxiv.org/abs/1608.03983), without restarts.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


# ----------------------------------------------------------------------------------------------------------------- loss
def token_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Return the mean `distillation_loss` over tokens as a float32 scalar; its gradient is computed in the same pass.

    Logits: (tokens, vocab) in any float dtype, labels: (tokens,); labels alone count without a teacher. A few rows at a time are turned
    into float32, so that they stay in the processor's cache: with a large vocabulary the softened distributions of all rows
    would be several times the rest of the model's activations. There is one backward pass, for the student's logits.
    """
    return _TokenLoss.apply(student_logits, teacher_logits, labels, temperature, 0.0 if teacher_logits is None else alpha)


class _TokenLoss(torch.autograd.Function):
    """What `token_loss` computes: forward keeps the gradient (tokens, vocab) of the mean, backward scales it, in place, once.

    In fp16 nearly all of that gradient would be 0 (the mean over 1,000 tokens of a probability of 1e-5 is 1e-8, the smallest
    number is 6e-8), and a loss scale of 65536 no number: there it is kept times a power of two that makes the best of the range,
    and is multiplied with what comes from above in float32.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, temperature: float, alpha: float) -> torch.Tensor:
        tokens = len(labels)
        gradient = torch.empty_like(student_logits)  # (tokens, vocab), of the mean, times ctx.scale
        ctx.scale = 1.0
        if gradient.dtype == torch.float16:  # no change of a sum is larger than (1 - alpha) + alpha * temperature
            ctx.scale = tokens * 2.0 ** math.floor(math.log2(2**15 / (1 - alpha + alpha * temperature)))
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        with torch.autocast(labels.device.type, enabled=False):  # it would round what is float32 here on purpose
            for start in range(0, tokens, CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                logits, wanted = student_logits[rows].float(), labels[rows, None]
                change = torch.log_softmax(logits, dim=-1)
                total -= (1 - alpha) * change.gather(1, wanted).double().sum()
                change.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=change.dtype)).mul_(1 - alpha)
                if alpha > 0:
                    ours = torch.log_softmax(logits / temperature, dim=-1)
                    theirs = torch.log_softmax(teacher_logits[rows].float() / temperature, dim=-1)
                    soft = theirs.exp()
                    total += alpha * temperature**2 * torch.linalg.vecdot(soft, theirs - ours).double().sum()
                    change.add_(ours.exp_().sub_(soft), alpha=alpha * temperature)
                gradient[rows] = change.div_(tokens / ctx.scale)
        ctx.save_for_backward(gradient)
        return (total / tokens).to(torch.float32)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        if gradient.dtype != torch.float16:
            return gradient.mul_(upstream.to(gradient.dtype)), None, None, None, None
        factor = upstream / ctx.scale
        for rows in gradient.split(CHUNK_TOKENS):
            rows.copy_(rows.float() * factor)
        return gradient, None, None, None, None


class TeacherStates:
    """What one teacher's head reads of every window, kept from one retraining to the next.

    A search retrains many models on the same text: the teacher then runs once, and its logits are made of states that are a
    hundredth of their size. `limit_bytes` bounds what is kept; windows beyond it are read again each time, except by `read`.
    """

    def __init__(self, limit_bytes: int = 1_000_000_000):
        self.room, self.kept = limit_bytes, {}
        self.reader: HeadInputs | None = None

    def read(self, teacher: PreTrainedModel, windows: torch.Tensor) -> None:
        """Keep what is read of `windows` (windows, seq_len), if that is all there is to know; the teacher may go afterwards."""
        self.reader = self.reader or HeadInputs(teacher)
        left = [row for row in windows if not self.holds(row[None])]
        for index, row in enumerate(left):
            states, _ = self.reader.read(teacher, row[None, :-1])
            if not self.reader.head_is_all:
                return
            if index == 0:
                kept = room_for(len(left), *states.shape[1:])
            kept[index] = states[0]
            self.kept[_key(row[:-1])] = kept[index]

    def holds(self, windows: torch.Tensor) -> bool:
        """Tell whether the logits of all `windows` (windows, seq_len) are known without the teacher."""
        return all(_key(row[:-1]) in self.kept for row in windows)

    @torch.no_grad()
    def logits(self, teacher: PreTrainedModel | None, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits (batch, seq_len, vocab) of token ids (batch, seq_len); without a teacher of those it has read."""
        keys = [_key(row) for row in input_ids]
        if self.kept.keys() >= set(keys):
            head = self.reader.head.to(input_ids.device)
            return head(torch.stack([self.kept[key] for key in keys]).to(input_ids.device))
        self.reader = self.reader or HeadInputs(teacher)
        states, logits = self.reader.read(teacher, input_ids)
        for key, state in zip(keys, states, strict=True):
            size = state.numel() * state.element_size()
            if self.reader.head_is_all and key not in self.kept and size <= self.room:
                self.kept[key] = state.to("cpu", copy=True)
                self.room -= size
        return logits


def _key(ids: torch.Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()


class RetrainingLoss(nn.Module):
    """The training loss as a function of a batch of windows, with the student as its only submodule.

    One module, so that a wrapper for several devices or for mixed precision sees one forward pass that returns a scalar and
    never copies the logits. The teacher stands in a tuple: it is neither trained, nor copied between devices.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        recipe: RetrainRecipe,
        states: TeacherStates | None = None,
    ):
        super().__init__()
        self.student, self.teacher, self.recipe, self.states = student, (teacher,), recipe, states or TeacherStates(0)
        self.use_hidden_loss = teacher is not None and recipe.hidden_loss_weight > 0
        if self.use_hidden_loss:
            depths = teacher.config.num_hidden_layers, student.config.num_hidden_layers
            self.layer_map = matching_layers(depths[0], alternate_layers(*depths))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the loss of `windows`, int64 (batch, seq_len), as a scalar."""
        (teacher,), recipe = self.teacher, self.recipe
        input_ids, labels = windows[:, :-1], windows[:, 1:].flatten()  # (batch, seq_len - 1), (batch * (seq_len - 1),)
        arguments = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": self.use_hidden_loss}
        output, logits = self.student(**arguments), None
        if self.use_hidden_loss:
            with torch.no_grad():
                target = teacher(**arguments)
            logits = target.logits
        elif recipe.distillation:
            logits = self.states.logits(teacher, input_ids)
        loss = token_loss(
            output.logits.flatten(0, 1),  # (batch * (seq_len - 1), vocab)
            None if logits is None else logits.flatten(0, 1),
            labels, recipe.temperature, recipe.alpha,
        )  # fmt: skip
        if self.use_hidden_loss:
            everywhere = torch.ones_like(input_ids)
            states = output.hidden_states, target.hidden_states
            loss = loss + recipe.hidden_loss_weight * hidden_state_loss(*states, self.layer_map, everywhere)
        return loss


def held_out_loss(model: PreTrainedModel, held_out: torch.Tensor, accelerator: Accelerator) -> float:
    """Return the mean loss in nats on `held_out` (windows, seq_len), the same number in every process; evaluation mode."""
    loss = window_losses(model.eval(), held_out).mean().to(accelerator.device)
    return accelerator.reduce(loss, reduction="mean").item()


def everywhere(found: bool, accelerator: Accelerator) -> bool:
    """Tell whether something was found true in every process; all must ask."""
    return accelerator.reduce(torch.tensor(float(found), device=accelerator.device)).item() == accelerator.num_processes


# -------------------------------------------------------------------------------------------------------------- weights
def add_adapters(model: PreTrainedModel, rank: int, alpha: int) -> nn.Module:
    """Put, in place, an adapter beside each of the seven linears of every block and freeze everything else.

    Returns peft's wrapper, whose `merge_and_unload` and `unload` take them out again. The first output is that of the model
    without adapters: one of the two factors starts at 0.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it advises optional CPU kernels at import
    from peft import LoraConfig, get_peft_model  # here, because importing it takes seconds that only this mode should pay

    targets = [path.rpartition(".")[2] for path in LINEARS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks for names that transformers has renamed
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets))


def trainable_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights in main memory, of divided ones this process's share; tied ones once."""
    return cpu_copy({name: own_share(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad})


@torch.no_grad()
def load_trainable(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write, in place, what `trainable_copy` returned."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        own_share(parameters[name]).copy_(tensor)


def set_gradient_checkpointing(model: PreTrainedModel, enable: bool) -> None:
    """Switch, in place, the recomputation of each block's activations on or off."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.20: the latter
    if enable:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()
        model.disable_input_require_grads()  # the hook on the embeddings that enabling put there


@contextmanager
def ready_to_train(model: PreTrainedModel, recipe: RetrainRecipe) -> Iterator[tuple[nn.Module | None, NF4Base | None]]:
    """Give, in place, a model the base, adapters and gradient checkpointing of a recipe; take them away at the end of the `with` block.

    So it is whatever was raised inside. Yields peft's wrapper, or None without adapters; those not merged until the end are lost; and the
    4-bit base, or None without.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = NF4Base(model) if recipe.base == "nf4" else None
    adapters = None
    try:
        if recipe.mode == "lora":
            adapters = add_adapters(model, recipe.lora_rank, recipe.lora_alpha)
        if recipe.gradient_checkpointing:
            set_gradient_checkpointing(model, True)
        yield adapters, base
    finally:
        if recipe.gradient_checkpointing:
            set_gradient_checkpointing(model, False)
        if base is not None:
            base.put_back()
        if adapters is not None:
            adapters.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
        model.zero_grad()
        model.eval()


# ----------------------------------------------------------------------------------------------------------------- loop
def check_inputs(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    recipe: RetrainRecipe,
    teacher: PreTrainedModel | None,
    known: bool = False,
) -> None:
    """Raise CompactMindError, before anything is computed, on models or text that cannot be trained with this recipe.

    `known`: what the teacher makes of the text has been read already.
    """
    llama_blocks(model)
    if len(windows) < 1 or len(held_out) < 1:
        raise CompactMindError(
            f"{len(windows)} training windows and {len(held_out)} held-out windows: retraining needs at least 1 of each; "
            "use more text or a smaller seq_len"
        )
    for what, text in {"training": windows, "held-out": held_out}.items():
        if text.ndim != 2 or text.shape[1] < 2:
            raise CompactMindError(
                f"{what} windows of shape {tuple(text.shape)}: expected (windows, seq_len), seq_len at least 2"
            )
        if not 0 <= text.min() <= text.max() < model.config.vocab_size:
            raise CompactMindError(
                f"token ids {text.min()} to {text.max()} in the {what} windows, but the model knows 0 to "
                f"{model.config.vocab_size - 1}: tokenize the text with the model's own tokenizer"
            )
    others = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    if others and not (is_widened(model) and (recipe.mode == "lora" or trains_sharded())):
        raise CompactMindError(
            f"weights of {', '.join(sorted(others))} lose the small steps of training: load the model with dtype=torch.float32, or train "
            "adapters (mode lora) beside weights that compute in float32 (compactmind.precision.widen)"
        )
    if recipe.mode == "full" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise CompactMindError("requires_grad is False for every weight of the model: call model.requires_grad_(True) first")
    if not recipe.distillation or (teacher is None and known and not recipe.hidden_loss_weight):
        return
    if teacher is None:
        raise CompactMindError("distillation needs a teacher: give the dense model, or set distillation to False")
    if teacher is model:
        raise CompactMindError("the teacher is the model itself: give the dense model, loaded on its own")
    ours, theirs = model.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise CompactMindError(
            f"the model has {ours.vocab_size} tokens in its vocabulary and the teacher {theirs.vocab_size}: distillation compares "
            "predictions token by token, so give a teacher of the same vocabulary or set distillation to False"
        )
    if recipe.hidden_loss_weight > 0:
        if ours.hidden_size != theirs.hidden_size:
            raise CompactMindError(
                f"hidden_loss_weight {recipe.hidden_loss_weight} needs a model and a teacher of one hidden size, not "
                f"{ours.hidden_size} and {theirs.hidden_size}: set hidden_loss_weight to 0"
            )
        if ours.num_hidden_layers > theirs.num_hidden_layers:
            raise CompactMindError(
                f"hidden_loss_weight {recipe.hidden_loss_weight} needs a teacher with at least the model's layers, not "
                f"{theirs.num_hidden_layers} for {ours.num_hidden_layers}: set hidden_loss_weight to 0"
            )


def retrain_causal_lm(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    recipe: RetrainRecipe,
    *,
    teacher: PreTrainedModel | None = None,
    teacher_states: TeacherStates | None = None,
    accelerator: Accelerator | None = None,
    resume: TrainingState | None = None,
    log_every: int = 20,
    label: str = "retrain",
) -> dict[str, Any]:
    """Retrain a Llama-like causal LM in place and leave it in evaluation mode with the weights of its lowest held-out loss.

    `model` has float32 weights, or for adapters, and where it is divided, any that compute in float32; it and the `teacher` (used if
    `recipe.distillation`, its weights stay as they are) go to the device of `accelerator`; `teacher_states` spares the teacher the windows
    it has read before, and is enough without it where it has read all of them. `windows` and `held_out`
    (windows, seq_len) are int64 token ids. With `resume` the state is saved after every evaluation, and a run that was killed goes
    on from there and ends with the weights of an unbroken one, unless the number of steps, of processes or the precision is another:
    then it starts anew. Who called clears it, once the model it led to is safe.

    Where the run asked for it (training.trains_sharded) the model is divided between the processes (sharding.py): each needs memory for its
    share, keeps and saves that, and only the model of the main process has weights afterwards, in main memory; a step that raises leaves
    it empty.

    A loss that is not finite ends the run early, without an exception. Returns perplexity_before, perplexity_after and
    loss_before, loss_after (held-out, in nats), tokens_seen, seconds, kept_step (0: no step was better than the weights that
    came in, so the model has these again), stopped (None, or what ended the run early) and history, a row per evaluation with
    step, phase, loss (training, mean since the last row), held_out_loss, perplexity, lr, seconds (since the last row).

    With the base nf4 the losses of the history are of the adapters beside 4 bits, and which step is kept is decided by them, from
    loss_of_base on, which is that of the 4-bit base alone. loss_before and loss_after are of the weights that came in and that are
    returned; where adapters that helped the base do not help these, they are left out (kept_step 0).
    Raises CompactMindError on models or text that do not fit the recipe.
    """
    started = mark = time.perf_counter()
    accelerator, sharded = accelerator or make_accelerator(may_shard=True), trains_sharded()
    processes = accelerator.num_processes
    if sharded:
        check_sharding(recipe.mode, recipe.optimizer, accelerator.mixed_precision)
    known = teacher_states is not None and windows.numel() > 0 and teacher_states.holds(windows_seen(windows, recipe, processes))
    check_inputs(model, windows, held_out, recipe, teacher, known)
    windows_per_step = recipe.batch_size * recipe.accumulation * processes
    total_steps = plan_steps(recipe, windows.shape[1], processes)
    evaluation_steps = {math.ceil(total_steps * number / recipe.evaluations) for number in range(1, recipe.evaluations + 1)}
    plan = {
        "total_steps": total_steps, "windows_per_step": windows_per_step, "processes": processes,
        "mixed_precision": accelerator.mixed_precision, **({"sharded": True} if sharded else {}),
    }  # fmt: skip
    if resume and sharded:
        resume = resume.part(accelerator.process_index, processes, accelerator.wait_for_everyone)
    saved = resume.load() if resume else None
    if saved and saved.get("plan") != plan:  # its rates and its order of windows are those of another run
        accelerator.print(f"{label}: the unfinished run there had the plan {saved.get('plan')}, this one {plan}: starting anew")
        saved = None
    if resume and sharded:
        steps = accelerator.gather(torch.tensor([saved["step"] if saved else 0], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            accelerator.print(f"{label}: the parts of the unfinished run there are of the steps {steps}: starting anew")
        saved = saved if len(set(steps)) == 1 else None

    # ---- models
    whole, sparse = model, set(names_of_held(model)) if recipe.mode == "full" else set()
    if sharded:
        accelerator.print(f"{label}: the model is divided between {processes} processes")
    model = shard(whole, accelerator.device) if sharded else model.to(accelerator.device)
    teacher = teacher.to(accelerator.device).eval() if recipe.distillation and teacher is not None else None
    loss_before = saved["loss_before"] if saved else held_out_loss(model, held_out, accelerator)
    if not loss_before < LARGEST_LOSS:
        raise CompactMindError(f"the held-out loss before retraining is {loss_before}: the model that came in is damaged")
    set_seed(recipe.seed)
    with ready_to_train(model, recipe) as (adapters, base):
        optimizer = make_optimizer(model, recipe.lr, recipe.weight_decay, recipe.optimizer == "adamw_8bit")
        scheduler = cosine_decay_with_warmup(optimizer, int(recipe.warmup_ratio * total_steps), total_steps)

        # ---- resume: the state of the last evaluation, if this very run was interrupted
        step, seconds, history, losses, stopped = 0, 0.0, [], [], None
        kept = {"loss": loss_before, "step": 0, "weights": trainable_copy(model)}
        if base is not None and not saved:
            kept["loss"] = held_out_loss(model, held_out, accelerator)
        loss_of_base = saved["loss_of_base"] if saved else kept["loss"]
        if saved:
            load_trainable(model, saved["weights"])
            load_own_moments(optimizer, saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(saved["scaler"])
            step, seconds, history, kept = saved["step"], saved["seconds"], saved["history"], saved["kept"]
            accelerator.print(f"{label}: going on after step {step} of {total_steps}")
        objective = RetrainingLoss(model, teacher, recipe, teacher_states)
        if sharded:
            objective, clip = autocast(objective, accelerator), nn.utils.clip_grad_norm_
        else:
            (objective, optimizer), clip = accelerator.prepare(objective, optimizer), accelerator.clip_grad_norm_

        # ---- steps
        held = HeldZeros(own_share(weight) for name, weight in model.named_parameters() if name in sparse)
        progress = Progress(label, total_steps, log_every, step, accelerator.is_main_process, unit="tokens")
        for number in range(step + 1, total_steps + 1):
            model.train()
            set_seed(recipe.seed + number, device_specific=True)  # dropout, if the model has any, depends on the step alone
            rows = batch_rows(len(windows), number, windows_per_step, recipe.seed)
            batches = rows.view(recipe.accumulation, processes, recipe.batch_size)[:, accelerator.process_index]
            loss = torch.zeros((), device=accelerator.device)
            for index, batch in enumerate(batches, start=1):
                # Sharded gradients are always averaged: each process would have to keep all of its own until then.
                with nullcontext() if index == recipe.accumulation or sharded else accelerator.no_sync(objective):
                    share = objective(windows[batch].to(accelerator.device)) / recipe.accumulation
                    accelerator.backward(share)
                loss += share.detach()
            loss = accelerator.reduce(loss, reduction="mean").item()
            if not math.isfinite(loss):  # before the step: its gradients never reach the weights
                stopped = f"loss became {loss} at step {number}"
                break
            clip(model.parameters(), recipe.max_grad_norm)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            held.put_back()
            scheduler.step()
            optimizer.zero_grad()
            step = number
            losses.append(loss)
            progress.update(loss, lr, windows_per_step * windows.shape[1])

            if step not in evaluation_steps:
                continue
            held_out_now = held_out_loss(model, held_out, accelerator)
            if not math.isfinite(held_out_now):
                stopped = f"held-out loss became {held_out_now} at step {step}"
                break
            # A weight that no held-out text reaches can be no number while the loss is one.
            if held_out_now < kept["loss"] and everywhere(are_finite(weights := trainable_copy(model)), accelerator):
                kept = {"loss": held_out_now, "step": step, "weights": weights}
            now = time.perf_counter()
            row = {
                "step": step,
                "phase": "retrain",
                "loss": sum(losses) / len(losses),
                "held_out_loss": held_out_now,
                "perplexity": math.exp(min(held_out_now, LARGEST_LOSS)),  # no float beyond that, and no use either
                "lr": lr,
                "seconds": now - mark,
            }
            history, losses, mark = [*history, row], [], now
            progress.track("evaluation", row)
            progress.write(
                f"{label:<18} step {step:>5}/{total_steps} | loss {row['loss']:7.4f} | held-out loss {held_out_now:7.4f} | "
                f"perplexity {row['perplexity']:8.4g} | {row['seconds']:.0f} s"
            )
            if resume and (accelerator.is_main_process or sharded):  # what is kept is saved once
                weights = kept["weights"] if kept["step"] == step else trainable_copy(model)
                resume.save(
                    plan=plan, step=step, seconds=seconds + now - started, history=history, kept=kept, loss_before=loss_before,
                    loss_of_base=loss_of_base, weights=weights, optimizer=own_moments(optimizer), scheduler=scheduler.state_dict(),
                    scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
                )  # fmt: skip
        progress.close()

        # ---- the best weights, in a plain model
        if stopped:
            accelerator.print(f"{label}: stopped: {stopped}")
        load_trainable(model, kept["weights"])
        kept_step, loss_after = kept["step"], kept["loss"] if kept["step"] else loss_before
        if adapters is not None and kept_step:
            if base is not None:
                base.put_back()
            adapters.merge_and_unload()
        if base is not None and kept_step:  # chosen by the loss beside 4 bits; what is returned has others
            loss_after = held_out_loss(model, held_out, accelerator)
            if not loss_after < loss_before:
                accelerator.print(f"{label}: with the adapters in the weights as they came the held-out loss is {loss_after:.4f}")
                base.restore()
                kept_step, loss_after = 0, loss_before
        if sharded:
            gather(model, whole, accelerator)
        origin = f"step {kept_step}" if kept_step else "before retraining: no step was better on held-out text"
        accelerator.print(f"{label}: kept the weights of {origin}")
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    return {
        "perplexity_before": math.exp(loss_before),
        "perplexity_after": math.exp(loss_after),
        "loss_before": loss_before,
        "loss_after": loss_after,
        "tokens_seen": step * windows_per_step * windows.shape[1],
        "seconds": seconds + time.perf_counter() - started,
        "kept_step": kept_step,
        "stopped": stopped,
        "history": history,
        **({"loss_of_base": loss_of_base} if recipe.base == "nf4" else {}),
    }
