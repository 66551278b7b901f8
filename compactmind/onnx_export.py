"""Classifiers as ONNX files that onnxruntime runs, for any batch size and length.

The int8 linears of a W8A8 model become onnxruntime's MatMulIntegerToFloat, its integer product that scales what it has added up: the
same integers as in PyTorch. Activations are shifted to unsigned bytes, and weights too in a u8u8 file: onnxruntime has no fast product
of two signed ones on x86. A u8s8 file leaves weights signed: its products are over twice as fast on CPUs with VNNI, and on x86 CPUs
without they saturate (wrong numbers) unless the session has `session.x64quantprecision` set to 1. A u8s7 file has weights of seven
bits, which fast products of any x86 CPU add up without saturating: the sum of two is at most 2 x 255 x 63; they are rounded once more.
The file is the same to the byte whatever machine writes it. Needs the packages of requirements-export.txt.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compactmind.data import reads_token_types
from compactmind.errors import CompactMindError
from compactmind.files import replace_file
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.quantization.grouped import GroupedWeight, forget_unpacked
from compactmind.methods.quantization.rotation import rotate
from compactmind.methods.quantization.w8a8_encoder import W8A8EncoderBlock
from compactmind.methods.quantization.w8a8_linear import LEVELS, W8A8Linear, activation_scale

FILE = "model.onnx"
"""Its name in the directory of a checkpoint."""
INPUTS = ("input_ids", "attention_mask")
"""And of a model of pairs that has two token types `token_type_ids`."""
OPSET = 23
"""The first one with attention as one operator; onnxruntime 1.23 reads it."""
PRODUCT = "MatMulIntegerToFloat"
"""Of onnxruntime (com.microsoft), for a MatMulInteger and two passes over its result, which ONNX has no single operator for."""
LEFT_ALONE = ("LayerNormalization", "Gelu")
"""What onnxruntime would join with the addition before it into one operator, which is slower than the two: for the norms of 32 sentences
of 128 tokens (three blocks, 384 channels) SkipLayerNormalization takes 16 ms, Sum and LayerNormalization 7."""
PRODUCTS = ("u8u8", "u8s8", "u8s7")
"""Of a W8A8 model: unsigned activations by unsigned weights, by signed ones, or by signed ones of seven bits, see above."""
SEVEN_BITS = 63
"""Largest magnitude of these."""
ZERO = 128
"""The unsigned byte that stands for 0."""


def require_onnx() -> None:
    """Raise CompactMindError with the command that installs them if the packages for ONNX are not there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CompactMindError(f"ONNX needs the package {error.name}: pip install -r requirements-export.txt") from None


class Logits(nn.Module):
    """A classifier as a function of two tensors, of pairs with token types three, that returns one."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each (batch, tokens) int64 -> logits (batch, classes)."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits


def inputs_of(model: PreTrainedModel) -> list[str]:
    """Return the names of what the file of a model takes."""
    pairs = getattr(model.config, "sentence_pairs", False) and reads_token_types(model)
    return [*INPUTS, *(["token_type_ids"] if pairs else [])]


class IntegerProduct(nn.Module):
    """A W8A8Linear as nodes of ONNX, to be traced and not to be run; `products` is one of PRODUCTS. Its weight is (in, out)."""

    def __init__(self, linear: W8A8Linear, products: str):
        super().__init__()
        self.linear, self.out_features, weight = linear, linear.out_features, linear.weight.t().contiguous()
        signed, finer = products != "u8u8", LEVELS / SEVEN_BITS if products == "u8s7" else 1
        weight = (weight / finer).round().to(torch.int8)
        self.register_buffer("weight", weight if signed else (weight.to(torch.int16) + ZERO).to(torch.uint8))
        self.register_buffer("channel_scale", linear.weight_scale.flatten() * finer)
        self.register_buffer("one", torch.tensor(1.0))
        zeros = {"zero": ZERO} if signed else {"zero": ZERO, "weight_zero": ZERO}
        for name, value in zeros.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.uint8))
        self.zeros = tuple(zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features) float32."""
        linear = self.linear
        if linear.hadamard_input is not None:
            x = rotate(x, linear.hadamard_input.matrix)
        scale = activation_scale(x, linear.activations, linear.input_scale)
        scaled = x * scale.reciprocal()
        if linear.activations == "per_tensor_static":  # the others' reach the largest level and no further
            scaled = scaled.clamp(-LEVELS, LEVELS)
        symbolic = torch.onnx.ops.symbolic
        q = symbolic("com.microsoft::QuantizeLinear", (scaled, self.one, self.zero), dtype=torch.uint8, shape=x.shape, version=1)
        factors = q, self.weight, self.one, self.channel_scale, *(getattr(self, name) for name in self.zeros)
        shape = *x.shape[:-1], linear.out_features
        result = symbolic(f"com.microsoft::{PRODUCT}", factors, dtype=torch.float32, shape=shape, version=1) * scale
        return result if linear.bias is None else result + linear.bias


