"""Whether two models read text alike."""

import json

from transformers import PreTrainedTokenizerBase


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers certainly give the same ids for every text; False where that cannot be read off them."""
    return one is other or (one.is_fast and other.is_fast and _rules(one) == _rules(other))


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return everything a fast tokenizer does, without padding and truncation, which a caller chooses."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
