"""Quantize a Llama to int8 weights and activations with SmoothQuant, beside the control that shows what smoothing is worth.

Paper: Xiao et al. 2023 (SmoothQuant, https://arxiv.org/abs/2211.10438).
Run:   python 4_smoothquant_llama.py            (after python download_model.py; every setting: --help)
       python 4_smoothquant_llama.py --alpha 0.85 --sites qkv gate_up      (the paper's recipe)
       python 4_smoothquant_llama.py --model_path /path/to/a/llama         (any local Hugging Face folder)
Reads: models/llama, wikitext_data/{train,validation,test}.jsonl
Writes: models/llama_w8a8          smoothed, int8 weights and activations
        models/llama_w8a8_naive    the control without smoothing
        results/smoothquant.{json,png}    perplexities on the same windows; alpha of every layer, or perplexity of every alpha
"""

import json
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import PROFILE, SmoothQuantConfig, parse_command_line, run_stage
from compactmind.checkpoint import is_up_to_date, load_checkpoint, save_checkpoint, weights_fingerprint
from compactmind.data import data_fingerprint, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.evaluation.perplexity import paired_ratio, perplexity
from compactmind.files import sha256_of, write_json_atomically
from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.quantization.w8a8_model import PER_LAYER, quantize_llama
from compactmind.text import load_documents, token_windows

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.SmoothQuantConfig. For example: for_profile(PROFILE, alpha=0.85)
CONFIG = SmoothQuantConfig.for_profile(PROFILE)


# ---------------------------------------------------------------------------------------------------------------- checks
def check(config: SmoothQuantConfig) -> None:
    """Raise CompactMindError on a setting that makes no sense, before anything is loaded."""
    numbers = config.alpha_grid if isinstance(config.alpha, str) else (config.alpha,)
    for alpha in numbers:
        if not 0 <= alpha <= 1:
            raise CompactMindError(f"alpha {alpha:g} is not in [0, 1]: for example --alpha 0.7, or --alpha per_layer")
    if not numbers:
        raise CompactMindError("alpha_grid is empty: for example --alpha_grid 0.5 0.7 0.9")
    for name, least in (("calibration_windows", 1), ("seq_len", 2), ("eval_windows", 0)):
        if getattr(config, name) < least:
            raise CompactMindError(f"{name} {getattr(config, name)} is not at least {least}: for example --{name} 64")


def load_as_released(path: Path):
    """Return a Llama in the dtype of its file and its tokenizer. Raises CompactMindError saying what is wrong with it."""
    if not (path / "config.json").is_file():
        raise CompactMindError(f"{path} holds no model (no config.json): run `python download_model.py`, or give --model_path")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
        raise CompactMindError(f"{path} could not be loaded ({error}): it is damaged, or its tokenizer is missing") from None
    llama_blocks(model)
    return model, tokenizer


def identity(path: Path) -> str:
    """Return what identifies the weights in a folder: from the manifest, or a hash of foreign files."""
    if (path / "manifest.json").is_file():
        return weights_fingerprint(path)
    return " ".join(sha256_of(file) for file in sorted(path.glob("*.safetensors")))


