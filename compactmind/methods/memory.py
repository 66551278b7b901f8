"""What memory a step of the LLM track needs, estimated from shapes alone, so that what cannot fit is refused before work begins.

It is what cannot be dropped: on a CPU the weights of a large model lie in the mapped file and count only where a step changes them, on a
GPU they count. A step is a row of phases, each a sum of what is in memory then; the largest phase is what is needed. Written beside each
method's code and checked against it by `benchmarks/scale.py`, which prints both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from compactmind.forward import LOGITS_TO_KEEP, MEMORY_TO_KEEP
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.calibration import ROWS
from compactmind.precision import ROWS_BYTES, SMALL_BYTES

RUNTIME = 60_000_000
"""Bytes that libraries take for buffers of their own once a model has run."""
NF4_BYTES = 0.52
"""Bytes of a weight in NF4 with double quantization."""
ALL_WINDOWS = 200
"""Windows of text that are reckoned with where all are measured: the test text of WikiText-2 has 166 of 2,048 tokens."""


@dataclass(frozen=True)
class Sizes:
    """What memory depends on, of a model and of the text it works on."""

    hidden: int
    inner: int
    """Of the widest FFN."""
    layers: int
    vocabulary: int
    blocks: int
    """Parameters of the linears of all blocks."""
    parameters: int
    itemsize: int
    """Bytes of a weight as released."""
    windows: int
    """Of calibration."""
    measured: int
    """Windows of text that are measured on."""
    seq_len: int
    cuda: bool = False
    processes: int = 1
    """That a model whose every weight is trained is divided between."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, released_bytes: int, windows: int, measured: int, seq_len: int, cuda: bool = False
    ) -> "Sizes":
        """Return the sizes of a model, which may be on the meta device; `released_bytes`: of its files; `measured` 0: all windows."""
        blocks = llama_blocks(model)
        linears = sum(getattr(block, field).weight.numel() for block in blocks for field in LINEARS)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(
            model.config.hidden_size, max(block.up.out_features for block in blocks), len(blocks), model.config.vocab_size, linears,
            parameters, max(1, round(released_bytes / parameters)), windows, measured or ALL_WINDOWS, seq_len, cuda,
        )  # fmt: skip

    @property
    def small(self) -> bool:
        """Whether it is float32 as a whole."""
        return 4 * self.parameters <= SMALL_BYTES

    @property
    def held(self) -> int:
        """Bytes of the dense model while nothing is done to it."""
        if self.small:
            return 4 * self.parameters
        return self.itemsize * self.parameters if self.cuda else 0

    @property
    def block(self) -> int:
        """Bytes of one block in float32."""
        return 4 * self.blocks // self.layers

    @property
    def logits(self) -> int:
        """Bytes of the logits of one window."""
        return 4 * self.seq_len * self.vocabulary

    @property
    def stream(self) -> int:
        """Bytes of the residual stream of one window."""
        return 4 * self.seq_len * self.hidden

    @property
    def states(self) -> int:
        """Bytes of the residual stream of all windows."""
        return self.windows * self.stream

    @property
    def within(self) -> int:
        """Bytes of what one block computes of one window."""
        return 4 * self.seq_len * (8 * self.hidden + 3 * self.inner)

    @property
    def widened(self) -> int:
        """Bytes of the head in float32, as much of it as is there at a time."""
        return 0 if self.small else min(4 * self.hidden * self.vocabulary, ROWS_BYTES)

    @property
    def measuring(self) -> int:
        """Bytes beside a model while its perplexity and KL are measured: what the dense one says, both logits, what a softmax takes."""
        kept = self.measured * (self.logits if self.small else self.stream)
        return min(kept, LOGITS_TO_KEEP if self.small else MEMORY_TO_KEEP) + 3 * self.logits + self.widened + self.within


@dataclass(frozen=True)
class Need:
    """What a step needs in bytes: at its peak, for the model that it leaves, and for the file of that; its sizes if it was pruned."""

    peak: int
    held: int
    file: int
    sizes: Sizes


def _replaced(sizes: Sizes, before: int, bytes_per_weight: float, tables: int) -> tuple[int, int]:
    """Return the bytes of a model of which `before` were in memory once its blocks take so many bytes a weight and `tables` are added,
    and those of its file."""
    of_blocks, new = before * sizes.blocks // sizes.parameters, int(sizes.blocks * bytes_per_weight)
    return before - of_blocks + new + tables, new + (tables or sizes.itemsize * (sizes.parameters - sizes.blocks))


