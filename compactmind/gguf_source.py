"""A GGUF file as a source of weights: dequantized to bfloat16, and the folder that is made of one where a folder is wanted."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import lock_directory
from compactmind.guards import check_outputs
from compactmind.manifest import MANIFEST_VERSION, is_up_to_date
from compactmind.published import in_words, published_as

SUFFIX = ".gguf"


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a GGUF file, dequantized to bfloat16, and its tokenizer.

    transformers counts a model read from GGUF as quantized and refuses to save it, so its weights move into a fresh one.
    """
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    settings = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = type(source)(type(source.config).from_dict(settings))
    for parameter in model.parameters():  # not model.to, which would round the frequencies of RoPE too
        parameter.data = parameter.data.to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.config.name_or_path = ""  # the maker's working title
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def folder_of(source: Path, models_dir: Path, show=print) -> Path:
    """Return the folder a model is read from: `source` itself, or for a GGUF file models_dir/<its name>, made if it is not up to date.

    Says what the file is and that it is dequantized. Raises CompactMindError if it is none, or damaged, or if another model has its place.
    """
    if source.suffix.lower() != SUFFIX or source.is_dir():
        return source
    if not source.is_file():
        raise CompactMindError(f"{source} is not there: give a GGUF file or the folder of a model")
    try:
        published = published_as(source)
    except (ValueError, OSError) as error:
        raise CompactMindError(f"{source} is no whole GGUF file ({error}): download it again") from None
    directory = models_dir / source.stem.replace(".", "_")
    config = {"source": f"GGUF file {source.name}", "manifest_version": MANIFEST_VERSION}
    stage = {"script": "gguf_source.py", "config": config, "inputs": {"weights": published["sha256"]}}
    check_outputs([directory], stage["script"], [], models_dir)
    with lock_directory(directory):
        if not is_up_to_date(directory, stage):
            show(f"{source}: dequantized to {directory} ...")
            try:
                model, tokenizer = read_gguf(source)
            except Exception as error:  # noqa: BLE001  gguf, transformers and tokenizers each have their own way to say "damaged"
                raise CompactMindError(f"{source} could not be read ({str(error).strip()[:300]}): is it a Llama's?") from None
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
    show(in_words(str(directory), published))
    return directory
