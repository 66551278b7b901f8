"""The tokenizer and the chat template of a GGUF file: byte-level BPE under llama.cpp's names, and BPE of SentencePiece."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from compactmind.errors import CompactMindError
from compactmind.gguf_source import LLAMA3, QWEN2


def pre_tokenizer_of(description: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the way a byte-level BPE tokenizer cuts text first, from its tokenizer.json; None if it has none."""
    pre = description.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    before, regex = parts[:-1], parts[-1].get("use_regex", True)
    if regex and not before:
        return "gpt-2"
    if regex and [(each["type"], each.get("individual_digits")) for each in before] == [("Digits", True)]:
        return "smollm"
    if not regex and len(before) == 1 and before[0]["type"] == "Split":
        pattern = before[0].get("pattern", {}).get("Regex")
        return {LLAMA3: "llama-bpe", QWEN2: "qwen2"}.get(pattern)
    return None


def dropped_normalizer(description: dict[str, Any], pieces: bool) -> str | None:
    """Return the name of what a tokenizer does to a text first and a GGUF file cannot say, from its tokenizer.json; None: nothing.

    llama.cpp leaves out NFC too, which Qwen's has and which changes no text that is typed.
    """
    normalizer = description.get("normalizer") or {}
    known = ("Prepend", "Replace") if pieces else ("NFC",)
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return next((part["type"] for part in parts if part["type"] not in known), None)


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write a tokenizer and its chat template with an open `gguf.GGUFWriter`: pieces of the first `rows` ids.

    Raises CompactMindError if it is of a kind that GGUF has no name for.
    """
    from gguf import TokenType

    if not tokenizer.is_fast:
        raise CompactMindError("the tokenizer has no tokenizer.json: GGUF wants the pieces of a fast one")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = description["model"], {each["id"]: each for each in description["added_tokens"]}
    pieces = model.get("byte_fallback") and any(name.startswith("<0x") for name in model["vocab"])
    pre = pre_tokenizer_of(description)
    if model["type"] != "BPE" or not (pieces or pre):
        raise CompactMindError(
            f"the tokenizer ({model['type']}, {json.dumps(description.get('pre_tokenizer'))[:120]}) is none that GGUF has a name for: "
            "BPE of SentencePiece as of Llama 2 and Mistral, and byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen 2 are exported"
        )
    if way := dropped_normalizer(description, pieces):
        raise CompactMindError(f"the tokenizer changes texts first ({way}), which GGUF has no way to say: it is not exported")
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    if max(names, default=0) >= rows:
        raise CompactMindError(
            f"the tokenizer has {names[max(names)]!r} as number {max(names)} and the table {rows} rows: they do not belong together"
        )
    tokens, types = [], []
    for number in range(rows):
        name = names.get(number)
        tokens.append(f"[PAD{number}]" if name is None else name)
        if name is None:
            types.append(TokenType.UNUSED)
        elif number in added:
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        elif pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    if pieces:
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(number) for number in range(rows)])  # pieces stand in the order they were merged in
        writer.add_add_space_prefix(bool(tokenizer("a", add_special_tokens=False).tokens()[0].startswith("\u2581")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    writer.add_token_types(types)
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
