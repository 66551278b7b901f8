"""Quantize a Llama to int8 weights and activations with SmoothQuant, beside the controls that show what smoothing is worth.

Paper: Xiao et al. 2023 (SmoothQuant, https://arxiv.org/abs/2211.10438); Ashkboos et al. 2024 (QuaRot, https://arxiv.org/abs/2404.00456).
Run:   python 4_smoothquant_llama.py            (after python download_model.py; every setting: --help)
       python 4_smoothquant_llama.py --alpha 0.85 --sites qkv gate_up --rotations      (SmoothQuant's own recipe)
       python 4_smoothquant_llama.py --rotations qkv o gate_up down    (nearer to the dense model; other readers need a recipe)
       python 4_smoothquant_llama.py --model_path /path/to/a/llama         (any local Hugging Face folder)
Reads: models/llama, wikitext_data/{train,validation,test}.jsonl
Writes: models/llama_w8a8          smoothed, o rotated in the weights, int8 weights and activations
        models/llama_w8a8_naive    control: the same without either
        models/llama_nf4           control: bitsandbytes NF4, 4-bit weights with compensated rounding, int8 tables
        models/llama_smoothed      smoothed but not quantized (--save_smoothed True)
        results/smoothquant.{json,png}    perplexity and KL to dense on the same held-out windows; alpha against KL; alpha of every layer
Time:  6 minutes on 2 shared CPU cores without VNNI (embedded profile); most of it reading text.
"""

import functools
import json
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from common import PROFILE, SmoothQuantConfig, parse_command_line, run_stage
from compactmind.checkpoint import load_as_released, load_checkpoint, save_checkpoint, skeleton_of
from compactmind.code_version import code_version
from compactmind.data import data_fingerprint, read_dataset_description
from compactmind.devices import default_device
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.divergence import measure_logits, measure_windows
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of
from compactmind.evaluation.recorded import quality_record
from compactmind.files import lock_directory, write_json_atomically
from compactmind.formats.table import kernel_of
from compactmind.forward import LogitsOf
from compactmind.gguf_source import folder_of
from compactmind.guards import check_outputs, check_released
from compactmind.manifest import add_to_manifest, identity_of, is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.memory import Sizes, of_pipeline
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4
from compactmind.methods.quantization.w8a8_model import (
    PER_LAYER,
    W8A8Recipe,
    calibrate_llama,
    quantize_llama,
    rotate_stream_for,
    smooth_llama,
)
from compactmind.methods.registry import METHODS
from compactmind.precision import is_small, work_in_float32
from compactmind.report.figures import save_figure
from compactmind.room import require_room
from compactmind.search.cache import Kept
from compactmind.search.compressor import Step
from compactmind.text import calibration_windows, load_documents, token_windows

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.SmoothQuantConfig. For example: for_profile(PROFILE, alpha=0.85)
CONFIG = SmoothQuantConfig.for_profile(PROFILE)

VALIDATION_WINDOWS = 4
"""Windows of validation text on which values of alpha are compared."""


