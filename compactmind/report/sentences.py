"""What the numbers of a report say, in sentences, and what a reader should be warned of. Everything is read off the report's dict."""

from typing import Any

from compactmind.formats.grouped import by_bits
from compactmind.formats.table import is_quantized
from compactmind.report.as_shipped import as_shipped, compressed, is_better, is_dominated, is_smaller
from compactmind.report.seeds import seeds_sentences, seeds_warnings
from compactmind.report.zeros import zeros_sentences

DISTINGUISHABLE = 0.05
"""Below this p-value two classifiers count as different."""
MAJORITY = 0.75
"""Share of one class above which an accuracy alone says little."""
FASTER = 1.03
"""A smaller ratio of times is called "as fast as": it is within what repeated measurements differ by."""


# ------------------------------------------------------------------------------------------------------------- reading
def measured(report: dict[str, Any], track: str) -> dict[str, dict[str, Any]]:
    """Return the measured rows of a track by name."""
    return {row["name"]: row for row in report["models"] if row["track"] == track and row["status"] == "measured"}


def reference_of(report: dict[str, Any], track: str) -> str:
    """Return the name of the row that the others of a track are compared with."""
    return report["references"][track]


def largest_batch(report: dict[str, Any]) -> str:
    """Return the key of the latency at the largest batch size."""
    return f"batch_{max(report['settings']['latency_batches'])}"


def tokens_per_second(row: dict[str, Any]) -> float | None:
    """Return how many tokens a language model generates in a second, None where it was not measured."""
    decode = (row.get("generation") or {}).get("decode") or {}
    return 1e3 / decode["median_ms"] if decode.get("median_ms") else None


def speedup(row: dict[str, Any], what: str) -> float | None:
    """Return a row's speed-up at a batch size (batch_32) or in a phase (prefill, decode), None where it was not measured."""
    return ((row.get("latency") or row.get("generation") or {}).get(what) or {}).get("speedup")


def times_as_fast(row: dict[str, Any], other: dict[str, Any], batch: str) -> float | None:
    """Return how many times as fast a classifier is as another one, None where one of them was not timed.

    By their speed-ups, each taken within rounds with the reference: two rows may come from different days. By times without one.
    """
    if batch not in row["latency"] or batch not in other["latency"]:
        return None
    mine, theirs = row["latency"][batch], other["latency"][batch]
    if mine["speedup"] and theirs["speedup"]:
        return mine["speedup"] / theirs["speedup"]
    return theirs["median_ms"] / mine["median_ms"]


def corrected_p(row: dict[str, Any]) -> float | None:
    """Return the p-value of a row against the reference, corrected for the number of rows; None where it was not compared."""
    comparison = row["mcnemar_against_reference"] or {}
    return comparison.get("p_holm", comparison.get("p_value"))


def p_in_words(row: dict[str, Any]) -> str:
    """Return the p-value of a row that was compared, and the corrected one where that differs."""
    p_value, corrected = f"{row['mcnemar_against_reference']['p_value']:.2g}", f"{corrected_p(row):.2g}"
    return f"p = {p_value}" + (f", {corrected} among all rows" if corrected != p_value else "")


def speed(ratio: float) -> str:
    """Return a ratio of times in words: 1.6x faster, as fast, 1.3x slower."""
    if ratio >= FASTER:
        return f"{ratio:.2f}x faster"
    return "as fast" if ratio > 1 / FASTER else f"{1 / ratio:.2f}x slower"


def share(change: float, less: str = "fewer", more: str = "more") -> str:
    """Return a relative change in words: 40% fewer."""
    return f"{abs(change):.0%} {less if change < 0 else more}"


# ----------------------------------------------------------------------------------------------------------- sentences
def sentences(report: dict[str, Any]) -> list[str]:
    """Return the findings: one sentence per model that is compared with another one, what there is to beat, and what the search found."""
    classifiers, languages = measured(report, "encoder"), measured(report, "llm")
    reference, batch = classifiers.get(reference_of(report, "encoder")), largest_batch(report)
    lines = [encoder_sentence(row, reference, batch) for row in classifiers.values() if reference and row is not reference]
    lines += seeds_sentences(classifiers) + zeros_sentences(report)
    file = as_shipped(report)
    for row in languages.values():
        dense = languages.get(row["compared_with"])
        if row is file:
            lines.append(as_shipped_sentence(file, compressed(report, file)))
        elif dense and row is not dense and row["against_dense"]:
            lines.append(language_sentence(row, dense, file))
        if by_bits(row.get("quantization")):
            lines.append(bits_sentence(row))
    return lines + search_sentences(report.get("search"), file)


