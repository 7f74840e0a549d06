"""HexGen's planner: its formulas by hand, layouts and shares against brute force, and a search that loses no GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster, Limits, Problem, Slo, Workload
from sim.model import model
from sim.planners.hexgen import HexGen, World
from sim.planners.hexgen.cost import Costs, Wire
from sim.planners.hexgen.genetic import Genetic, Partition
from sim.planners.hexgen.goodput import Server, attained
from sim.planners.hexgen.layout import Layouts, parts, shared_out
from sim.types import InfeasibleError
from tests.toys import ToyCost, cluster, problem

DEFAULTS = Costs(
    layer_params=12 * 8192**2, hidden_size=8192, kv_values=2 * 8192, value_bytes=2, batch=1, input_tokens=32,
    output_tokens=128,
)  # fmt: skip
"""Of the authors' scripts."""
WIRE = Wire(1e-6, 1e11)


def test_the_scripts_own_values() -> None:
    assert DEFAULTS.compute_s(32, 1, 1e12, 1e12) == pytest.approx(0.0531502, rel=1e-6)
    assert DEFAULTS.compute_s(1, 1, 1e12, 1e12) == pytest.approx(3.22123e-3, rel=2e-6)
    assert DEFAULTS.collectives_s(32, 2, WIRE) == pytest.approx(1.448576e-5, rel=1e-9)
    assert DEFAULTS.memory_bytes(80, 1) / 2**30 == pytest.approx(120.4004, rel=1e-6)


def test_a_hop_tells_the_next_stages_group() -> None:
    sent_s = 1e-6 + 32 * 8192 * 2 / 1e11
    assert DEFAULTS.hop_s(32, WIRE) == pytest.approx(sent_s)
    told_s = 2 * 3 * (1e-6 + 32 * 8192 * 2 / 4 / 1e11)
    assert DEFAULTS.hop_s(32, WIRE, 4, WIRE) == pytest.approx(sent_s + told_s)


@given(tp=st.sampled_from([1, 2, 4, 8]), tokens=st.integers(1, 4000), layers=st.integers(1, 80))
def test_compute_halves_with_twice_the_peaks_and_memory_with_twice_the_gpus(tp: int, tokens: int, layers: int) -> None:
    slow, fast = DEFAULTS.compute_s(tokens, tp, 1e14, 1e12), DEFAULTS.compute_s(tokens, tp, 2e14, 2e12)
    assert fast == pytest.approx(slow / 2)
    assert DEFAULTS.memory_bytes(layers, 2 * tp) < DEFAULTS.memory_bytes(layers, tp)
    assert DEFAULTS.memory_bytes(layers + 1, tp) > DEFAULTS.memory_bytes(layers, tp)
    assert replace(DEFAULTS, batch=2).memory_bytes(layers, tp) > DEFAULTS.memory_bytes(layers, tp)
    assert DEFAULTS.collectives_s(tokens, tp, Wire(1e-6, 2e11)) <= DEFAULTS.collectives_s(tokens, tp, WIRE)


def test_the_ways_to_cut_a_machine() -> None:
    assert parts(4) == ((4,), (2, 2), (2, 1, 1), (1, 1, 1, 1))
    assert [len(parts(count)) for count in (1, 2, 3, 8)] == [1, 2, 2, 10]
    assert all(sum(cut) == 8 for cut in parts(8))


