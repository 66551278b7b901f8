"""A search that goes on with more trials, and one whose space is large."""

import itertools
import tracemalloc

import made_up_search
import pytest
from made_up_search import cost, fresh, run
from optuna.trial import TrialState

from compactmind.search.compressor import read_pipeline
from compactmind.search.notes import Skipped
from compactmind.search.space import make_space
from compactmind.search.strategies import shuffled_points

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
