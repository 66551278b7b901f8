"""The pipelines a search chooses from: every legal order of the methods, and each method's own parameters.

The order is one choice among names like `prune > retrain > w8a8`; parameters carry the name of their method (`prune.sparsity`), whatever
order it stands in, so that what is learnt of one order serves the others. A method that occurs again has a number (`prune2.sparsity`).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna import Trial
from optuna.trial import FixedTrial
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.registry import METHODS, Method, are_numbers, as_choice
from compactmind.search.compressor import Step, order_problem

MODES = ("single", "hybrid", "both")
"""single: one method that compresses, prune or quantize; hybrid: several; retraining and smoothing stand beside them in all."""
COMPRESSING = ("prune", "quantize")
SEPARATOR = " > "


@dataclass(frozen=True)
class Space:
    """What can be asked for: `orders` of methods, and per method and parameter the values to choose from."""

    orders: tuple[tuple[str, ...], ...]
    choices: dict[str, dict[str, Sequence[Any]]]

    def suggest(self, trial: Trial) -> list[dict[str, Any]]:
        """Return the pipeline that an Optuna trial asks for."""
        order = trial.suggest_categorical("order", [SEPARATOR.join(order) for order in self.orders])
        names = order.split(SEPARATOR)
        return [
            {"method": name, "params": METHODS[name].suggest(trial, label, choices)}
            for name, label, choices in zip(names, labels(names), self.choices_per_step(names), strict=True)
        ]

    def choices_per_step(self, order: Sequence[str]) -> list[dict[str, Sequence[Any]]]:
        """Return what may be chosen from in each step where methods stand in this order.

        Behind one that makes zeros a parameter that keeps them with a single value has that one; where several would, all stay, since a
        study knows one list of values for a name, and the pipeline is refused when it is asked for.
        """
        kinds, per_step = [METHODS[name].kind for name in order], []
        for number, name in enumerate(order):
            choices = self.choices[name]
            keeping = _keeping_zeros(METHODS[name], choices) if "sparsify" in kinds[:number] else choices
            per_step.append({key: keeping[key] if len(keeping[key]) == 1 else values for key, values in choices.items()})
        return per_step

    def pipeline(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the pipeline of a point, the parameters an Optuna trial has."""
        return self.suggest(FixedTrial(point))

    def choices_for(self, order: Sequence[str]) -> dict[str, list[Any]]:
        """Return the choices where methods stand in this order: by name, the values to choose from as a study holds them."""
        return {
            f"{label}.{parameter}": [as_choice(value) for value in values]
            for label, choices in zip(labels(order), self.choices_per_step(order), strict=True)
            for parameter, values in choices.items()
            if len(values) > 1
        }

    def points(self) -> Iterator[dict[str, Any]]:
        """Return every point of the space, as the parameters an Optuna trial has."""
        for order in self.orders:
            choices = self.choices_for(order)
            for values in itertools.product(*choices.values()):
                yield {"order": SEPARATOR.join(order), **dict(zip(choices, values, strict=True))}

    def point(self, index: int) -> dict[str, Any]:
        """Return the point that `points` has at an index, from 0 to size - 1, without those before it. Raises IndexError."""
        rest = index
        for name, choices, count in self._counted if index >= 0 else ():
            if rest < count:
                values = {}
                for parameter in reversed(choices):  # the last one changes fastest
                    rest, at = divmod(rest, len(choices[parameter]))
                    values[parameter] = choices[parameter][at]
                return {"order": name, **{parameter: values[parameter] for parameter in choices}}
            rest -= count
        raise IndexError(f"point {index} of a space that has {self.size()} points")

    @cached_property
    def _counted(self) -> list[tuple[str, dict[str, list[Any]], int]]:
        """Every order by name, the choices where methods stand in it, and its number of points."""
        choices = [self.choices_for(order) for order in self.orders]
        return [(SEPARATOR.join(order), of, math.prod(map(len, of.values()))) for order, of in zip(self.orders, choices, strict=True)]

    def neighbours(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the points that differ from one in a single choice: in a parameter, for a number the next smaller or larger value; or in
        the order, by a step more, a step less, another one in its place, or two in a row that change places. Steps that are new have the
        usual parameters, and cut the least that may be chosen."""
        order, near = tuple(point["order"].split(SEPARATOR)), []
        for name, values in self.choices_for(order).items():
            number = are_numbers(values) and len(values) > 2
            at = _nearest(values, point[name]) if number else values.index(point[name])
            others = [at - 1, at + 1] if number else range(len(values))
            near += [{**point, name: values[other]} for other in others if other != at and 0 <= other < len(values)]
        for other in self.orders:
            if _differ_by_one(order, other):
                usual = {
                    f"{label}.{parameter}": as_choice(min(values) if parameter == "sparsity" else _usual(name, parameter, values))
                    for name, label, choices in zip(other, labels(other), self.choices_per_step(other), strict=True)
                    for parameter, values in choices.items()
                    if len(values) > 1
                }
                near.append({"order": SEPARATOR.join(other), **{name: point.get(name, usual[name]) for name in usual}})
        return near

    def first_guesses(self, ratio_of: Callable[[list[dict[str, Any]]], float], target: float) -> list[dict[str, Any]]:
        """Return what anyone would try first, as the parameters an Optuna trial has: every order prune > smooth > retrain > quantize, or
        a part of it, with the least sparsity that reaches the compression ratio `target`, no fewer bits than that takes, and the usual
        values of everything else.

        `ratio_of` tells the ratio to expect of a pipeline. An order that cannot reach the target is left out, and so are several methods
        without retraining where the same with it are there. The least pruned come first, of these the shortest, then the largest models.
        """
        usual = {
            (name, parameter): _usual(name, parameter, values)
            for name in self.choices
            for parameter, values in self.choices[name].items()
        }
        guesses = []
        for order in self._obvious_orders():
            # what makes a model smaller is tried in all ways
            free = [(name, parameter) for name, parameter in usual if name in order and METHODS[name].kind != "retrain"]
            free = [key for key in free if key[1] == "sparsity" or METHODS[key[0]].bits is not None]
            reaching = []
            for picked in itertools.product(*(self.choices[name][parameter] for name, parameter in free)):
                chosen = dict(zip(free, picked, strict=True))
                values = {key: value for key, value in {**usual, **chosen}.items() if key[0] in order}
                pipeline = [
                    {"method": name, "params": {key[1]: value for key, value in values.items() if key[0] == name}}
                    for name in order
                ]
                ratio = ratio_of(pipeline)
                if ratio >= target:
                    sparsity = sum(value for (_, parameter), value in chosen.items() if parameter == "sparsity")
                    unusual = sum(value != usual[key] for key, value in chosen.items())
                    reaching.append((sparsity, round(ratio, 3), unusual, values))
            if reaching:
                sparsity, ratio, _, values = min(reaching, key=lambda known: known[:3])
                params = {
                    f"{name}.{parameter}": as_choice(value)
                    for (name, parameter), value in values.items()
                    if len(self.choices[name][parameter]) > 1
                }
                guesses.append((sparsity, len(order), ratio, {"order": SEPARATOR.join(order), **params}))
        return [guess for *_, guess in sorted(guesses, key=lambda known: known[:3])]

    def guesses_for(
        self, targets: Sequence[float], ratio_of: Callable[[list[dict[str, Any]]], float], at_once: int = 1
    ) -> list[dict[str, Any]]:
        """Return the first guesses for several targets, each once: the first one for every target, then the second ones ...

        `at_once` of them take turns, for as many workers: a pipeline begins alike for every target, and what one worker has run of it
        another one finds in the cache, unless both run it at the same time.
        """
        of_each = [self.first_guesses(ratio_of, target) for target in targets]
        ranked, ordered = list(itertools.zip_longest(*of_each)), []
        for start in range(0, len(ranked), at_once):
            for guesses in zip(*ranked[start : start + at_once], strict=True):
                ordered += [guess for guess in guesses if guess is not None and guess not in ordered]
        return ordered

    def _obvious_orders(self) -> Iterator[tuple[str, ...]]:
        """Return the orders of first_guesses, whatever they reach."""
        retrained = {tuple(name for name in order if name != "retrain") for order in self.orders if "retrain" in order}
        for order in self.orders:
            kinds = [METHODS[name].kind for name in order]
            if kinds != [kind for kind in ("prune", "smooth", "retrain", "quantize") if kind in kinds]:
                continue
            if len(order) == 1 or order not in retrained:
                yield order

    def single_steps(self) -> list[Step]:
        """Return every method of the space as a step, with the first choice of each parameter."""
        names = dict.fromkeys(name for order in self.orders for name in order)
        first = {name: {key: values[0] for key, values in self.choices[name].items()} for name in names}
        return [Step(METHODS[name], METHODS[name].parameters(given)) for name, given in first.items()]

    def size(self) -> int:
        """Return the number of points."""
        return sum(math.prod(len(values) for step in self.choices_per_step(order) for values in step.values()) for order in self.orders)

    def described(self) -> dict[str, Any]:
        """Return the space as JSON has it: two equal spaces are described equally."""
        used = {name for order in self.orders for name in order}
        return {
            "orders": [SEPARATOR.join(order) for order in self.orders],
            "choices": {name: {key: list(values) for key, values in self.choices[name].items()} for name in sorted(used)},
        }


def _keeping_zeros(method: Method, choices: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return the values of each parameter with which a method leaves zeros, beside some values of the others; none: it never does."""
    taken: dict[str, list[Any]] = {name: [] for name in choices}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        if method.fills_zeros is None or method.fills_zeros(method.parameters(chosen)) is None:
            for name, value in chosen.items():
                if value not in taken[name]:
                    taken[name].append(value)
    return taken


def _usual(name: str, parameter: str, values: Sequence[Any]) -> Any:
    """Return the default of a method's recipe if it may be chosen, else the nearest number, else the first value."""
    default = getattr(METHODS[name].recipe(), parameter)
    if default in values:
        return default
    numbers = [value for value in (*values, default) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return min(values, key=lambda value: abs(value - default)) if len(numbers) == len(values) + 1 else values[len(values) // 2]


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))  # 0.30000000000000004 is 0.3


def _differ_by_one(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Tell whether two orders differ by one step that is added, left out or replaced, or by two in a row that changed places."""
    if len(one) == len(other):
        different = [index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        swapped = len(different) == 2 and different[1] == different[0] + 1 and sorted(one) == sorted(other)
        return len(different) == 1 or swapped
    short, long = sorted((one, other), key=len)
    return len(long) == len(short) + 1 and any(long[:index] + long[index + 1 :] == short for index in range(len(long)))


def labels(names: Sequence[str]) -> list[str]:
    """Return the name of each step's parameters: the method's, with a number from its second occurrence on."""
    numbered = []
    for index, name in enumerate(names):
        number = list(names[: index + 1]).count(name)
        numbered.append(name if number == 1 else f"{name}{number}")
    return numbered


def read_choices(text: str) -> dict[str, Any]:
    """Return what `make_space` calls choices from JSON text. Raises CompactMindError."""
    try:
        choices = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompactMindError(f'choices are no JSON ({error}): for example {{"prune.sparsity": [0.1, 0.2]}}') from None
    if not isinstance(choices, dict):
        raise CompactMindError(f'choices {text} are no object: for example {{"prune.sparsity": [0.1, 0.2]}}')
    return choices


def make_space(
    methods: Sequence[str],
    *,
    mode: str = "both",
    max_length: int = 4,
    max_repeats: int = 1,
    choices: dict[str, Sequence[Any]] | None = None,
    targets: Sequence[float] = (),
    by_text: bool = False,
) -> Space:
    """Return the space of all legal orders of these methods, up to `max_length` steps, each method at most `max_repeats` times.

    `choices` replaces what may be chosen from, by name: {"prune.sparsity": [0.1, 0.2]}. With `targets`, the compression ratios that are
    searched for, a method that can aim at some of them does, unless there are choices for it; a printed line names the others. `by_text`:
    what is searched for may be better than the dense model, so that a model may be retrained of which nothing was cut; by the distance to
    the dense model that only loses. Raises CompactMindError naming the unknown name or the value a method refuses, or saying why no
    pipeline is left.
    """
    if mode not in MODES:
        raise CompactMindError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    for name in methods:
        if name not in METHODS:
            raise CompactMindError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    by_method = {name: dict(METHODS[name].space) for name in methods}
    for name in methods:
        aims = METHODS[name].aim and not any(label.startswith(f"{name}.") for label in choices or {})
        if aims and (taken := _targets_taken(METHODS[name], targets)):
            by_method[name] = {METHODS[name].aim: taken, **METHODS[name].aimed}
    for label, values in (choices or {}).items():
        name, _, parameter = label.partition(".")
        if name not in by_method:
            raise CompactMindError(f"choices for {label!r}: {name!r} is not among the methods {', '.join(methods)}")
        if not isinstance(values, (list, tuple)) or not values:
            raise CompactMindError(f"choices for {label!r}: {values!r} is no list of values, for example [0.1, 0.2]")
        for value in values:
            try:
                METHODS[name].parameters({parameter: value})
            except (ValueError, TypeError) as error:
                raise CompactMindError(f"choices for {label!r}: {error}") from None
        by_method[name][parameter] = tuple(values)
    orders = tuple(
        order
        for length in range(1, max_length + 1)
        for order in itertools.product(methods, repeat=length)
        if _is_wanted([METHODS[name] for name in order], mode, max_repeats, by_text) and _leaves_zeros(order, by_method)
    )
    if not orders:
        raise CompactMindError(
            f"no legal pipeline of at most {max_length} step(s) from {', '.join(methods) or 'no method'} in mode {mode}: "
            "allow more methods or steps"
        )
    return Space(orders, by_method)


def _targets_taken(method: Method, targets: Sequence[float]) -> tuple[float, ...]:
    """Return those of the targets that a method can aim at, and say which it cannot."""
    taken, why = [], {}
    for target in targets:
        try:
            method.parameters({method.aim: target})
            taken.append(target)
        except ValueError as error:
            why[f"{target:g}"] = error
    if why:
        aims, left_out, reason = ", ".join(f"{each:g}" for each in taken), ", ".join(why), next(iter(why.values()))
        which = f"at {aims} and not at {left_out}" if taken else f"at none of {left_out}, its own parameters are searched"
        print(f"{method.name} aims {which}: {reason}", flush=True)
    return tuple(taken)


def check_space(space: Space, dense: PreTrainedModel) -> None:
    """Raise CompactMindError if a choice of the space can never be made with this model, rather than trial by trial."""
    for name in dict.fromkeys(name for order in space.orders for name in order):
        method, choices = METHODS[name], space.choices[name]
        for values in itertools.product(*choices.values()) if method.check else ():
            method.check(dense, method.parameters(dict(zip(choices, values, strict=True))), False)


def _leaves_zeros(order: Sequence[str], choices: dict[str, dict[str, Sequence[Any]]]) -> bool:
    """Tell whether every method behind one that makes zeros can leave them, with some of its choices."""
    kinds = [METHODS[name].kind for name in order]
    behind = order[kinds.index("sparsify") + 1 :] if "sparsify" in kinds else ()
    return all(all(_keeping_zeros(METHODS[name], choices[name]).values()) for name in behind)


def is_hybrid(methods: Sequence[Method]) -> bool:
    """Tell whether several methods that compress stand together."""
    return len({method.name for method in methods if method.kind in COMPRESSING}) > 1


def _is_wanted(methods: list[Method], mode: str, max_repeats: int, by_text: bool) -> bool:
    names, kinds = [method.name for method in methods], [method.kind for method in methods]
    if "retrain" in kinds and not by_text and not {"prune", "sparsify"} & set(kinds):
        return False
    if order_problem(methods) or max(map(names.count, names)) > max_repeats:
        return False
    if not any(method.kind in COMPRESSING for method in methods):
        return False
    if any(a == b for a, b in zip(names, names[1:], strict=False)):  # twice in a row is once
        return False
    return mode == "both" or is_hybrid(methods) == (mode == "hybrid")
