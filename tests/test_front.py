"""Fronts, knees and what steps are worth, by hand; what is asked for next, on made-up studies."""

import json
import random
import re
from types import SimpleNamespace

import helpers
import optuna
import pytest
from optuna.trial import TrialState

from compactmind.errors import CompactMindError
from compactmind.search import choosing, findings, strategies
from compactmind.search.ablation import ablation
from compactmind.search.ablation import table as ablation_table
from compactmind.search.compressor import read_pipeline
from compactmind.search.engine import counted_trials, open_study, search
from compactmind.search.front import (
    candidates,
    contenders,
    described,
    front,
    front_problem,
    hypervolume,
    knee,
    objectives_problem,
    table,
)
from compactmind.search.space import make_space
from compactmind.search.strategies import POPULATION, Proposer, changes_seen, front_of, key_of, make_sampler


def trial(number, size, kl):
    measured = {"bytes": size, "kl": kl, "compression_ratio": 100 / size, "perplexity": 1.0}
    pipeline = [{"method": "nf4", "params": {}}]
    return SimpleNamespace(number=number, user_attrs={"measured": measured, "pipeline": pipeline})


TRIALS = [trial(*each) for each in ((0, 50, 0.1), (1, 40, 0.2), (2, 40, 0.3), (3, 25, 1.0), (4, 30, 0.25), (5, 45, 0.25), (6, 50, 0.1))]


def test_the_front_is_what_nothing_beats_in_both():
    assert [each.number for each in front(TRIALS, "kl")] == [0, 1, 4, 3]
    assert [each.number for each in front(random.Random(1).sample(TRIALS, 7), "kl")] == [0, 1, 4, 3]
    assert knee(front(TRIALS, "kl"), "kl").number == 4  # 4/5 of the way to the smallest, 2/5 to the farthest
    assert knee(front(TRIALS[:2], "kl"), "kl") is None
    concave = [trial(*each) for each in ((0, 100, 0.1), (1, 60, 0.9), (2, 50, 1.0))]  # the middle lies above the line
    straight = [trial(*each) for each in ((0, 100, 0.01), (1, 75, 0.1), (2, 50, 1.0))]  # KL is drawn by its logarithm
    for corners in (concave, straight):
        assert knee(corners, "kl") is None and described(corners, "kl", {})["knee"] is None
    assert knee([trial(0, 100, 0.0), trial(1, 60, 1e-4), trial(2, 50, 1.0)], "kl").number == 1  # 0 counts as very little
    result = described(TRIALS, "kl", {4: {"kl": 0.26}})
    assert [point["on_all_windows"] for point in result["points"]] == [None, None, 0.26, None] and result["knee"] == 4
    lines = table(json.loads(json.dumps(result))).splitlines()
    assert [line.endswith("<- the knee") for line in lines[2:]] == [False, False, True, False]
    assert "0.26" in lines[4] and "nan" in lines[5]
    assert front_problem(2) is None and "1 point" in front_problem(1)


def test_the_best_of_a_size_is_the_nearest_that_is_small_enough():
    assert [each.number for each in candidates(TRIALS, 2.4, "kl", 2)] == [1, 4]
    assert candidates(TRIALS, 4.5, "kl", 2) == []


def test_what_is_twice_as_bad_as_the_best_of_a_size_is_no_contender():
    assert [each.number for each in candidates(TRIALS, 2.0, "kl", 5)] == [0, 6, 1, 4, 5]
    assert [each.number for each in contenders(TRIALS, 2.0, "kl", 5)] == [0, 6, 1]
    assert [each.number for each in contenders(TRIALS, 2.0, "kl", 2)] == [0, 6]
    assert contenders(TRIALS, 4.5, "kl", 2) == []


def test_the_hypervolume_is_the_area_up_to_the_reference():
    assert hypervolume([(1, 3), (2, 1), (2, 2)], (4, 4)) == (4 - 1) * (4 - 3) + (4 - 2) * (3 - 1)
    assert hypervolume([(5, 0), (0, 5)], (4, 4)) == hypervolume([], (4, 4)) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bayesian", ("kl", "bytes"), (2.0, 3.0)), None),
        (("fixed", ("kl",), ()), None),
        (("fixed", ("kl",), (2.0,)), "has no front"),
        (("random", ("latency", "bytes"), ()), "how good a model is"),
        (("random", ("perplexity",), (2.5,)), "save_front 2.5 wants.*--objectives perplexity bytes"),
    ],
)
def test_objectives_that_contradict_what_is_asked_for_say_so(arguments, expected):
    problem = objectives_problem(*arguments)
    assert problem is None if expected is None else re.search(expected, problem)


