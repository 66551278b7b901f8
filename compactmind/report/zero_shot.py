"""Zero-shot tasks in the report: a table, and in sentences what can be distinguished. Measured by compactmind/evaluation/zero_shot.py."""

from typing import Any

from compactmind.report.sentences import DISTINGUISHABLE
from compactmind.report.tables import Table, number


def _rows_and_tasks(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows that were asked and the tasks in the order in which they appear."""
    rows = [row for row in report["models"] if row["status"] == "measured" and row.get("zero_shot")]
    return rows, list(dict.fromkeys(name for row in rows for name in row["zero_shot"]))


def zero_shot_table(report: dict[str, Any]) -> Table | None:
    """Return the share of every task's problems a model gets right with its interval, and the corrected p-value against its base."""
    rows, tasks = _rows_and_tasks(report)
    if not rows:
        return None
    lines = []
    for row in rows:
        line = [row["name"]]
        for name in tasks:
            result = row["zero_shot"].get(name)
            against = (result or {}).get("against")
            line.append("{:.1%} [{:.1%}, {:.1%}]".format(result["accuracy"], *result["interval"]) if result else "-")
            line.append(number(against and against["p_holm"], ".2g"))
        lines.append(line)
    header = ["model", *(part for name in tasks for part in (f"{name} [95%]", "p, Holm"))]
    notes = []
    for name in tasks:
        result = next(row["zero_shot"][name] for row in rows if name in row["zero_shot"])
        notes.append(f"{name}: {result['metric']}, {result['problems']} problems")
    harness = ", ".join(sorted({result["harness"] for row in rows for result in row["zero_shot"].values()}))
    note = f"{'; '.join(notes)} ({harness}); p: McNemar on the same problems against the model a row is made from, corrected for all."
    return Table("Zero-shot", header, lines, note)


def zero_shot_sentences(report: dict[str, Any]) -> list[str]:
    """Return which models differ from the one they were made from, in one sentence, and which tasks could not be asked, a line each."""
    rows, _ = _rows_and_tasks(report)
    compared = [
        (row, name, result["against"]) for row in rows for name, result in row["zero_shot"].items() if result.get("against")
    ]  # fmt: skip
    lines = [f"{name} was not asked: {why.rstrip('.')}." for name, why in (report.get("zero_shot_refused") or {}).items()]
    if not compared:
        return lines
    differ = []
    for row, name, against in compared:
        if against["p_holm"] < DISTINGUISHABLE:
            better = against["only_this_correct"] > against["only_reference_correct"]
            differ.append(f"{row['name']} is {'better' if better else 'worse'} at {name} (p = {against['p_holm']:.2g})")
    text = f"Zero-shot, of {len(compared)} comparisons with the model each was made from on the same problems "
    text += f"{len(differ)} differ{'s' * (len(differ) == 1)} from chance: {'; '.join(differ)}" if differ else "none differs from chance"
    return [f"{text}.", *lines]
