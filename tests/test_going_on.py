"""A search that goes on with more trials, and one whose space is large and has few pipelines that are small enough."""

import itertools
import tracemalloc

import made_up_search
import pytest
from made_up_search import cost, fresh, run
from optuna.trial import TrialState

from compactmind.search import strategies
from compactmind.search.compressor import read_pipeline
from compactmind.search.notes import Skipped
from compactmind.search.space import make_space
from compactmind.search.strategies import Proposer, key_of, shuffled_points

space = made_up_search.space


def guesses_of(space, count):
    return list(space.points())[:count]


# ----------------------------------------------------------------------------------------------------------------- going on
def test_a_grid_goes_on_with_more_trials_as_if_it_had_been_asked_for_all_at_once(tmp_path, space):
    whole = [trial.user_attrs["key"] for trial in run(fresh(tmp_path, "whole"), space, 12, strategy="grid", seed=3)]
    study = fresh(tmp_path)
    assert len(run(study, space, 6, strategy="grid", seed=3)) == 6
    assert [trial.user_attrs["key"] for trial in run(study, space, 12, strategy="grid", seed=3)] == whole
    assert len(run(study, space, 15, strategy="grid", seed=4)) == len(study.trials) == 15  # another order of points: none of them twice


def test_a_grid_runs_as_many_as_it_was_asked_for_though_a_first_guess_is_too_large(tmp_path, space):
    first = [point for point in space.points() if point["order"] == "prune"][:3]
    small = lambda steps: 0.0 if steps[-1].method.name == "nf4" else 1.0  # noqa: E731

    def evaluate(_, steps):
        if small(steps):
            raise Skipped("not run: too large")
        return [cost(steps)]

    assert len(run(fresh(tmp_path), space, 9, evaluate, strategy="grid", first=first, excess=small)) == 9


@pytest.mark.parametrize("strategy", ["bayesian", "grid"])
def test_a_search_that_goes_on_has_the_first_guesses_that_were_left_and_none_twice(tmp_path, space, strategy):
    first, study = guesses_of(space, 12), fresh(tmp_path)
    run(study, space, 6, strategy=strategy, first=first)
    assert [trial.params for trial in study.trials[:4]] == first[:4]  # two thirds
    trials = run(study, space, 15, strategy=strategy, first=first)
    asked = [trial.params for trial in trials]
    assert len(trials) == len(study.trials) == len({trial.user_attrs["key"] for trial in trials}) == 15
    assert all(guess in asked for guess in first[:10]) and all(guess in first[:10] for guess in asked[6:8])
    assert not study.get_trials(states=[TrialState.WAITING])


def test_going_on_by_one_leaves_no_first_guess_waiting(tmp_path, space):
    study = fresh(tmp_path)
    run(study, space, 6)
    assert len(run(study, space, 7, first=guesses_of(space, 12))) == len(study.trials) == 7


# ------------------------------------------------------------------------------------------------------------ large spaces
def test_the_points_in_random_order_are_those_of_the_space_and_the_seeds_own(space):
    everything = list(space.points())
    assert [space.point(index) for index in range(space.size())] == everything
    mixed = list(shuffled_points(space, 1))
    assert len(mixed) == len(everything) and all(point in everything for point in mixed) and all(point in mixed for point in everything)
    assert mixed == list(shuffled_points(space, 1)) and mixed != everything and mixed != list(shuffled_points(space, 2))
    for index in (-1, space.size()):
        with pytest.raises(IndexError, match=rf"point {index} .* {space.size()} points"):
            space.point(index)


def test_the_first_points_of_the_default_space_cost_no_memory():
    large = make_space(("prune", "retrain", "smooth", "w8a8", "nf4", "gptq"), targets=(2.5,))
    assert large.size() > 10_000_000
    tracemalloc.start()
    points = list(itertools.islice(shuffled_points(large, 0), 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6 and len({str(point) for point in points}) == 100
    assert len({point["order"] for point in points}) > 3 and all(read_pipeline(large.pipeline(point)) for point in points)


SCARCE = make_space(("prune", "retrain", "smooth", "w8a8", "nf4"))


def scarce_excess(steps) -> float:
    """Return what stands for a target that very few pipelines reach: two orders, each with certain values alone."""
    if [step.method.name for step in steps] not in (["prune", "nf4"], ["prune", "retrain", "nf4"]):
        return 1.0
    pruned, rounded = steps[0].recipe, steps[-1].recipe
    wanted = pruned.sparsity == 0.6 and pruned.criterion == "l2" and rounded.embeddings == "int8" and rounded.double_quantization
    return 0.0 if wanted and getattr(steps[1].recipe, "tokens", 8192) == 8192 else 1.0


@pytest.mark.parametrize("strategy", ["bayesian", "random", "grid"])
def test_where_few_pipelines_are_small_enough_what_is_near_a_known_one_is_found(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(strategies, "ENUMERABLE", 50)
    usual = {name: values[0] for name, values in SCARCE.choices_for(("prune", "nf4")).items()}
    small = {"prune.sparsity": 0.6, "prune.criterion": "l2", "nf4.embeddings": "int8", "nf4.double_quantization": True}
    guess = {"order": "prune > nf4", **usual, **small}
    assert scarce_excess(read_pipeline(SCARCE.pipeline(guess))) == 0.0
    trials = run(fresh(tmp_path), SCARCE, 6, strategy=strategy, first=[guess], excess=scarce_excess)
    assert len(trials) == len({trial.user_attrs["key"] for trial in trials}) == 6
    assert trials[0].params == guess and all(trial.params["prune.sparsity"] == pytest.approx(0.6) for trial in trials)


def test_a_neighbour_that_is_two_changes_away_is_found():
    small = make_space(("nf4",), choices={"nf4.compensation": [True, False], "nf4.embeddings": ["as_released", "int8"]})
    origin, far = ({"order": "nf4", "nf4.double_quantization": double, "nf4.compensation": True, "nf4.embeddings": table}
                   for double, table in ((True, "int8"), (False, "as_released")))  # fmt: skip
    keys = [key_of(read_pipeline(small.pipeline(point))) for point in (origin, far)]
    proposer = Proposer(small, "bayesian", "tpe", lambda steps: float(key_of(steps) not in keys), [origin])
    assert proposer.near_what_is_small([], {keys[0]}, 0) == far and proposer.near_what_is_small([], set(keys), 0) is None


def test_a_search_that_ends_early_says_so_in_one_line_and_what_to_do(tmp_path, space, capsys):
    nf4 = lambda steps: 0.0 if [step.method.name for step in steps] == ["nf4"] else 1.0  # noqa: E731
    assert len(run(fresh(tmp_path), space, 9, excess=nf4, aim="a compression of 6")) == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "trials" in line]
    assert line.startswith("4 of 9 trials: nothing else that was drawn reaches a compression of 6; ")
    assert "--methods" in line and "--target_compression" in line
    run(fresh(tmp_path, "whole"), space, 3, excess=nf4)
    assert "nothing else" not in capsys.readouterr().out
