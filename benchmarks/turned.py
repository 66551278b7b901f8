"""Write the control without the grid, "base turned": a Llama with the same outputs and generic weights.

Run:   python benchmarks/turned.py --model models/llama --output models/llama_turned      (after python download_model.py)
Reads: any local Hugging Face folder of a Llama-like causal LM with RMSNorm
Writes: an ordinary Hugging Face folder: what quantizes the one quantizes the other. Seconds on 2 CPU cores for SmolLM2-135M

Why: the embedded Llama is a dequantized GGUF file, so all weights of a block of 32 lie on 16 equidistant values (Q4_1). A quantizer whose
grid happens to fit that one looks better than it is, and one whose grid does not looks worse: what is measured on `models/llama` is how
well the old grid is found again. Here the residual stream is turned by a random orthogonal matrix (compactmind/methods/quantization/
stream_rotation.py): each weight becomes a sum over its whole row or column, and no grid is left, while the model computes what it did, up
to the rounding to its own dtype (--dtype float32 for none). Report both: a method that wins on one alone owes it to the grid.

What else is different: outliers of single channels are spread (a help to simple quantizers), q/k/v and gate/up hold the weights of the
norms, v's and up's outputs and their order are as they were, and a tied head has become a table of its own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_as_released, save_checkpoint  # noqa: E402
from compactmind.code_version import code_version  # noqa: E402
from compactmind.forward import next_token_logits  # noqa: E402
from compactmind.guards import check_outputs, check_released  # noqa: E402
from compactmind.manifest import identity_of  # noqa: E402
from compactmind.methods.quantization.stream_rotation import random_orthogonal, rotate_stream  # noqa: E402

SCRIPT = "benchmarks/turned.py"


@dataclass(frozen=True)
class TurnedConfig(StageConfig):
    model: Path = Path("models/llama")
    """The Llama to turn."""
    output: Path = Path("models/llama_turned")
    """Where the turned one goes."""
    dtype: Literal["as_released", "float32"] = "as_released"
    """What its weights are stored in; bfloat16 rounds each to 8 bits once more."""


def main(config: TurnedConfig) -> None:
    check_released(config.model)
    check_outputs([config.output], SCRIPT, [config.model], config.models_dir)
    model, tokenizer = load_as_released(config.model)
    if config.dtype == "float32":
        model.float()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.config.dtype = dtype
    tokens = torch.randint(len(tokenizer), (64,), generator=torch.Generator().manual_seed(config.seed))
    before = next_token_logits(model, tokens).float()
    rotate_stream(model, random_orthogonal(model.config.hidden_size, config.seed))
    difference = (next_token_logits(model, tokens).float() - before).norm() / before.norm()
    stage = {"script": SCRIPT, "config": config.relevant("seed", "dtype"), "inputs": {"model": identity_of(config.model)}}
    save_checkpoint(
        config.output, model, tokenizer, kind="dense", parent=config.model.name, beside=config.model,
        stage={**stage, "code": code_version(__file__)}, dtype=dtype,
    )  # fmt: skip
    print(f"in {dtype} the logits of 64 random tokens differ by {difference:.1e} of their norm")
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(TurnedConfig.for_profile()))