# --------------------------------------------------------------------------------------------------------------- ablation
def test_what_a_step_is_worth_is_the_whole_without_it_and_the_step_alone():
    result = {"prune > nf4": 1.0, "smooth > nf4": 0.25, "prune > smooth > nf4": 0.9, "nf4": 0.3, "prune": 0.5}

    def run(steps):
        return SimpleNamespace(steps=[{"kl": 0.0}, {"kl": result[" > ".join(step.method.name for step in steps)]}])

    steps = read_pipeline([{"method": name} for name in ("prune", "smooth", "nf4")])
    prune, smooth, nf4 = ablation(steps, run, "kl", [{"kl": 0.0}, {"kl": 0.9}])
    assert prune["change"] == pytest.approx(0.65) and prune["alone"] == 0.5 and prune["interaction"] == pytest.approx(0.15)
    assert smooth["change"] == pytest.approx(-0.1) and smooth["alone"] is smooth["interaction"] is None
    assert nf4["change"] is None and "changes nothing but how well a quantization goes" in nf4["reason"] and nf4["alone"] == 0.3
    assert ablation(steps[2:], run, "kl", []) == []
    lines = ablation_table([prune, smooth, nf4], "kl").splitlines()
    assert "+0.6500" in lines[2] and "+0.1500" in lines[2] and "-0.1000" in lines[3] and "put one behind it" in lines[4]


def test_what_only_makes_up_for_another_step_is_not_run_without_it():
    steps = read_pipeline([{"method": "prune"}, {"method": "retrain", "params": {"alpha": 1.0}}, {"method": "nf4"}])
    asked = []

    def run(some):
        asked.append([step.method.name for step in some])
        return SimpleNamespace(steps=[{"kl": 0.0}, {"kl": 0.5}])

    prune, retrain, nf4 = ablation(steps, run, "kl", [{"kl": 0.0}, {"kl": 0.9}])
    assert prune["without"] is None and "step 1, retrain, would change nothing" in prune["reason"]
    assert retrain["without"] == nf4["without"] == 0.5 and ["retrain", "nf4"] not in asked and ["prune", "nf4"] in asked


# ------------------------------------------------------------------------------------------------------- what comes next
@pytest.fixture
def space():
    choices = {
        "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "l2"], "prune.scope": ["global"],
        "prune.structures": [["channels"]], "prune.blocks": [0], "nf4.compensation": [True], "nf4.embeddings": ["as_released", "int8"],
        "retrain.lr": [1e-4], "retrain.tokens": [4096],
    }  # fmt: skip
    return make_space(("prune", "retrain", "nf4"), choices=choices)


def cost(steps) -> float:
    return 1 + sum(getattr(step.recipe, "sparsity", 0.0) for step in steps) - 0.5 * any(step.method.kind == "retrain" for step in steps)


def bytes_of(steps) -> float:
    return 100 / (1 + 2 * sum(getattr(step.recipe, "sparsity", 0.0) for step in steps) + any(step.method.name == "nf4" for step in steps))


@pytest.mark.parametrize("strategy", ["bayesian", "evolution", "random", "grid"])
@pytest.mark.parametrize("objectives", [1, 2])
def test_nothing_is_asked_for_twice_nor_what_is_too_large_and_all_begin_alike(tmp_path, space, strategy, objectives):
    study = open_study("x", f"{tmp_path}/study.log", {}, ["minimize"] * objectives)
    first = [
        {"order": "nf4", "nf4.double_quantization": True, "nf4.embeddings": "int8"},
        {"order": "prune > nf4", "prune.sparsity": 0.1, "prune.criterion": "l2", "nf4.double_quantization": True, "nf4.embeddings": "int8"},
    ]  # fmt: skip
    small = lambda steps: 0.0 if steps[-1].method.name == "nf4" else 1.0  # noqa: E731
    search(
        study, space, 2 * POPULATION + 4, lambda _, steps: [cost(steps), bytes_of(steps)][:objectives], strategy=strategy, first=first,
        excess=small, seed=3,
    )  # fmt: skip
    trials = counted_trials(study)
    assert len(study.trials) == len(trials) == 2 * POPULATION + 4  # nothing was skipped
    assert len({each.user_attrs["key"] for each in trials}) == len(trials)
    assert [each.params for each in trials[:2]] == first and all(each.params["order"].endswith("nf4") for each in trials)


