"""Metis's search, layers and shares; the training planner; the two pools of the serving planner."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise, permutations
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.planners.metis.balance import balanced, cut, repaired, shares
from sim.planners.metis.groups import device_groups, multiset_permutations, type_orders, units

# ---------------------------------------------------------------- what is searched


def test_device_groups_of_eight_gpus_as_published() -> None:
    """The repository's log of 4 A100 and 4 T4 (results/het_search_space), in its order."""
    assert [len(device_groups(8, stages)) for stages in range(1, 9)] == [1, 1, 3, 1, 7, 6, 4, 1]
    assert device_groups(8, 3) == [(4, 2, 2), (2, 4, 2), (2, 2, 4)]
    assert device_groups(8, 5) == [
        (4, 1, 1, 1, 1), (1, 1, 4, 1, 1), (1, 1, 1, 1, 4),
        (2, 2, 2, 1, 1), (1, 1, 2, 2, 2), (2, 1, 1, 2, 2), (2, 2, 1, 1, 2),
    ]  # fmt: skip
    assert device_groups(8, 6) == [
        (2, 2, 1, 1, 1, 1), (1, 1, 2, 2, 1, 1), (2, 1, 1, 2, 1, 1),
        (1, 1, 2, 1, 1, 2), (1, 1, 1, 1, 2, 2), (2, 1, 1, 1, 1, 2),
    ]  # fmt: skip
    assert [groups.index(2) for groups in device_groups(8, 7)] == [0, 2, 4, 6]


def test_counts_with_and_without_pruning() -> None:
    def count(gpus: int, stages: int, **options: float | None) -> int:
        return sum(len(device_groups(gpus, s, **options)) for s in range(1, stages + 1))  # type: ignore[arg-type]

    everything = {"variance": 0.0, "max_permute_len": None}
    assert count(8, 8, **everything) == 56
    assert count(16, 10, **everything) == 3282
    assert count(16, 10) == 79


def test_types_are_ordered_in_every_way() -> None:
    assert list(type_orders(["T4", "A100", "T4"])) == [("A100", "T4"), ("T4", "A100")]
    assert len(list(type_orders("abcd"))) == 24


def test_units_join_the_smallest() -> None:
    assert units((1, 1, 1, 1, 4), 4) == [(1, 1), (1, 1), (4,)]
    assert units((2, 2, 2, 2), 4) == [(2,)] * 4
    assert units((1,) * 16, 4) == [(1, 1, 1, 1)] * 4
    assert units((1, 2, 4), 2) == [(1,), (2,), (4,)]  # none are alike
    assert units((1, 1, 1, 2), 3) == [(1, 1), (1,), (2,)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_every_permutation_comes_once(items: list[int]) -> None:
    found = list(multiset_permutations([(item,) for item in items]))
    assert len(found) == len(set(found))
    assert set(found) == set(permutations([(item,) for item in items]))


@pytest.mark.parametrize("gpus", [4, 6, 8, 12, 16])
def test_groups_sum_up_and_wider_settings_add_to_them(gpus: int) -> None:
    for stages in range(1, min(gpus, 8) + 1):
        narrow, half, long, all_ = (
            Counter(device_groups(gpus, stages, variance=v, max_permute_len=most))
            for v, most in ((1.0, 4), (0.5, 4), (1.0, 6), (1.0, None))
        )
        assert all(sum(groups) == gpus and len(groups) == stages for groups in half)
        assert max(all_.values(), default=1) == 1
        assert set(narrow) <= set(half)
        assert set(narrow) <= set(long) <= set(all_)


# ---------------------------------------------------------------- layers and shares


def test_layers_follow_capacity() -> None:
    assert balanced([1.0] * 10, [1.0, 1.0]) == (0, 5, 10)
    assert balanced([1.0] * 10, [0.4, 0.6]) == (0, 4, 10)
    assert balanced([5.0, 1.0, 1.0, 1.0], [1.0, 1.0]) == (0, 1, 4)
    assert balanced([1.0, 1.0], [1.0, 1.0, 1.0]) is None


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=8), st.lists(st.floats(0.1, 9), min_size=1, max_size=4))
def test_no_cut_is_better(loads: list[float], capacities: list[float]) -> None:
    bounds = balanced(loads, capacities)
    if len(capacities) > len(loads):
        assert bounds is None
        return

    def worst(bounds: tuple[int, ...]) -> float:
        parts = zip(bounds, bounds[1:], capacities, strict=False)
        return max(sum(loads[a:b]) / capacity for a, b, capacity in parts)

    assert bounds is not None
    assert (bounds[0], bounds[-1]) == (0, len(loads))
    assert all(a < b for a, b in pairwise(bounds))
    inner = combinations(range(1, len(loads)), len(capacities) - 1)
    assert worst(bounds) == pytest.approx(min(worst((0, *ends, len(loads))) for ends in inner))


def test_a_stage_takes_nothing_that_it_cannot() -> None:
    free = np.subtract.outer(np.arange(4.0), np.arange(4.0)) * -1
    two = np.where(free <= 2, free, inf)
    assert cut([free, two]) in ((0, 1, 3), (0, 2, 3))
    assert cut([np.where(free <= 1, free, inf), two]) == (0, 1, 3)
    assert cut([np.where(free <= 1, free, inf)] * 2) is None


def test_memory_repairs_a_cut() -> None:
    """The second stage holds three of ten layers: its capacity becomes 0.9 of 3/5 of 0.5, and 8/0.73 < 3/0.27."""
    needs = [[1.0] * 10] * 2
    whole = repaired([1.0] * 10, [0.5, 0.5], needs, [9.0, 9.0])
    assert whole is not None
    assert (whole.bounds, whole.attempts, whole.fits) == ((0, 5, 10), 1, True)
    assert whole.slack == (4.0, 4.0)
    short = repaired([1.0] * 10, [0.5, 0.5], needs, [9.0, 3.0])
    assert short is not None
    assert short.bounds == (0, 8, 10)
    assert (short.attempts, short.fits) == (2, True)
    none = repaired([1.0] * 10, [0.5, 0.5], needs, [5.0, 3.0])
    assert none is not None
    assert (none.attempts, none.fits) == (3, False)


@given(st.integers(0, 200), st.lists(st.floats(0.1, 10), min_size=1, max_size=8))
def test_shares_sum_up_and_follow_speed(total: int, times: list[float]) -> None:
    given_ = shares(total, times)
    assert sum(given_) == total
    by_speed = [share for _, share in sorted(zip(times, given_, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert by_speed == sorted(by_speed, reverse=True)


def test_shares_of_a_mixed_stage() -> None:
    assert shares(8, [1.0, 3.0]) == (6, 2)
    assert shares(8, [1.0, 2.0]) == (5, 3)
    assert shares(3, [1.0, 1.0]) == (2, 1)
