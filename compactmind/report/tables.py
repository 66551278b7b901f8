"""The tables of the report as rows of text, read off the report's dict; one source for the terminal, HTML, Markdown and TeX."""

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compactmind.report.as_shipped import as_shipped
from compactmind.report.literature import beside_the_literature
from compactmind.report.seeds import COLUMN, NOTE, has_seeds, seeds_cell
from compactmind.report.sentences import corrected_p, largest_batch, measured, speedup, tokens_per_second

NOTHING = "-"
MATRIX = 12
"""Classes up to which a confusion matrix is shown as one, and errors shown where there are more."""


@dataclass(frozen=True)
class Table:
    """Rows under a header; cells are text without markup."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def as_text(self) -> str:
        """Return it with aligned columns, words to the left and numbers to the right.

        A row with words in place of numbers (what to run, why it failed) makes no column wide.
        """
        lines = [[*line, *[""] * (len(self.header) - len(line))] for line in (self.header, *self.rows)]
        whole = [line for line in lines if not _is_words(line)]
        widths = [
            max(len(line[0]) for line in lines),
            *(max(map(len, column)) for column in list(zip(*whole, strict=True))[1:]),
        ]
        text = [self.caption]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            for cell, width, name in zip(line[1:], widths[1:], self.header[1:], strict=True):
                words = name in LEFT or _is_words(line)
                cells.append(cell.ljust(width) if words else cell.rjust(width))
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)


def _is_words(line: Sequence[str]) -> bool:
    return len(line) > 2 and not any(line[2:])


LEFT = (
    "step",
    "taken for",
    "kernel",
    "verdict",
    "source",
    "protocol",
    "comparable",
    "pipeline",
    "parameters",
    "value",
    "model",
    "task",
)
"""Columns of words."""
FROM = {"spread": "spread over the text", "first": "its first"}
"""Which windows of the text, see compactmind/text.py -> in words."""


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """Return a number as a cell, `-` for none."""
    return NOTHING if value is None else f"{value:{form}}{unit}"


def divergence(kl: dict[str, Any] | None) -> str:
    """Return the mean of a KL and its interval as a cell, 0 for the dense model itself."""
    if kl is None:
        return NOTHING
    if not kl["mean"]:
        return "0"
    places = max(4, 1 - math.floor(math.log10(kl["mean"])))  # two digits of the mean at least: next to nothing is not nothing
    return f"{kl['mean']:.{places}f} [{kl['interval'][0]:.{places}f}, {kl['interval'][1]:.{places}f}]"


# ----------------------------------------------------------------------------------------------------------- the tracks
def encoder_table(report: dict[str, Any]) -> Table:
    """Return the classifiers side by side."""
    rows = [row for row in report["models"] if row["track"] == "encoder"]
    batches = sorted(report["settings"]["latency_batches"]) if any(row["status"] == "measured" for row in rows) else []
    onnx, seeds = any("onnx_latency" in row for row in rows), any(map(has_seeds, rows))
    task = report["data"].get("task") or {}
    many, mcc = len(task.get("labels", ())) > 2, task.get("metric") == "mcc"
    header = ["model", "accuracy [95%]", *([COLUMN] if seeds else []), "macro-F1" if many else "F1", *(["MCC"] if mcc else []),
              "AUC", "p", "p, Holm", "M param", "GFLOPs", "thop GMACs", "MB",
              *(f"ms, batch {batch}" for batch in batches), "speed-up", "load s", "peak MB",
              *(f"ONNX ms, batch {batch}" for batch in batches if onnx)]  # fmt: skip
    lines = []
    for row in rows:
        if row["status"] != "measured":
            lines.append(_without_numbers(row))
            continue
        low, high = row["accuracy_interval"]
        against = row["mcnemar_against_reference"]
        times, exported = ([row.get(key, {}).get(f"batch_{batch}") for batch in batches] for key in ("latency", "onnx_latency"))
        lines.append(
            [
                row["name"], f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]", *([seeds_cell(row)] if seeds else []),
                f"{row['f1']:.3f}",
                *([f"{row['mcc']:.3f}"] if mcc else []), number(row["auc"], ".3f"),
                number(against and against["p_value"], ".2g"), number(corrected_p(row), ".2g"),
                f"{row['parameters'] / 1e6:.2f}", number(row["gflops"]),
                number(row["gmacs_thop"]), f"{row['size_mb']:.1f}", *(number(time and time["median_ms"], ".1f") for time in times),
                number(speedup(row, largest_batch(report)), ".2f", "x"), number(row["load_seconds"]),
                number(row["peak_memory_mb"], ".0f"), *(number(time and time["median_ms"], ".1f") for time in exported if onnx),
            ]
        )  # fmt: skip
    reference, tokens = report["references"]["encoder"], report["settings"]["cost_length"]
    note = (
        f"p: McNemar against {reference} (Holm: corrected for the number of rows); speed-up: against it, at the largest batch; ms for "
        f"sentences of {tokens} tokens."
    ) + (NOTE if seeds else "")
    if onnx or any(row["status"] == "measured" and row["kind"] == "w8a8" for row in rows):
        note += " W8A8 and ONNX compute of the last block the first token alone, which is all that is read of it; GFLOPs count all."
    if task:
        f1 = "mean over the classes" if many else f"of {task['labels'][1]}"
        judged = {"mcc": "MCC", "f1": "F1"}.get(task["metric"], "accuracy")
        usually = f"; the task is usually judged by {judged}" if task["name"].startswith("GLUE ") else ""
        note += f" {task['name']}: F1 is {f1}{', AUC the mean of each class against the rest' if many else ''}{usually}."
    return Table("Encoder track", header, lines, note)


def per_class_table(report: dict[str, Any]) -> Table | None:
    """Return, per class of a task that is not the profiles' sentiment, its test rows and the F1 of every classifier."""
    task, rows = report["data"].get("task"), measured(report, "encoder")
    rows = {name: row for name, row in rows.items() if task and len(row.get("per_class", ())) == len(task["labels"])}
    if not rows:
        return None
    first = next(iter(rows.values()))
    lines = [
        [label, f"{first['per_class'][index]['rows']:.0f}", *(f"{row['per_class'][index]['f1']:.3f}" for row in rows.values())]
        for index, label in enumerate(task["labels"])
    ]
    lines.append(["macro", f"{first['rows']}", *(f"{row['macro_f1']:.3f}" for row in rows.values())])
    return Table(
        "F1 per class", ["class", "rows", *rows], lines, "Precision and recall of every class are in final_report.json."
    )


