"""HexGen-2's planner: partition, types, flow and swaps."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine.setup import check_plan
from sim.planners.hexgen2 import HexGen2, Network, inside, max_flow, partition, refined, swapped, types
from sim.planners.thunderserve.groups import Group, canonical, has_both_phases
from sim.planners.thunderserve.orchestrate import transport
from sim.types import InfeasibleError
from tests.sim.planners.test_thunderserve import CLOUD, TWO_KINDS, nodes, world


def test_a_plan_routes_by_the_flow() -> None:
    where = world(TWO_KINDS)
    found = HexGen2().search(where)
    check_plan(found.best.plan, where)
    assert sum(found.best.plan.shares.values()) == pytest.approx(1.0)
    assert {replica.role for replica in found.best.plan.replicas} == {"prefill", "decode"}
    assert found.best.plan == HexGen2().plan(where)


# ---------------------------------------------------------------- flow


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_the_flow_is_the_lp_with_every_score_one(seed: int) -> None:
    """ThunderServe's LP on the same capacities; the traffic is what all groups could take."""
    rng = np.random.default_rng(seed)
    mu, nu, caps = rng.integers(0, 50, 3), rng.integers(0, 50, 4), rng.integers(0, 20, (3, 4))
    flow = max_flow(mu.astype(float), nu.astype(float), caps.astype(float))
    lp = transport(np.ones((3, 4)), mu / 1000, nu / 1000, caps / 1000)
    assert flow.sum() == pytest.approx(1000 * lp.value)
    assert (flow <= caps).all()
    assert (flow.sum(1) <= mu).all()
    assert (flow.sum(0) <= nu).all()


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_more_bandwidth_never_lowers_the_flow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mu, nu, caps = rng.random(3) * 50, rng.random(3) * 50, rng.random((3, 3)) * 20
    raised = caps.copy()
    raised[rng.integers(3), rng.integers(3)] += 10 * rng.random()
    assert max_flow(mu, nu, raised).sum() >= max_flow(mu, nu, caps).sum() - 1e-9


def test_large_capacities_do_not_overflow() -> None:
    assert max_flow(np.array([3e9, 1e9]), np.array([5.0]), np.full((2, 1), 1e12)).sum() == 5.0


def test_without_links_nothing_flows() -> None:
    where = world(nodes(("A40", 1), ("A40", 1), gbps=0.0))
    with pytest.raises(InfeasibleError, match="no KV flows"):
        HexGen2().plan(where)


# ---------------------------------------------------------------- partition and types


def test_groups_are_whole_machines_where_links_between_machines_are_slow() -> None:
    where = world(nodes(("A40", 2), ("A40", 2), ("A40", 2), gbps=1.0), name="llama-30b")
    assert sorted(partition(Network(where, 600.0))) == [(0, 0, 2), (0, 2, 0), (2, 0, 0)]


def test_every_gpu_is_in_one_group_and_every_group_holds_the_model() -> None:
    where = world(CLOUD, name="llama-30b")
    network = Network(where, 600.0)
    parts = partition(network)
    assert tuple(np.sum(parts, axis=0)) == tuple(node.count for node in CLOUD.nodes)
    assert all(map(network.world.layouts.holds, parts))
    assert len(parts) >= 8


def test_exchanges_cut_less() -> None:
    rates = np.array([[10.0, 1.0], [1.0, 10.0]])
    mixed = [(1, 1), (1, 1)]
    better = refined(mixed, rates, lambda counts: True)
    assert sorted(better) == [(0, 2), (2, 0)]
    assert sum(inside(part, rates) for part in better) > sum(inside(part, rates) for part in mixed)
    assert refined(mixed, rates, lambda counts: counts == (1, 1)) == mixed


def test_types_put_slow_links_between_groups_of_one_type() -> None:
    """Two pairs of machines: KV crosses the fast link of a pair, so each pair gets both types."""
    where = nodes(*[("A40", 1)] * 4, pairs=[
        {"a": f"n{a}", "b": f"n{b}", "gbps": 100.0 if {a, b} in ({0, 1}, {2, 3}) else 1.0}
        for a, b in product(range(4), repeat=2) if a < b
    ])  # fmt: skip
    network = Network(world(where), 600.0)
    grouping = types(network, [tuple(int(place == machine) for place in range(4)) for machine in range(4)])
    prefills = {group.counts.index(1) for group in grouping if group.role == "prefill"}
    assert prefills in ({0, 2}, {0, 3}, {1, 2}, {1, 3})


def test_alike_gpus_and_links_get_the_best_split_of_their_number() -> None:
    where = world(nodes(*[("A40", 1)] * 5, gbps=400.0))
    network = Network(where, 600.0)
    one = [tuple(int(place == machine) for place in range(5)) for machine in range(5)]

    def split(prefills: int) -> Any:
        return canonical(Group(part, "prefill" if place < prefills else "decode") for place, part in enumerate(one))

    best = max(network.flow(split(count)).value for count in range(1, 5))
    assert network.flow(types(network, one)).value == pytest.approx(best, rel=1e-3)


# ---------------------------------------------------------------- swaps


def test_swaps_never_lower_the_flow_and_keep_every_gpu() -> None:
    where = world(CLOUD, 20.0)
    found = HexGen2().search(where)
    assert [row.best for row in found.log] == sorted(row.best for row in found.log)
    assert found.log[-1].best >= found.log[0].best
    network = Network(where, 600.0)
    grouping = types(network, partition(network))
    rng = np.random.default_rng(0)
    flow = network.flow(grouping)
    moves = set()
    for _ in range(60):
        made = swapped(grouping, flow, rng)
        if made is not None:
            moves.add(made[0])
            assert np.sum([group.counts for group in made[1]], axis=0).tolist() == [n.count for n in CLOUD.nodes]
            assert has_both_phases(made[1])
            assert all(min(group.counts) >= 0 for group in made[1])
    assert len(moves) >= 3


def test_without_room_for_two_copies_the_gigabytes_are_named() -> None:
    with pytest.raises(InfeasibleError, match=r"need 2 x 26\.\d GB"):
        HexGen2().plan(world(nodes(("RTX-3090-Ti", 2))))