def traceable(model: PreTrainedModel, products: str) -> PreTrainedModel:
    """Return a copy to be traced, not to be run: W8A8 linears are nodes of ONNX, whatever multiplies them here.

    The last block computes its first token alone, which is all that is read of it. Tables of 8 bits are bytes, narrower ones stay packed.
    Its blocks have the forward pass of transformers: that of W8A8 blocks is written for PyTorch's caches.
    """
    model = copy.deepcopy(model).cpu().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, W8A8EncoderBlock):
            module.__class__ = type(module).__mro__[2]
        if isinstance(module, W8A8Linear):
            model.set_submodule(name, IntegerProduct(module, products))
        if isinstance(module, GroupedWeight):
            module.kernel = "dequantized"
    with suppress(CompactMindError):  # of another family: all tokens
        read_all_tokens(model)
        read_first_token_only(model)
    forget_unpacked(model)  # rows of narrow tables stay packed in the file
    for module in model.modules():
        if isinstance(module, GroupedWeight) and module.grid.bits == 8:
            module.unpacked = module.q  # no larger, and nothing has to be unpacked
    return model


def export_classifier(
    model: PreTrainedModel, path: Path, check: Callable[["OnnxClassifier"], None] = lambda exported: None, products: str = "u8u8"
) -> None:
    """Write a classifier as ONNX; it takes the place of an older file when it is whole and `check` of it has raised nothing.

    `products`: of a W8A8 model, one of PRODUCTS. Raises CompactMindError without the packages for it, and whatever `check` raises.
    """
    require_onnx()
    plain = traceable(model, products)
    plain.set_attn_implementation("sdpa")  # one operator, Attention
    example = torch.ones(2, 8, dtype=torch.long)
    names = inputs_of(model)
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about its own insides
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Logits(plain), tuple(example.clone() for _ in names), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=names, output_names=["logits"], dynamic_shapes=({0: batch, 1: tokens},) * len(names),
        )  # fmt: skip
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names directories of this machine
        if node.op_type in LEFT_ALONE and (before := node.inputs[0].producer()) and before.op_type == "Add":
            before.op_type = "Sum"  # the same, but it is not joined
    if any(isinstance(module, IntegerProduct) for module in plain.modules()):
        program.model.metadata_props["int8_products"] = products
    with replace_file(path) as temporary:
        program.save(temporary, external_data=False)
        check(OnnxClassifier(temporary))


class OnnxClassifier:
    """An ONNX file as something that is called like a model: for measuring it beside the others."""

    device = torch.device("cpu")

    def __init__(self, path: Path, config: PretrainedConfig | None = None):
        self.config = config
        require_onnx()
        import onnxruntime

        def session(saturating: bool) -> "onnxruntime.InferenceSession":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            if not saturating:
                options.add_session_config_entry("session.x64quantprecision", "1")
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it takes the cores from who comes next
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        vnni = torch.cpu._is_vnni_supported()
        self.session = session(vnni)  # else products of a u8s8 file saturate on x86
        if not vnni and self.session.get_modelmeta().custom_metadata_map.get("int8_products") == "u8s7":  # none of these does
            self.session = session(True)

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """Each (batch, tokens) int64 -> logits (batch, classes) float32."""
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        if len(self.session.get_inputs()) > len(INPUTS):
            given["token_type_ids"] = (torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids).numpy()
        return torch.from_numpy(self.session.run(["logits"], given)[0])
