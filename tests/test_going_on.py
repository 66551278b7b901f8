"""A search whose space is large."""

import itertools
import tracemalloc

import made_up_search
import pytest

from compactmind.search.compressor import read_pipeline
from compactmind.search.space import make_space
from compactmind.search.strategies import shuffled_points

space = made_up_search.space


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