def test_evolution_crosses_parents_of_different_orders(space):
    study = optuna.create_study()
    points = [
        {"order": "prune > retrain > nf4", "prune.sparsity": 0.2, "prune.criterion": "l2", "retrain.alpha": 0.5,
         "nf4.double_quantization": False, "nf4.embeddings": "int8"},
        {"order": "nf4", "nf4.double_quantization": True, "nf4.embeddings": "as_released"},
    ]  # fmt: skip
    evolution = make_sampler("evolution", "", 1)
    for point in points * POPULATION:
        study.enqueue_trial(point)
        asked = study.ask()
        space.suggest(asked)
        study.tell(asked, 1.0)
    parents = study.trials
    children = [evolution._child(study, evolution.infer_relative_search_space(study, parents[0]), parents) for _ in range(200)]
    both = [child for child in children if child.get("order") == points[0]["order"] and child.get("nf4.embeddings") == "as_released"]
    assert both and any(child.get("prune.sparsity") == 0.2 for child in both)  # the order of one, the table of the other
    assert all(set(child) <= set(points[0]) for child in children)
    assert not any("prune.sparsity" in child for child in children if child.get("order") == "nf4")
    assert any("order" not in child for child in children)  # what is forgotten is drawn anew


def study_of(space, count: int) -> tuple[optuna.Study, set[str]]:
    """Return a study of `count` trials, of which the first, `prune > nf4` by 0.2, is the best, and the keys of all."""
    study, everything, known = optuna.create_study(), list(space.points()), set()
    best = next(point for point in everything if point["order"] == "prune > nf4" and point["prune.sparsity"] == 0.2)
    for value, point in enumerate([best, *random.Random(0).sample(everything, count - 1)]):
        study.enqueue_trial(point)
        asked = study.ask()
        known.add(key_of(read_pipeline(space.suggest(asked))))
        study.tell(asked, float(value))
    return study, known


@pytest.mark.parametrize(("strategy", "count", "near"), [("bayesian", 31, True), ("bayesian", 5, False), ("bayesian", 30, False),
                                                         ("evolution", 31, False), ("random", 31, False)])  # fmt: skip
def test_every_other_proposal_of_the_bayesian_search_is_a_neighbour_of_the_best(space, monkeypatch, strategy, count, near):
    study, known = study_of(space, count)
    asked, original = [], strategies.make_sampler
    monkeypatch.setattr(strategies, "make_sampler", lambda *given: asked.append(given) or original(*given))
    proposed = Proposer(space, strategy, "tpe", lambda _: 0.0).propose(study, known, seed=0)
    assert key_of(read_pipeline(space.pipeline(proposed))) not in known and bool(asked) != near
    assert not near or proposed in space.neighbours(study.trials[0].params)


def test_after_a_duplicate_comes_a_neighbour_of_the_best(space, monkeypatch):
    (study, known), everything = study_of(space, 32), list(space.points())
    best = study.trials[0].params
    proposer = Proposer(space, "bayesian", "tpe", lambda _: 0.0)
    others = [point for point in everything if point["order"] != "prune > nf4"]
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        stuck = optuna.samplers.PartialFixedSampler(best, optuna.samplers.RandomSampler(seed=0))
    monkeypatch.setattr("compactmind.search.strategies.make_sampler", lambda *_: stuck)
    proposed = proposer.propose(study, known, seed=0)
    near = space.neighbours(study.trials[0].params)
    assert proposed in near and key_of(read_pipeline(space.pipeline(proposed))) not in known
    left = others[-1]
    all_but_one = {key_of(read_pipeline(space.pipeline(point))) for point in everything if point != left}
    assert proposer.propose(study, all_but_one, seed=0) == left
    assert proposer.propose(study, all_but_one | {key_of(read_pipeline(space.pipeline(left)))}, seed=0) is None


