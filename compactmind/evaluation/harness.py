"""A causal LM of any format as lm-eval takes it: the harness would load the library its config names and tie its weights again."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quiet() -> None:
    """Let the harness say errors alone; importing it sets its level, so call this after that."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@functools.cache
def task_manager() -> TaskManager:
    """Return what knows the harness's tasks: reading them all takes seconds, once."""
    quiet()
    return TaskManager()


@contextmanager
def in_the_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Iterator[HFLM]:
    """Inside the `with` block a model, stored in any way, is one of the harness; it is unchanged after the block.

    A table of integers has no weight to be tied: what loads a checkpoint has seen to that.
    """
    quiet()
    quantized = model.config.__dict__.pop("quantization_config", None)
    model.tie_weights = lambda *_, **__: None
    try:
        yield HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        del model.tie_weights
        if quantized is not None:
            model.config.quantization_config = quantized