@settings(max_examples=60)
@given(
    layers=st.integers(1, 9),
    stages=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_no_other_share_makes_the_slowest_stage_faster(layers: int, stages: list[tuple[int, int]]) -> None:
    layer_s, most = [float(s) for s, _ in stages], [m for _, m in stages]
    found = shared_out(layers, layer_s, most)
    all_ways = [way for way in product(*(range(1, m + 1) for m in most)) if sum(way) == layers]
    if not all_ways:
        assert found is None
        return
    assert found is not None
    assert tuple(found) in all_ways
    slowest = [max(n * s for n, s in zip(way, layer_s, strict=True)) for way in [*all_ways, found]]
    assert slowest[-1] == min(slowest)


def test_equal_stages_have_equal_layers() -> None:
    assert sorted(shared_out(80, [1.0] * 3, [80] * 3) or []) == [26, 27, 27]
    assert shared_out(10, [1.0, 9.0, 1.0], [9] * 3, even=True) == [4, 3, 3]
    assert shared_out(10, [1.0, 1.0], [9, 4], even=True) is None


# ------------------------------------------------------------ layouts


def mixed(gbps: float = 100.0) -> Problem:
    """Two machines of one region and one of another; Llama-2-70B."""
    where = Cluster.of(
        nodes=[
            {"gpu": "A100-80G-SXM", "count": 4, "region": "east"},
            {"gpu": "L40S", "count": 4, "region": "east"},
            {"gpu": "A100-80G-SXM", "count": 4, "region": "west"},
        ],
        links={"inter_node": {"gbps": gbps}, "inter_region": {"gbps": 1.0}},
    )  # fmt: skip
    base = problem(where, ToyCost())
    workload = Workload(rate_per_s=2.0, lengths=((500, 100),))
    return replace(base, model=model("llama-2-70b"), workload=workload, slo=Slo(ttft_s=5.0, tpot_s=0.2))


def layouts(where: Problem, **options: bool) -> Layouts:
    return Layouts(where, Costs.of(where.model, 500, 100), by_model=False, **options)


@pytest.mark.parametrize("counts", [(4, 0, 0), (4, 4, 0), (2, 4, 0), (3, 2, 0)])
def test_asymmetric_layouts_are_never_worse_and_hold_every_layer_once(counts: tuple[int, ...]) -> None:
    free, alike = layouts(mixed()).best(counts), layouts(mixed(), asymmetric=False).best(counts)
    assert free is not None
    assert sum(free.layers) == 80
    for machine, count in enumerate(counts):
        assert sum(part.tp for part in free.cut if part.machine == machine) == count
    if alike is not None:
        assert len({part.tp for part in alike.cut}) == 1
        assert max(alike.layers) - min(alike.layers) <= 1
        assert free.latency_s <= alike.latency_s * (1 + 1e-9)


def test_one_machine_of_equal_gpus_is_one_stage_and_a_faster_line_never_hurts() -> None:
    best = layouts(mixed()).best((4, 0, 0))
    assert best is not None
    assert [part.tp for part in best.cut] == [4]
    slow, fast = (layouts(mixed(gbps)).best((4, 4, 0)) for gbps in (10.0, 100.0))
    assert slow is not None
    assert fast is not None
    assert fast.latency_s <= slow.latency_s
    assert layouts(mixed()).best((1, 0, 0)) is None  # 80 GB do not hold 140


# ------------------------------------------------------------ the search


def genetic(judge: object = None, generations: int = 60) -> Genetic:
    def fewest(partition: Partition) -> tuple[float, float]:
        return float(len(partition)), 0.0

    return Genetic(
        region=["a", "a", "b"], enough=lambda group: sum(group) >= 2, valid=lambda group: sum(group) >= 2,
        judge=judge or fewest, generations=generations,  # type: ignore[arg-type]
    )  # fmt: skip


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 30))
def test_mutations_lose_no_gpu_and_mix_no_regions(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    partition: Partition = ((6, 4, 0), (0, 0, 5))
    for _ in range(steps):
        partition = genetic().mutated(partition, rng)
        assert [sum(group[machine] for group in partition) for machine in range(3)] == [6, 4, 5]
        assert all(not (group[2] and (group[0] or group[1])) for group in partition)
        assert all(sum(group) >= 2 for group in partition)


def test_the_search_finds_the_best_of_all_partitions() -> None:
    """Five replicas are possible; the judge wants exactly three, the more alike the better."""

    def judge(partition: Partition) -> tuple[float, float]:
        return abs(len(partition) - 3.0), max(map(sum, partition)) - min(map(sum, partition))

    start: Partition = ((6, 4, 0),)
    found = genetic(judge, 200).search([start], np.random.default_rng(0))
    assert judge(found) == (0.0, 1.0)  # 3 + 3 + 4
    again = genetic(judge, 200).search([start], np.random.default_rng(0))
    assert again == found


def test_a_plan_uses_every_gpu_of_regions_that_hold_the_model() -> None:
    where = mixed()
    plan = HexGen(generations=40, prices="paper").plan(where)
    gpus = [gpu for one in plan.replicas for gpu in one.gpus]
    assert sorted(gpus) == sorted(where.cluster.gpu_ids)
    for one in plan.replicas:
        assert len({where.cluster.node(gpu).region for gpu in one.gpus}) == 1
        assert all(len({where.cluster.node(gpu).name for gpu in stage.gpus}) == 1 for stage in one.stages)
        assert [stage.first_layer for stage in one.stages][1:] == [stage.end_layer for stage in one.stages][:-1]
    fewer = HexGen(generations=40, prices="paper").plan(where, without={"n2.g0", "n2.g1", "n2.g2"})
    assert {where.cluster.node(gpu).region for one in fewer.replicas for gpu in one.gpus} == {"east"}
    assert plan == HexGen(generations=40, prices="paper").plan(where)


def test_the_search_begins_with_regions_and_with_machines() -> None:
    """Four L40S hold the model as well as four A100; two of either do not, and go to the machine before."""
    world = World(mixed(), HexGen(prices="paper"))
    assert list(world.by_region([4, 4, 4])) == [(4, 4, 0), (0, 0, 4)]
    assert list(world.by_machine([4, 4, 4])) == [(4, 0, 0), (0, 4, 0), (0, 0, 4)]
    assert list(world.by_machine([4, 2, 1])) == [(4, 2, 0)]


def test_no_region_that_holds_the_model_is_an_error() -> None:
    small = replace(mixed(), cluster=Cluster.of(nodes=[{"gpu": "L4", "count": 4}]))
    with pytest.raises(InfeasibleError, match=r"no region's GPUs hold llama-2-70b \(138 GB\)"):
        HexGen().plan(small)


# ------------------------------------------------------------ what it is judged by


def test_the_quick_replay_by_hand() -> None:
    """One at a time, 2 s each, the first token after half a second; arrivals every second: the second waits one."""
    arrivals_s = np.array([0.0, 1.0, 2.0])
    one = Server(slots=1, prefill_s=0.5, step_s=0.1, busy_s=2.0)
    assert attained([one], arrivals_s, Slo(ttft_s=0.5)) == (1 / 3, 3.0)
    assert attained([one], arrivals_s, Slo(ttft_s=1.5, e2e_s=3.0)) == (2 / 3, 3.0)
    assert attained([one], arrivals_s, Slo(tpot_s=0.09))[0] == 0
    assert attained([one, one], arrivals_s, Slo(ttft_s=0.5)) == (1.0, 2.0)
    assert attained([one._replace(slots=2)], arrivals_s, Slo()) == (1.0, 2.0)


def test_more_slots_wait_longer_for_prompts_and_stay_within_the_slo() -> None:
    where = problem(cluster(gpus=2), ToyCost())
    strict, loose = (World(replace(where, slo=Slo(tpot_s=bound)), HexGen()) for bound in (0.0135, inf))
    few, many = strict.server((2,)), loose.server((2,))
    assert few.slots < many.slots
    assert few.step_s <= 0.0135 < many.step_s
    alone = World(where, HexGen(continuous=False)).server((2,))
    assert alone.slots == 1
    assert alone.busy_s == pytest.approx(alone.prefill_s + loose.output_tokens * alone.step_s)


def test_what_no_replica_holds_costs_goodput_and_is_said() -> None:
    """16,000 tokens of KV a replica: one of four requests ends with 16,001 in it, another just fits."""
    lengths = ((500, 100), (500, 100), (15_000, 1_001), (15_000, 1_002))
    limits = Limits(num_kv_blocks=1000)
    where = replace(mixed(), workload=Workload(rate_per_s=2.0, lengths=lengths), limits=limits)
    planner = HexGen(generations=1, prices="paper")
    group: Partition = ((4, 4, 0),)
    assert World(where, planner).refused(group) == 0.25
    all_fit = replace(where, limits=Limits(num_kv_blocks=1001))
    lost, fewer = World(where, planner).judge(group)[0], World(all_fit, planner).judge(group)[0]
    assert lost == pytest.approx(fewer / 0.75)
    said = [line for line in planner.explain(where) if "rejected" in line]
    assert said == [
        "no replica holds more than 16000 tokens of KV: 25.0% of the workload's requests are longer and will be "
        "rejected"
    ]
