"""ThunderServe's planner: what a plan looks like, that its parts are exact where they say so, and its invariants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster, ConfigError, Limits, Problem, Slo, Workload
from sim.cost import Roofline
from sim.engine.setup import check_plan
from sim.memory import kv_blocks
from sim.model import model
from sim.planners.pools import Colocated, Pool
from sim.planners.thunderserve import TabuSearch
from sim.planners.thunderserve.groups import Group, Grouping, agglomerate, canonical, has_both_phases, neighbour
from sim.planners.thunderserve.replay import Sample
from sim.planners.thunderserve.world import World
from sim.transfers import Quantized
from sim.types import InfeasibleError
from tests.toys import problem as toy_problem

RNG = np.random.default_rng(1)
LENGTHS = tuple((int(a), int(b)) for a, b in zip(RNG.integers(64, 900, 60), RNG.integers(2, 90, 60), strict=True))
FREE_16, FREE_4 = (Quantized(bits, codec_bytes_per_s=float("inf")) for bits in (16, 4))
QUICK = TabuSearch(n_steps=5, n_neighbors=6)


def nodes(*rows: tuple[str, int], gbps: float = 40.0, **links: Any) -> Cluster:
    """One machine for each (GPU, count)."""
    return Cluster.of(
        [{"gpu": gpu, "count": count} for gpu, count in rows],
        links={"inter_node": {"gbps": gbps, "latency_us": 20}, **links},
    )


def world(where: Cluster, rate_per_s: float = 4.0, name: str = "llama-13b", seed: int = 0) -> Problem:
    return Problem(
        cluster=where,
        model=model(name),
        cost=Roofline(),
        workload=Workload(rate_per_s=rate_per_s, lengths=LENGTHS),
        slo=Slo(ttft_s=0.6, tpot_s=0.08, e2e_s=8.0),
        seed=seed,
    )


TWO_KINDS = nodes(("A40", 2), ("RTX-3090-Ti", 4))
CLOUD = nodes(
    ("A6000", 4), ("A6000", 4), ("A5000", 4), ("A5000", 4), ("A40", 8), ("RTX-3090-Ti", 4), ("RTX-3090-Ti", 4)
)  # fmt: skip


def test_a_plan_has_both_phases_and_shares_that_add_up() -> None:
    where = world(TWO_KINDS)
    found = QUICK.search(where)
    best = found.best
    check_plan(best.plan, where)
    assert {replica.role for replica in best.plan.replicas} == {"prefill", "decode"}
    assert sum(best.plan.shares.values()) == pytest.approx(1.0)
    assert 0.9 < best.attainment <= 1
    assert best.served == 1
    ranks = [(candidate.attainment, candidate.served) for candidate in found.candidates]
    assert ranks == sorted(ranks, reverse=True)
    assert [row.evaluation for row in found.log] == list(range(len(found.log)))


def test_tensor_parallelism_stays_inside_a_machine_and_every_copy_fits() -> None:
    where = world(CLOUD, name="llama-30b")
    for candidate in TabuSearch(n_steps=4).search(where).candidates:
        check_plan(candidate.plan, where)
        for replica in candidate.plan.replicas:
            assert all(len({gpu.split(".")[0] for gpu in stage.gpus}) == 1 for stage in replica.stages)
            assert kv_blocks(where, replica.stages, where.limits) * 16 >= max(map(sum, LENGTHS))


# ---------------------------------------------------------------- the upper level


def set_partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for place, part in enumerate(rest):
            yield [*rest[:place], [items[0], *part], *rest[place + 1 :]]


def every_grouping(where: Problem) -> set[Grouping]:
    """All ways to group all GPUs, and to give every group a phase."""
    machines = [place for place, node in enumerate(where.cluster.nodes) for _ in range(node.count)]
    found: set[Grouping] = set()
    for parts in set_partitions(range(len(machines))):
        counts = [
            tuple(sum(machines[gpu] == place for gpu in part) for place in range(len(where.cluster.nodes)))
            for part in parts
        ]
        for roles in product(("prefill", "decode"), repeat=len(parts)):
            groups = canonical(map(Group, counts, roles))
            if has_both_phases(groups):
                found.add(groups)
    return found


@settings(max_examples=3)
@given(
    kinds=st.lists(st.sampled_from(["A40", "RTX-3090-Ti", "A5000", "A100-80G-SXM"]), min_size=2, max_size=2),
    sizes=st.sampled_from([(2, 2), (3, 2), (4, 2), (3, 3)]),
    gbps=st.sampled_from([2.0, 40.0]),
    rate=st.sampled_from([2.0, 6.0]),
)
def test_tabu_finds_what_brute_force_finds(kinds: list[str], sizes: tuple[int, int], gbps: float, rate: float) -> None:
    where = world(nodes((kinds[0], sizes[0]), (kinds[1], sizes[1]), gbps=gbps), rate)
    judge = World(where, Quantized())
    best = max(judge.evaluate(grouping).rank for grouping in every_grouping(where) if judge.feasible(grouping))
    try:
        found = TabuSearch().search(where).best
    except InfeasibleError:
        assert best[1] == 0
        return
    assert (found.attainment, found.served) == (pytest.approx(best[0], abs=1e-6), pytest.approx(best[1], abs=1e-6))


def test_more_steps_are_never_worse() -> None:
    where = world(TWO_KINDS, rate_per_s=12.0)
    values = [TabuSearch(n_steps=steps).search(where).best for steps in (0, 1, 3, 8)]
    ranks = [(round(best.attainment, 9), round(best.served, 9), best.headroom) for best in values]
    assert ranks == sorted(ranks)
    log = TabuSearch(n_steps=8).search(where).log
    assert [row.best for row in log] == sorted(row.best for row in log)


def test_equal_seeds_give_equal_plans_and_other_seeds_look_elsewhere() -> None:
    where = world(TWO_KINDS, rate_per_s=12.0)
    assert QUICK.plan(where) == QUICK.plan(where)
    logs = [[row.value for row in QUICK.search(replace(where, seed=seed)).log] for seed in (0, 1)]
    assert logs[0] != logs[1]


def test_time_is_a_limit_too() -> None:
    quick = replace(TabuSearch(), seconds=1e-9).search(world(TWO_KINDS))
    assert len(quick.log) == 2  # a start and a neighbour
    assert quick.candidates


def test_renaming_machines_and_gpus_changes_nothing() -> None:
    rows = [{"gpu": "A40", "count": 2}, {"gpu": "A40", "count": 2}]
    found = []
    for names in (("a", "b"), ("zebra", "apple")):
        where = Cluster.of(
            [{**row, "name": name} for row, name in zip(rows, names, strict=True)],
            links={"inter_node": {"gbps": 40}},
        )
        best = QUICK.search(world(where, 12.0)).best
        found.append((best.attainment, best.headroom, sorted(map(len, (r.gpus for r in best.plan.replicas)))))
    assert found[0] == found[1]


def test_twelve_copies_of_llama_30b_fit_the_cloud_and_four_of_two_gpus_the_house() -> None:
    """The paper's replica counts, 32 mixed GPUs against eight A100; with 8192 tokens of KV a copy takes two."""
    cloud = World(world(CLOUD, name="llama-30b"), Quantized())
    assert len(cloud.start()[0]) == 12
    house = world(nodes(("A100-80G-SXM", 8)), name="llama-30b")
    assert len(Colocated(pool=Pool()).plan(house).replicas) == 4


