"""A GGUF file as a source of weights: dequantized to bfloat16, and the folder that is made of one where a folder is wanted."""

from pathlib import Path

import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compactmind.attention import with_attention_kernel
from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import lock_directory
from compactmind.formats.loading import meta_model, tie_table
from compactmind.guards import check_nothing_missing, check_outputs
from compactmind.manifest import MANIFEST_VERSION, is_up_to_date
from compactmind.published import describe_published, published_as

SUFFIX = ".gguf"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How the tokenizer of Llama 3 cuts text before it looks for pieces."""
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
"""That of Qwen 2 takes digits one by one."""
PRE_TOKENIZERS = {
    "gpt-2": lambda: ByteLevel(add_prefix_space=False),
    "smollm": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": lambda: Sequence([Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "qwen2": lambda: Sequence([Split(Regex(QWEN2), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
}
"""`tokenizer.ggml.pre` of a byte-level tokenizer -> how it cuts text."""


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a GGUF file, dequantized to bfloat16, and its tokenizer.

    transformers counts a model read from GGUF as quantized and refuses to save it, so its weights move, not copied, into a fresh one. Of a
    byte-level tokenizer it does not read how text is cut before pieces are looked for: PRE_TOKENIZERS. Raises CompactMindError if weights
    are missing.
    """
    source, report = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, output_loading_info=True
    )
    check_nothing_missing(path, source, report["missing_keys"])
    settings = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = meta_model(type(source), type(source.config).from_dict(settings))
    model.load_state_dict(source.state_dict(), assign=True)
    tie_table(model)
    model.config.name_or_path = ""  # the maker's working title
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if (way := PRE_TOKENIZERS.get(pre_tokenizer_name(path))) and tokenizer.is_fast:
        tokenizer.backend_tokenizer.pre_tokenizer = way()
    return with_attention_kernel(model), tokenizer


def pre_tokenizer_name(path: Path) -> str | None:
    """Return the name of the way a file's byte-level tokenizer cuts text, None for one of another kind."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind, way = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    return way.contents() if kind and kind.contents() == "gpt2" and way else None


def require_readable(path: Path) -> None:
    """Raise CompactMindError if a file's heads do not divide its channels, which transformers does not read from GGUF."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    channels, heads = (fields.get(f"llama.{name}") for name in ("embedding_length", "attention.head_count"))
    if channels and heads and channels.contents() % heads.contents():
        raise CompactMindError(
            f"{path} has {heads.contents()} heads for {channels.contents()} channels, as a model whose heads were pruned has: "
            "transformers reads none such from GGUF; give the folder that it was made from"
        )


def bytes_dequantized(path: Path) -> int:
    """Return the bytes of a file's weights in bfloat16, from its head alone."""
    from gguf import GGUFReader

    return 2 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def folder_of(source: Path, models_dir: Path, show=print, dry_run: bool = False) -> Path | None:
    """Return the folder a model is read from: `source` itself, or for a GGUF file models_dir/<its name>, made if it is not up to date.

    Says what the file is and that it is dequantized; with `dry_run` only that it would be, and returns None. Raises CompactMindError if it
    is none, or damaged, or if another model has its place.
    """
    if source.suffix.lower() != SUFFIX or source.is_dir():
        return source
    if not source.is_file():
        raise CompactMindError(f"{source} is not there: give a GGUF file or the folder of a model")
    try:
        published = published_as(source)
    except (ValueError, OSError) as error:
        raise CompactMindError(f"{source} is no whole GGUF file ({error}): download it again") from None
    require_readable(source)
    directory = models_dir / source.stem.replace(".", "_")
    config = {"source": f"GGUF file {source.name}", "manifest_version": MANIFEST_VERSION}
    stage = {"script": "gguf_source.py", "config": config, "inputs": {"weights": published["sha256"]}}
    check_outputs([directory], stage["script"], [], models_dir)
    if dry_run and not is_up_to_date(directory, stage):
        room = f"{bytes_dequantized(source) / 1e9:.2f} GB; memory and disk are known once it is there"
        show(f"{source}: would be dequantized to {directory} first, {room}")
        return None
    with lock_directory(directory):
        if not is_up_to_date(directory, stage):
            show(f"{source}: dequantized to {directory} ...")
            try:
                model, tokenizer = read_gguf(source)
            except CompactMindError:
                raise
            except Exception as error:  # noqa: BLE001  gguf, transformers and tokenizers each have their own way to say "damaged"
                reason = " ".join(str(error).split())[:300]
                raise CompactMindError(f"{source} could not be read ({reason}): is it a Llama's?") from None
            save_checkpoint(
                directory,
                model,
                tokenizer,
                kind="dense",
                parent=None,
                stage=stage,
                extra={"published_as": published},
                dtype="bfloat16",
            )
    show(describe_published(str(directory), published))
    if (way := pre_tokenizer_name(source)) and way not in PRE_TOKENIZERS:
        show(
            f"{source}: how its tokenizer cuts text ({way}) is not known here: numbers and contractions may become other tokens"
        )
    return directory