def study_told(space, *trials: tuple[dict, list[float]]) -> optuna.Study:
    """Return a study in which these points were told these values."""
    study = optuna.create_study(directions=["minimize"] * 2)
    for point, values in trials:
        study.enqueue_trial(point)
        asked = study.ask()
        space.suggest(asked)
        study.tell(asked, values)
    return study


@pytest.mark.parametrize("seed", range(8))
def test_what_helped_at_one_size_is_tried_at_the_others_first(space, seed):
    usual = {"order": "prune > nf4", "nf4.double_quantization": True}
    small = {**usual, "prune.sparsity": 0.4, "prune.criterion": "l2", "nf4.embeddings": "int8"}
    large = {**usual, "prune.sparsity": 0.1, "prune.criterion": "taylor", "nf4.embeddings": "as_released"}
    beaten = {**usual, "prune.sparsity": 0.2, "prune.criterion": "taylor", "nf4.embeddings": "as_released"}
    study = study_told(space, (small, [2.0, 1.0]), (large, [1.0, 2.0]), (beaten, [3.0, 3.0]))
    proposer = Proposer(space, "bayesian", "tpe", lambda _: 0.0)
    pairs, names = ((small, large), (large, small)), ("prune.criterion", "nf4.embeddings")
    helped = [{**one, name: other[name]} for one, other in pairs for name in names]
    near = proposer.near_the_best(study.trials, True, set(), seed)
    assert near in helped
    assert proposer.near_the_best(study.trials, True, {key_of(read_pipeline(space.pipeline(near)))}, seed) in helped


@pytest.mark.parametrize("strategy", ["bayesian", "evolution", "random"])
def test_what_is_the_same_without_one_of_its_steps_is_never_asked_for(strategy):
    methods, first = ("prune", "retrain", "nf4"), {"prune.sparsity": [0.2], "prune.criterion": ["taylor"], "prune.scope": ["global"]}
    one = {name: [value] for name, value in (("retrain.tokens", 4096), ("retrain.lr", 1e-4), ("nf4.double_quantization", True))}
    few = {"prune.structures": [["channels"]], "prune.blocks": [0], "nf4.compensation": [True], "nf4.embeddings": ["int8"]}
    small = make_space(methods, choices={**first, **one, **few, "retrain.alpha": [0.5, 1.0]}, by_text=True)
    everything = {key_of(read_pipeline(small.pipeline(point))): point for point in small.points()}
    idle = {key for key, point in everything.items() if point.get("retrain.alpha") == 1.0 and "prune" not in point["order"]}
    assert len(idle) == 1  # retrain > nf4 with nothing cut before it
    study, known = optuna.create_study(), set()
    proposer = Proposer(small, strategy, "tpe", lambda _: 0.0)
    while (point := proposer.propose(study, known, seed=len(known))) is not None:
        study.enqueue_trial(point)
        asked = study.ask()
        known.add(key_of(read_pipeline(small.suggest(asked))))
        study.tell(asked, len(known))
    assert known == everything.keys() - idle


@pytest.mark.parametrize("seed", range(8))
def test_what_made_another_worse_is_tried_last(space, seed):
    usual = {"order": "prune > nf4", "nf4.double_quantization": True, "nf4.embeddings": "as_released"}
    one = {**usual, "prune.sparsity": 0.1, "prune.criterion": "taylor"}
    other = {**usual, "prune.sparsity": 0.2, "prune.criterion": "taylor"}
    worse = {**one, "prune.criterion": "l2"}
    study = study_told(space, (one, [2.0, 1.0]), (worse, [3.0, 1.0]), (other, [1.0, 2.0]))
    change = ("prune.criterion", "taylor", "l2")
    assert changes_seen(study.trials) == {change: 1.0, (change[0], "l2", "taylor"): -1.0}  # of one size
    harmful, unknown = {**other, "prune.criterion": "l2"}, {**other, "nf4.embeddings": "int8"}
    near = [point for origin in (one, other) for point in space.neighbours(origin)]
    assert harmful in near and unknown in near
    known = {key_of(read_pipeline(space.pipeline(point))) for point in near if point not in (harmful, unknown)}
    proposer = Proposer(space, "bayesian", "tpe", lambda _: 0.0)
    for expected in (unknown, harmful):
        assert proposer.near_the_best(study.trials, True, known, seed) == expected
        known.add(key_of(read_pipeline(space.pipeline(expected))))