def confusion_table(report: dict[str, Any]) -> Table | None:
    """Return what the reference takes for what: the matrix, of more than MATRIX classes the most frequent errors."""
    task, row = report["data"].get("task"), measured(report, "encoder").get(report["references"]["encoder"])
    if not task or not row or len(row["confusion_matrix"]) != len(task["labels"]):
        return None
    matrix, labels = row["confusion_matrix"], task["labels"]
    caption = f"What {row['name']} takes for what"
    if len(labels) <= MATRIX:
        lines = [[label, *map(str, counts)] for label, counts in zip(labels, matrix, strict=True)]
        return Table(
            caption,
            ["class", *(f"as {label}" for label in labels)],
            lines,
            "A row is what it is, a column what it is taken for.",
        )
    errors = [(count, i, j) for i, counts in enumerate(matrix) for j, count in enumerate(counts) if i != j and count]
    lines = [
        [labels[i], labels[j], str(count)] for count, i, j in sorted(errors, key=lambda error: (-error[0], error[1:]))[:MATRIX]
    ]
    return Table(
        caption, ["class", "taken for", "rows"], lines, f"The {len(lines)} most frequent errors; all are in final_report.json."
    )


def language_table(report: dict[str, Any]) -> Table:
    """Return the language models side by side."""
    header = ["model", "perplexity [95%]", "against dense [95%, paired]", "KL, nats [95%]", "KL 99.9%", "same top", "M param", "MB",
              "ratio", "prefill ms", "prefill",
              "decode ms", "decode", "tokens/s", "load s", "peak MB", "kernel"]  # fmt: skip
    lines = []
    rows = [row for row in report["models"] if row["track"] == "llm"]
    for row in rows:
        if row["status"] != "measured":
            lines.append(_without_numbers(row))
            continue
        against, (low, high) = row["against_dense"], row["perplexity_interval"]
        change = NOTHING
        if against:
            change = "{:+.2%} [{:+.2%}, {:+.2%}]".format(against["ratio"] - 1, *(bound - 1 for bound in against["interval"]))
        if against and row["compared_with"] != report["references"]["llm"]:
            change += f" of {row['compared_with']}"
        kl = row["divergence"]
        prefill, decode = ((row["generation"] or {}).get(phase) or {} for phase in ("prefill", "decode"))
        lines.append(
            [
                row["name"], f"{row['perplexity']:.2f} [{low:.2f}, {high:.2f}]", change, divergence(kl),
                number(kl and kl["p999"]), number(kl and kl["same_top"], ".1%"), f"{row['parameters'] / 1e6:.1f}",
                f"{row['size_mb']:.1f}", number(row["compression_ratio"], ".2f", "x"), number(prefill.get("median_ms"), ".0f"),
                number(prefill.get("speedup"), ".2f", "x"), number(decode.get("median_ms"), ".1f"),
                number(decode.get("speedup"), ".2f", "x"), number(tokens_per_second(row), ".1f"),
                number(row["load_seconds"]), number(row["peak_memory_mb"], ".0f"), row["kernel"],
            ]
        )  # fmt: skip
    protocol = next((row["protocol"] for row in rows if row["status"] == "measured"), None)
    note = ""
    if protocol:
        windows = f"{protocol['windows']} windows of {protocol['seq_len']} tokens ({FROM[protocol['windows_from']]})"
        note = (
            f"{protocol['text']}; {windows}; KL of every token's prediction from that of the model it was made from; prefill of "
            f"{report['settings']['prompt_tokens']} tokens."
        )
    if file := as_shipped(report):
        note += (
            f" {file['name']}: the bytes of {file['published_as']['file']} and the quality of {file['compared_with']}, whose weights are "
            "that file's, rounded to bfloat16."
        )
    return Table("LLM track", header, lines, note)


