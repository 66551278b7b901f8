"""Write classifiers as ONNX files for onnxruntime and check that they give the same logits.

Run:   pip install -r requirements-export.txt
       python export_onnx.py                               (after 3_quantize.py)
       python export_onnx.py --models my-model --tolerance 1e-3
Reads: models/<name>, sst2_data/validation.jsonl
Writes: models/<name>/model.onnx, any batch size and length, an older one replaced only when the logits of the new one are right;
        6_evaluate_report.py then shows its latency beside PyTorch's
"""

from dataclasses import dataclass
from typing import Literal

import torch

from common import PROFILE, StageConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_checkpoint
from compactmind.data import EncodedSentences, load_split, model_inputs, require_same_texts
from compactmind.errors import CompactMindError
from compactmind.formats.table import FORMATS
from compactmind.onnx_export import FILE, OnnxClassifier, export_classifier, require_onnx


# ------------------------------------------------------------------------------------------------------------ constants
@dataclass(frozen=True)
class ExportConfig(StageConfig):
    """Settings of export_onnx.py: classifiers as ONNX."""

    models: tuple[str, ...] = ("student_distilled", "student_pruned", "student_pruned_w8a8")
    """Classifiers under models_dir to write as ONNX."""
    sentences: int = 64
    """Validation sentences on which the logits are compared."""
    tolerance: float = 1e-4
    """Largest difference of a logit that is accepted."""
    int8_tolerance: float = 0.1
    """The same of an int8 model: where a float differs in its last bit, an int8 may be the next one."""
    seven_bit_tolerance: float = 0.5
    """The same with int8_products u8s7, whose weights are not quite the same."""
    int8_products: Literal["u8u8", "u8s8", "u8s7"] = "u8u8"
    """Of W8A8 models. u8u8 is right on every CPU; u8s8 is faster with VNNI (or on ARM) and saturates on x86 CPUs without, unless the
    onnxruntime session there has session.x64quantprecision set to 1; u8s7 is as fast with VNNI and saturates on no CPU, its weights
    rounded once more, to seven bits."""


CONFIG = ExportConfig.for_profile(PROFILE)


def export(name: str, config: ExportConfig) -> None:
    """Export models/<name> and compare its logits with PyTorch's on validation sentences, in batches of several shapes."""
    directory = config.models_dir / name
    checkpoint = load_checkpoint(directory)
    kind, architecture = checkpoint.manifest["kind"], checkpoint.manifest["architecture"]
    if "SequenceClassification" not in architecture or "onnx" not in FORMATS[kind].exports:
        raise CompactMindError(
            f"{directory} is a {architecture} ({kind}): classifiers in full precision or W8A8 can be exported"
        )
    path = directory / FILE
    sentences = EncodedSentences(checkpoint.tokenizer, load_split(config.data_dir, "validation")[: config.sentences], 128)
    require_same_texts(checkpoint.model, sentences)
    int8_tolerance = config.seven_bit_tolerance if config.int8_products == "u8s7" else config.int8_tolerance
    tolerance = int8_tolerance if FORMATS[kind].quantized else config.tolerance
    largest = 0.0

    def check(exported: OnnxClassifier) -> None:
        nonlocal largest
        for size in (1, 7, 32):
            for batch in sentences.evaluation_batches(size):
                inputs = model_inputs(batch, checkpoint.model)
                with torch.inference_mode():
                    wanted = checkpoint.model(**inputs).logits
                difference = (exported(**inputs) - wanted).abs().max().item()
                if not difference <= tolerance:
                    raise CompactMindError(
                        f"{name}: logits of ONNX differ by {difference:.2e}, more than {tolerance:g}: the file was not kept"
                    )
                largest = max(largest, difference)

    export_classifier(checkpoint.model, path, check, config.int8_products)
    print(f"{path} {path.stat().st_size / 1e6:.1f} MB, logits within {largest:.1e} of PyTorch's on {len(sentences)} sentences")


def main(config: ExportConfig) -> None:
    require_onnx()
    for name in config.models:
        export(name, config)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
