"""What a model can be given: how many tokens, which of them, and how many rows at a time.

Asked before a model runs, because the answer comes too late from running it: on a GPU an index outside a table ends the whole
process, and a decoder that cannot tell a row from its padding classifies the padding.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many token ids a model knows: the rows of its embedding table."""
    return model.get_input_embeddings().num_embeddings


def require_known_ids(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Raise CompactMindError if one of the `input_ids` (rows, tokens) is outside the model's embedding table."""
    largest, known = int(input_ids.max()), vocabulary_of(model)
    if largest >= known:
        raise CompactMindError(
            f"its tokenizer gives the token {largest} and the model knows {known} of them, 0 to {known - 1}: the tokenizer is another "
            "model's, or tokens were added to it and model.resize_token_embeddings was forgotten"
        )


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has learned positions for, None if its positions are computed and have no end."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (name.endswith("wpe") or ("position" in name and "relative" not in name))
    ]
    return min((table.num_embeddings - _places_before_the_first(table) for table in tables), default=None)


def _places_before_the_first(table: nn.Embedding) -> int:
    """OPT and BART leave rows out by an offset; RoBERTa and its kind begin behind the row of the padding."""
    return getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)


def require_positions(model: PreTrainedModel, tokens: int, setting: str) -> None:
    """Raise CompactMindError, naming the setting that decides it, if a model has no positions for so many tokens."""
    known = positions_of(model)
    if known is not None and tokens > known:
        raise CompactMindError(f"it has positions for {known} tokens, not for {tokens}: choose a smaller --{setting}")


def rows_at_a_time(model: PreTrainedModel, pad_token_id: int | None, batch_size: int) -> int:
    """Return the batch size for rows of different lengths, 1 where the model knows no padding token or another one than theirs.

    A decoder that classifies takes the last token that is not its own padding token for the end of a row.
    """
    return batch_size if pad_token_id is not None and pad_token_id == model.config.get_text_config().pad_token_id else 1