def _without_numbers(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row that was not measured: what to run, or why it failed (the warnings say it in full)."""
    reason = f"run `{row['command']}`" if "command" in row else textwrap.shorten(row["error"], 100, placeholder=" ...")
    return [row["name"], f"{row['status']}: {reason}"]


def gsm8k_table(report: dict[str, Any]) -> Table | None:
    """Return the shares of GSM8K's problems answered, None if nobody was asked."""
    asked = [row for row in report["models"] if row.get("gsm8k")]
    if not asked:
        return None
    matches = [name for name, result in asked[0]["gsm8k"].items() if isinstance(result, dict) and "accuracy" in result]
    rows = []
    for row in asked:
        cells = (row["gsm8k"][match] for match in matches)
        rows.append([row["name"], *("{:.1%} [{:.1%}, {:.1%}]".format(cell["accuracy"], *cell["interval"]) for cell in cells)])
    result = asked[0]["gsm8k"]
    return Table(f"{result['task']}, {result['problems']} problems", ["model", *matches], rows)


def steps_table(report: dict[str, Any]) -> Table | None:
    """Return perplexity and KL after every step of the pipelines that made rows of the report."""
    rows = []
    for row in report["models"]:
        for step in row.get("pipeline", []) if row["status"] == "measured" else []:
            low, high = (bound - 1 for bound in step["against_dense"]["interval"])
            against = f"{step['against_dense']['ratio'] - 1:+.2%} [{low:+.2%}, {high:+.2%}]"
            far = divergence(step.get("divergence"))
            rows.append([row["name"], step["method"], f"{step['perplexity']:.2f}", against, far, f"{step['seconds']:.0f}"])
    header = ["model", "step", "perplexity", "against dense [95%, paired]", "KL, nats [95%]", "seconds"]
    return Table("After every step", header, rows) if rows else None


# ------------------------------------------------------------------------------------------------------------- the rest
def search_table(report: dict[str, Any]) -> Table | None:
    """Return the best pipelines of the search that were measured on all windows."""
    search = report.get("search")
    if not search or not search["confirmed"]:
        return None
    rows = []
    quality = search.get("quality", "perplexity")
    for trial, row in sorted(search["confirmed"].items(), key=lambda item: item[1][quality]):
        steps = " > ".join(step["method"] for step in row["steps"][1:])
        rows.append(
            [
                trial,
                steps,
                number(row.get("kl"), ".4g"),
                f"{row['perplexity']:.2f}",
                f"{row['compression_ratio']:.2f}x",
                number(row["interaction"], "+.4f"),
            ]
        )
    header = ["trial", "pipeline", "KL, validation, nats", "perplexity, validation", "ratio", "interaction, nats"]
    return Table(f"Search for {search['target_compression']:g}x, {search['trials']} trials: the best, on all windows", header, rows,
                 "interaction: loss of the whole minus the sum of the losses of its parts")  # fmt: skip


def literature_table(report: dict[str, Any]) -> Table:
    """Return published results beside which this run stands, and which of them it can be compared with."""
    rows = [
        [row["task"], row["model"], number(row["dense"], "g"), f"{row['result']:g}", row["protocol"], row["source"],
         f"{'yes' if row['comparable'] else 'no'}: {row['why']}"]
        for row in beside_the_literature(report)
    ]  # fmt: skip
    note = "SST-2: accuracy in %; WikiText-2: perplexity."
    return Table("Published results", ["task", "model", "dense", "result", "protocol", "source", "comparable"], rows, note)


def environment_table(report: dict[str, Any]) -> Table:
    """Return what the numbers were measured on and with."""
    values = dict(report["environment"])
    values |= {f"version of {name}": version for name, version in values.pop("versions").items()}
    values |= {"profile": report["profile"], "created": report["created"], "data fingerprint": report["data"]["fingerprint"]}
    return Table("Environment", ["what", "value"], [[name, str(value)] for name, value in values.items() if value is not None])


def stages_table(report: dict[str, Any]) -> Table:
    """Return the settings every model was made with."""
    rows = []
    for row in report["models"]:
        if row["status"] == "measured" and row.get("stage"):
            settings = ", ".join(f"{name}={value}" for name, value in row["stage"]["config"].items())
            rows.append([row["name"], row["stage"]["script"], row["created"], settings])
    return Table("How every model was made", ["model", "script", "created", "parameters"], rows)


def protocols_table(report: dict[str, Any]) -> Table:
    """Return how each number was measured."""
    return Table("Protocols", ["number", "value"], [[name, value] for name, value in report["protocols"].items()])


# ------------------------------------------------------------------------------------------------------ for spreadsheets
def comparison_csv(report: dict[str, Any]) -> str:
    """Return the models of both tracks as CSV text, one line each, empty cells where nothing was measured, the reasons last."""
    fields = ["name", "status", "accuracy", "accuracy_low", "accuracy_high", "f1", "macro_f1", "mcc", "auc", "mcnemar_p",
              "mcnemar_p_holm", "parameters", "gflops",
              "gmacs_thop", "size_mb", "load_seconds", "peak_memory_mb",
              "perplexity", "perplexity_low", "perplexity_high", "kl_mean", "kl_low", "kl_high", "kl_p999", "same_top",
              "compression_ratio", "prefill_ms", "decode_ms",
              "gsm8k_strict", "gsm8k_flexible"]  # fmt: skip
    fields += [
        f"latency_{batch}_{what}"
        for batch in report["settings"]["latency_batches"]
        for what in ("median_ms", "low_ms", "high_ms", "speedup")
    ]
    fields += ["error", "not_measured"]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in report["models"]:
        flat = dict(row)
        flat["not_measured"] = "; ".join(f"{what}: {reason}" for what, reason in row.get("not_measured", {}).items())
        if row["status"] == "measured" and row["track"] == "llm":
            flat["perplexity_low"], flat["perplexity_high"] = row["perplexity_interval"]
            if kl := row["divergence"]:
                flat |= {"kl_mean": kl["mean"], "kl_p999": kl["p999"], "same_top": kl["same_top"]}
                flat["kl_low"], flat["kl_high"] = kl["interval"]
            flat |= {f"{phase}_ms": times["median_ms"] for phase, times in (row["generation"] or {}).items()}
            flat |= {f"gsm8k_{match}": row["gsm8k"][match]["accuracy"] for match in ("strict", "flexible") if row.get("gsm8k")}
        elif row["status"] == "measured":
            flat["accuracy_low"], flat["accuracy_high"] = row["accuracy_interval"]
            flat["mcnemar_p"] = (row["mcnemar_against_reference"] or {}).get("p_value")
            flat["mcnemar_p_holm"] = corrected_p(row)
            for batch, times in row["latency"].items():
                flat |= {f"latency_{batch.removeprefix('batch_')}_{what}": value for what, value in times.items()}
        writer.writerow(flat)
    return text.getvalue()