def _tables(sizes: Sizes, embeddings: str) -> int:
    """Return the bytes of table and head where they become integers; a tied head is the table's."""
    if not embeddings.startswith("int"):
        return 0
    return int((sizes.parameters - sizes.blocks) * (int(embeddings.removeprefix("int")) / 8 + 1 / 32))


def w8a8(sizes: Sizes, recipe: Any, before: int) -> Need:
    """Statistics of every input, one block in float32 and the int8 blocks before it."""
    held, file = _replaced(sizes, before, 1, _tables(sizes, recipe.embeddings))
    seen = 4 * sizes.layers * ROWS * (3 * sizes.hidden + sizes.inner)
    turned = 3 * 4 * sizes.hidden * sizes.inner
    return Need(max(before, held) + seen + sizes.block + max(turned, sizes.within), held + seen, file, sizes)


def smooth(sizes: Sizes, recipe: Any, before: int) -> Need:
    """Statistics of every input and one block in float32; the blocks before it as they are held, a small model float32 as a whole."""
    itemsize = 4 if sizes.small else sizes.itemsize
    held, _ = _replaced(sizes, before, itemsize, 0)
    seen = 4 * sizes.layers * ROWS * (3 * sizes.hidden + sizes.inner)
    return Need(max(before, held) + seen + sizes.block + sizes.within, held + seen, itemsize * sizes.parameters, sizes)


def _compensated(sizes: Sizes, before: int, bytes_per_weight: float, tables: int, copies: int) -> Need:
    """States of all windows, one block in float32 with its moments, and a factor of the largest in float64; `copies`: of a weight."""
    held, file = _replaced(sizes, before, bytes_per_weight, tables)
    h, f = sizes.hidden, sizes.inner
    moments = 4 * (3 * h * h + f * f)
    factor = max((4 + 2 * 8) * f * f, 4 * f * f + 4 * copies * h * f)
    return Need(max(before, held) + sizes.states + sizes.block + moments + factor, held, file, sizes)


def nf4(sizes: Sizes, recipe: Any, before: int) -> Need:
    """As `gptq`; scales, what is pinned and what is decoded are matrices too."""
    return _compensated(sizes, before, NF4_BYTES if recipe.double_quantization else 0.5625, _tables(sizes, recipe.embeddings), 7)


def gptq(sizes: Sizes, recipe: Any, before: int) -> Need:
    """Integers block by block; what tensors cost is measured one block and one tensor at a time before."""
    bits = 8 * sizes.itemsize / recipe.target_compression if recipe.target_compression else recipe.bits_per_weight[0]
    return _compensated(sizes, before, bits / 8, _tables(sizes, "int8" if recipe.embeddings == "auto" else recipe.embeddings), 3)


def prune(sizes: Sizes, recipe: Any, before: int) -> Need:
    """Scoring: a state of every block. Re-fitting: four states of all windows, inputs of one linear, its moments in float64. Measuring: the
    states of all windows, a block in float32 and its moments, one of them re-fitted, logits of less than a window."""
    kept = 1 - recipe.sparsity
    smaller = replace(
        sizes, blocks=int(sizes.blocks * kept), inner=int(sizes.inner * kept),
        parameters=sizes.parameters - int(sizes.blocks * recipe.sparsity),
    )  # fmt: skip
    held, _ = _replaced(sizes, before, (4 if sizes.small else sizes.itemsize) * kept, 0)
    h, f = smaller.hidden, smaller.inner
    scoring = before + (sizes.layers + 1) * sizes.stream + 3 * sizes.logits + sizes.widened + 2 * sizes.within
    text = 3 * sizes.states + 4 * sizes.windows * sizes.seq_len * f
    refit = 4 * (f * f + h * f) + 8 * (2 * f * f + 4 * h * f)
    h, f = sizes.hidden, sizes.inner
    moments = 4 * (3 * h * h + f * f) + 8 * (3 * f * f + 4 * h * f)
    measuring = before + sizes.states + sizes.within + sizes.block + moments + 3 * sizes.logits
    peak = max(
        scoring if recipe.criterion == "taylor" else 0, measuring if recipe.scope == "measured" else 0,
        max(before, held) + (text + refit if recipe.compensate else 0),
    )  # fmt: skip
    return Need(peak, held, smaller.itemsize * smaller.parameters, smaller)


