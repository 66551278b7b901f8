"""A vocabulary of what a task's text is made of: most of a small encoder is its table, and most rows of it are never read.

Kept are the tokens that most of the training text is made of, special tokens, and every piece that others are split into: single
characters (WordPiece, with and without ##; Unigram), bytes and what merges are made of (BPE). A word whose token is gone falls
into smaller pieces that are kept, so no text becomes unknown that was known. The order of the tokens stays, so the kept rows of the
table are those of before. In the spirit of TextPruner (Yang et al. 2022, https://arxiv.org/abs/2203.15996), which keeps every token seen.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.errors import CompactMindError

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "unk_token_id", "mask_token_id")
"""What of a configuration is a token id."""


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers certainly give the same ids for every text; False where that cannot be read off them."""
    return one is other or (one.is_fast and other.is_fast and _rules(one) == _rules(other))


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything a fast tokenizer does, without padding and truncation, which a caller chooses."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}


# ------------------------------------------------------------------------------------------------------------- choosing
def _pieces_of_wordpiece(model: dict[str, Any]) -> set[str]:
    prefix = model["continuing_subword_prefix"]
    return {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1}


def _pieces_of_unigram(model: dict[str, Any]) -> set[str]:
    return {piece for piece, _ in model["vocab"] if len(piece) == 1} | {model["vocab"][model["unk_id"]][0]}


def _pieces_of_bpe(model: dict[str, Any]) -> set[str]:
    return set(model["vocab"]) - {left + right for left, right in _merges(model)}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs a BPE joins, in its order; older files have a space between the two."""
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


PIECES = {"WordPiece": _pieces_of_wordpiece, "Unigram": _pieces_of_unigram, "BPE": _pieces_of_bpe}
"""Kind of a tokenizer -> the tokens that every other one can be split into."""


def tokens_to_keep(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], coverage: float) -> list[int]:
    """Return the ids, ascending, of the fewest tokens that make up a share `coverage` of the tokens of `texts`, and of what is always kept.

    With coverage 1 everything that occurs is kept. Raises ValueError outside (0, 1] and CompactMindError for a tokenizer of another kind.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], not {coverage}")
    model = _rules(tokenizer)["model"] if tokenizer.is_fast else {"type": type(tokenizer).__name__}
    if model["type"] not in PIECES:
        raise CompactMindError(
            f"the vocabulary of a tokenizer of kind {model['type']} cannot be cut: {', '.join(PIECES)} can; use --vocabulary_coverage 0"
        )
    ids = tokenizer.get_vocab()
    counts = Counter(index for row in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] for index in row)
    ranked, total, covered, kept = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])), sum(counts.values()), 0, set()
    for index, count in ranked:
        if covered >= coverage * total:
            break
        covered += count
        kept.add(index)
    kept |= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kept |= {ids[piece] for piece in PIECES[model["type"]](model)}
    # Where RoBERTa's positions begin follows from the id of its padding, which therefore stays.
    kept |= {index for index in ids.values() if tokenizer.pad_token_id is not None and index <= tokenizer.pad_token_id}
    if model["type"] == "BPE":
        _keep_what_is_joined(model, ids, kept)
    return sorted(kept)


def _keep_what_is_joined(model: dict[str, Any], ids: dict[str, int], kept: set[int]) -> None:
    """Add, in place, both halves of every kept token of a BPE, and theirs: without them it would not come about."""
    for left, right in reversed(_merges(model)):  # a token is joined after its halves are
        if ids.get(left + right) in kept:
            kept |= {ids[left], ids[right]}


# -------------------------------------------------------------------------------------------------------------- cutting
def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    """Return a copy of a fast tokenizer with the tokens `kept` (ids, ascending) alone, numbered from 0 in the same order.

    Raises CompactMindError if it cannot be rebuilt.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    expected = {token: new_ids[old] for token, old in tokenizer.get_vocab().items() if old in new_ids}
    rules = _rules(tokenizer)
    model = rules["model"]
    if model["type"] == "Unigram":
        unknown = model["vocab"][model["unk_id"]][0]
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new_ids]
        model["unk_id"] = [piece for piece, _ in model["vocab"]].index(unknown)
    else:
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    if model["type"] == "BPE":
        there = model["vocab"]
        model["merges"] = [pair for pair in _merges(model) if {*pair, "".join(pair)} <= there.keys()]
    for token in rules["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    _renumber(rules["post_processor"], new_ids)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(rules))  # transformers has no public way in
    if smaller.get_vocab() != expected:
        raise CompactMindError(f"a {type(tokenizer).__name__} cannot be rebuilt with fewer tokens: use --vocabulary_coverage 0")
    return smaller


def _renumber(part: Any, new_ids: dict[int, int]) -> None:
    """Give, in place, the special tokens that a post-processor adds their new ids."""
    if isinstance(part, list):
        for each in part:
            _renumber(each, new_ids)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in ("sep", "cls") and isinstance(value, list):
                part[name] = [value[0], new_ids[value[1]]]
            elif name == "ids":
                part[name] = [new_ids[old] for old in value]
            else:
                _renumber(value, new_ids)


@torch.no_grad()
def cut_table(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep, in place, the rows `kept` (token ids, ascending) of a model's word embeddings alone; its configuration follows."""
    table, new_ids = model.get_input_embeddings(), {old: new for new, old in enumerate(kept)}
    rows = table.weight[kept].clone()
    smaller = nn.Embedding(*rows.shape, padding_idx=new_ids.get(table.padding_idx), _weight=rows)
    smaller.weight.requires_grad_(table.weight.requires_grad)
    model.set_input_embeddings(smaller.train(table.training))
    model.config.vocab_size = len(kept)
    for name in SPECIAL_IDS:
        if isinstance(old := getattr(model.config, name, None), int):
            setattr(model.config, name, new_ids.get(old))
