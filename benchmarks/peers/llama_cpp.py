"""llama.cpp's own quantizer (llama-quantize): block formats of GGUF, mixed over tensors as the file type says, tables included.

Run:   .peers/llama_cpp/bin/python benchmarks/peers/llama_cpp.py --model models/llama --output peers/q4_k_m --type Q4_K_M
       ... --importance True --calibration calibration.json       (with an importance matrix, what llama-imatrix measures)
Environment: requirements/llama_cpp.txt, a wheel with libllama; nothing is compiled

The model is written as a 16-bit GGUF file, `llama_model_quantize` makes the other, and gguf's reference code reads it back. The importance
matrix is the mean square of every input of every linear over the calibration tokens, measured here with transformers and handed to
llama.cpp as it wants it.
"""

import json
from pathlib import Path

import gguf
import llama_cpp_py_sync
import torch
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from peer import EMBEDDING, HEAD, WRITTEN, Taken, arguments, calibration_windows, read_weights, write_result
from transformers import AutoModelForCausalLM

IN_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
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


def write_gguf(weights: dict[str, torch.Tensor], config: dict, path: Path) -> None:
    """Write a Llama as a bfloat16 GGUF file without a tokenizer, which quantizing does not read."""
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, weight in weights.items():
        weight = pair_up(weight, heads_of(name, config)) if heads_of(name, config) else weight
        if weight.dim() == 1:
            writer.add_tensor(gguf_name(name), weight.float().numpy())
        else:
            packed = weight.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
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


def quantize(source: Path, target: Path, file_type: str, importance: dict[str, torch.Tensor]) -> None:
    """Have llama.cpp write `target`. Raises SystemExit with the names of the file types on another one, and if llama.cpp refuses."""
    library, ffi = get_lib(), get_ffi()
    types = {each.name.removeprefix("MOSTLY_"): int(each) for each in gguf.LlamaFileType}
    if file_type not in types:
        raise SystemExit(f"error: --type {file_type!r}: choose one of {', '.join(types)}")
    library.llama_backend_init()
    wanted = library.llama_model_quantize_default_params()
    wanted.nthread, wanted.ftype = torch.get_num_threads(), types[file_type]
    kept = [(ffi.new("char[]", name.encode()), ffi.new("float[]", values.tolist())) for name, values in importance.items()]
    if kept:
        entries = ffi.new("llama_model_imatrix_data[]", len(kept) + 1)
        for entry, (name, values) in zip(entries, kept, strict=False):
            entry.name, entry.data, entry.size = name, values, len(values)
        wanted.imatrix = entries
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ffi.addressof(wanted)):
        raise SystemExit(f"error: llama.cpp did not make {file_type} of {source}")


def main() -> None:
    found = arguments(__doc__, type="Q4_K_M", importance=False, samples=32)
    config = json.loads((found.model / "config.json").read_text(encoding="utf-8"))
    base = read_weights(found.model)
    written = found.output / WRITTEN
    written.mkdir(parents=True)
    source, target = written / "bf16.gguf", written / f"{found.type}.gguf"
    taken = Taken()
    write_gguf(base, config, source)
    windows = calibration_windows(found.calibration, found.samples) if found.importance else None
    quantize(source, target, found.type, mean_squares(found.model, windows) if found.importance else {})
    cost = taken.stop()
    source.unlink()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weights = {}
    for name in base:
        tensor = tensors[gguf_name(name)]
        dense = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(base[name].shape)
        weights[name] = unpair(dense, heads_of(name, config)) if heads_of(name, config) else dense
    tables = {name: int(tensors[OUTSIDE[name]].n_bytes) for name in (EMBEDDING, HEAD) if OUTSIDE[name] in tensors}
    version = f"{llama_cpp_py_sync.__llama_cpp_tag__} (llama-cpp-py-sync {llama_cpp_py_sync.__version__})"
    write_result(found, weights, "llama.cpp", version, cost, target.stat().st_size, tables)


if __name__ == "__main__":
    main()
