"""What a language model can do without examples: HellaSwag, PIQA, ARC and LAMBADA through lm-eval, problem by problem.

Perplexity says how well a model predicts text; these ask whether it still picks the right ending, answer or word. EleutherAI's harness
builds the prompts and sums the log-likelihoods, so that a number stands beside published ones of the same task, metric and version; the
tasks are its own but for where the problems lie: `<folder>/<task>.jsonl` if it is there, else the hub. Each problem's outcome is kept, so
two models are compared on the same problems (McNemar's exact test), which shows far smaller differences than two intervals.

hellaswag        Zellers et al. 2019, https://arxiv.org/abs/1905.07830; acc_norm
piqa             Bisk et al. 2020, https://arxiv.org/abs/1911.11641; acc_norm
arc_easy, arc_challenge   Clark et al. 2018, https://arxiv.org/abs/1803.05457; acc_norm
lambada_openai   Paperno et al. 2016, https://arxiv.org/abs/1606.06031; acc
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import Checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import holm, mcnemar
from compactmind.evaluation.failures import cell_fails_alone, reason_of
from compactmind.files import sha256_of

BATCH_SIZE = 8


@dataclass(frozen=True)
class Suite:
    """A task of the harness: its file there, the metric it is quoted by, the split that is asked, the columns of its problems."""

    file: str
    metric: str
    split: str
    columns: tuple[str, ...]


TASKS = {
    "hellaswag": Suite("hellaswag/hellaswag.yaml", "acc_norm", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": Suite("piqa/piqa.yaml", "acc_norm", "validation", ("goal", "sol1", "sol2", "label")),
    "arc_easy": Suite("arc/arc_easy.yaml", "acc_norm", "test", ("question", "choices", "answerKey")),
    "arc_challenge": Suite("arc/arc_challenge.yaml", "acc_norm", "test", ("question", "choices", "answerKey")),
    "lambada_openai": Suite("lambada/lambada_openai.yaml", "acc", "test", ("text",)),
}
"""Name, as the harness has it -> what is asked."""


def require_tasks(names: Iterable[str]) -> None:
    """Raise CompactMindError on a name that is no task here."""
    for name in names:
        if name not in TASKS:
            raise CompactMindError(f"--zero_shot {name!r} is no task: choose among {', '.join(TASKS)}")


def check_problems(name: str, file: Path) -> None:
    """Raise CompactMindError unless the first line of `file` is a problem of the task as JSON."""
    columns = ", ".join(TASKS[name].columns)
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(next(lines, ""))
        missing = [column for column in TASKS[name].columns if column not in first]
    except (OSError, ValueError, TypeError) as error:
        raise CompactMindError(f"{file} holds no problems of {name} as JSON lines with {columns}: {error}") from error
    if missing:
        raise CompactMindError(f"{file} lacks {', '.join(missing)}: a problem of {name} has {columns}")


def load_tasks(names: Iterable[str], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the harness's tasks with their problems by name, and why others cannot be asked: name -> one line.

    A task's problems are those of `<folder>/<task>.jsonl`, the harness's columns as JSON lines, else the hub's. Raises CompactMindError
    on an unknown name.
    """
    names = list(dict.fromkeys(names))
    require_tasks(names)
    loaded: dict[str, Any] = {}
    refused: dict[str, str] = {}
    if not names:
        return loaded, refused
    import lm_eval  # here: it takes seconds that only those who ask for it should pay
    from lm_eval.tasks._yaml_loader import load_yaml

    from compactmind.evaluation.harness import task_manager

    for name in names:
        file, suite, task = folder / f"{name}.jsonl", TASKS[name], name
        try:
            if file.is_file():
                check_problems(name, file)
                task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / suite.file, resolve_func=True)
                task = {key: value for key, value in task.items() if key != "tag"}
                task |= {"training_split": None, "validation_split": None, "test_split": None, f"{suite.split}_split": suite.split}
                task |= {"dataset_path": "json", "dataset_name": None}
                task["dataset_kwargs"] = {"data_files": {suite.split: str(file.resolve())}}
            loaded[name] = task_manager().load([task])["tasks"][name]
        except CompactMindError as error:
            refused[name] = str(error)
        except Exception as error:  # noqa: BLE001  the hub's library has many ways to say that it is not there
            refused[name] = f"{file} is not there, and the hub does not answer ({reason_of(error)[:120]})"
            if file.is_file():
                refused[name] = f"{file} cannot be read: {reason_of(error)[:160]}"
    return loaded, refused


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any], limit: int, batch_size: int = BATCH_SIZE
) -> dict[str, dict[str, Any]]:
    """Return what a causal LM, stored in any way, gets right of the first `limit` problems (0: all) of tasks of `load_tasks`.

    By task: task, version, harness, metric, problems, accuracy with its 95% Wilson interval, in [0, 1], and `right`, a character for
    each problem in the order of the file: 1 right, 0 wrong.
    """
    import lm_eval

    from compactmind.evaluation.harness import in_the_harness, task_manager

    with in_the_harness(model, tokenizer, batch_size) as asked:
        evaluated = lm_eval.simple_evaluate(
            asked, tasks=list(tasks.values()), limit=limit or None, num_fewshot=0, bootstrap_iters=0, log_samples=True,
            task_manager=task_manager(), verbosity="ERROR",
        )  # fmt: skip
    results = {}
    for name in tasks:
        metric = TASKS[name].metric
        samples = sorted(evaluated["samples"][name], key=lambda sample: sample["doc_id"])
        right = [int(sample[metric]) for sample in samples]
        interval = binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
        results[name] = {
            "task": name, "version": evaluated["versions"][name], "harness": f"lm-eval {lm_eval.__version__}", "metric": metric,
            "problems": len(right), "accuracy": sum(right) / len(right), "interval": [float(interval.low), float(interval.high)],
            "right": "".join(map(str, right)),
        }  # fmt: skip
    return results


