"""Metis's two pools: figures one can do in one's head, and what holds of every plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

from sim import Cluster, Problem, Slo, Workload
from sim.cost import Roofline
from sim.memory import kv_blocks
from sim.model import model
from sim.planners.metis import Metis
from sim.planners.metis.serving import Search, chains, front
from sim.planners.metis.stages import Stages, chunks
from sim.types import InfeasibleError, Plan
from tests.toys import TINY, cluster, problem

A_PROMPT_S = 0.010 + 0.001
"""Of 100 tokens."""


def step_s(sequences: int) -> float:
    """At 105 tokens of context each."""
    return 0.010 + sequences * (1e-5 + 105e-9)


def test_a_gpu_for_each_phase() -> None:
    """Twenty prompts of 100 tokens fill a step of 2,048; 256 sequences decode nine more tokens each."""
    found = Metis().search(problem(cluster(2)))
    assert found.prefill.rate_per_s == pytest.approx(20 / (0.010 + 2000 * 1e-5))
    assert found.prefill.time_s == pytest.approx(A_PROMPT_S)
    assert found.decode.rate_per_s == pytest.approx(256 / step_s(256) / 9)
    assert found.decode.time_s == pytest.approx(step_s(256))
    plan = Metis().plan(problem(cluster(2)))
    assert [(one.name, one.role, one.gpus) for one in plan.replicas] == [
        ("prefill0", "prefill", ("n0.g0",)), ("decode0", "decode", ("n0.g1",)),
    ]  # fmt: skip
    assert plan.shares == {("prefill0", "decode0"): pytest.approx(1.0)}


def test_a_step_within_its_limit() -> None:
    where = replace(problem(cluster(2)), slo=Slo(tpot_s=0.0105))
    assert Metis().search(where).decode.time_s == pytest.approx(step_s(32))
    by_end = replace(where, slo=Slo(ttft_s=0.05, e2e_s=0.05 + 9 * 0.0105))
    assert Metis().search(by_end).decode.time_s == pytest.approx(step_s(32))


def test_a_batch_that_memory_holds() -> None:
    """2,048 tokens of KV are 18 requests of 110."""
    where = problem(cluster(2))
    where = replace(where, limits=replace(where.limits, num_kv_blocks=128))
    assert Metis().search(where).decode.time_s == pytest.approx(step_s(16))
    with pytest.raises(InfeasibleError, match="no two pools"):
        Metis().search(replace(where, limits=replace(where.limits, num_kv_blocks=6)))


def test_long_prompts_come_in_chunks() -> None:
    assert chunks(5000, 2048) == (2048, 2048, 904)
    assert chunks(4096, 2048) == (2048, 2048)
    where = replace(problem(cluster(2)), workload=Workload(rate_per_s=1.0, lengths=((3048, 10),)))
    seconds = 2 * 0.010 + 3048 * 1e-5 + 3e-12 * 1000 * 2048
    found = Metis().search(where).prefill
    assert (found.time_s, found.rate_per_s) == pytest.approx((seconds, 1 / seconds))


def test_chains_take_a_part_of_every_stage() -> None:
    ranks = tuple("abcdef")
    assert chains(ranks, (4, 2), 2) == ((("a", "b"), ("e",)), (("c", "d"), ("f",)))
    assert chains(ranks, (4, 2), 1) == ((("a", "b", "c", "d"), ("e", "f")),)


def test_the_front_is_what_no_other_beats() -> None:
    found = Metis(exhaustive=True).search(mixed()).prefill
    slower, faster = found._replace(time_s=found.time_s * 2), found._replace(rates_per_s=(1.0,))
    quick = faster._replace(time_s=found.time_s / 2)
    assert front(iter([faster, slower, quick, found])) == [found, quick]


def mixed(slo: Slo | None = None) -> Problem:
    """Two GPUs rich in FLOP/s, two rich in bandwidth, and an A40, so that some stage is mixed."""
    where = Cluster.of(
        [{"gpu": "L40S", "count": 2}, {"gpu": "A100-80G-SXM", "count": 2}, {"gpu": "A40", "count": 1}],
        links={"inter_node": {"gbps": 100, "latency_us": 10}},
    )
    return Problem(
        cluster=where,
        model=model("llama-2-13b"),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((700, 200), (300, 50))),
        slo=slo or Slo(),
    )


def whole(plan: Plan, where: Problem) -> None:
    """Every GPU in one stage, all layers in every replica, room for the longest request, shares of 1."""
    used = [gpu for one in plan.replicas for gpu in one.gpus]
    assert Counter(used) == Counter(where.cluster.gpu_ids)
    for one in plan.replicas:
        bounds = [one.stages[0].first_layer, *(stage.end_layer for stage in one.stages)]
        assert (bounds[0], bounds[-1]) == (0, where.model.num_layers)
        assert [(stage.first_layer, stage.end_layer) for stage in one.stages] == list(pairwise(bounds))
        assert all(len({where.cluster.node(gpu).name for gpu in stage.gpus}) == 1 for stage in one.stages)
        longest = max(map(sum, where.workload.lengths))
        assert kv_blocks(where, one.stages, where.limits) * where.limits.block_size >= longest
    assert sum(plan.shares.values()) == pytest.approx(1.0)
    assert {one.role for one in plan.replicas} == {"prefill", "decode"}


@pytest.mark.parametrize("exhaustive", [False, True])
def test_plans_are_whole(exhaustive: bool) -> None:
    where = mixed()
    whole(Metis(exhaustive=exhaustive).plan(where), where)


def test_prefill_goes_where_flops_are_and_decode_where_bandwidth_is() -> None:
    where = mixed()
    pair = replace(where, cluster=replace(where.cluster, nodes=where.cluster.nodes[:2]))
    plan = Metis(exhaustive=True).plan(pair)
    kinds = {role: Counter(pair.cluster.gpu(gpu).name for one in plan.replicas if one.role == role for gpu in one.gpus)
             for role in ("prefill", "decode")}  # fmt: skip
    assert kinds["decode"]["A100-80G-SXM"] == 2
    assert kinds["prefill"]["L40S"] > kinds["decode"]["L40S"]


def test_replicas_of_mixed_types_get_shares_by_speed() -> None:
    """Four GPUs in two pools of one stage: whatever the split, one pool at least has two types."""
    where = mixed()
    nodes = [{"gpu": "L40S", "count": 1}, {"gpu": "A100-80G-SXM", "count": 2}, {"gpu": "A40", "count": 1}]
    where = replace(where, cluster=Cluster.of(nodes, links={"inter_node": {"gbps": 100}}))
    found = Metis(max_stages=1, max_tp=1).search(where)
    plan = Metis(max_stages=1, max_tp=1).plan(where)
    uneven = 0
    for place, pool in enumerate((found.prefill, found.decode)):
        names = list(dict.fromkeys(pair[place] for pair in plan.shares))
        given = [sum(share for pair, share in plan.shares.items() if pair[place] == name) for name in names]
        assert given == pytest.approx([rate / pool.rate_per_s for rate in pool.rates_per_s])
        kinds = [where.cluster.gpu(chain[0][0]) for chain in pool.chains]
        if kinds[0] != kinds[1]:
            uneven += 1
            by_speed = sorted(range(2), key=lambda i: kinds[i].bandwidth_bytes_per_s)
            assert (given[by_speed[0]] < given[by_speed[1]]) or place == 0
            assert given[0] != given[1]
    assert uneven


def test_data_parallelism_comes_first() -> None:
    """Two A100: as two replicas, and only where all is tried as one of TP 2, which is quicker and does less."""
    (only,) = Search(Metis(max_stages=1), mixed()).pool((2, 0, 0), "prefill")
    assert [len(gpus) for chain in only.chains for gpus in chain] == [1, 1]
    first, second = Search(Metis(max_stages=1, exhaustive=True), mixed()).pool((2, 0, 0), "prefill")
    assert first == only
    assert [len(gpus) for chain in second.chains for gpus in chain] == [2]
    assert second.time_s < first.time_s


def test_speeds_of_a_stage_add_up() -> None:
    stages = Stages(problem(cluster(2)))
    one = ("n0.g0",)
    alone, both = stages.prefill((one,), 1), stages.prefill((one, one), 1)
    assert alone[0, 2] == pytest.approx(A_PROMPT_S)
    assert both[0, 2] == pytest.approx(A_PROMPT_S / 2)
    assert alone[1, 1] == both[1, 1] == inf


def test_a_wider_search_is_never_worse() -> None:
    where = mixed()
    plain = Metis().search(where).rate_per_s
    for wider in (
        Metis(exhaustive=True),
        Metis(variance=0.5),
        Metis(max_permute_len=6),
        Metis(max_stages=None),
        Metis(max_tp=8),
    ):
        assert wider.search(where).rate_per_s >= plain * (1 - 1e-9)


def test_limits_that_no_plan_keeps_are_said() -> None:
    with pytest.raises(InfeasibleError, match=r"slo: a mean prompt .* limit is 0\.001 s"):
        Metis().search(mixed(Slo(ttft_s=0.001)))
    with pytest.raises(InfeasibleError, match=r"slo: a decode step .* limit is 0\.0001 s"):
        Metis().search(mixed(Slo(tpot_s=0.0001)))
    large = replace(mixed(), model=model("llama-2-70b"))
    little = Cluster.of([{"gpu": "A40", "count": 4}], links={"inter_node": {"gbps": 100}})
    with pytest.raises(InfeasibleError, match="cluster: no two pools"):
        Metis().search(replace(large, cluster=little))


def test_machines_without_a_link_are_said() -> None:
    apart = Cluster.of(
        [{"gpu": "L40S", "count": 2}, {"gpu": "A100-80G-SXM", "count": 2}], links={"inter_node": {"gbps": 0}}
    )
    with pytest.raises(InfeasibleError, match=r"cluster\.links"):
        Metis().plan(replace(mixed(), cluster=apart))


def test_the_way_of_the_kv_counts_to_the_first_token() -> None:
    """3.3 MB a prompt take 0.26 s at 0.1 Gbps."""
    limit = Slo(ttft_s=0.1)
    Metis().search(replace(problem(cluster(1, nodes=2, gbps=100)), slo=limit))
    with pytest.raises(InfeasibleError, match=r"slo: a mean prompt and its KV's way takes 0\.2"):
        Metis().search(replace(problem(cluster(1, nodes=2, gbps=0.1)), slo=limit))


def test_a_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    """Two GPUs with a layer each take 256 sequences in two micro-batches; as two replicas they take twice as many."""
    search = Search(Metis(max_tp=1, exhaustive=True), problem(cluster(4)))
    two, pipeline = search.pool((2,), "decode")
    assert (two.bounds, pipeline.bounds) == ((0, 2), (0, 1, 2))
    assert (two.rate_per_s, two.time_s) == pytest.approx((2 * 256 / step_s(256) / 9, step_s(256)))
    assert (pipeline.rate_per_s, pipeline.time_s) == pytest.approx((256 / step_s(128) / 9, step_s(128)), rel=2e-3)
    three = replace(problem(cluster(4)), model=replace(TINY, num_layers=3))
    (uneven,) = Search(Metis(), three).cuts(((("n0.g0",), ("n0.g1",)),), "decode")
    assert uneven.time_s == pytest.approx(2 * 2 / 3 * step_s(128), rel=2e-3)
    first = search.pool((2,), "prefill")[0]
    assert len(first.chains) == 2
    assert first.chains[0] == (("n0.g0",),)
    assert two.chains[1] == (("n0.g3",),)
