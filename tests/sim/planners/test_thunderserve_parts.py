"""The parts of ThunderServe's planner: order of stages, layers, queues and the LP, against what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Workload
from sim.planners.thunderserve.groups import Group
from sim.planners.thunderserve.orchestrate import Row, transport
from sim.planners.thunderserve.parallel import share_out, shortest_order
from sim.planners.thunderserve.replay import PROMPTS, REQUESTS, Decoder, Prefiller, Sample
from sim.planners.thunderserve.world import World
from sim.transfers import Quantized
from sim.types import Stage
from tests.sim.planners.test_thunderserve import TWO_KINDS, nodes, world

# ---------------------------------------------------------------- the lower level


@settings(max_examples=40)
@given(st.data())
def test_the_order_of_stages_is_the_shortest(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 2), min_size=2, max_size=4))
    kinds = len(counts)
    hop = st.integers(1, 50)
    hops = [[float(data.draw(hop)) for _ in range(kinds)] for _ in range(kinds)]

    def length(order: Sequence[int]) -> float:
        return sum(hops[a][b] for a, b in pairwise(order))

    stages = [kind for kind, count in enumerate(counts) for _ in range(count)]
    found = shortest_order(counts, hops)
    assert sorted(found) == stages
    assert length(found) == min(map(length, permutations(stages)))


def test_layers_are_shared_out_by_speed_and_every_stage_has_one() -> None:
    assert share_out(60, [312.0, 80.0]) == [48, 12]
    assert share_out(4, [1e6, 1.0, 1.0]) == [2, 1, 1]


def test_layers_leave_a_stage_that_would_overflow() -> None:
    """Together 128 GB for 66 GB of weights: by speed the 3090 Ti would decode 20 of 60 layers, but 24 GB hold 19."""
    where = world(nodes(("A100-40G-SXM", 1), ("A6000", 1), ("RTX-3090-Ti", 1), gbps=100), name="llama-30b")
    server = World(where, Quantized()).layouts.serve(Group((1, 1, 0), "decode"))
    assert server is not None
    assert sorted(stage.num_layers for stage in server.stages) == [27, 33]


def one_stage(sample: Sample, prompt_s: float) -> Prefiller:
    stage = Stage(name="0", gpus=("n0.g0",), first_layer=0, end_layer=2)
    return Prefiller(
        stages=(stage,), weakest="", stage_s=np.full((1, REQUESTS), prompt_s), hop_s=np.zeros(REQUESTS)
    ).sized(sample)  # fmt: skip


def test_the_prompt_queue_waits_as_long_as_an_m_d_1_queue() -> None:
    sample = Sample.of(world(TWO_KINDS))
    server = one_stage(sample, 0.1)
    assert server.capacity_per_s == pytest.approx(10.0)
    for load in (0.2, 0.5, 0.8):
        waited = server.latency_at(load * 10, sample).mean() - 0.1
        assert waited == pytest.approx(0.1 * load / (2 * (1 - load)), rel=0.2)


def test_a_pipeline_of_two_takes_a_prompt_as_soon_as_one_leaves() -> None:
    """Stages of 1 s and hops of 0.5 s: alone 2.5 s; two at a time, so 0.8 a second."""
    sample = Sample.of(world(TWO_KINDS))
    server = replace(one_stage(sample, 1.0), stage_s=np.ones((2, REQUESTS)), hop_s=np.full(REQUESTS, 0.5)).sized(sample)
    assert server.capacity_per_s == pytest.approx(0.8, rel=2 / PROMPTS)
    assert np.median(server.latency_at(0.001, sample)) == pytest.approx(2.5)


def decoder(sample: Sample, kv_tokens: int, step_s: float = 0.02) -> Decoder:
    stage = Stage(name="0", gpus=("n0.g0",), first_layer=0, end_layer=2)
    return Decoder(
        stages=(stage,),
        weakest="",
        step_s=np.full(9, step_s),
        step_s_per_context=np.zeros(9),
        kv_tokens=kv_tokens,
        most_seqs=8,
    ).sized(sample)


def test_decodes_take_a_step_a_token_until_seats_or_memory_run_out() -> None:
    sample = Sample.of(replace(world(TWO_KINDS), workload=Workload(rate_per_s=1.0, lengths=((100, 11),))))
    server = decoder(sample, 10**6)
    assert server.capacity_per_s == pytest.approx(8 / (10 * 0.02))
    assert server.latency_at(0.01, sample) == pytest.approx(10.5 * 0.02)
    one_at_a_time = decoder(sample, 120)
    assert one_at_a_time.latency_at(4.0, sample).mean() > 2 * server.latency_at(4.0, sample).mean()


def test_kv_on_its_way_holds_its_room() -> None:
    """Room for one request of 110 tokens; each decodes 0.21 s and is carried for 1 s, so one leaves every 1.21 s."""
    sample = Sample.of(replace(world(TWO_KINDS), workload=Workload(rate_per_s=1.0, lengths=((100, 11),))))
    busy = decoder(sample, 120).latency_at(0.7, sample, carry_s=1.0)
    free = decoder(sample, 10**6).latency_at(0.7, sample, carry_s=1.0)
    assert free == pytest.approx(0.21)
    assert busy.mean() > 1.0


# ---------------------------------------------------------------- the LP


def test_the_lp_routes_as_exhaustive_search_does() -> None:
    """Capacities in quarters have an optimum in quarters."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.random((2, 2))
        mu, nu = rng.integers(0, 4, 2) / 4, rng.integers(0, 4, 2) / 4
        caps = rng.integers(0, 4, (2, 2)) / 4
        grid = np.array(list(product(range(5), repeat=4))).reshape(-1, 2, 2) / 4
        fits = (grid.sum((1, 2)) <= 1) & (grid.sum(2) <= mu).all(1) & (grid.sum(1) <= nu).all(1)
        fits &= (grid <= caps).all((1, 2))
        assert transport(scores, mu, nu, caps).value == pytest.approx((grid[fits] * scores).sum((1, 2)).max())


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_more_bandwidth_never_lowers_the_lp(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, caps = rng.random((3, 2)), rng.random((3, 2))
    usage = (rng.random((3, 2)) > 0.5).astype(float)
    mu, nu = rng.random(3), rng.random(2)

    def value(pair_caps: Any, line: float) -> float:
        return transport(scores, mu, nu, pair_caps, [Row("nic:n0:out", usage, line)]).value

    raised = caps.copy()
    raised[rng.integers(3), rng.integers(2)] += rng.random()
    assert value(raised, 0.3) >= value(caps, 0.3) - 1e-9
    assert value(caps, 0.5) >= value(caps, 0.3) - 1e-9


def test_the_price_of_what_binds_is_not_zero() -> None:
    flow = transport(np.ones((1, 2)), np.array([0.5]), np.ones(2), np.ones((1, 2)))
    assert flow.value == pytest.approx(0.5)
    assert flow.prices == pytest.approx({"traffic": 0.0, "prefill 0": 0.5, "decode 0": 0.0, "decode 1": 0.0})