def encoder_sentence(row: dict[str, Any], reference: dict[str, Any], batch: str) -> str:
    """Return what a classifier costs and saves against the reference."""
    saved = []
    if row["gflops"] and reference["gflops"]:
        operations = row["gflops"] / reference["gflops"] - 1
        saved += [f"{share(operations)} GFLOPs"] if abs(operations) >= 0.005 else []
    if abs(row["size_mb"] / reference["size_mb"] - 1) >= 0.005:
        saved.append(f"{row['size_mb']:.1f} MB instead of {reference['size_mb']:.1f}")
    ratio = speedup(row, batch)
    if ratio is not None:
        saved.append(f"{speed(ratio)} at batch {batch.removeprefix('batch_')}")
    points = 100 * (row["accuracy"] - reference["accuracy"])
    verdict = ""
    if row["mcnemar_against_reference"]:
        which = "different" if corrected_p(row) < DISTINGUISHABLE else "not distinguishable"
        verdict = f"; McNemar {p_in_words(row)}: {which} on {row['rows']} sentences"
    return (
        f"{row['name']}: {', '.join([*saved, 'for ']) if saved else ''}{points:+.1f} points of accuracy against {reference['name']} "
        f"({row['accuracy']:.1%} and {reference['accuracy']:.1%}{verdict})."
    )


