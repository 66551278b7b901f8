"""Bits for every tensor: the best of all that keep to the budget, or an error that says what would."""

import itertools

import pytest
import torch

from compactmind.methods.allocation import Choice, allocate, least_size


def problem(tensors: int, choices: int, seed: int) -> dict[str, list[Choice]]:
    """Return choices for tensors of different sizes whose costs fall with bits, mostly."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for number in range(tensors):
        size = int(torch.randint(100, 100_000, (), generator=generator))
        weight = float(torch.rand((), generator=generator)) * 10 ** float(torch.randint(-6, 0, (), generator=generator))
        noise = torch.rand(choices, generator=generator).tolist()
        result[f"tensor {number}"] = [
            Choice(f"grid {each}", size * (each + 2), weight * 4.0**-each * (0.5 + noise[each])) for each in range(choices)
        ]
    return result


def brute_force(choices: dict[str, list[Choice]], budget: int) -> float:
    """Return the least cost of all combinations that keep to a budget."""
    combinations = itertools.product(*choices.values())
    return min(sum(each.cost for each in taken) for taken in combinations if sum(each.size for each in taken) <= budget)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_combination_within_the_budget_costs_less(seed, share):
    choices = problem(5, 5, seed)
    least, most = (sum(pick(choice.size for choice in each) for each in choices.values()) for pick in (min, max))
    budget = least + int(share * (most - least))
    result = allocate(choices, budget)
    assert result.keys() == choices.keys() and all(result[name] in choices[name] for name in choices)
    assert sum(choice.size for choice in result.values()) <= budget
    assert sum(choice.cost for choice in result.values()) <= brute_force(choices, budget) * (1 + 1e-3)


def test_a_budget_for_everything_takes_what_costs_least():
    choices = problem(30, 6, 0)
    result = allocate(choices, 10**12)
    assert all(result[name].cost == min(choice.cost for choice in each) for name, each in choices.items())


def test_a_large_problem_keeps_to_its_budget_and_is_no_worse_than_greedy():
    choices = problem(250, 22, 1)
    budget = int(sum(each[4].size for each in choices.values()))
    result = allocate(choices, budget)
    bits = sum(choice.size for choice in result.values())
    assert 0.999 * budget < bits <= budget
    taken, spent = {name: 0 for name in choices}, sum(each[0].size for each in choices.values())
    while True:  # always the step that saves the most for a bit
        steps = [
            (
                (choices[name][at].cost - choices[name][at + 1].cost) / (choices[name][at + 1].size - choices[name][at].size),
                name,
            )
            for name, at in taken.items()
            if at < 21 and spent + choices[name][at + 1].size - choices[name][at].size <= budget
        ]
        if not steps:
            break
        name = max(steps)[1]
        spent += choices[name][taken[name] + 1].size - choices[name][taken[name]].size
        taken[name] += 1
    greedy = sum(choices[name][at].cost for name, at in taken.items())
    assert sum(choice.cost for choice in result.values()) <= greedy * (1 + 1e-3)


def test_costs_of_zero_and_one_choice_are_no_special_case():
    choices = {"a": [Choice("only", 100, 0.0)], "b": [Choice("small", 10, 0.0), Choice("large", 90, 0.0)]}
    assert allocate(choices, 110)["b"].what == "small" and sum(each.size for each in allocate(choices, 500).values()) <= 190


@pytest.mark.parametrize("budget", [-5, 0, 7_999_999])
def test_a_budget_that_nothing_keeps_to_is_refused(budget):
    choices = {"a": [Choice("small", 6_000_000, 1.0), Choice("large", 9_000_000, 0.5)], "b": [Choice("small", 2_000_000, 1.0)]}
    assert least_size(choices) == 8_000_000
    with pytest.raises(ValueError, match=f"take 8000000, more than {budget}"):
        allocate(choices, budget)
    assert sum(choice.size for choice in allocate(choices, 8_000_000).values()) == 8_000_000
