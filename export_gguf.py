"""Write a language model as one GGUF file for llama.cpp, Ollama and LM Studio: weights, tokenizer, chat template.

Run:   python export_gguf.py                                 (after 5_bayesian_search.py, see docs/language_models.md)
       python export_gguf.py --model models/llama_gptq_3.5x --output x.gguf
Reads: a Llama, Mistral, Granite, Qwen 2 or Qwen 3 under models/, dense, uniformly pruned or of the method gptq, or any such Hugging Face
       folder or GGUF file
Writes: the file; an older one is replaced only when the new one, read back by gguf's own code, holds the weights of the model

What gptq rounded is written on the very same levels (compactmind/gguf_export.py); made with `"layout": "gguf"` it also has no wider type
than it needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import PROFILE, StageConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_any
from compactmind.errors import CompactMindError
from compactmind.files import weight_files
from compactmind.gguf_export import context_of, export_gguf
from compactmind.gguf_source import folder_of


# ------------------------------------------------------------------------------------------------------------ constants
@dataclass(frozen=True)
class GGUFConfig(StageConfig):
    """Settings of export_gguf.py: a language model as one file for llama.cpp."""

    model: str = ""
    """Folder of the model, or a GGUF file; empty: models_dir/llama_gptq_3.5x."""
    output: str = ""
    """File to write; empty: model.gguf in the folder of the model."""
    dtype: Literal["BF16", "F16", "F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = "BF16"
    """Type of the weights that are not rounded yet, the Q types to the nearest level as llama.cpp's own quantizer; norms are F32."""


CONFIG = GGUFConfig.for_profile(PROFILE)


def main(config: GGUFConfig) -> None:
    directory = folder_of(Path(config.model), config.models_dir) if config.model else config.models_dir / "llama_gptq_3.5x"
    checkpoint = load_any(directory)
    path = Path(config.output) if config.output else directory / "model.gguf"
    if path.suffix != ".gguf" or path.is_dir():
        raise CompactMindError(f"output {path}: the name of a file that ends in .gguf")
    counts = export_gguf(checkpoint.model, checkpoint.tokenizer, path, directory.name, config.dtype)
    if (context := context_of(checkpoint.model)) < checkpoint.model.config.max_position_embeddings:
        print(f"the model reads the last {context} tokens, llama.cpp all: they agree up to there, which the file gives as its context")
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda each: -each[1]))
    before = sum(file.stat().st_size for file in weight_files(directory))
    print(
        f"{path} {path.stat().st_size / 1e6:.1f} MB with tokenizer ({before / 1e6:.1f} MB of weights in {directory}); tensors: {types}"
    )


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
