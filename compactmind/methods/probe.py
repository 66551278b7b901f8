"""What a change of one tensor of a language model costs, measured: KL to the model as it is, on a few tokens of text."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.forward import logits_divisor
from compactmind.methods.blockwise import block_inputs, in_float32, run_block
from compactmind.methods.llama import llama_blocks


class Probe:
    """KL to the dense model on a few tokens of text when one tensor of it is another: the blocks before it need not run again."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, window: torch.Tensor):
        """`window`: (tokens,) ids. The model stays as it is."""
        self.model, self.blocks = model.eval(), llama_blocks(model)
        (states,), self.arguments = block_inputs(model, window[None])
        self.states = [states]
        for block, others in zip(self.blocks, self.arguments, strict=True):
            with in_float32(block.module):
                self.states.append(run_block(block.module, self.states[-1], others))
            require_finite(block.name, self.states[-1])
        self.wanted = self._log_probabilities(self.states[-1])
        require_finite("the prediction", self.wanted)

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings().weight
        with in_float32(self.model.model.norm):
            read = self.model.model.norm(states)[0] / logits_divisor(self.model)
            return (read @ head.float().t()).log_softmax(dim=-1)

    @torch.no_grad()
    def divergences(self, states: torch.Tensor, index: int) -> list[float]:
        """Return the KL in nats a token for each of `states` (changes, tokens, channels) if block `index` reads it."""
        for block, others in zip(self.blocks[index:], self.arguments[index:], strict=True):
            with in_float32(block.module):
                states = run_block(block.module, states, others)
        kls = []
        for each in states.split(1):  # predictions of one change at a time: vocabularies are large
            logs = self._log_probabilities(each)
            kl = torch.nn.functional.kl_div(logs, self.wanted, log_target=True, reduction="sum")
            kls.append(max(float(kl) / len(logs), 0.0))
        return kls

    @torch.no_grad()
    def with_weights(self, index: int, changes: Iterable[tuple[str, torch.Tensor]]) -> list[float]:
        """Return the KL with each of `changes` to block `index` alone: another weight (out, in) in one of its linears, by field.

        What they make of the block goes through the others together, which takes less time than one after the other.
        """
        block, written = self.blocks[index], []
        for field, weight in changes:
            linear = getattr(block, field)
            before = linear.weight.data
            linear.weight.data = weight.to(before.dtype)
            try:
                with in_float32(block.module):
                    written.append(run_block(block.module, self.states[index], self.arguments[index]))
            finally:
                linear.weight.data = before
        return self.divergences(torch.cat(written), index + 1) if written else []


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CompactMindError if what is computed at a place is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise CompactMindError(
            f"{name}: what is computed of calibration text is NaN or infinite there: the weights of this layer or of one before it are "
            "damaged, download or make the model again"
        )
