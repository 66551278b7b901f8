"""Studies whose pipelines cost what is made up, and trials that a worker has left running."""

import pytest

from compactmind.search.compressor import read_pipeline
from compactmind.search.engine import counted_trials, open_study, search
from compactmind.search.space import make_space

DESCRIBED = {"model": "abc", "space": {"orders": ["prune"]}}


@pytest.fixture
def space():
    choices = {
        "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "l2"], "prune.scope": ["global"],
        "prune.structures": [["channels"]], "prune.blocks": [0], "nf4.compensation": [True], "nf4.embeddings": ["as_released", "int8"],
    }  # fmt: skip
    return make_space(("prune", "retrain", "nf4"), choices=choices)


def fresh(tmp_path, name="made up"):
    return open_study(name, f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED)


def cost(steps) -> float:
    """Return a made-up perplexity: more sparsity is worse, retraining helps, 4 bits cost."""
    methods = [step.method.name for step in steps]
    sparsity = sum(getattr(step.recipe, "sparsity", 0) for step in steps)
    return 10 + 20 * sparsity - 4 * ("retrain" in methods) + 3 * ("nf4" in methods)


def run(study, space, n_trials, evaluate=lambda _, steps: [cost(steps)], strategy="bayesian", **options):
    search(study, space, n_trials, evaluate, strategy=strategy, **options)
    return counted_trials(study)


def cost_of(trial) -> float:
    return cost(read_pipeline(trial.user_attrs["pipeline"]))


def abandoned(study, space, point, worker):
    """Leave a trial of a point, or of what waits, running as a worker that is gone would."""
    if point is not None:
        study.enqueue_trial(point)
    trial = study.ask()
    space.suggest(trial)
    trial.set_user_attr("worker", worker)
    trial.set_user_attr("key", f"what trial {trial.number} runs")
    trial.set_user_attr("runs", True)
    return trial.number
