"""A Llama as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run: weights, tokenizer and chat template.

Integers in groups (methods/quantization/grouped.py) lie on the grids of GGUF's simple types, so nothing is rounded a second time:

| grid                           | type | bits a weight | a weight is            |
|--------------------------------|------|---------------|------------------------|
| symmetric, 2 to 4 bits         | Q4_0 | 4.5           | scale * (q - 8)        |
| symmetric, 5 bits              | Q5_0 | 5.5           | scale * (q - 16)       |
| symmetric, 6 and 8 bits        | Q8_0 | 8.5           | scale * q              |
| with a minimum, 2 to 4 bits    | Q4_1 | 5             | scale * q + minimum    |
| with a minimum, 5 bits         | Q5_1 | 6             | scale * q + minimum    |
| with super-blocks, 2 to 6 bits | Q2_K to Q6_K: methods/quantization/superblocks.py |

Blocks of the others have 32 weights; of a larger group every block gets the scale. What has the bits of its type and groups of 32 takes
as many bytes as it did (`"layout": "gguf"` and `"gguf_k"` of gptq choose among these alone). Rows of q and k are in another order there:
the two halves that RoPE turns together are next to each other. Norms are float32, everything else that is not rounded has the dtype that
is asked for.
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
from compactmind.gguf_tokenizer import write_tokenizer
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.quantization.grid import GGUF_BLOCK as BLOCK
from compactmind.methods.quantization.grid import SUPERBLOCK
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, GroupedWeight, TiedHead
from compactmind.methods.quantization.superblocks import multiples_of

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What weights that are not rounded may be written as."""
ROUNDED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""... or in blocks of 32, to the nearest level as llama.cpp's quantizer does it; table and head in Q8_0 then."""
FAMILIES = ("llama", "mistral")
"""`model_type` of the models that llama.cpp computes as its `llama`."""
PARTS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""Linear of a block -> its name there."""


# ----------------------------------------------------------------------------------------------------------------- weights
def encoded(weight: GroupedWeight, rows: torch.Tensor | None = None) -> tuple[numpy.ndarray, str]:
    """Return the bytes of a weight, uint8 (rows, bytes of a row), with its rows in the order `rows`, and their type.

    Raises ValueError if GGUF has no type for it.
    """
    kind, grid, width = weight.grid.gguf_type, weight.grid, weight.shape[1]
    if kind is None or width % BLOCK:
        raise ValueError(f"no GGUF type holds rows of {width} weights in {grid}")
    order = slice(None) if rows is None else rows
    if grid.superblocks:
        return _superblocks(weight, order), kind
    q = weight.q[order].to(torch.int16).view(-1, width // BLOCK, BLOCK)
    times = (width if grid.group_size == -1 else grid.group_size) // BLOCK
    scale, zero = (each[order].repeat_interleave(times, 1)[:, : width // BLOCK, None] for each in (weight.scale, weight.zero))
    bits = int(kind[1])
    parts = [_bytes_of(scale.half())]
    if kind.endswith("_1"):
        parts.append(_bytes_of(zero.half()))
    else:
        q = q - 2 ** (grid.bits - 1) + (0 if bits == 8 else 2 ** (bits - 1))
    if bits == 8:
        parts.append(_bytes_of(q.to(torch.int8)))
    else:
        if bits == 5:
            high = (q >> 4).to(torch.int64) << torch.arange(BLOCK, device=q.device)
            parts.append(_bytes_of(high.sum(-1, keepdim=True))[..., :4])  # 32 bits, the lowest first
        low = q & 15
        parts.append(_bytes_of((low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4).to(torch.uint8)))
    return numpy.concatenate(parts, -1).reshape(len(q), -1), kind


def _superblocks(weight: GroupedWeight, order: torch.Tensor | slice) -> numpy.ndarray:
    """Return the bytes of a weight with super-blocks, uint8 (rows, bytes of a row): blocks of a K type as ggml-common.h has them."""
    grid, q = weight.grid, weight.q[order].to(torch.int32).view(-1, SUPERBLOCK)  # (super-blocks, weights)
    count = grid.fitted_together
    (step, scales), (least_step, minima) = (multiples_of(each[order], count) for each in (weight.scale, -weight.zero.half()))
    step, least_step = (each.reshape(-1, 1) for each in (step, least_step))
    scales, minima = (each.reshape(-1, count).int() for each in (scales, minima))
    halves = q.view(-1, 2, SUPERBLOCK // 2)
    quarters = halves.unflatten(-1, (4, 32))  # of each half, which share bytes
    if grid.bits == 2:
        parts = [scales | minima << 4, _shifted(quarters, 2), step, least_step]
    elif grid.bits == 3:
        high = _shifted((q >> 2).view(-1, 1, 8, 32), 1)
        parts = [high, _shifted(quarters & 3, 2), _six_bits_of_sixteen(scales + 32), step]
    elif grid.bits == 6:
        low = halves & 15
        low = low[..., :64] | low[..., 64:] << 4
        parts = [low, _shifted(quarters >> 4, 2), scales, step]
    else:
        pairs = q.view(-1, 4, 2, 32)
        low = (pairs[:, :, 0] & 15) | (pairs[:, :, 1] & 15) << 4
        high = [_shifted((q >> 4).view(-1, 1, 8, 32), 1)] if grid.bits == 5 else []
        parts = [step, least_step, _six_bits_of_eight(scales, minima), *high, low]
    written = [_bytes_of(each if each.dtype == torch.float16 else (each & 255).to(torch.uint8)) for each in parts]
    rows = len(weight.q[order])
    return numpy.concatenate([each.reshape(len(q), -1) for each in written], -1).reshape(rows, -1)


def _shifted(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """Return bytes (blocks, n, 32) that have of (blocks, n, parts, 32) numbers of `bits` bits the first part in the lowest bits."""
    shifts = bits * torch.arange(parts.shape[2], device=parts.device)
    return (parts << shifts[:, None]).sum(2)


def _six_bits_of_eight(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Return the 12 bytes of 8 scales and 8 minima, (blocks, 8) each, of Q4_K and Q5_K."""
    first, second = (each[:, :4] | each[:, 4:] >> 4 << 6 for each in (scales, minima))
    return torch.cat([first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], 1)


