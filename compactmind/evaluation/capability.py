"""Grade-school mathematics as a capability check: GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168) through lm-eval.

Perplexity says how well a model predicts text; this asks whether it can still do something with it. EleutherAI's harness builds the
prompts, generates greedily and matches the answers, so that a number stands beside published ones of the same task and version:
`gsm8k_cot`, the eight worked examples of Wei et al. 2022 (https://arxiv.org/abs/2201.11903), which need no training split.

strict     the answer stands where the examples put it ("The answer is 9.")
flexible   the last number of the answer, wherever it stands
"""

from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.errors import CompactMindError

TASK = "gsm8k_cot"
MATCHES = {"strict": "strict-match", "flexible": "flexible-extract"}
"""Our name -> the harness's."""


def gsm8k(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: int,
    *,
    file: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """Return the share of the first `problems` test problems (0: all 1319) a causal LM solves, with 95% Wilson intervals.

    `file` holds the test split as JSON lines (question, answer); without it the hub's openai/gsm8k is used. Keys: task, version,
    harness, problems, max_new_tokens, strict and flexible, each with accuracy and interval, shares in [0, 1]. Raises
    CompactMindError if the problems cannot be read.
    """
    import lm_eval  # here: it takes seconds that only those who ask for it should pay

    from compactmind.evaluation.harness import in_the_harness, task_manager

    task: str | dict[str, Any] = TASK
    if file is not None:
        if not file.is_file():
            raise CompactMindError(f"{file} not found: put GSM8K's test split there, as JSON lines with question and answer")
        definition = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"  # the harness's own, but for the data
        task = yaml.safe_load(definition.read_text(encoding="utf-8"))
        task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file.resolve())}}}
    try:
        with in_the_harness(model, tokenizer, batch_size) as asked:
            evaluated = lm_eval.simple_evaluate(
                asked, tasks=[task], limit=problems or None, bootstrap_iters=0, gen_kwargs={"max_gen_toks": max_new_tokens},
                task_manager=task_manager(), verbosity="ERROR",
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        where = file or "the hub's openai/gsm8k (or put test.jsonl into gsm8k_data/)"
        raise CompactMindError(f"GSM8K cannot be read from {where}: {str(error).splitlines()[0]}") from error
    result, count = evaluated["results"][TASK], evaluated["n-samples"][TASK]["effective"]
    shares = {}
    for name, match in MATCHES.items():
        accuracy = result[f"exact_match,{match}"]
        interval = binomtest(round(accuracy * count), count).proportion_ci(0.95, method="wilson")
        shares[name] = {"accuracy": float(accuracy), "interval": [float(interval.low), float(interval.high)]}
    return {
        "task": TASK, "version": evaluated["versions"][TASK], "harness": f"lm-eval {lm_eval.__version__}", "problems": count,
        "max_new_tokens": max_new_tokens, **shares,
    }  # fmt: skip