def test_clusters_close_around_fast_links() -> None:
    where = nodes(("A40", 2), ("A40", 2))
    assert sorted(agglomerate(where, (2, 2), lambda counts: sum(counts) >= 2)) == [(0, 2), (2, 0)]
    assert agglomerate(where, (2, 1), lambda counts: sum(counts) >= 2) == [(2, 1)]
    assert agglomerate(where, (1, 1), lambda counts: sum(counts) >= 3) == []


@given(st.integers(0, 10**6))
def test_moves_keep_every_gpu_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grouping = canonical([Group((2, 1, 0), "prefill"), Group((0, 1, 3), "decode"), Group((1, 0, 0), "decode")])
    for _ in range(20):
        step = neighbour(grouping, rng)
        if step is not None:
            grouping = step.grouping
        assert tuple(np.sum([group.counts for group in grouping], axis=0)) == (3, 2, 3)
        assert all(any(group.counts) and min(group.counts) >= 0 for group in grouping)
        assert has_both_phases(grouping)


# ---------------------------------------------------------------- quantisation


def groupings(where: Problem, count: int) -> list[Grouping]:
    judge = World(where, FREE_16)
    rng = np.random.default_rng(2)
    found = judge.start()
    while len(found) < count:
        step = neighbour(found[int(rng.integers(len(found)))], rng)
        if step is not None and judge.feasible(step.grouping):
            found.append(step.grouping)
    return found[:count]


def test_four_bits_with_a_free_codec_are_never_worse_than_sixteen() -> None:
    """For given groups and shares, as the LP sees them and at the shares' own loads."""
    where = world(nodes(("A40", 2), ("RTX-3090-Ti", 4), gbps=5.0), 3.0)
    gained = 0
    for grouping in groupings(where, 12):
        wide, narrow = World(where, FREE_16), World(where, FREE_4)
        before = wide.evaluate(grouping)
        if not before.shares.size:
            continue
        servers = narrow.servers(grouping, "prefill"), narrow.servers(grouping, "decode")
        same = narrow.orchestrator.predict(*servers, narrow.orchestrator.ways(*servers), before.shares, 1.0, 1.0, "")
        assert (same.pair_scores >= before.pair_scores).all()
        gained += same.attainment > before.attainment
    assert gained