# ------------------------------------------------------------------------------------------------------------------ plot
def plot_alphas(description: dict, table: list[dict], path: Path) -> None:
    """Draw the alpha of every layer and site, or perplexity against alpha where one was searched for all."""
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    if table:
        axes.plot([row["alpha"] for row in table], [row["perplexity"] for row in table], "o-", color="#1f5fa8")
        axes.set(xlabel="alpha", ylabel="perplexity on validation text", title="One alpha for all layers")
    else:
        for site, marker in zip(description["sites"], "osv^", strict=False):
            axes.plot([layer[site] for layer in description["alphas"]], marker=marker, lw=1, label=site)
        axes.set(xlabel="layer", ylabel="alpha with the smallest output error", ylim=(0, 1), title="Alpha of every layer")
        axes.legend(title="input of")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: SmoothQuantConfig) -> None:
    check(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = read_dataset_description(config.text_dir)["source"]["source"]
    settings = ("profile", "calibration_windows", "seq_len", "activations", "embeddings")
    stage = {
        "script": "4_smoothquant_llama.py",
        "config": {**config.relevant(*settings, "alpha", "alpha_grid", "sites"), "text": data_fingerprint(config.text_dir)},
        "inputs": {"model": identity(config.model_path)},
    }
    naive_stage = {**stage, "config": {**config.relevant(*settings), "text": stage["config"]["text"], "sites": ()}}
    outputs = {config.output_dir: stage, f"{config.output_dir}_naive": naive_stage}
    _, tokenizer = load_as_released(config.model_path)
    calibration = token_windows(tokenizer, load_documents(config.text_dir, "train"), config.seq_len, config.calibration_windows)

    # ---- quantize: a fresh copy of the released weights each time
    def quantized(alpha, sites):
        model, _ = load_as_released(config.model_path)
        model.to(device)
        description = quantize_llama(
            model, calibration, alpha=alpha, sites=sites, grid=config.alpha_grid, activations=config.activations,
            embeddings=config.embeddings,
        )  # fmt: skip
        return model, description

    table: list[dict] = []
    for name, wanted in outputs.items():
        directory = config.models_dir / name
        if not config.force and is_up_to_date(directory, wanted):
            print(f"{directory} is up to date: skipped (--force True quantizes again)")
            continue
        alpha, sites = config.alpha, config.sites if wanted is stage else ()
        if alpha == "global" and sites:
            validation = token_windows(tokenizer, load_documents(config.text_dir, "validation"), config.seq_len, 8)
            for candidate in config.alpha_grid:
                found = perplexity(quantized(candidate, sites)[0].float(), validation, "validation")["perplexity"]
                table.append({"alpha": candidate, "perplexity": found})
                print(f"alpha {candidate:.2f} | perplexity on validation text {found:.3f}", flush=True)
            alpha = min(table, key=lambda row: row["perplexity"])["alpha"]
        print(
            f"{name}: calibrating on {len(calibration)} windows of {config.seq_len} tokens, then block by block ...", flush=True
        )
        model, description = quantized(PER_LAYER if isinstance(alpha, str) else alpha, sites)
        save_checkpoint(
            directory, model, tokenizer, kind="w8a8", parent=config.model_path.name, stage=wanted, quantization=description,
            data_fingerprint=stage["config"]["text"], extra={"alpha_table": table},
        )  # fmt: skip
        if sites:
            plot_alphas(description, table, config.results_dir / "smoothquant.png")
        del model

    # ---- measure all on the same held-out windows
    windows = token_windows(tokenizer, load_documents(config.text_dir, "test"), config.seq_len, config.eval_windows)
    dense, _ = load_as_released(config.model_path)
    released_bytes = sum(file.stat().st_size for file in config.model_path.glob("*.safetensors"))
    rows = {config.model_path.name: (dense.to(device).float(), released_bytes)}
    for name in outputs:
        directory = config.models_dir / name
        rows[name] = (load_checkpoint(directory, device).model, sum(f.stat().st_size for f in directory.glob("*.safetensors")))
    report = {"protocol": None, "models": []}
    print(
        f"\n{'model':<24}{'perplexity [95% interval]':>30}{'against dense [95%, paired]':>34}{'MB':>9}{'of released':>13}  kernel"
    )
    for name, (model, size) in rows.items():
        result = perplexity(model, windows, f"{text}, test")
        report["protocol"] = result.pop("protocol")
        first = report["models"][0] if report["models"] else result
        ratio = paired_ratio(result["losses"], first["losses"])
        kernels = sorted({module.kernel for module in model.modules() if isinstance(module, W8A8Linear)})
        row = {"name": name, **result, "against_dense": ratio, "bytes": size, "kernels": kernels}
        report["models"].append(row)
        interval = "[{:.2f}, {:.2f}]".format(*result["interval"])
        paired = "[{:+.2%}, {:+.2%}]".format(*(bound - 1 for bound in ratio["interval"]))
        print(
            f"{name:<24}{result['perplexity']:>13.3f} {interval:>16}{ratio['ratio'] - 1:>+14.2%} {paired:>19}"
            f"{size / 1e6:>9.1f}{size / released_bytes:>13.3f}  {', '.join(kernels) or 'float32'}"
        )
    write_json_atomically(config.results_dir / "smoothquant.json", report)
    print(f"\n{json.dumps(report['protocol'])}\nwritten to {config.results_dir / 'smoothquant.json'}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
