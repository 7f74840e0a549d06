"""The capacity LP: balances by hand, bounds that layouts keep, whole layouts that fit their machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster, Problem, Slo, Workload
from sim.cost import Roofline
from sim.model import model
from sim.planners.thunderserve import TabuSearch
from sim.planners.thunderserve.balance import Resource, balanced
from sim.planners.thunderserve.capacity import Loads
from sim.planners.thunderserve.survey import Survey, signature
from sim.transfers import Quantized

ONE_LINK = np.array([[True]])


def world(*machines: tuple[str, int, int], gbps: float = 50.0, tpot_s: float = 0.1, regions: int = 1) -> Problem:
    rows = [
        {"gpu": gpu, "count": count, "nodes": nodes, "region": f"r{place % regions}"}
        for place, (gpu, count, nodes) in enumerate(machines)
    ]
    return Problem(
        cluster=Cluster.of(
            rows,
            links={
                "inter_node": {"gbps": gbps, "latency_us": 30},
                "inter_region": {"gbps": gbps / 10, "latency_us": 5000},
            },
        ),
        model=model("llama-3.1-8b"),
        cost=Roofline(),
        workload=Workload(rate_per_s=10.0, lengths=((1000, 200), (600, 100), (1500, 300))),
        slo=Slo(ttft_s=1.0, tpot_s=tpot_s),
    )


MIXED = world(("A100-80G-SXM", 4, 1), ("L4", 4, 2))


def test_a_balance_by_hand() -> None:
    """Two prefill replicas of 1 and 3 times the rate, one decode of 2: decode is loaded half, prefill a quarter."""
    found = balanced(np.array([1.0, 3.0]), np.array([2.0]), np.zeros(0), np.array([[True], [True]]))
    assert found is not None
    assert found.pairs.ravel() == pytest.approx([0.25, 0.75])
    assert found.headroom == pytest.approx(2.0)
    assert found.binds == "decode 0"


def test_a_link_may_be_what_binds() -> None:
    """The line takes a fifth more than the traffic; the replicas could take ten times as much."""
    line = Resource(name="region:a>b", usage=np.array([[1 / 1.2]]))
    found = balanced(np.array([10.0]), np.array([10.0]), np.zeros(0), ONE_LINK, [line])
    assert found is not None
    assert (found.headroom, found.binds) == (pytest.approx(1.2), "region:a>b")


def test_replicas_that_do_both_take_their_part() -> None:
    found = balanced(np.array([3.0]), np.array([3.0]), np.array([1.0]), ONE_LINK)
    assert found is not None
    assert (found.pairs[0, 0], found.mixed[0]) == (pytest.approx(0.75), pytest.approx(0.25))
    assert found.headroom == pytest.approx(4.0)


def test_nothing_flows_without_a_link() -> None:
    assert balanced(np.array([3.0]), np.array([3.0]), np.zeros(0), np.array([[False]])) is None


def test_a_cluster_of_one_type_carries_what_its_best_unit_does() -> None:
    """Four GPUs apart in one phase each: the bound is at least any unit's share of them, and at most all of them."""
    survey = Survey(world(("A100-80G-SXM", 4, 1)), Quantized())
    both = [unit.rate_per_s / unit.gpus for unit in survey.units.all if unit.role == "mixed"]
    assert survey.capacity.bound().rate_per_s >= 4 * max(both) - 1e-9
    assert survey.capacity.bound().binds == "A100-80G-SXM"


def test_a_slower_network_lowers_the_bound_and_is_named() -> None:
    """At 2 Gbps the L4 cannot send what they compute, so the LP serves more where it is."""
    rates = [
        Survey(world(("A100-80G-SXM", 4, 1), ("L4", 4, 2), gbps=gbps), Quantized(bits=16)).capacity.bound().rate_per_s
        for gbps in (0.5, 5.0, 100.0)
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[2]


@settings(max_examples=8)
@given(
    types=st.lists(st.sampled_from(["A100-80G-SXM", "L4", "A40", "RTX-3090-Ti"]), min_size=1, max_size=3, unique=True),
    count=st.sampled_from([2, 3, 4, 8]),
    gbps=st.sampled_from([10.0, 100.0]),
    tpot_s=st.sampled_from([0.05, 0.2]),
    regions=st.sampled_from([1, 2]),
)
def test_layouts_fit_and_keep_the_bound(types: list[str], count: int, gbps: float, tpot_s: float, regions: int) -> None:
    where = world(*((gpu, count, 1) for gpu in types), gbps=gbps, tpot_s=tpot_s, regions=regions)
    survey = Survey(where, Quantized())
    bound = survey.capacity.bound().rate_per_s
    for shape in survey.shapes():
        placed = survey.placer.of(shape)
        assert placed is not None
        used = Counter(gpu for one in placed.plan.replicas for gpu in one.gpus)
        assert set(used.values()) == {1}
        assert sum(placed.plan.shares.values()) == pytest.approx(1)
        assert shape.rate_per_s <= bound * (1 + 1e-6)
        assert placed.likely_per_s <= placed.rate_per_s * (1 + 1e-6)
        assert survey.shape_of(placed.plan) is not None


def test_the_least_rent_leaves_out_what_is_not_needed() -> None:
    survey = Survey(MIXED, Quantized())
    few, many = (survey.capacity.cheapest(rate, Loads()) for rate in (2.0, 30.0))
    assert few is not None
    assert many is not None
    assert sum(unit.gpus * n for unit, n in few.counts) < sum(unit.gpus * n for unit, n in many.counts)
    assert survey.capacity.cheapest(10 * survey.capacity.bound().rate_per_s, Loads()) is None


def test_neighbours_are_layouts_of_other_shapes() -> None:
    survey = Survey(MIXED, Quantized())
    shape = survey.capacity.shape(Loads(roles=("prefill", "decode")))
    assert shape is not None
    here = survey.placer.of(shape)
    assert here is not None
    types = {gpu: MIXED.cluster.gpu(gpu).name for gpu in MIXED.cluster.gpu_ids}
    around = survey.neighbours(shape)
    shapes = {signature(one.plan, types) for one in around}
    assert signature(here.plan, types) not in shapes
    assert len(shapes) == len(around) > 5
    assert all(one.role != "mixed" for plan in survey.neighbours(shape, colocated=False) for one in plan.plan.replicas)


def test_by_hand_divisions_give_every_type_one_phase() -> None:
    found = dict(Survey(MIXED, Quantized()).split_by_type())
    assert "A100-80G-SXM prefill, TP 1" in found
    shape = found["L4 prefill, TP 2"]
    assert {(unit.role, unit.gpus, count) for unit, count in shape.counts} == {("prefill", 2, 4), ("decode", 2, 2)}


def test_the_search_begins_with_the_program_and_is_the_same_twice() -> None:
    where = replace(MIXED, workload=replace(MIXED.workload, rate_per_s=20.0))
    first, second = (TabuSearch(n_steps=2, n_neighbors=2).search(where) for _ in range(2))
    assert first.best.plan == second.best.plan
    assert first.best.headroom >= 1