# ------------------------------------------------------------------------------------------------------------------ plot
def plot_alphas(description: dict, table: list[dict], path: Path) -> None:
    """Draw KL to the dense model against alpha, with the levels of the other settings, and the alpha of every layer and site."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), constrained_layout=True)
    curve = [row for row in table if isinstance(row["alpha"], float)]
    left.plot(
        [row["alpha"] for row in curve], [row["divergence"] for row in curve], "o-", color="#1f5fa8", label="one alpha for all"
    )
    levels = [(row["alpha"], row["divergence"]) for row in table if isinstance(row["alpha"], str)]
    for (name, level), style, colour in zip(levels, ("-", "--", ":", "-."), ("#4d4d4d", "#b03a2e", "#2e7d32", "#8e44ad"), strict=False):
        left.axhline(level, ls=style, color=colour, label=name)
    left.set(
        xlabel="alpha",
        ylabel="KL to the dense model (nats a token)",
        title=f"Alpha, {VALIDATION_WINDOWS} windows of validation text",
    )
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3)  # below: the curve is wherever it likes
    for site, marker in zip(description["sites"], "osv^", strict=False):
        right.plot([layer[site] for layer in description["alphas"]], marker=marker, lw=1, label=site)
    right.set(xlabel="layer", ylabel="alpha", ylim=(0, 1.02), title="Alpha of every layer and input")
    right.legend(title="input of", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: SmoothQuantConfig) -> None:
    source = folder_of(Path(config.model_path or config.models_dir / "llama"), config.models_dir, dry_run=config.dry_run)
    if source is None:
        return
    check_released(source)
    names = [config.output_dir, f"{config.output_dir}_naive", config.nf4_dir] + [config.smoothed_dir] * config.save_smoothed
    check_outputs([config.models_dir / name for name in names], "4_smoothquant_llama.py", [source], config.models_dir)
    with ExitStack() as locks:
        for name in sorted(names):
            locks.enter_context(lock_directory(config.models_dir / name))
        make_and_measure(config, source)


def recipe_of(config: SmoothQuantConfig, alpha=0.5, **changes) -> W8A8Recipe:
    """Return the W8A8 recipe of the settings, with some of them changed."""
    settings = config.relevant("sites", "rotations", "activations", "embeddings", "stream_rotation")
    return W8A8Recipe(**{"alpha": alpha, "grid": config.alpha_grid, **settings, **changes})


def require_room_for(config: SmoothQuantConfig, source: Path, recipes: dict, due: list[str]) -> None:
    """Say what memory and disk the models that are `due` take. Raises CompactMindError if it is not there."""
    device = default_device()
    windows = config.calibration_windows, config.eval_windows, config.seq_len
    sizes = Sizes.of(skeleton_of(source), weight_bytes(source), *windows, device == "cuda")
    needs, disk = {}, sizes.itemsize * sizes.parameters * (config.smoothed_dir in due)
    for name, recipe in recipes.items():
        if name in due:
            method = "nf4" if isinstance(recipe, NF4Recipe) else "w8a8"
            of_steps, file = of_pipeline([Step(METHODS[method], recipe)], sizes)
            needs, disk = needs | {name: max(of_steps.values())}, disk + file
    if needs:
        way_out = "fewer --calibration_windows or a smaller --seq_len take less"
        require_room(needs, disk, config.models_dir, device, way_out)


def make_and_measure(config: SmoothQuantConfig, source: Path) -> None:
    """Make what is not up to date of the models at the top of this file, then measure all."""
    device = default_device()
    text = read_dataset_description(config.text_dir)["source"]["source"]
    report_path, plot_path = config.results_dir / "smoothquant.json", config.results_dir / "smoothquant.png"

    # ---- what each output depends on: if none of it changed, the output is up to date
    settings = ("profile", "calibration_windows", "seq_len", "activations", "embeddings")
    choosing = ("alpha", "alpha_grid", "sites", "rotations", "stream_rotation", "window_choice")
    fingerprint = data_fingerprint(config.text_dir)
    made_by = {"script": "4_smoothquant_llama.py", "code": code_version(__file__), "inputs": {"model": identity_of(source)}}
    kept = Kept(config.results_dir / "search" / "costs", made_by["inputs"], config.force)

    def stage(*names: str, **more) -> dict:
        return {**made_by, "config": {**config.relevant(*names), "text": fingerprint, **more}}

    smoothed_stage = stage(*settings, *choosing)
    compensating = ("calibration_windows", "seq_len") if config.nf4_compensation else ()
    stages = {
        config.output_dir: smoothed_stage,
        f"{config.output_dir}_naive": stage(*settings, sites=(), rotations=(), stream_rotation=False),
        config.nf4_dir: stage("profile", "nf4_embeddings", *compensating, method="nf4", compensation=config.nf4_compensation),
    }
    if config.save_smoothed:
        stages[config.smoothed_dir] = {**smoothed_stage, "quantized": False}

    protocol = config.relevant("seq_len", "eval_windows", "window_choice")

    def measured() -> dict:
        """Return what the numbers of the report depend on."""
        weights = {name: weights_fingerprint(config.models_dir / name) for name in stages}
        weights["model"] = made_by["inputs"]["model"]
        return {"weights": weights, "text": fingerprint, "code": made_by["code"], **protocol}

    places = {name: config.models_dir / name for name in stages}
    due = [name for name, wanted in stages.items() if config.force or not is_up_to_date(places[name], wanted, config.verify)]
    for name in stages:
        if name not in due:
            print(f"{places[name]} is up to date: skipped (--force True makes it again)")
    if not due and plot_path.is_file() and measured_before(report_path) == measured():
        return

    naive = recipe_of(config, sites=(), rotations=(), stream_rotation=False)
    nf4 = NF4Recipe(compensation=config.nf4_compensation, embeddings=config.nf4_embeddings)
    require_room_for(config, source, {config.output_dir: recipe_of(config), f"{config.output_dir}_naive": naive, config.nf4_dir: nf4}, due)
    if config.dry_run:
        return

    # ---- texts, and how a copy of the model is made
    model, tokenizer = load_as_released(source)
    validation, windows = (
        token_windows(tokenizer, load_documents(config.text_dir, split), config.seq_len, count, config.window_choice)
        for split, count in (("validation", VALIDATION_WINDOWS), ("test", config.eval_windows))
    )
    del model

    recipe = functools.partial(recipe_of, config)

    def released(how: W8A8Recipe, dtype: torch.dtype | None = None):
        """Return a fresh copy of the released model (of `dtype`), its stream turned if the recipe wants that."""
        model = load_as_released(source)[0].to(device, dtype)
        rotate_stream_for(model, how)
        return model

    @functools.cache
    def calibration() -> torch.Tensor:
        return calibration_windows(tokenizer, load_documents(config.text_dir, "train"), config.seq_len, config.calibration_windows)

    @functools.cache
    def statistics(stream_rotation: bool):
        """Return what is seen of the inputs: calibrated once, and once more for a stream that is turned."""
        print(f"calibrating on {len(calibration())} windows of {config.seq_len} tokens ...", flush=True)
        return calibrate_llama(released(recipe(0.5, stream_rotation=stream_rotation)), calibration())

    def quantized(how: W8A8Recipe):
        """Return the released model in W8A8, and its description."""
        seen, model = statistics(how.stream_rotation), released(how)
        return model, quantize_llama(model, seen, how)

    # ---- alpha against KL and perplexity, on validation text
    table: list[dict] = []
    alpha = config.alpha
    if config.output_dir in due:
        compared = {"naive": naive, PER_LAYER: recipe(PER_LAYER)}
        if config.rotations or config.stream_rotation:
            compared[f"{PER_LAYER}, not rotated"] = recipe(PER_LAYER, rotations=(), stream_rotation=False)
        if set(config.rotations) < set(SITES) and not config.stream_rotation and config.activations != "per_tensor_static":
            compared[f"{PER_LAYER}, all rotated"] = recipe(PER_LAYER, rotations=tuple(SITES))
        compared |= {value: recipe(value) for value in config.alpha_grid}
        logits = LogitsOf(work_in_float32(load_as_released(source)[0].to(device)), validation, kept.states(validation))
        for label, how in compared.items():
            evaluated = measure_windows({"": work_in_float32(quantized(how)[0])}, validation, logits)[""]
            reached = perplexity_of(evaluated["losses"], config.seq_len, "validation")["perplexity"]
            table.append({"alpha": label, "perplexity": reached, "divergence": evaluated["divergence"]["mean"]})
            print(
                f"alpha {label if isinstance(label, str) else f'{label:.2f}':<22} | on validation text: KL to dense "
                f"{evaluated['divergence']['mean']:8.5f}, perplexity {reached:8.3f}", flush=True,
            )  # fmt: skip
        del logits
        if alpha == "global":
            alpha = min((row for row in table if isinstance(row["alpha"], float)), key=lambda row: row["divergence"])["alpha"]

    # ---- make what is due
    def save(name: str, model, kind: str, **manifest) -> None:
        save_checkpoint(
            config.models_dir / name, model, tokenizer, kind=kind, parent=source.name, stage=stages[name],
            data_fingerprint=fingerprint, beside=source, **manifest,
        )  # fmt: skip

    for name in due:
        print(f"{name} ...", flush=True)
        if name == config.nf4_dir:
            model, _ = load_as_released(source)
            description = quantize_nf4(model.to(device), calibration(), nf4)
            save(name, model, "nf4", quantization=description)
        elif name == config.smoothed_dir:
            model = released(recipe(alpha), torch.float32 if is_small(skeleton_of(source)) else None)
            smooth_llama(model, statistics(config.stream_rotation), recipe(alpha))
            save(name, model, "dense")
        else:
            model, description = quantized(recipe(alpha) if name == config.output_dir else naive)
            save(
                name,
                model,
                "w8a8",
                quantization=description,
                extra={"alpha_table": table} if name == config.output_dir else None,
            )
        del model

    # ---- all are saved: measure all on the same held-out windows, one after the other
    released_bytes = weight_bytes(source)
    model = work_in_float32(load_as_released(source)[0].to(device))
    logits, kernels = LogitsOf(model, windows, kept.states(windows)), {source.name: kernel_of(model, "dense")}
    evaluated = {source.name: measure_logits(logits, windows)}
    del model
    for name in stages:
        checkpoint = load_checkpoint(config.models_dir / name, device)
        kernels[name] = kernel_of(checkpoint.model, checkpoint.manifest["kind"])
        measured_now = evaluated[name] = measure_windows({name: checkpoint.model}, windows, logits)[name]
        record = quality_record(windows, made_by["inputs"]["model"], measured_now["losses"], measured_now["divergence"])
        add_to_manifest(config.models_dir / name, record)
        del checkpoint
    smoothed = read_manifest(config.models_dir / config.output_dir)
    table = smoothed.get("alpha_table", [])
    report = {"protocol": None, "models": [], "alpha_table": table, "measured": measured()}
    print(
        f"\n{'model':<24}{'perplexity [95%]':>27}{'against dense [95%, paired]':>34}{'KL, nats [95%]':>26}{'same top':>10}{'MB':>9}"
        f"{'of released':>13}  kernel"
    )
    for name, kernel in kernels.items():
        result = perplexity_of(evaluated[name]["losses"], config.seq_len, f"{text}, test", config.window_choice)
        report["protocol"], far = result.pop("protocol"), evaluated[name]["divergence"]
        first = report["models"][0] if report["models"] else result
        ratio = paired_ratio(result["losses"], first["losses"])
        size = weight_bytes(source if name == source.name else config.models_dir / name)
        row = {"name": name, **result, "against_dense": ratio, "divergence": far, "bytes": size, "kernel": kernel}
        report["models"].append(row)
        interval = "[{:.2f}, {:.2f}]".format(*result["interval"])
        paired = "[{:+.2%}, {:+.2%}]".format(*(bound - 1 for bound in ratio["interval"]))
        apart = "{:.4f} [{:.4f}, {:.4f}]".format(far["mean"], *far["interval"])
        print(
            f"{name:<24}{result['perplexity']:>10.3f} {interval:>16}{ratio['ratio'] - 1:>+14.2%} {paired:>19}{apart:>26}"
            f"{far['same_top']:>10.1%}{size / 1e6:>9.1f}{size / released_bytes:>13.3f}  {kernel}", flush=True,
        )  # fmt: skip
    write_json_atomically(report_path, report)
    plot_alphas(smoothed["quantization"], table, plot_path)
    print(f"\n{json.dumps(report['protocol'])}\nwritten to {report_path}, plot {plot_path}")


def measured_before(report_path: Path) -> dict | None:
    """Return what the numbers of an earlier report depend on, None if there is no such report."""
    try:
        return json.loads(report_path.read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
