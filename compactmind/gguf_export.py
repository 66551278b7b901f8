"""A Llama as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run: weights, tokenizer and chat template.

What gptq rounded is written on its own levels (gguf_blocks.py). Rows of q and k are in another order in a Llama's file: the two halves
that RoPE turns together are next to each other. Norms are float32, everything else that is not rounded has the dtype that is asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.errors import CompactMindError
from compactmind.files import replace_file, require_free_space
from compactmind.gguf_blocks import bytes_of, encoded
from compactmind.gguf_tokenizer import write_tokenizer
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks, llama_type
from compactmind.methods.quantization.grid import GGUF_ARCHITECTURES, GGUFArchitecture
from compactmind.methods.quantization.grid import GGUF_BLOCK as BLOCK
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, GroupedWeight, TiedHead

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What weights that are not rounded may be written as."""
ROUNDED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""... or in blocks of 32, to the nearest level as llama.cpp's quantizer does it; table and head in Q8_0 then."""
UNIFORM = (
    "python 5_bayesian_search.py --strategy fixed --pipeline "
    """'[{"method": "prune", "params": {"sparsity": 0.2, "scope": "uniform"}}, {"method": "retrain"}]'"""
)
PARTS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""Linear of a block -> its name there."""


# ----------------------------------------------------------------------------------------------------------------- weights
def rope_order(rows: int, heads: int) -> torch.Tensor:
    """Return the order, (rows,), in which llama.cpp has the rows of q or k: of each head the two halves in turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def tensors_of(model: PreTrainedModel, dtype: str) -> Iterator[tuple[str, numpy.ndarray, str]]:
    """Yield the name, the data and the type of every tensor of a file. Raises CompactMindError naming a weight that GGUF cannot hold."""
    in_turns = architecture_of(model).in_turns

    def tensor_of(
        name: str, module: nn.Module, rows: torch.Tensor | None = None, kind: str = dtype
    ) -> tuple[str, numpy.ndarray, str]:
        try:
            if isinstance(module, GroupedWeight):
                return f"{name}.weight", *encoded(module, rows)
            return f"{name}.weight", *_plain(module.weight.detach()[slice(None) if rows is None else rows], kind)
        except ValueError as error:
            way = 'make it with `"layout": "gguf"` among the params of gptq, which takes the grids GGUF has'
            raise CompactMindError(f"{name}: {error}; {way if isinstance(module, GroupedWeight) else 'write it as BF16'}") from None

    of_tables = "Q8_0" if dtype in ROUNDED else dtype
    yield tensor_of("token_embd", model.get_input_embeddings(), kind=of_tables)
    head = model.get_output_embeddings()
    if not isinstance(head, TiedHead) and not _same(head, model.get_input_embeddings()):
        yield tensor_of("output", head, kind=of_tables)
    for name, values in _vectors_of(model):
        yield name, *_plain(values, "F32")
    for number, block in enumerate(llama_blocks(model)):
        for field in LINEARS:
            linear, rows = getattr(block, field), None
            if in_turns and field in ("q", "k"):
                rows = rope_order(linear.out_features, linear.out_features // block.head_dim)
            yield tensor_of(f"blk.{number}.{PARTS[field]}", linear, rows)


def _vectors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the values of everything that is no matrix: norms, biases, factors of RoPE."""
    yield "output_norm.weight", model.model.norm.weight.detach()
    if (factors := _rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    for number, block in enumerate(llama_blocks(model)):
        norms = {"attn_norm": block.input_norm, "ffn_norm": block.post_norm}
        norms |= {f"attn_{part}_norm": getattr(block.module.self_attn, f"{part}_norm", None) for part in ("q", "k")}
        for name, norm in norms.items():
            if norm is not None:
                yield f"blk.{number}.{name}.weight", norm.weight.detach()
        for field in LINEARS:
            linear = getattr(block, field)
            if linear.bias is None:
                continue
            bias = linear.bias.detach()
            if architecture_of(model).in_turns and field in ("q", "k"):
                bias = bias[rope_order(linear.out_features, linear.out_features // block.head_dim)]
            yield f"blk.{number}.{PARTS[field]}.bias", bias


def _plain(weight: torch.Tensor, dtype: str) -> tuple[numpy.ndarray, str]:
    """Return a tensor that is not rounded yet in a dtype, and that. Raises ValueError if its numbers do not go into it."""
    if dtype == "F16" and weight.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{float(weight.abs().max()):.3g} is beyond F16, which ends at 65504")
    if dtype in ROUNDED:
        return _rounded(weight, dtype), dtype
    if dtype == "BF16":
        return bytes_of(weight.to(torch.bfloat16).view(torch.int16)), dtype
    return weight.to(DTYPES[dtype]).contiguous().cpu().numpy(), dtype


def _rounded(weight: torch.Tensor, dtype: str) -> numpy.ndarray:
    """Return a weight in one of ROUNDED, uint8 (rows, bytes of a row). Raises ValueError if blocks do not fill its rows."""
    import gguf

    if weight.shape[1] % BLOCK:
        raise ValueError(f"{dtype} is for rows of a multiple of {BLOCK} weights, not {weight.shape[1]}")
    return gguf.quants.quantize(weight.float().cpu().numpy(), gguf.GGMLQuantizationType[dtype])


def _same(head: nn.Module, table: nn.Module) -> bool:
    one, other = getattr(head, "weight", None), getattr(table, "weight", None)
    return one is not None and other is not None and one.data_ptr() == other.data_ptr()


def _rope_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """Return what the frequencies of RoPE are divided by, (head_dim / 2,), None where they are those of the base."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    size = llama_blocks(model)[0].head_dim
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()


# ---------------------------------------------------------------------------------------------------------------- what can be
def architecture_of(model: PreTrainedModel) -> GGUFArchitecture:
    """Return what llama.cpp computes a model as. Raises CompactMindError if it has nothing for it that is written here."""
    if (known := GGUF_ARCHITECTURES.get(kind := llama_type(model))) is None or not hasattr(getattr(model, "model", None), "layers"):
        raise CompactMindError(
            f"a {kind} model ({type(model).__name__}) is not exported to GGUF: {', '.join(GGUF_ARCHITECTURES)} are; "
            "a dense model of another family is converted by llama.cpp's convert_hf_to_gguf.py"
        )
    return known


def context_of(model: PreTrainedModel) -> int:
    """Return how many tokens llama.cpp computes as the model does: it reads all of them where the model has a window of some."""
    return min(model.config.max_position_embeddings, getattr(model.config, "sliding_window", None) or 10**9)


def require_exportable(model: PreTrainedModel) -> None:
    """Raise CompactMindError, before anything is written, if llama.cpp has no architecture for a model."""
    config = model.config
    architecture_of(model)
    blocks = llama_blocks(model)
    for field in LINEARS:
        shapes = {(getattr(block, field).out_features, getattr(block, field).in_features) for block in blocks}
        if len(shapes) > 1:
            shown = ", ".join(f"{out} x {into}" for out, into in sorted(shapes))
            raise CompactMindError(
                f"{field} is {shown} in different blocks: llama.cpp wants the same widths everywhere; prune so with `{UNIFORM}`"
            )
    modules = {f"{block.name}.{LINEARS[field]}": getattr(block, field) for block in blocks for field in LINEARS}
    modules |= {"the table": model.get_input_embeddings(), "the head": model.get_output_embeddings()}
    for name, module in modules.items():
        if type(module) not in (nn.Linear, nn.Embedding, GroupedLinear, GroupedEmbedding, TiedHead):
            raise CompactMindError(
                f"{name} is a {type(module).__name__}: dense and gptq models are exported to GGUF; "
                "make one with `python 5_bayesian_search.py --strategy fixed --pipeline "
                '\'[{"method": "gptq", "params": {"bits": 4, "layout": "gguf"}}]\'`'
            )
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise CompactMindError(f"{name} holds NaN or infinite numbers: the model is of no use")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise CompactMindError(f"hidden_act {config.hidden_act!r}: llama.cpp's llama knows silu alone")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CompactMindError(f"rope_type {kind!r} is not exported: default, linear and llama3 are")


def _metadata(writer: Any, model: PreTrainedModel, block: LlamaBlock, name: str) -> None:
    config, rope = model.config, model.config.rope_parameters
    heads, key_heads = (getattr(block, field).out_features // block.head_dim for field in ("q", "k"))
    writer.add_name(name)
    writer.add_quantized_by("compactmind")
    writer.add_quantization_version(2)
    writer.add_context_length(context_of(model))
    writer.add_embedding_length(block.input_norm.weight.numel())
    writer.add_block_count(len(llama_blocks(model)))
    writer.add_feed_forward_length(block.up.out_features)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(block.head_dim)
    writer.add_value_length(block.head_dim)
    writer.add_rope_dimension_count(block.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture_of(model).name == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    writer.add_vocab_size(config.vocab_size)


# -------------------------------------------------------------------------------------------------------------------- file
def export_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str, dtype: str = "BF16"
) -> dict[str, int]:
    """Write a Llama as a GGUF file; returns how many tensors it has of each type. An older file is replaced when the new one is whole.

    `name`: what the file says it is called; `dtype`: one of DTYPES or ROUNDED, of weights that are not rounded yet. Raises
    CompactMindError saying what cannot be exported and what could be instead, before the file is touched.
    """
    import gguf

    require_exportable(model)
    require_free_space(path.parent, sum(each.numel() * each.element_size() for each in model.state_dict().values()))
    counts: dict[str, int] = {}
    with replace_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture_of(model).name)
        try:
            _metadata(writer, model, llama_blocks(model)[0], name)
            write_tokenizer(writer, tokenizer, model.get_input_embeddings().num_embeddings)
            for tensor, data, kind in tensors_of(model, dtype):
                counts[kind] = counts.get(kind, 0) + 1
                raw = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(tensor, data, raw_dtype=raw)
            most = max((kind for kind in counts if kind != "F32"), key=counts.get, default="F32")
            known = gguf.LlamaFileType.__members__  # of the mixtures with much of a K type the small one
            names = ["ALL_F32"] if most == "F32" else [f"MOSTLY_{most}", f"MOSTLY_{most}_S"]
            writer.add_file_type(next(known[name] for name in names if name in known))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        if difference := largest_difference(model, temporary, dtype):
            raise CompactMindError(f"{path} would not hold the weights of the model ({difference}): it was not kept")
    return counts


def largest_difference(model: PreTrainedModel, path: Path, dtype: str = "F32") -> str:
    """Return which tensor of a GGUF file, read by gguf's own code, is not the model's, and by how much; empty if all are.

    A minimum is added by gguf after the product was rounded to float32, here before: they may differ in the last place.
    """
    import gguf

    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = list(_weights_of(model))
    if missing := {name for name, *_ in expected} ^ set(held):
        return f"{', '.join(sorted(missing))}: in one of both alone"
    for name, module, values in expected:
        tensor = held[name]
        stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.tensor_type.name in DTYPES:
            values = values.to(DTYPES[tensor.tensor_type.name]).float()
        elif dtype in ROUNDED and not isinstance(module, GroupedWeight):
            again = gguf.quants.dequantize(_rounded(values, tensor.tensor_type.name), tensor.tensor_type)
            values = torch.from_numpy(again.copy())
        most = float((stored.view_as(values) - values).abs().max()) / max(float(values.abs().max()), 1e-30)
        if not most <= 3e-7:
            return f"{name} by {most:.1e}"
    return ""


def _weights_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield all that is computed with, float32, by its name in a file, and what has it."""

    def weight(module: nn.Module) -> torch.Tensor:
        return module.dequantize() if isinstance(module, GroupedWeight) else module.weight.detach().float()

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield "token_embd.weight", table, weight(table)
    if not isinstance(head, TiedHead) and not _same(head, table):
        yield "output.weight", head, weight(head)
    for name, values in _vectors_of(model):
        yield name, model, values.float()
    for number, block in enumerate(llama_blocks(model)):
        for field in LINEARS:
            linear = getattr(block, field)
            values = weight(linear)
            if architecture_of(model).in_turns and field in ("q", "k"):
                heads = linear.out_features // block.head_dim
                values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
            yield f"blk.{number}.{PARTS[field]}.weight", linear, values
