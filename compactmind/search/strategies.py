"""What is asked for next: TPE, a Gaussian process, evolution or chance, and nothing twice, nor what is the same without one of its steps.

A pipeline is drawn in a copy of the study in memory, until it is one that has not been run and can be small enough; only that one becomes a
trial. So the study holds no copies, nothing is told twice, and every strategy chooses among the same pipelines. Who proposes what is known
already is near the best it has seen: instead the nearest thing that is not known is tried, a neighbour of the best, one choice away. Of
what the Bayesian search asks for, every other pipeline is such a neighbour in any case: a space of many orders, each with parameters of its
own, is too large for a model of it to learn from tens of trials (local search beside a model: SMAC, Hutter et al. 2011,
https://doi.org/10.1007/978-3-642-25566-3_40).

Where few pipelines of a large space reach the target, what is drawn seldom does: then what is near a trial or a first guess that does is
looked through, before the search is said to be at its end.

Evolution: NSGA-II (Deb et al. 2002, https://doi.org/10.1109/4235.996017) on pipelines of different orders. Optuna's crosses only what all
trials have, which is the order; here a child has the order of one parent and takes each parameter from either that has it.
"""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from compactmind.search.compressor import Step, idle_problem, read_pipeline
from compactmind.search.space import SEPARATOR, Space

SAMPLERS = ("tpe", "gp")
STARTUP_TRIALS = 8
"""Random trials before the sampler begins to learn."""
POPULATION = 8
"""Pipelines of a generation: of 30 trials that makes three and a half."""
DRAWS = 40
"""Pipelines the sampler may propose in a row that are too large, before chance proposes so many more."""
BEST = 5
"""Of so many of the best trials the neighbours are looked at."""
ENUMERABLE = 20_000
"""A space of at most so many points is looked through before it is said to be used up; of a larger one so many are drawn."""
MUTATIONS = 2000
"""So often what is known to be small enough is changed in search of more, where what is drawn is too large."""


class Evolution(NSGAIISampler):
    """NSGA-II whose children are crossed from parents of any orders."""

    def __init__(self, seed: int):
        self.choose = random.Random(seed)
        super().__init__(population_size=POPULATION, seed=seed, child_generation_strategy=self._child)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return everything that a trial of the study has been asked for."""
        space: dict[str, BaseDistribution] = {}
        for each in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            space |= each.distributions
        return space

    def _child(self, _: optuna.Study, space: dict[str, BaseDistribution], parents: list[FrozenTrial]) -> dict[str, Any]:
        one, other = (self.choose.choice(parents).params for _ in range(2))
        child = dict(one)  # its order, and what the other one lacks
        child |= {name: value for name, value in other.items() if name in one and name != "order" and self.choose.random() < 0.5}
        forgotten = [name for name in child if self.choose.random() < 1 / len(child)]
        if child == one and not forgotten:
            forgotten = [self.choose.choice(list(child))]
        return {name: value for name, value in child.items() if name not in forgotten and name in space}  # chance has the rest


def make_sampler(strategy: str, sampler: str, seed: int) -> BaseSampler:
    """Return what chooses the next pipeline; a grid has its points in a random order and needs none."""
    if strategy in ("random", "grid"):
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what Optuna calls every setting here
        if strategy == "evolution":
            return Evolution(seed)
        if sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True, constant_liar=True)


class Proposer:
    """Proposes what a study has not seen: the `first` guesses, then what the strategy draws.

    `excess` returns by how much a pipeline is expected to miss the target, 0 or less where it reaches it. `seed` is that of the search: it
    says in which order a grid is looked through.
    """

    def __init__(
        self, space: Space, strategy: str, sampler: str, excess: Callable[[Sequence[Step]], float],
        first: Sequence[dict[str, Any]] = (), seed: int = 0,
    ):  # fmt: skip
        self.space, self.strategy, self.sampler, self.excess, self.first = space, strategy, sampler, excess, first
        self.grid = shuffled_points(space, seed)

    def propose(self, study: optuna.Study, known: set[str], seed: int) -> dict[str, Any] | None:
        """Return the point to try next, None if nothing is left that is not `known` (keys, see `key_of`) and can reach the target.

        `seed` is of this proposal alone: another one for every worker and every number of trials.
        """
        for guess in self.first:
            if key_of(read_pipeline(self.space.pipeline(guess))) not in known:
                return guess
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING and trial.params]
        if self.strategy == "grid":
            return self._any(self.grid, known) or self.near_what_is_small(trials, known, seed)
        several, draft = len(study.directions) > 1, optuna.create_study(directions=study.directions)
        in_turn = self.strategy == "bayesian" and len(trials) >= STARTUP_TRIALS and len(trials) % 2
        if in_turn and (near := self.near_the_best(trials, several, known, seed)):
            return near
        draft.add_trials(trials)
        for draw in range(2 * DRAWS):
            draft.sampler = make_sampler(self.strategy if draw < DRAWS else "random", self.sampler, seed + 100_003 * draw)
            trial = draft.ask()
            steps = read_pipeline(self.space.suggest(trial))
            too_much = self.excess(steps)
            if too_much > 0:  # the draft learns it, the study need not
                trial.set_constraint("compression", too_much)
                draft.tell(trial, state=TrialState.FAIL if several else TrialState.PRUNED)
            elif key_of(steps) not in known and not idle_problem(steps):
                return trial.params
            else:
                draft.tell(trial, state=TrialState.FAIL)
                if self.strategy in ("bayesian", "evolution") and (near := self.near_the_best(trials, several, known, seed)):
                    return near
        points = shuffled_points(self.space, seed)
        if self.strategy == "random" or self.space.size() <= ENUMERABLE:
            return self._any(points, known) or self.near_what_is_small(trials, known, seed)
        return self.near_what_is_small(trials, known, seed) or self._any(points, known)

    def near_the_best(self, trials: Sequence[FrozenTrial], several: bool, known: set[str], seed: int) -> dict[str, Any] | None:
        """Return a neighbour, not known, of the best finished trial that has one; None if none of the best ones has.

        What helped one of the best is tried in the others first, a neighbour that another of them has the changed values of; last comes
        a change of one value that made another pipeline worse, of the same size where models of several are asked for.
        """
        choose = random.Random(seed)
        done = [each for each in trials if each.state == TrialState.COMPLETE and is_feasible(each)]
        if several:
            best = front_of(done)
            choose.shuffle(best)
        else:
            best = sorted(done, key=lambda each: each.value)
        changes = changes_seen(done)
        for trial in best[:BEST]:
            for point in self._neighbours(trial, best[:BEST], changes, choose):
                if self._is_new(point, known):
                    return point
        return None

    def _neighbours(
        self, trial: FrozenTrial, best: Sequence[FrozenTrial], changes: dict[tuple, float], choose: random.Random
    ) -> list[dict[str, Any]]:
        points = self.space.neighbours(trial.params)
        choose.shuffle(points)
        harmful = [changes.get(_changed(trial.params, point), 0.0) > 0 for point in points]
        ranked = sorted(zip(harmful, points, strict=True), key=lambda each: (each[0], not has_change_of(each[1], trial.params, best)))
        return [point for _, point in ranked]

    def _is_new(self, point: dict[str, Any], known: set[str]) -> bool:
        steps = read_pipeline(self.space.pipeline(point))
        return self.excess(steps) <= 0 and key_of(steps) not in known and not idle_problem(steps)

    def near_what_is_small(self, trials: Sequence[FrozenTrial], known: set[str], seed: int) -> dict[str, Any] | None:
        """Return a point, not known, that is near one that reaches the target: a neighbour of a finished trial, the best first, or of a
        first guess; then one of these or of their neighbours with other values of one to three parameters. None if that has none."""
        choose, done = random.Random(seed), [each for each in trials if each.state == TrialState.COMPLETE and is_feasible(each)]
        origins = [each.params for each in sorted(done, key=lambda each: each.values[0])] + [*self.first]
        near: list[dict[str, Any]] = []
        for origin in origins:
            points = self.space.neighbours(origin)
            choose.shuffle(points)
            if found := next((point for point in points if self._is_new(point, known)), None):
                return found
            near += points
        for _ in range(MUTATIONS if near else 0):
            point = choose.choice(choose.choice((origins, near)))
            choices = self.space.choices_for(point["order"].split(SEPARATOR))
            names = choose.sample(sorted(choices), min(len(choices), choose.randint(1, 3)))
            mutated = {**point, **{name: choose.choice(choices[name]) for name in names}}
            if self._is_new(mutated, known):
                return mutated
        return None

    def _any(self, points: Iterator[dict[str, Any]], known: set[str]) -> dict[str, Any] | None:
        return next((point for point in itertools.islice(points, ENUMERABLE) if self._is_new(point, known)), None)


def has_change_of(point: dict[str, Any], origin: dict[str, Any], trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether one of the trials has all values in which a point differs from its origin."""
    changed = {name: value for name, value in point.items() if origin.get(name) != value}
    return any(changed.items() <= trial.params.items() for trial in trials)