# ---------------------------------------------------------------- infeasible


def test_without_links_between_groups_nothing_is_served() -> None:
    """Each machine has room for one copy, and there is no network."""
    where = world(nodes(("A40", 1), ("A40", 1), gbps=0.0))
    judge = World(where, Quantized())
    for grouping in judge.start():
        assert judge.evaluate(grouping).rank == (0.0, 0.0, 0.0)
    with pytest.raises(InfeasibleError, match=r"links: of \d+ plans none has a link"):
        QUICK.plan(where)


def test_without_memory_the_missing_gigabytes_are_named() -> None:
    wanted = r"llama-13b, each with KV for \d+ tokens, need 2 x 26\.\d GB .* 2 GPUs have"
    with pytest.raises(InfeasibleError, match=wanted):
        QUICK.plan(world(nodes(("RTX-3090-Ti", 2))))


def test_a_rate_that_is_too_high_names_the_bottleneck() -> None:
    found = QUICK.search(world(TWO_KINDS, rate_per_s=1000.0))
    assert found.best.served < 0.5
    assert "stage" in found.best.bottleneck
    with pytest.raises(InfeasibleError, match=r"bottleneck: .* stage (prefill|decode)\d"):
        found.require(0.9)
    assert QUICK.search(world(TWO_KINDS)).require(0.5).attainment >= 0.5


def test_requests_beyond_the_context_count_as_missed_or_are_refused() -> None:
    half = replace(world(TWO_KINDS), workload=Workload(rate_per_s=1.0, lengths=((100, 10), (5000, 10))))
    assert QUICK.search(half).best.attainment == pytest.approx(0.5)
    with pytest.raises(InfeasibleError, match="none of the 1 sampled requests fits the context of 2048"):
        QUICK.plan(replace(half, workload=Workload(rate_per_s=1.0, lengths=((5000, 10),))))


# ---------------------------------------------------------------- rescheduling


def test_flips_alone_change_no_group_and_no_layer() -> None:
    where = world(nodes(("A40", 4), ("RTX-3090-Ti", 4)), 8.0)
    plan = QUICK.plan(where)
    lost = next(replica for replica in plan.replicas if sum(r.role == replica.role for r in plan.replicas) > 1).gpus[0]
    busier = replace(where, workload=Workload(rate_per_s=8.0, lengths=tuple((a // 4, b * 4) for a, b in LENGTHS)))
    found = QUICK.replan(busier, plan, lost=[lost])
    kept = {replica.name: replica.stages for replica in plan.replicas if lost not in replica.gpus}
    assert {replica.name: replica.stages for replica in found.best.plan.replicas} == kept
    assert sum(found.best.plan.shares.values()) == pytest.approx(1.0)
    for role in ("prefill", "decode"):
        assert any(replica.role == role for replica in found.best.plan.replicas)


def test_a_full_replan_avoids_what_is_lost() -> None:
    where = world(TWO_KINDS)
    found = QUICK.replan(where, QUICK.plan(where), lost=["n1.g0", "n1.g2"], flips_only=False)
    check_plan(found.best.plan, where)
    assert not {gpu for replica in found.best.plan.replicas for gpu in replica.gpus} & {"n1.g0", "n1.g2"}


def test_with_no_change_a_replan_is_not_worse() -> None:
    where = world(TWO_KINDS, 12.0)
    before = QUICK.search(where).best
    assert QUICK.replan(where, before.plan).best.attainment >= before.attainment - 1e-9


def test_one_survivor_cannot_have_two_phases() -> None:
    where = world(nodes(("A40", 1), ("A40", 1)))
    plan = QUICK.plan(where)
    with pytest.raises(InfeasibleError, match="1 of its replicas have all their GPUs"):
        QUICK.replan(where, plan, lost=["n0.g0"])


def test_a_stage_over_two_machines_is_refused() -> None:
    where = world(nodes(("A40", 1), ("A40", 1), ("A40", 2)))
    plan = QUICK.plan(where)
    first = plan.replicas[0]
    wide = replace(first, stages=(replace(first.stages[0], gpus=("n0.g0", "n1.g0"), end_layer=40, first_layer=0),))
    with pytest.raises(ConfigError, match="spans the machines n0, n1"):
        QUICK.routed(where, replace(plan, replicas=(wide, *plan.replicas[1:])))


def test_the_sample_follows_the_workload() -> None:
    sample = Sample.of(world(TWO_KINDS))
    assert set(zip(sample.inputs.tolist(), sample.outputs.tolist(), strict=True)) <= set(LENGTHS)
    assert sample.longest_tokens == max(map(sum, LENGTHS))
    tiny = replace(toy_problem(), limits=Limits(max_model_len=110))
    assert Sample.of(tiny).longest_tokens == 110