def test_the_front_of_a_study_is_optunas(space):
    study, choose = optuna.create_study(directions=["minimize"] * 2), random.Random(2)
    for _ in range(40):
        study.add_trial(optuna.trial.create_trial(values=[choose.randint(0, 9), choose.randint(0, 9)], state=TrialState.COMPLETE))
    assert {tuple(each.values) for each in front_of(study.trials)} == {tuple(each.values) for each in study.best_trials}


# ------------------------------------------------------------------------------------------------------------- choosing
def chooser(kl, learns="retrain"):
    """Return what stands for a runner: whatever it runs comes to `kl`."""
    made = SimpleNamespace(steps=[{"method": "dense", "seconds": 9.0}, {"method": learns, "seconds": 2.0}])
    resources = SimpleNamespace(teacher=helpers.make_llama)
    return SimpleNamespace(quality="kl", run=lambda _: made, measure=lambda _: {"kl": kl}, resources=resources)


def test_what_is_retrained_long_is_saved_only_if_it_is_better():
    steps = read_pipeline([{"method": "prune"}, {"method": "retrain", "params": {"tokens": 100}}])
    for kl, kept in ((0.4, True), (0.6, False)):
        result, record = choosing.retrain_longer(steps, {"kl": 0.5}, chooser(kl), 300)
        assert record == {"tokens": 300, "seconds": 2.0, "searched": 0.5, "final": kl, "kept": kept}
        assert result[1].recipe.tokens == (300 if kept else 100)
    for few in (0, 100):
        assert choosing.retrain_longer(steps, {"kl": 0.5}, chooser(0.1), few) == (steps, None)
    assert choosing.retrain_longer(steps[:1], {"kl": 0.5}, chooser(0.1), 300) == (steps[:1], None)


@pytest.mark.parametrize("error", [CompactMindError("the model is damaged"), MemoryError("no memory left\nand more")], ids=repr)
def test_a_final_training_that_fails_leaves_the_pipeline_as_the_search_made_it(error, capsys):
    def failing(*_):
        raise error

    steps = read_pipeline([{"method": "prune"}, {"method": "retrain", "params": {"tokens": 100}}])
    found = trial(7, 50, 0.1)
    found.user_attrs["pipeline"], confirmed = [step.described() for step in steps], {7: {"kl": 0.5, "compression_ratio": 2.0}}
    runner = chooser(0.1)
    for name in ("run", "measure"):
        chosen = choosing.choose(2.0, [found], confirmed, SimpleNamespace(**vars(runner) | {name: failing}), 300)
        assert chosen["trial"] == 7 and chosen["pipeline"] == found.user_attrs["pipeline"]
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        assert chosen["final_training"] == {"tokens": 300, "searched": 0.5, "final": None, "kept": False, "error": why}
        assert f"final training failed ({why}): the pipeline of the search is kept\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [CompactMindError("not finite"), MemoryError("no memory left\nand more")], ids=repr)
def test_a_trial_that_cannot_be_confirmed_is_left_out_and_not_the_search(tmp_path, error, capsys):
    study, found = open_study("one", f"sqlite:///{tmp_path / 'study.db'}", {}), [trial(number, 50, 0.1) for number in range(2)]
    failed = []

    def run(_):
        if not failed:
            failed.append(error)
            raise error
        return SimpleNamespace(steps=[])

    measure = lambda *_, **__: {"kl": 0.5, "compression_ratio": 2.0}  # noqa: E731
    runner = SimpleNamespace(run=run, measure=measure, windows=[1, 2], resources=None, step_measure=None, cache=None, quality="kl")
    confirmed = choosing.confirm(study, found, runner)
    why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert set(confirmed) == {1} and f"trial 0 is left out, it could not be confirmed: {why}\n" in capsys.readouterr().out
    assert choosing.choose(2.0, found[:1], confirmed, runner, 0) == {"ratio": 2.0}
    failed.clear()
    with pytest.raises(CompactMindError, match=f"none of the best trials could be confirmed on 2 windows .{why}.: the study is kept"):
        choosing.confirm(study, found[:1], runner)