def as_shipped_sentence(file: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Return what the file that the dense model was published as is to the models made of it."""
    text = (
        f"{file['name']} is what every compressed model has to beat: {file['size_mb']:.1f} MB, {file['compression_ratio']:.2f}x smaller "
        f"than {file['compared_with']} at no loss"
    )
    if not others:
        return f"{text}."
    beaten = []
    for count, what in (
        ([row for row in others if is_smaller(row, file)], "smaller"),
        ([row for row in others if is_better(row)], "better"),
    ):
        names = "".join(f" ({', '.join(row['name'] for row in count)})" if count else "")
        beaten.append(f"{len(count) or 'none'}{names} {'is' if len(count) < 2 else 'are'} {what}")
    return f"{text}; of {len(others)} made from {file['compared_with']} {' and '.join(beaten)}."


def language_sentence(row: dict[str, Any], dense: dict[str, Any], file: dict[str, Any] | None = None) -> str:
    """Return what a language model costs and saves against the one it was made from; `file`: what a dense one was published as."""
    against = row["against_dense"]
    low, high = against["interval"]
    sure = "" if low > 1 or high < 1 else ", not distinguishable from 0"
    prefill, decode = speedup(row, "prefill"), speedup(row, "decode")
    times = (
        f"; next to the dense model in {dense['kernel']} it reads a prompt {speed(prefill)} and generates {speed(decode)}"
        if prefill and decode
        else ""
    )
    far = ""
    if kl := row["divergence"]:
        far = f"; KL {kl['mean']:.2g} nats a token, {kl['p999']:.2g} at the worst of 1000, "
        far += f"same top token at {kl['same_top']:.1%}"
    than = f"{dense['name']} as released"
    if file and file["compared_with"] == dense["name"]:
        times_file = row["size_mb"] / file["size_mb"]
        than = f"{dense['name']} dequantized ({times_file:.2f} times the bytes of {file['name']})"
    return (
        f"{row['name']}: {row['compression_ratio']:.2f}x smaller than {than}, perplexity "
        f"{against['ratio'] - 1:+.2%} [{low - 1:+.2%}, {high - 1:+.2%}]{sure} ({row['perplexity']:.2f} and "
        f"{dense['perplexity']:.2f} on {row['protocol']['windows']} windows){far}{times}."
    )


def bits_per_weight(row: dict[str, Any]) -> float:
    """Return the bits of the weight file for each weight of the model: scales and what is no integer included."""
    return 8e6 * row["size_mb"] / row["parameters"]


def bits_sentence(row: dict[str, Any]) -> str:
    """Return how wide the integers of a model are whose tensors know their own width, and whether it came out as planned."""
    quantization, kl = row["quantization"], row["divergence"]
    widths = ", ".join(f"{len(names)} of {bits} bits" for bits, names in by_bits(quantization).items())
    text = f"{row['name']}: {bits_per_weight(row):.2f} bits a weight, all of the file counted (tensors: {widths})"
    if quantization["target_compression"] and row["compression_ratio"]:
        text += f"; {quantization['target_compression']:g}x smaller was asked for, {row['compression_ratio']:.3f}x reached"
    if quantization["expected_kl"] and kl:
        text += f"; KL {quantization['expected_kl']:.2g} nats a token expected from calibration text, {kl['mean']:.2g} measured"
    return f"{text}."


def search_sentences(search: dict[str, Any] | None, file: dict[str, Any] | None = None) -> list[str]:
    """Return what the search found, whether a combination of methods was worth it, and whether the published `file` is as small anyway."""
    if not search or not search["best"]:
        return []
    best, target = search["best"], search["target_compression"]
    lines = [
        f"Of {search['trials']} pipelines tried, the best that is at least {target:g}x smaller is "
        f"{' > '.join(best['methods'])} (trial {best['trial']}): perplexity {best['confirmed']['perplexity']:.2f} on validation text "
        f"at {best['measured']['compression_ratio']:.2f}x."
    ]
    if file and file["compression_ratio"] >= best["measured"]["compression_ratio"]:
        lines[0] += f" {file['name']} is {file['compression_ratio']:.2f}x smaller at no loss."
    hybrid, single = search["best_hybrid"], search["best_single"]
    if hybrid and single:
        ratio = hybrid["measured"]["perplexity"] / single["measured"]["perplexity"]
        better = "better" if ratio < 1 else "worse"
        lines.append(
            f"The best combination of methods at that size is {abs(ratio - 1):.0%} {better} than the best single one "
            f"({' > '.join(single['methods'])}, {single['measured']['perplexity']:.2f})."
        )
    elif hybrid:
        lines.append(f"No single method that was tried is {target:g}x smaller; only combinations are.")
    elif single:
        lines.append(f"No combination of methods that was tried is {target:g}x smaller; {' > '.join(single['methods'])} is.")
    return lines


# ------------------------------------------------------------------------------------------------------------ warnings
def warnings(report: dict[str, Any]) -> list[str]:
    """Return what could mislead a reader of the tables, each in one sentence."""
    encoders, languages = measured(report, "encoder"), measured(report, "llm")
    return [
        *_without_numbers(report),
        *_without_reference(report, encoders),
        *_compared_with_nothing(report, languages),
        *_left_out(report, [*encoders.values(), *languages.values()]),
        *seeds_warnings(encoders),
        *_many_cut(encoders),
        *_one_class_is_most(encoders, report),
        *_slower_than_parent(encoders),
        *_operations_without_time(encoders),
        *_too_wide_to_rank(report, encoders),
        *_dominated(report),
        *_languages(languages),
        *_of_another_kind(report, [*encoders.values(), *languages.values()]),
    ]


def _without_numbers(report: dict[str, Any]) -> list[str]:
    return [f"{row['name']} {row['status']}: {row['error'].rstrip('.')}." for row in report["models"] if "error" in row]


def _without_reference(report: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    reference = reference_of(report, "encoder")
    if not rows or reference in rows:
        return []
    return [f"{reference}, the classifier that the others are compared with, was not measured: they are compared with nothing."]


def _compared_with_nothing(report: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    """Language models whose dense one is not beside them: another one would say nothing of what compression did to them."""
    lines = []
    for name, row in rows.items():
        base, parent = row["compared_with"], row.get("parent")
        if base is None and parent:
            like = f"it was made from a model called {parent} whose weights are those of no row here"
            lines.append(
                f"{name} is compared with nothing: {like}; --models my-{parent}=FOLDER makes the model in that folder a row, and it is "
                "compared with that."
            )
        elif base is None and row["kind"] == "foreign":
            lines.append(f"{name} is compared with nothing: a folder of others does not say which model it was made from.")
        elif base is not None and base not in rows:
            lines.append(f"{name} is compared with nothing: {base}, which it was made from, was not measured.")
    return lines


def _left_out(report: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Costs that could not be measured, with the reason, and sentences that were cut shorter than the others'."""
    lines = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for what, reason in (row.get("not_measured") or {}).items():
            reasons.setdefault(reason, []).append(what)
        lines += [f"{row['name']}: {', '.join(what)} could not be measured: {reason.rstrip('.')}." for reason, what in reasons.items()]
        asked = report["settings"].get("max_length")
        if asked and row.get("max_length", asked) < asked:
            lines.append(
                f"{row['name']} has positions for {row['max_length']} tokens: its sentences were cut there, the others' at {asked}."
            )
    return lines


def _many_cut(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Classifiers that read less than all of more than one row in a hundred, those with the same numbers together."""
    by_reason: dict[str, list[str]] = {}
    for name, row in rows.items():
        cut = row.get("cut")
        if cut and cut["share"] > 0.01:
            text = (
                f"of {cut['share']:.1%} of the test rows only the first {row['max_length']} tokens were read; at --max_length "
            )
            by_reason.setdefault(f"{text}{cut['length_of_99']} it would be 1%.", []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in by_reason.items()]


def _one_class_is_most(rows: dict[str, dict[str, Any]], report: dict[str, Any]) -> list[str]:
    task = report["data"].get("task")
    each = next((row["per_class"] for row in rows.values() if "per_class" in row), None)
    if not task or not each:
        return []
    largest = max(range(len(each)), key=lambda index: each[index]["rows"])
    share = each[largest]["rows"] / sum(one["rows"] for one in each)
    if share <= MAJORITY:
        return []
    return [f"{share:.1%} of the test rows are {task['labels'][largest]}: always saying that is as accurate; look at macro-F1."]


def _slower_than_parent(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        parent = rows.get(row["made_from"])
        if parent is None or not is_quantized(row["kind"]):
            continue
        ratios = {batch: times_as_fast(parent, row, batch) for batch in row["latency"]}
        slower = [f"{ratio:.2f}x at {batch.replace('_', ' ')}" for batch, ratio in ratios.items() if ratio and ratio > FASTER]
        if slower:
            lines.append(
                f"{name} is slower than its parent {parent['name']} ({', '.join(slower)}): {row['kind']} weights save memory here, "
                "not time."
            )
    return lines


def _operations_without_time(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        parent = rows.get(row["made_from"])
        if parent is None or not row["gflops"] or not parent["gflops"] or row["gflops"] > 0.9 * parent["gflops"]:
            continue
        for batch in row["latency"]:
            ratio = times_as_fast(row, parent, batch)
            if ratio is not None and ratio < FASTER:
                lines.append(
                    f"{name} has {share(row['gflops'] / parent['gflops'] - 1)} GFLOPs than {parent['name']}, but is not faster at batch "
                    f"{batch.removeprefix('batch_')} ({ratio:.2f} times as fast)."
                )
    return lines


def _too_wide_to_rank(report: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    reference = rows.get(reference_of(report, "encoder"))
    alike = [name for name, row in rows.items() if row["mcnemar_against_reference"] and corrected_p(row) >= DISTINGUISHABLE]
    if not reference or not alike:
        return []
    half = 50 * (reference["accuracy_interval"][1] - reference["accuracy_interval"][0])
    return [
        f"{reference['rows']} sentences give an accuracy to within {half:.1f} points: {', '.join(alike)} cannot be ranked against "
        f"{reference['name']} by it."
    ]


def _dominated(report: dict[str, Any]) -> list[str]:
    """Compressed language models that are neither smaller nor better than the file their dense model was published as."""
    file = as_shipped(report)
    lines = []
    for row in compressed(report, file) if file else []:
        if not is_dominated(row, file):
            continue
        faster = [f"{phase} {ratio:.2f}x" for phase in ("prefill", "decode") if (ratio := speedup(row, phase) or 0) >= FASTER]
        remark = f"; its speed is left ({', '.join(faster)} against {row['compared_with']}; the file's was not measured)"
        lines.append(
            f"{row['name']} is dominated: {file['name']} has {file['size_mb']:.1f} MB instead of {row['size_mb']:.1f} and a perplexity of "
            f"{file['perplexity']:.2f} instead of {row['perplexity']:.2f}{remark if faster else ''}."
        )
    return lines


def _languages(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    if any(row["protocol"]["windows"] == 1 for row in rows.values()):
        lines.append("One window of text says nothing of the spread: the intervals of perplexity and KL have no width.")
    for name, row in rows.items():
        if "simulated" in row["kernel"]:
            lines.append(
                f"{name} was multiplied in floating point, because this machine has no int8 kernel: its times say nothing."
            )
        prefill = speedup(row, "prefill")
        if prefill is not None and prefill < 1 / FASTER and row["compression_ratio"] and row["compression_ratio"] > 1:
            lines.append(f"{name} is smaller than {row['compared_with']} and reads a prompt {1 / prefill:.2f}x slower.")
    return lines


def _of_another_kind(report: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Rows whose numbers do not belong beside the others: another text or length, another machine."""
    lines, protocols = [], {}
    for row in rows:
        if "protocol" in row:
            protocol = ", ".join(f"{name} {value!r}" for name, value in row["protocol"].items())
            protocols.setdefault(protocol, []).append(row["name"])
    if len(protocols) > 1:
        common = max(protocols, key=lambda protocol: len(protocols[protocol]))
        lines += [
            f"{', '.join(names)} was measured under another protocol ({protocol}): its perplexity cannot be compared with the others'."
            for protocol, names in protocols.items()
            if protocol != common
        ]
    here = report["environment"]["machine"]
    for row in rows:
        if row.get("machine", here) != here:
            lines.append(f"{row['name']} was measured on another machine ({row['machine']}): its times cannot be compared.")
    return lines
