"""llama.cpp's block formats as its llama-quantize mixes them over tensors (Q4_K_M and its kin), tables included.

Run:   .peers/llama_cpp/bin/python benchmarks/peers/llama_cpp.py --model models/llama --output peers/q4_k_m --type Q4_K_M
       ... --importance True --calibration calibration.json       (with an importance matrix, what llama-imatrix measures)
       ... --q3_k_instead IQ4_NL   (where 256 does not divide the columns: as llama.cpp did in 2025, see README.md)
       ... --as_tied True      (input table in the head's format: for a head that is the input table with a norm folded in)
Environment: python -m venv .peers/llama_cpp && .peers/llama_cpp/bin/pip install -r benchmarks/peers/requirements-llama_cpp.txt

`ggml_quantize_chunk` of the library in the wheel makes every tensor, as llama-quantize does; gguf's reference code reads the file back.
Which format a tensor gets is decided by C++ that the wheel does not hold, so `type_of` says it again, for Llamas and the six file types
here. The file holds no tokenizer, like the safetensors of the others. The importance matrix is the mean square of every input of every
linear over the calibration tokens.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from peer import EMBEDDING, HEAD, WRITTEN, Taken, arguments, calibration_windows, read_weights, write_result
from transformers import AutoModelForCausalLM

IN_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
FILE_TYPES = {
    "Q4_0": Type.Q4_0,
    "Q8_0": Type.Q8_0,
    "Q3_K_M": Type.Q3_K,
    "Q4_K_M": Type.Q4_K,
    "Q5_K_M": Type.Q5_K,
    "Q6_K": Type.Q6_K,
}
"""The file types of this script and the format of most of their tensors."""
INSTEAD = {Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""What a tensor gets whose columns are no multiple of the 256 of a K block, but of 32."""
OUTSIDE = {EMBEDDING: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{block}.{IN_BLOCK[part]}.weight"


def pair_up(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return query or key rows in llama.cpp's order: the two halves that RoPE turns together side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def unpair(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `pair_up`."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config: dict) -> int:
    """Return how many heads the rows of a query or key projection belong to, 0 for every other tensor."""
    if "q_proj" in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if "k_proj" in name else 0


def type_of(name: str, file_type: str, config: dict, importance: bool, instead: dict[Type, Type] = INSTEAD) -> Type:
    """Return the format that llama-quantize gives a matrix of a Llama (llama-quant.cpp, llama_tensor_get_type), by its name there."""
    default = FILE_TYPES[file_type]
    block, blocks = int(name.split(".")[1]) if name.startswith("blk.") else 0, config["num_hidden_layers"]
    columns = config["hidden_size"] if "ffn_down" not in name else config["intermediate_size"]
    more_bits = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    chosen = default
    if name == OUTSIDE[HEAD] or (name == OUTSIDE[EMBEDDING] and config["tie_word_embeddings"]):
        chosen = Type.Q8_0 if default == Type.Q8_0 or columns % gguf.GGML_QUANT_SIZES[default][0] else Type.Q6_K
    elif "attn_v" in name and file_type == "Q3_K_M":
        chosen = Type.Q5_K if block < 2 else Type.Q4_K
    elif "ffn_down" in name and file_type == "Q3_K_M":
        chosen = Type.Q5_K if block < blocks // 16 else Type.Q4_K
    elif "attn_output" in name and file_type == "Q3_K_M":
        chosen = Type.Q4_K
    elif ("attn_v" in name or "ffn_down" in name) and file_type in ("Q4_K_M", "Q5_K_M") and more_bits:
        chosen = Type.Q6_K
    elif "ffn_down" in name and file_type == "Q4_0" and importance and block < blocks // 8:
        chosen = Type.Q4_1
    return chosen if columns % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else instead[chosen]


def quantize(weight: torch.Tensor, target: Type, importance: torch.Tensor | None) -> np.ndarray:
    """Return a float32 matrix (rows, columns) in a block format by llama.cpp's own code, uint8 (rows, bytes of a row)."""
    rows, columns = weight.shape
    packed = np.empty(gguf.quant_shape_to_byte_shape((rows, columns), target), dtype=np.uint8)
    weight = weight.contiguous()
    floats = ctypes.POINTER(ctypes.c_float)
    squares = ctypes.cast(importance.contiguous().data_ptr(), floats) if importance is not None else None
    library = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats
    ]  # fmt: skip
    written = library.ggml_quantize_chunk(
        int(target), ctypes.cast(weight.data_ptr(), floats), packed.ctypes.data, 0, rows, columns, squares
    )
    assert written == packed.nbytes
    return packed


def write_gguf(
    weights: dict[str, torch.Tensor], config: dict, path: Path, file_type: str, importance: dict, instead: dict[Type, Type]
) -> None:
    """Write a Llama as a GGUF file without a tokenizer: matrices quantized, norms in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
    for name, weight in weights.items():
        weight = pair_up(weight.float(), heads_of(name, config)) if heads_of(name, config) else weight.float()
        called = gguf_name(name)
        if weight.dim() == 1:
            writer.add_tensor(called, weight.numpy())
        else:
            target = type_of(called, file_type, config, bool(importance), instead)
            writer.add_tensor(called, quantize(weight, target, importance.get(called)), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def mean_squares(folder: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return per linear, by llama.cpp's name, the mean square of its inputs over all tokens: float32 (columns,)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = {}

    def add(name: str):
        def hook(module, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].reshape(-1, module.in_features).square().sum(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add(gguf_name(f"{name}.weight")))
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    if model.config.tie_word_embeddings:  # llama.cpp quantizes the one tensor under the table's name
        sums[OUTSIDE[EMBEDDING]] = sums.pop(OUTSIDE[HEAD])
    return {name: total / windows.numel() for name, total in sums.items()}


def main() -> None:
    args = arguments(__doc__, type="Q4_K_M", importance=False, samples=24, as_tied=False, q3_k_instead="Q4_0")
    if args.type not in FILE_TYPES:
        raise SystemExit(f"error: --type {args.type!r}: choose one of {', '.join(FILE_TYPES)}")
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    base = read_weights(args.model)
    target = args.output / WRITTEN / f"{args.type}.gguf"
    target.parent.mkdir(parents=True)
    taken = Taken()
    importance = mean_squares(args.model, calibration_windows(args.calibration, args.samples)) if args.importance else {}
    as_taken = config | ({"tie_word_embeddings": True} if args.as_tied else {})
    instead = INSTEAD | {Type.Q3_K: Type[args.q3_k_instead]}
    write_gguf(base, as_taken, target, args.type, importance, instead)
    cost = taken.stop()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weights = {}
    for name in base:
        tensor = tensors[gguf_name(name)]
        dense = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(base[name].shape)
        weights[name] = unpair(dense, heads_of(name, config)) if heads_of(name, config) else dense
    tables = {name: int(tensors[OUTSIDE[name]].n_bytes) for name in (EMBEDDING, HEAD) if OUTSIDE[name] in tensors}
    version = f"in xllamacpp {importlib.metadata.version('xllamacpp')}"
    write_result(args, weights, "llama.cpp", version, cost, target.stat().st_size, tables)


if __name__ == "__main__":
    main()
