"""How to retrain a causal language model, and what follows from that alone: how many steps, which windows each sees, at what rate."""

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

MODES = ("full", "lora")
BASES = ("as_released", "nf4")
OPTIMIZERS = ("adamw", "adamw_8bit")


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
    """Weight of the dense model's predictions in [0, 1]; the text has 1 - alpha: 1 stays nearest to the dense model; distillation only."""
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

    @property
    def distils(self) -> bool:
        """Whether the dense model has any say."""
        return self.distillation and (self.alpha > 0 or self.hidden_loss_weight > 0)

    @property
    def chosen_by_divergence(self) -> bool:
        """Whether the dense model alone decides which weights are kept: it is all that is learnt from."""
        return self.distillation and self.alpha == 1

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


def windows_read(windows: torch.Tensor, held_out: torch.Tensor, recipe: RetrainRecipe, processes: int = 1) -> list[torch.Tensor]:
    """Return what the dense model reads for it: of `windows` those that are trained on, and `held_out` where it decides what is kept."""
    return [windows_seen(windows, recipe, processes), *([held_out] if recipe.chosen_by_divergence else [])]


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