def measure_zero_shot(
    rows: list[dict[str, Any]], load: Callable[[dict[str, Any]], Checkpoint], tasks: Mapping[str, Any], folder: Path, limit: int
) -> None:
    """Add, in place, `zero_shot`, task -> outcome, to the rows that were measured and lack it; each fails alone.

    What is there of the same problems and limit stays; `load` returns the checkpoint of a row.
    """
    files = {name: folder / f"{name}.jsonl" for name in tasks}
    data = {name: sha256_of(file) if file.is_file() else "hub" for name, file in files.items()}
    for row in rows:
        known = row.get("zero_shot") or {}
        requests = {name: {"limit": limit, "problems": data[name]} for name in tasks}
        missing = {name: tasks[name] for name in tasks if (known.get(name) or {}).get("asked") != requests[name]}
        if row["status"] != "measured" or not missing:
            continue
        print(f"{row['name']:<24} {', '.join(missing)}, {limit or 'all'} problems each ...", flush=True)
        with cell_fails_alone(row, "zero_shot"):
            checkpoint = load(row)
            new = ask(checkpoint.model, checkpoint.tokenizer, missing, limit)
            row["zero_shot"] = known | {name: outcome | {"asked": requests[name]} for name, outcome in new.items()}


def compare_zero_shot(rows: list[dict[str, Any]]) -> None:
    """Give, in place, every outcome its `against`, McNemar's test on the same problems with the row it is compared with, or None.

    `p_holm` is corrected for all of a report's comparisons (Holm 1979): rows times tasks.
    """
    by_name, comparisons = {row["name"]: row for row in rows}, []
    for row in rows:
        base = by_name.get(row.get("compared_with") or "") or {}
        for name, outcome in (row.get("zero_shot") or {}).items():
            other = (base.get("zero_shot") or {}).get(name)
            outcome["against"] = None
            if other and base is not row and outcome["asked"] == other["asked"] and len(outcome["right"]) == len(other["right"]):
                outcome["against"] = mcnemar(*(numpy.array([mark == "1" for mark in each["right"]]) for each in (other, outcome)))
                comparisons.append(outcome["against"])
    for comparison, corrected in zip(comparisons, holm([each["p_value"] for each in comparisons]), strict=True):
        comparison["p_holm"] = corrected