def test_two_machines_that_confirm_at_once_lose_nothing_of_each_other(tmp_path):
    found = [trial(number, 50, 0.1) for number in range(3)]
    ours, theirs = (open_study("one", f"sqlite:///{tmp_path / 'study.db'}", {}) for _ in range(2))
    ours.set_user_attr("confirmed", {"2": {"kl": 2.0}})  # as earlier versions wrote all of them in one

    def confirming(kl, meanwhile=lambda: None):
        def run(_):
            meanwhile()
            return SimpleNamespace(steps=[])

        measure = lambda *_, **__: {"kl": kl}  # noqa: E731
        return SimpleNamespace(run=run, measure=measure, windows=[], resources=None, step_measure=None, cache=None)

    def the_other_one_too():
        assert set(choosing.confirm(theirs, [found[0], found[2]], confirming(0.5))) == {0, 2}

    assert set(choosing.confirm(ours, [found[1]], confirming(1.0, the_other_one_too))) == {0, 1, 2}
    for study in (ours, theirs):
        known = choosing.confirm(study, found, confirming(0.0, lambda: pytest.fail("it is known")))
        assert {number: each["kl"] for number, each in known.items()} == {0: 0.5, 1: 1.0, 2: 2.0}


def test_integers_that_cost_something_learn_after_rounding_before_they_are_saved(monkeypatch):
    steps = read_pipeline([{"method": "prune"}, {"method": "gptq", "params": {"target_compression": 4}}])
    for kl, kept in ((0.4, True), (0.6, False)):
        result, record = choosing.retrain_longer(steps, {"kl": 0.5}, chooser(kl, "gptq"), 300)
        assert record == {"tokens": 300, "seconds": 2.0, "searched": 0.5, "final": kl, "kept": kept}
        assert result[1].recipe.tuning_tokens == (300 if kept else 0) and result[1].recipe.target_compression == 4
    assert choosing.retrain_longer(steps, {"kl": choosing.AS_GOOD}, chooser(0.0), 300) == (steps, None)  # nothing to win
    monkeypatch.setattr(choosing, "is_small", lambda _: False)  # no room for gradients of all its weights
    assert choosing.retrain_longer(steps, {"kl": 0.5}, chooser(0.1), 300) == (steps, None)
    both = read_pipeline([{"method": "prune"}, {"method": "retrain", "params": {"tokens": 100}}, {"method": "gptq"}])
    result, _ = choosing.retrain_longer(both, {"kl": 0.5}, chooser(0.1), 300)
    assert result[1].recipe.tokens == 300 and result[2].recipe.tuning_tokens == 0


@pytest.mark.parametrize(("quality", "learns"), [("kl", 300), ("perplexity", 0)])
def test_what_retraining_taught_of_the_text_is_not_unlearnt_from_the_dense_model(quality, learns):
    steps = read_pipeline([{"method": "retrain", "params": {"tokens": 100}}, {"method": "gptq", "params": {"target_compression": 4}}])
    runner = chooser(0.4)
    runner.quality, runner.measure = quality, lambda _: {quality: 0.4}
    result, record = choosing.retrain_longer(steps, {"kl": 0.5, "perplexity": 0.5}, runner, 300)
    assert record["kept"] and [result[0].recipe.tokens, result[1].recipe.tuning_tokens] == [300, learns]
    alone, _ = choosing.retrain_longer(steps[1:], {"kl": 0.5, "perplexity": 0.5}, runner, 300)
    assert alone[0].recipe.tuning_tokens == 300


def test_a_stopped_trial_is_none_of_the_measured_ones():
    study = optuna.create_study()
    for estimated in (False, True):
        asked = study.ask()
        asked.set_user_attr("estimated" if estimated else "measured", [1.0] if estimated else {"kl": 1.0, "compression_ratio": 2.0})
        study.tell(asked, 1.0)
    assert [each.number for each in findings.measured_trials(study)] == [0]
    assert findings.states_of(study)["STOPPED"] == 1 and findings.states_of(study)["COMPLETE"] == 1
