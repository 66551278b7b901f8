"""What memory the stages of the encoder track need, estimated from shapes alone, as memory.py does for language models.

Estimated is what a stage adds to a process that has loaded its libraries, at its peak; checked by `benchmarks/classifier_memory.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

RUNTIME = 150_000_000
"""Bytes that libraries take for buffers of their own, and sentences with their tokens, once a classifier has run."""


@dataclass(frozen=True)
class ClassifierSizes:
    """What memory depends on, of an encoder in float32."""

    hidden: int
    inner: int
    """Of the widest FFN."""
    layers: int
    heads: int
    parameters: int
    table: int
    """Parameters of the word embeddings."""

    @classmethod
    def of(cls, settings: dict[str, Any], weight_bytes: int) -> "ClassifierSizes":
        """Return the sizes of the model with this config.json and so many bytes of float32 weights; pruned ones are estimated as dense."""

        def either(*names: str) -> int:
            return next(int(settings[name]) for name in names if name in settings)

        hidden, layers = either("hidden_size", "dim"), either("num_hidden_layers", "n_layers")
        table = either("vocab_size") * either("embedding_size", "hidden_size", "dim")
        inner, heads = either("intermediate_size", "hidden_dim"), either("num_attention_heads", "n_heads")
        return cls(hidden, inner, layers, heads, weight_bytes // 4, table)

    def cut(self, layers: int) -> "ClassifierSizes":
        """Return the sizes with fewer layers, four matrices of attention and two of the FFN each."""
        each = 4 * self.hidden**2 + 2 * self.hidden * self.inner
        return replace(self, layers=layers, parameters=self.parameters - (self.layers - layers) * each)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return 4 * self.parameters

    def layer(self, batch: int, length: int) -> int:
        """Bytes that one layer computes of a batch of sentences, all of `length` tokens."""
        return 4 * batch * (length * (12 * self.hidden + 3 * self.inner) + 2 * self.heads * length**2)


def trained_bytes(sizes: ClassifierSizes, frozen_table: bool) -> int:
    """Return the bytes of the weights that have a gradient."""
    return 4 * (sizes.parameters - frozen_table * sizes.table)


def train(sizes: ClassifierSizes, batch: int, length: int, frozen_table: bool) -> int:
    """Weights, gradient, two moments and the average of what is trained, and the activations of all layers."""
    return RUNTIME + sizes.weights + 4 * trained_bytes(sizes, frozen_table) + sizes.layers * sizes.layer(batch, length)


def training_state(sizes: ClassifierSizes, frozen_table: bool) -> int:
    """Return the bytes on disk of what a killed run goes on from: weights, average and moments."""
    return sizes.weights + 3 * trained_bytes(sizes, frozen_table)


def predict(sizes: ClassifierSizes, batch: int, length: int) -> int:
    """Return the bytes beside the weights while a batch is read without gradients: what one layer takes."""
    return RUNTIME + sizes.layer(batch, length)


def quantize(sizes: ClassifierSizes, sentences: int, batch: int, length: int) -> int:
    """A parent and its copy from the file, states of the calibration, and moments and a float64 factor of the widest linear (GPTQ)."""
    states = 2 * 4 * sentences * length * sizes.hidden
    factors = bool(sentences) * (4 * (3 * sizes.hidden**2 + sizes.inner**2) + 20 * sizes.inner**2)
    return 2 * sizes.weights + states + factors + predict(sizes, batch, length)
