"""Pools of equal replicas: what is asked for is laid out, what cannot be is an error that says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Cluster, ConfigError, Limits, Plan, Problem
from sim.engine.setup import check_plan
from sim.model import model
from sim.planners.pools import Colocated, Pool, Split
from sim.systems.layout import layout
from sim.types import Replica, Stage
from tests.lab import ONE, system
from tests.toys import problem, request, run

MIXED = Cluster.of(
    [
        {"gpu": "A40", "count": 4, "name": "slow"},
        {"gpu": "H100-SXM", "count": 4, "name": "fast"},
        {"gpu": "A100-80G-SXM", "count": 8, "name": "mid"},
    ],
    links={"inter_node": {"gbps": 100}},
)


def world(where: Cluster = MIXED, name: str = "llama-2-7b", **limits: Any) -> Problem:
    return replace(problem(where), model=model(name), limits=Limits(**limits))


def colocated(where: Problem, **pool: Any) -> list[tuple[str, ...]]:
    return [replica.gpus for replica in Colocated(pool=Pool(**pool)).plan(where).replicas]


def test_replicas_of_a_width_are_laid_out_on_the_fastest_gpus_first() -> None:
    assert colocated(world(), replicas=3, tp=2) == [
        ("fast.g0", "fast.g1"),
        ("fast.g2", "fast.g3"),
        ("mid.g0", "mid.g1"),
    ]


def test_unasked_every_gpu_is_used() -> None:
    assert len(colocated(world(), tp=4)) == 1 + 2 + 1


def test_tp_stays_in_a_machine_and_leaves_a_rest() -> None:
    assert colocated(world(), tp=3) == [tuple(f"{node}.g{n}" for n in part) for node, part in (
        ("fast", (0, 1, 2)), ("mid", (0, 1, 2)), ("mid", (3, 4, 5)), ("slow", (0, 1, 2)),
    )]  # fmt: skip


def test_the_narrowest_tp_that_holds_the_model_and_some_context() -> None:
    """Llama-2-70B is 138 GB and 8192 tokens of its KV 2.7 GB: two GPUs of 80 GB at 90 % hold it, or four of 48 GB."""
    assert [len(gpus) for gpus in colocated(world(name="llama-2-70b"))] == [2, 2, 2, 2, 2, 2, 4]
    assert [len(gpus) for gpus in colocated(world(name="llama-2-70b", gpu_memory_utilization=0.8))] == [4, 4, 4, 4]
    assert {len(gpus) for gpus in colocated(world())} == {1}


def test_a_machine_too_small_is_left_out() -> None:
    where = Cluster.of([{"gpu": "T4", "count": 2}, {"gpu": "H100-SXM", "count": 4}])
    assert colocated(world(where, "llama-2-70b")) == [("n1.g0", "n1.g1"), ("n1.g2", "n1.g3")]


def test_only_on_a_type() -> None:
    assert {gpu.split(".")[0] for gpus in colocated(world(), gpu="a40", tp=1) for gpu in gpus} == {"slow"}


def test_a_pipeline_does_not_mix_types_and_spreads_layers_evenly() -> None:
    plan = Colocated(pool=Pool(tp=4, pp=2)).plan(world())
    assert [replica.gpus[0] for replica in plan.replicas] == ["mid.g0"]
    plan = Colocated(pool=Pool(replicas=1, tp=1, pp=3)).plan(world())
    layers = [(stage.first_layer, stage.end_layer) for stage in plan.replicas[0].stages]
    assert layers == [(0, 11), (11, 22), (22, 32)]
    assert plan.replicas[0].leg == ("mixed0.0", "mixed0.1", "mixed0.2")


def test_split_puts_prefill_on_the_fastest_and_decode_on_the_rest() -> None:
    plan = Split(prefill=Pool(replicas=1, tp=4), decode=Pool(replicas=2, tp=4)).plan(world())
    assert [(replica.name, replica.role, replica.gpus[0]) for replica in plan.replicas] == [
        ("prefill0", "prefill", "fast.g0"),
        ("decode0", "decode", "mid.g0"),
        ("decode1", "decode", "mid.g4"),
    ]


@pytest.mark.parametrize(
    ("prefill", "decode", "counts"),
    [({}, {}, (2, 2)), ({"replicas": 1}, {}, (1, 3)), ({}, {"replicas": 1}, (3, 1)), ({}, {"replicas": 3}, (1, 3))],
)
def test_split_shares_what_nobody_asked_for(prefill: Any, decode: Any, counts: tuple[int, int]) -> None:
    plan = Split(prefill=Pool(tp=4, **prefill), decode=Pool(tp=4, **decode)).plan(world())
    roles = [replica.role for replica in plan.replicas]
    assert (roles.count("prefill"), roles.count("decode")) == counts


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda w: Colocated(pool=Pool(replicas=5, tp=4)).plan(w),
            r"5 mixed replica\(s\), tp 4, pp 1 of llama-2-7b asked for, .* room for 4",
        ),
        (lambda w: Colocated(pool=Pool(gpu="T4")).plan(w), "at least one mixed .* on T4 .* room for 0"),
        (
            lambda w: Split(prefill=Pool(replicas=4, tp=4), decode=Pool(tp=4)).plan(w),
            "at least one decode .* room for 0",
        ),
    ],
)
def test_what_the_cluster_has_no_room_for_is_an_error(plan: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(world())


def test_pools_come_from_mappings_and_wrong_keys_are_named() -> None:
    assert Pool.of({"replicas": 2, "gpu": "L40S"}, "prefill") == Pool(replicas=2, gpu="L40S")
    assert Pool.of(None, "prefill") == Pool()
    pool = Pool(tp=2)
    assert Pool.of(pool, "decode") is pool
    with pytest.raises(ConfigError, match=r"system\.prefill.replica is unknown; known are replicas, tp, pp, gpu"):
        Pool.of({"replica": 2}, "prefill")
    with pytest.raises(ConfigError, match=r"system\.decode.tp is 0; it must be a whole number >= 1"):
        Pool.of({"tp": 0}, "decode")
    with pytest.raises(ConfigError, match=r"system\.decode.tp is 'two'"):
        Pool.of({"tp": "two"}, "decode")


def test_layout_is_split_or_colocated_not_both() -> None:
    assert isinstance(layout(2, 1, 1, None, None, None).planner, Colocated)
    assert isinstance(layout(None, None, 1, None, {"tp": 1}, None).planner, Split)
    with pytest.raises(ConfigError, match="describe colocated replicas; with prefill and decode, set them there"):
        layout(None, 2, 1, None, {"tp": 1}, None)


@given(tp=st.sampled_from([None, 1, 2, 4]), pp=st.integers(1, 4), replicas=st.integers(1, 4), split=st.booleans())
def test_whatever_is_planned_is_possible(tp: int | None, pp: int, replicas: int, split: bool) -> None:
    where = world(num_kv_blocks=1000)
    pool = Pool(replicas=replicas, tp=tp, pp=pp)
    planner = Split(prefill=pool, decode=Pool(tp=tp, pp=pp)) if split else Colocated(pool=pool)
    try:
        plan = planner.plan(where)
    except ConfigError:
        return
    check_plan(plan, where)
    assert sum(replica.role != "decode" for replica in plan.replicas) == replicas
    for replica in plan.replicas:
        assert len(replica.stages) == pp
        assert len({where.cluster.gpu(gpu).name for gpu in replica.gpus}) == 1
        assert all(len({gpu.split(".")[0] for gpu in stage.gpus}) == 1 for stage in replica.stages)


# ------------------------------------------------------------ what no plan may say


def _stage(name: str, gpus: tuple[str, ...] = ("n0.g0",), first: int = 0, end: int = 2) -> Stage:
    return Stage(name=name, gpus=gpus, first_layer=first, end_layer=end)


def _plan(*replicas: tuple[str, tuple[Stage, ...]]) -> Plan:
    return Plan(replicas=tuple(Replica(name=name, stages=stages) for name, stages in replicas))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(replicas=()), "it has no replicas"),
        (_plan(("a", (_stage("s"),)), ("b", (_stage("s", ("n0.g1",)),))), "stage 's' occurs twice"),
        (_plan(("a", (_stage("b"),)), ("b", (_stage("b", ("n0.g1",)),))), "stage 'b' occurs twice"),
        (_plan(("a", (_stage("s", end=1), _stage("s", ("n0.g1",), 1)))), "stage 's' occurs twice"),
        (_plan(("a", (_stage("s"),)), ("a", (_stage("t", ("n0.g1",)),))), "replica 'a' occurs twice"),
        (_plan(("a", (_stage("s", first=1),))), "no replica holds layer 0"),
        (_plan(("a", (_stage("s", end=1), _stage("t", ("n0.g1",))))), "holds layers 0 to 2; it must start at 1"),
        (
            _plan(("a", (_stage("s", end=1), _stage("t", ("n0.g1",), 1, 1)))),
            "2 stages, layers 0 to 1; where one holds a",
        ),
        (_plan(("a", (_stage("s", end=1),))), "no replica holds layer 1"),
        (_plan(("a", (_stage("s", ("n7.g0",)),))), "GPU 'n7.g0', which the cluster does not have"),
        (_plan(("a", (_stage("s"),)), ("b", (_stage("t"),))), "GPU n0.g0 is used by a and by b"),
    ],
)
def test_an_impossible_plan_is_a_config_error(plan: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(system(), [request(0)], plan=plan)


def test_a_model_that_does_not_fit_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"tiny does not fit on stage a.0 \(1 x A100-80G-SXM\): .* GB a GPU"):
        run(system(gpu_memory_utilization=0.01), [request(0)], plan=ONE)