def sparse24(sizes: Sizes, recipe: Any, before: int) -> Need:
    """By magnitude masks of a matrix. By Wanda states of all windows, a block in float32, moments of its inputs, masks of two blocks."""
    h, f = sizes.hidden, sizes.inner
    text = sizes.states + sizes.within + sizes.block + 4 * (3 * h * h + f * f) + sizes.block // 2
    peak = before + (text if recipe.criterion == "wanda" else 6 * h * f)
    return Need(peak, before, sizes.itemsize * sizes.parameters, sizes)


def retrain(sizes: Sizes, recipe: Any, before: int) -> Need:
    """What is trained with its gradient, two moments and the best so far; activations, and three logits of a batch; 4 bits beside it.

    Measured on a CPU, a large model beside 4 bits has no lower peak than beside its own weights: it is estimated as the latter.
    """
    trained = 4 * sizes.parameters
    if recipe.mode == "lora":
        trained = 4 * recipe.lora_rank * sizes.layers * (8 * sizes.hidden + 3 * (sizes.hidden + sizes.inner))
    moments = 2 if recipe.optimizer == "adamw" else 0.5
    copies = 2 + moments + (recipe.mode == "lora")  # gradient, best so far; the weights themselves are counted with the model
    layers = (sizes.layers + 1) * sizes.stream if recipe.gradient_checkpointing else sizes.layers * sizes.within
    known = 0 if sizes.small else min(MEMORY_TO_KEEP, 4 * recipe.tokens * sizes.hidden) * recipe.distils
    batch = recipe.batch_size * (layers + 2 * sizes.within + (2 + recipe.distils) * sizes.logits)
    base = before if recipe.mode == "lora" else max(before, 4 * sizes.parameters)
    converting = 0
    if sizes.processes > 1 and recipe.mode == "full":  # its share; two blocks are gathered, and table and head; first all, in main memory
        converting = 0 if sizes.cuda else max(before, (4 if sizes.small else sizes.itemsize) * sizes.parameters)
        trained //= sizes.processes
        base = trained + 2 * sizes.block + 4 * (sizes.parameters - sizes.blocks)
    if recipe.base == "nf4":
        waiting = (4 if sizes.small else sizes.itemsize) * sizes.blocks  # of the blocks as they came: in main memory, or in a file
        if sizes.cuda:
            base = max(0, before - waiting) + int(NF4_BYTES * sizes.blocks)
        elif waiting <= MEMORY_TO_KEEP:
            base += int(NF4_BYTES * sizes.blocks)
        converting = before + sizes.block + int(NF4_BYTES * sizes.blocks) // sizes.layers
    peak = max(converting, base + int(copies * trained) + batch + known + sizes.widened)
    return Need(peak, before, sizes.itemsize * sizes.parameters, sizes)


def report(sizes: Sizes, held: int) -> int:
    """Return the bytes that measuring models needs of which `held` are in memory."""
    return RUNTIME + held + sizes.measuring


def of_pipeline(steps: Sequence[Any], sizes: Sizes) -> tuple[dict[str, int], int]:
    """Return the bytes that every step of a pipeline needs at its peak, "dense" first, measuring its result included; and its file's.

    A small dense model stays in memory beside the one that is worked on.
    """
    teacher, before, file = sizes.held if sizes.small else 0, sizes.held, sizes.itemsize * sizes.parameters
    needs = {"dense": RUNTIME + before + sizes.measuring}
    for number, step in enumerate(steps, start=1):
        need = step.method.needs(sizes, step.recipe, before) if step.method.needs else Need(before, before, file, sizes)
        sizes, before, file = need.sizes, need.held, need.file
        needs[f"{step.method.name} (step {number})"] = RUNTIME + teacher + max(need.peak, before + sizes.measuring)
    return needs, file


def of_pipelines(pipelines: Sequence[Sequence[Any]], sizes: Sizes) -> tuple[dict[str, int], int, int]:
    """Return what `of_pipeline` does of the one that needs most at its peak, and the bytes of the files of all."""
    each = [of_pipeline(steps, sizes) for steps in pipelines]
    needs, file = max(each, key=lambda one: max(one[0].values()))
    return needs, file, sum(file for _, file in each)