def _six_bits_of_sixteen(scales: torch.Tensor) -> torch.Tensor:
    """Return the 12 bytes of 16 scales (blocks, 16) from 0 to 63 of Q3_K."""
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    return torch.cat([low, _shifted((scales >> 4).view(-1, 1, 4, 4), 2)[:, 0]], 1)


def _bytes_of(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.contiguous().cpu().numpy().view(numpy.uint8)


def rope_order(rows: int, heads: int) -> torch.Tensor:
    """Return the order, (rows,), in which llama.cpp has the rows of q or k: of each head the two halves in turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def tensors_of(model: PreTrainedModel, dtype: str) -> Iterator[tuple[str, numpy.ndarray, str]]:
    """Yield the name, the data and the type of every tensor of a file. Raises CompactMindError naming a weight that GGUF cannot hold."""

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
    yield "output_norm.weight", *_plain(model.model.norm.weight.detach(), "F32")
    if (factors := _rope_factors(model)) is not None:
        yield "rope_freqs.weight", *_plain(factors, "F32")
    for number, block in enumerate(llama_blocks(model)):
        for norm, name in ((block.input_norm, "attn_norm"), (block.post_norm, "ffn_norm")):
            yield f"blk.{number}.{name}.weight", *_plain(norm.weight.detach(), "F32")
        for field in LINEARS:
            linear, rows = getattr(block, field), None
            if field in ("q", "k"):
                rows = rope_order(linear.out_features, linear.out_features // block.head_dim)
            yield tensor_of(f"blk.{number}.{PARTS[field]}", linear, rows)
            if linear.bias is not None:
                bias = linear.bias.detach()[slice(None) if rows is None else rows]
                yield f"blk.{number}.{PARTS[field]}.bias", *_plain(bias, "F32")


def _plain(weight: torch.Tensor, dtype: str) -> tuple[numpy.ndarray, str]:
    if dtype in ROUNDED:
        return _rounded(weight, dtype), dtype
    if dtype == "BF16":
        return _bytes_of(weight.to(torch.bfloat16).view(torch.int16)), dtype
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
def require_exportable(model: PreTrainedModel) -> None:
    """Raise CompactMindError, before anything is written, if llama.cpp has no architecture for a model."""
    config = model.config
    if config.model_type not in FAMILIES or not hasattr(getattr(model, "model", None), "layers"):
        raise CompactMindError(
            f"a {config.model_type} model ({type(model).__name__}) is not exported to GGUF: {' and '.join(FAMILIES)} are; "
            "a dense model of another family is converted by llama.cpp's convert_hf_to_gguf.py"
        )
    blocks = llama_blocks(model)
    for field in LINEARS:
        shapes = {(getattr(block, field).out_features, getattr(block, field).in_features) for block in blocks}
        if len(shapes) > 1:
            shown = ", ".join(f"{out} x {into}" for out, into in sorted(shapes))
            raise CompactMindError(
                f'{field} is {shown} in different blocks: llama.cpp wants the same widths everywhere; prune with `"scope": "uniform"`'
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
    writer.add_context_length(config.max_position_embeddings)
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
        writer = gguf.GGUFWriter(temporary, "llama")
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
    for name, module, expected in _weights_of(model):
        tensor = held[name]
        stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.tensor_type.name in DTYPES:
            expected = expected.to(DTYPES[tensor.tensor_type.name]).float()
        elif dtype in ROUNDED and not isinstance(module, GroupedWeight):
            again = gguf.quants.dequantize(_rounded(expected, tensor.tensor_type.name), tensor.tensor_type)
            expected = torch.from_numpy(again.copy())
        most = float((stored.view_as(expected) - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        if not most <= 3e-7:
            return f"{name} by {most:.1e}"
    return ""


def _weights_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield the weights that are computed with, float32, by their names in a file, and what has them."""

    def weight(module: nn.Module) -> torch.Tensor:
        return module.dequantize() if isinstance(module, GroupedWeight) else module.weight.detach().float()

    yield "token_embd.weight", model.get_input_embeddings(), weight(model.get_input_embeddings())
    for number, block in enumerate(llama_blocks(model)):
        for field in LINEARS:
            linear = getattr(block, field)
            values = weight(linear)
            if field in ("q", "k"):
                heads = linear.out_features // block.head_dim
                values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
            yield f"blk.{number}.{PARTS[field]}.weight", linear, values