def _changed(origin: dict[str, Any], point: dict[str, Any]) -> tuple | None:
    """Return (name, value, other value) if two points of one order differ in one value alone, else None."""
    different = [name for name in origin if name in point and origin[name] != point[name]]
    if origin.keys() != point.keys() or len(different) != 1:
        return None
    return different[0], origin[different[0]], point[different[0]]


def changes_seen(trials: Sequence[FrozenTrial]) -> dict[tuple, float]:
    """Return what every change of one value, (name, value, other value), did to the first objective, the others being equal.

    At the best, where several pairs of trials show it; what a change does, the change back undoes.
    """
    alike: dict[tuple, list[FrozenTrial]] = {}
    for trial in trials:
        for name in trial.params.keys() - {"order"}:
            others = frozenset((key, value) for key, value in trial.params.items() if key != name)
            alike.setdefault((name, others, *trial.values[1:]), []).append(trial)
    seen: dict[tuple, float] = {}
    for (name, *_), group in alike.items():
        for one, other in itertools.permutations(group, 2):
            change = name, one.params[name], other.params[name]
            seen[change] = min(seen.get(change, math.inf), other.values[0] - one.values[0])
    return seen


def key_of(steps: Sequence[Step]) -> str:
    """Return what tells a pipeline from every other one."""
    return " ".join(step.identity() for step in steps)


def is_feasible(trial: FrozenTrial) -> bool:
    """Tell whether a trial keeps to its constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def front_of(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that no other one beats in all that is minimised."""

    def beaten(one: FrozenTrial, by: FrozenTrial) -> bool:
        return by.values != one.values and all(b <= a for a, b in zip(one.values, by.values, strict=True))

    return [trial for trial in trials if not any(beaten(trial, other) for other in trials)]


def shuffled_points(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Return the points of a space in random order, so that the first ones are a fair sample: each is made when it is asked for, since a
    space of the usual methods has millions of them."""
    choose, size = random.Random(seed), space.size()
    moved: dict[int, int] = {}  # Fisher and Yates' shuffle of the indices, of which only those that changed places are kept
    for position in range(size):
        other = choose.randrange(position, size)
        index = moved.get(other, other)
        moved[other] = moved.pop(position, position)
        yield space.point(index)
