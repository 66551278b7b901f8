"""The README.md in every checkpoint's directory: what the model is, where it came from, what it scored, how to load it."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from compactmind.formats.grouped import by_bits
from compactmind.formats.table import FORMATS, is_quantized
from compactmind.origin import Origin, dataset_name
from compactmind.published import describe_published, is_rounded


def model_card(
    name: str,
    manifest: dict[str, Any],
    report_row: dict[str, Any] | None = None,
    origin: Origin | None = None,
    sentences: str | None = None,
) -> str:
    """Return the card of a checkpoint as Markdown; with the row of a report also what was measured of it.

    `origin` is what was downloaded, `sentences` the source of those that a classifier's row was measured on.
    """
    language = "CausalLM" in manifest["architecture"]
    own_class = manifest["architecture"].startswith("Pruned")
    published = manifest.get("published_as")
    rounded = published is not None and is_rounded(published)
    what = "dequantized, nothing removed" if rounded else FORMATS[manifest["kind"]].words
    lines = [
        "---",
        metadata(name, manifest, report_row, origin, sentences).strip(),
        "---",
        f"# {name}",
        "",
        f"A {manifest['architecture']} made by CompactMind: {what}. "
        f"{manifest['parameters'] / 1e6:.1f} M parameters"
        + (f", made from `{manifest['parent']}`" if manifest["parent"] else "")
        + f", {manifest['created']}.",
        "",
        *([describe_published(f"`{name}`", published), ""] if published else []),
        *_attribution(origin),
        *_made_with(manifest),
        *_bits(manifest["quantization"]),
        *_numbers(manifest, report_row),
        "## How to load it",
        "",
        "```python",
        "from compactmind.checkpoint import load_checkpoint",
        "",
        f'checkpoint = load_checkpoint("models/{name}")  # .model, .tokenizer, .manifest',
        "```",
        "",
    ]
    auto = "AutoModelForCausalLM" if language else "AutoModelForSequenceClassification"
    form = FORMATS[manifest["kind"]]
    if caveat := form.caveat(manifest["quantization"] or {}):
        lines += [caveat, ""]
    elif form.libraries:
        trust = ", trust_remote_code=True" if own_class else ""
        lines += [f"With {form.libraries}" + (" (its code lies beside the weights):" if own_class else ":"), ""]
        lines += [
            "```python",
            f"from transformers import {auto}",
            "",
            f'{auto}.from_pretrained("models/{name}"{trust})',
            "```",
            "",
        ]
    program = "generate" if language else "classify"
    lines += ["To try it:", "", "```bash", f'python -m compactmind.{program} --model models/{name} "a text"', "```", ""]
    return "\n".join(lines)


def metadata(
    name: str,
    manifest: dict[str, Any],
    row: dict[str, Any] | None = None,
    origin: Origin | None = None,
    sentences: str | None = None,
) -> str:
    """Return what a hub reads of a card, as YAML: licence, base model, task, data and, of a report's row, its numbers (`model-index`)."""
    language = "CausalLM" in manifest["architecture"]
    task, base, results, data = "text-generation" if language else "text-classification", origin and origin.name, [], None
    if row and (language or sentences):
        metric, data = ("perplexity", row["protocol"]["text"]) if language else ("accuracy", sentences)
        data = data.removesuffix(", test")
        known = dataset_name(data, metric)
        results = [EvalResult(task, known or "local", data, metric, row[metric], dataset_split="test")]
        data = known
    relation = None
    if base and manifest["parent"]:
        relation = "quantized" if is_quantized(manifest["kind"]) else "finetune"
    return ModelCardData(
        license=origin and origin.licence, library_name="transformers", pipeline_tag=task, tags=["compactmind"], base_model=base,
        base_model_relation=relation, datasets=[data] if data else None, metrics=[results[0].metric_type] if results else None,
        eval_results=results or None, model_name=name if results else None,
    ).to_yaml()  # fmt: skip


def _attribution(origin: Origin | None) -> list[str]:
    if origin is None:
        return []
    name = f"[{origin.name}](https://huggingface.co/{origin.name})" if origin.name else "a model"
    licence = f"licence: {origin.licence}" if origin.licence else "its licence holds for this one too: see its page, or the file beside"
    return [f"It goes back to {name}, from {origin.source}; {licence}.", ""]


def _made_with(manifest: dict[str, Any]) -> list[str]:
    stage = manifest["stage"]
    lines = []
    if stage.get("script"):
        lines += [f"Made by `{stage['script']}`; every setting is in `manifest.json`.", ""]
    steps = [step for step in manifest.get("pipeline", []) if step["method"] != "dense"]
    if steps:
        lines += ["| step | settings | perplexity after it | KL to dense, nats |", "| --- | --- | ---: | ---: |"]
        for step in steps:
            settings = ", ".join(f"{key}={value}" for key, value in step["params"].items())
            far = f"{step['divergence']['mean']:.4f}" if step.get("divergence") else "-"
            lines.append(f"| {step['method']} | {settings} | {step['perplexity']:.2f} | {far} |")
        lines.append("")
    return lines


def _bits(quantization: dict[str, Any] | None) -> list[str]:
    """Return how many tensors have integers of which width, if they know their own."""
    widths = by_bits(quantization)
    if not widths:
        return []
    lines = ["| bits | tensors | weights that share a scale |", "| ---: | ---: | --- |"]
    for bits, names in widths.items():
        sizes = sorted({quantization["tensors"][name]["group_size"] for name in names})
        groups = ", ".join(map(str, [size for size in sizes if size > 0] + ["a row"] * (-1 in sizes)))
        lines.append(f"| {bits} | {len(names)} | {groups} |")
    return [*lines, ""]


def _numbers(manifest: dict[str, Any], row: dict[str, Any] | None) -> list[str]:
    """Return the measured numbers, or what the stage that made the model saw of it."""
    if row is None:
        shown = {name: value for name, value in manifest["metrics"].items() if isinstance(value, (int, float))}
        where = "What the stage that made it measured (validation text; the report measures on held-out text):"
    else:
        where = f"Measured by `6_evaluate_report.py` on {row['machine']}, held-out text:"
        shown = {"MB": row["size_mb"], "load, s": row["load_seconds"], "peak memory, MB": row["peak_memory_mb"]}
        if "accuracy" in row:
            low, high = row["accuracy_interval"]
            shown = {"accuracy": f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]", "GFLOPs": row["gflops"], **shown}
            if len(row.get("per_class", ())) > 2:
                shown["macro-F1"] = row["macro_f1"]
            shown |= {f"ms at {batch.replace('_', ' ')}": times["median_ms"] for batch, times in row["latency"].items()}
        else:
            low, high = row["perplexity_interval"]
            protocol = row["protocol"]
            on = f"{protocol['text']}, {protocol['windows']} windows of {protocol['seq_len']}"
            shown = {"perplexity": f"{row['perplexity']:.2f} [{low:.2f}, {high:.2f}] ({on})", **shown}
            if kl := row["divergence"]:
                low, high = kl["interval"]
                shown[f"KL to {row['compared_with']}, nats a token"] = f"{kl['mean']:.4f} [{low:.4f}, {high:.4f}]"
                shown["same top token"] = f"{kl['same_top']:.1%}"
            shown |= {f"{phase}, ms": times["median_ms"] for phase, times in (row["generation"] or {}).items()}
    shown = {name: value for name, value in shown.items() if value is not None}  # what could not be measured
    if not shown:
        return []
    cells = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in shown.items()}
    return ["## Numbers", "", where, "", "| | |", "| --- | ---: |", *(f"| {n} | {v} |" for n, v in cells.items()), ""]
