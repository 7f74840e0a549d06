"""ExeGPT's planner: what schedules give, and the search over them. Letters are the invariants of its specification."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster, ConfigError, Limits, Problem, Workload
from sim.cost import Roofline, seconds
from sim.model import model
from sim.planners.exegpt import ExeGPT, Found, Perf, Tensor, Traffic, branch_and_bound, exhaustive
from sim.planners.exegpt.layout import groups
from sim.planners.exegpt.schedule import Schedule, World, encode_gpus, round_robin, workload_aware
from sim.planners.exegpt.timing import Timing
from sim.types import InfeasibleError, Stage, Work
from tests.toys import TINY, ToyCost, cluster, problem

SUMMARISING = ((256, 252), (32, 13))
GENERATING = ((64, 23), (192, 93))


def lengths(
    means: tuple[tuple[int, int], tuple[int, int]], count: int = 400, seed: int = 0
) -> tuple[tuple[int, int], ...]:
    """Normal prompts and answers, at least a token each."""
    rng = np.random.default_rng(seed)
    columns = [np.maximum(1, np.rint(rng.normal(mean, std, count))).astype(int).tolist() for mean, std in means]
    return tuple(zip(*columns, strict=True))


def server(means: tuple[tuple[int, int], tuple[int, int]] = SUMMARISING, gpus: int = 4, **limits: float) -> Problem:
    """OPT-13B on A40s."""
    return Problem(
        cluster=Cluster.of(nodes=[{"gpu": "A40", "count": gpus}]),
        model=model("opt-13b"),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=lengths(means)),
        limits=Limits(max_num_seqs=512, max_num_batched_tokens=16384, **limits),  # type: ignore[arg-type]
    )


def test_the_schedule_with_the_highest_throughput_within_a_bound() -> None:
    schedule = ExeGPT(bound_s=10.0).schedule(server())
    assert schedule.perf.latency_s <= 10.0
    assert schedule.perf.throughput_per_s > 20
    assert {gpu for one in schedule.plan.replicas for gpu in one.gpus} == {"n0.g0", "n0.g1", "n0.g2", "n0.g3"}


# ------------------------------------------------------------ branch and bound


@st.composite
def rising(draw: st.DrawFn) -> tuple[dict[tuple[int, ...], Perf], tuple[int, ...], float]:
    """Tables of two figures that rise with every coordinate, plateaus and endless latencies included; a bound."""
    sides = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    tables = []
    for _ in range(2):
        table = rng.integers(0, 4, sides).astype(float)
        for axis in range(len(sides)):
            table = np.maximum.accumulate(np.cumsum(table, axis=axis), axis=axis)
        tables.append(table)
    bound_s = draw(st.floats(0, float(tables[1].max()) * 1.2))
    endless = draw(st.floats(0.3, 1.5)) * float(tables[1].max())
    found = {
        point: Perf(float(tables[0][point]), inf if tables[1][point] > endless else float(tables[1][point]))
        for point in np.ndindex(*sides)
    }
    return found, sides, bound_s


@settings(max_examples=300)
@given(world=rising())
def test_a_without_tolerance_it_finds_what_looking_at_everything_finds(
    world: tuple[dict[tuple[int, ...], Perf], tuple[int, ...], float],
) -> None:
    table, sides, bound_s = world
    quick, whole = branch_and_bound(table.__getitem__, sides, bound_s, 0.0), exhaustive(table.get, sides, bound_s)  # type: ignore[arg-type]
    assert quick.perf.throughput_per_s == whole.perf.throughput_per_s
    assert (quick.point is None) == (whole.point is None)
    assert quick.evaluations <= whole.evaluations == quick.points == whole.points
    if quick.point is not None:
        assert quick.perf == table[quick.point]
        assert quick.perf.latency_s <= bound_s


@settings(max_examples=50)
@given(bound=st.floats(0.05, 0.95), weight=st.floats(0.2, 5.0))
def test_a_with_fewer_evaluations(bound: float, weight: float) -> None:
    def price(point: tuple[int, ...]) -> Perf:
        x, y = (value + 1 for value in point)
        return Perf(x**0.7 * y**0.5, x + weight * y)

    bound_s = bound * (60 + weight * 60)
    quick, whole = branch_and_bound(price, (60, 60), bound_s, 0.0), exhaustive(price, (60, 60), bound_s)
    assert quick.perf.throughput_per_s == whole.perf.throughput_per_s
    assert quick.evaluations < whole.evaluations / 3


@pytest.mark.parametrize(("better", "cut"), [((0, 3), {(1, 3), (2, 0)}), ((3, 0), {(3, 1), (0, 2)})])
def test_a_block_is_cut_across_where_the_better_corner_is(better: tuple[int, int], cut: set[tuple[int, int]]) -> None:
    """Top left within the bound and the better: the first variable is cut; bottom right: the second."""
    looked: list[tuple[int, ...]] = []

    def price(point: tuple[int, ...]) -> Perf:
        looked.append(point)
        return Perf(10.0 if point == (3, 3) else 5.0 if point == better else float(sum(point)), float(min(point)))

    branch_and_bound(price, (4, 4), 2.0, 0.0)
    assert looked[:4] == [(3, 3), (0, 0), (0, 3), (3, 0)]
    assert cut <= set(looked[4:8])


def test_tolerance_finds_a_peak_behind_a_dip() -> None:
    """Along one side throughput falls by 3 % before it rises; the corner behind the peak hides it."""

    def price(point: tuple[int, ...]) -> Perf:
        return Perf((1.0, 1.2, 1.16, 1.3, 1.4)[point[0]], float(point[0]))

    assert branch_and_bound(price, (5,), 2.5, 0.05).point == (1,)
    assert branch_and_bound(price, (5,), 2.5, 0.0).point == (2,)
    assert branch_and_bound(price, (5,), -1.0, 0.05) == Found(None, Perf(0.0, inf), 2, 5, 0.0)


# ------------------------------------------------------------ what a point gives


def test_e_each_pool_of_waa_holds_the_whole_model() -> None:
    for kind in ("waa-c", "waa-m"):
        plan = ExeGPT(kinds=(kind,)).schedule(server()).plan  # type: ignore[arg-type]
        assert [one.role for one in plan.replicas] == ["prefill", "decode"]
        for one in plan.replicas:
            assert (one.stages[0].first_layer, one.stages[-1].end_layer) == (0, 40)
            assert all(a.end_layer == b.first_layer for a, b in pairwise(one.stages))


def toy(cost: ToyCost, means: tuple[tuple[int, int], ...] = ((100, 9),), gpus: int = 1) -> World:
    """Nothing but a fixed time and one for every token."""
    place = replace(
        problem(cluster(gpus), cost), workload=Workload(rate_per_s=1.0, lengths=means), limits=Limits(max_num_seqs=64)
    )
    traffic = Traffic.of(place.workload)
    timing = Timing(place, traffic.prompt_tokens, traffic.context_tokens, traffic.decode_iterations)
    return World(timing=timing, traffic=traffic, gpus=place.cluster.gpu_ids)


PLAIN = ToyCost(per_context_ps=0, per_pair_ps=0)
"""10 ms, and 10 us for a token."""


def test_a_phase_of_round_robin_by_hand() -> None:
    """8 iterations, 4 a phase: two phases; 3 prompts and 6 decodes a phase: 13 + 4 x 10.06 ms."""
    schedule = round_robin(toy(PLAIN), 3, 4, Tensor(1, 0))
    assert schedule.decode_batch == 6
    assert schedule.perf.throughput_per_s == pytest.approx(3 / 0.05324)
    assert schedule.perf.latency_s == pytest.approx(2 * 0.05324)


def test_a_pipeline_of_round_robin_by_hand() -> None:
    """Two stages, half the time each: passes of two prompts (6 ms) and of four decodes (5.02 ms), a bubble of 0.98."""
    world = toy(PLAIN, gpus=2)
    schedule = round_robin(world, 4, 4, Tensor(1, 0))
    hop_s = world.timing.hop_s(schedule.plan.replicas[0], 4)
    phase_s = 2 * 0.006 + world.timing.hop_s(schedule.plan.replicas[0], 200) + 4 * (2 * 0.00502 + hop_s) + 0.00098
    assert 1 / schedule.perf.throughput_per_s == pytest.approx(phase_s / 4, rel=1e-6)


def test_pools_of_waa_by_hand() -> None:
    """A GPU each. 4 prompts take 14 ms; what comes in an iteration makes the next: B = 4 x 8 / 14 ms x t(B)."""
    world = toy(PLAIN, gpus=2)
    schedule = workload_aware(world, "waa-c", 4, 1, Tensor(1, 0), 1)
    batch, token_s = schedule.decode_batch, 0.01 + 1e-5 * ceil(schedule.decode_batch)
    assert batch == pytest.approx(4 * 8 / 0.014 * token_s, rel=0.01)
    assert schedule.perf.throughput_per_s == pytest.approx(4 / 0.014)
    part_s, over_s = world.timing.hand_over_s(("n0.g0",), ("n0.g1",), 4)
    assert over_s == pytest.approx(2 * part_s)
    assert schedule.perf.latency_s == pytest.approx(0.014 + over_s + 8 * token_s)


def test_the_line_between_machines_sets_the_pace() -> None:
    """Two machines, 10 MB/s: KV of four prompts takes longer than their 14 ms."""
    nodes = [{"gpu": "A100-80G-SXM", "count": 1, "nodes": 2}]
    far = Cluster.of(nodes=nodes, links={"inter_node": {"gbps": 0.08, "latency_us": 100}})
    world = toy(PLAIN, gpus=2)
    timing = Timing(replace(world.timing.problem, cluster=far), 100, world.traffic.context_tokens, 8)
    schedule = workload_aware(replace(world, timing=timing, gpus=far.gpu_ids), "waa-c", 4, 1, Tensor(1, 0), 1)
    line_s = 1e-4 + 4 * 100 * TINY.kv_bytes_per_token() / 1e7
    assert line_s > 0.014
    assert schedule.perf.throughput_per_s == pytest.approx(4 / line_s)
    assert schedule.perf.latency_s == pytest.approx(0.014 + line_s + 8 * 0.01 + 8e-5 * ceil(schedule.decode_batch))


def test_micro_batches_follow_each_other_through_the_slowest_stage() -> None:
    """Stages of two layers and one: two micro-batches take twice the first, which is more than the way through both."""
    world = toy(PLAIN, gpus=3)
    problem_ = replace(world.timing.problem, model=replace(TINY, num_layers=3))
    timing = Timing(problem_, 100, world.traffic.context_tokens, 8)
    schedule = workload_aware(replace(world, timing=timing), "waa-c", 1, 2, Tensor(1, 0), 1)
    encode, decode = schedule.plan.replicas
    assert [stage.num_layers for stage in decode.stages] == [2, 1]
    micro_s = 2 / 3 * (0.01 + 1e-5 * ceil(schedule.decode_batch / 2))
    _, over_s = timing.hand_over_s(encode.gpus, decode.gpus, 1)
    assert schedule.perf.latency_s == pytest.approx(0.011 + over_s + 8 * 2 * micro_s)


@pytest.mark.parametrize(("blocks", "fits"), [(93, True), (92, False)])
def test_the_prefill_pool_has_room_for_a_batch_in_each_stage_and_one_more(blocks: int, fits: bool) -> None:
    """Two stages, batches of four prompts, seven blocks each, a tenth to spare: 3 x 4 x 7 x 1.1 = 92.4."""
    world = toy(PLAIN, gpus=3)
    limits = replace(world.timing.problem.limits, num_kv_blocks=blocks)
    timing = Timing(replace(world.timing.problem, limits=limits), 100, world.traffic.context_tokens, 8)
    schedule = workload_aware(replace(world, timing=timing), "waa-c", 4, 1, Tensor(1, 0), 2)
    assert len(schedule.plan.replicas[0].stages) == 2
    assert (schedule.perf.latency_s < inf) == fits


def test_a_full_decode_pool_sets_the_pace() -> None:
    """Room for 4 sequences: the prefill pool waits."""
    world = toy(PLAIN, gpus=2)
    short = replace(world.timing.problem, limits=Limits(max_num_seqs=4))
    timing = Timing(short, 100, world.traffic.context_tokens, 8)
    schedule = workload_aware(replace(world, timing=timing), "waa-c", 2, 1, Tensor(1, 0), 1)
    assert schedule.decode_batch == 4
    assert schedule.perf.throughput_per_s == pytest.approx(4 / (8 * 0.01004))


def test_the_papers_rule_hands_over_at_every_iteration() -> None:
    world = replace(toy(PLAIN, gpus=2), rule="paper")
    assert workload_aware(world, "waa-c", 4, 1, Tensor(1, 0), 1).decode_batch == 4 * 8


def test_pools_are_shared_out_by_compute_time_or_by_bytes() -> None:
    """Prompts of 1,000 tokens take most of the time, and the decodes most of the memory."""
    world = toy(ToyCost(base_ps=10**9), ((1000, 9),), gpus=4)
    assert encode_gpus(world, "waa-c", 4) == 3
    place = server(((200, 1), (400, 1)))
    traffic = Traffic.of(place.workload)
    big = World(
        timing=Timing(place, 200, traffic.context_tokens, 399), traffic=traffic, gpus=place.cluster.gpu_ids,
    )  # fmt: skip
    assert encode_gpus(big, "waa-m", 4) == 1


def test_stage_times_are_those_of_the_latency_model() -> None:
    place = server()
    timing = Timing(place, 256, 270.0, 31)
    pool = timing.pipeline("x", "mixed", groups(place.cluster.gpu_ids, Tensor(2, 2)))
    stage = Stage(name="x", gpus=("n0.g0", "n0.g1"), first_layer=0, end_layer=pool.replica.stages[0].end_layer)
    first_s = seconds(place.cost.bind(place.model, stage, place.cluster), Work((), 8, 2160))
    assert pool.decode_s(8)[0] >= first_s
    assert pool.decode_s(8)[1] > 2 * first_s


# ------------------------------------------------------------ the search


BOUNDS_S = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)


def schedules(place: Problem, bounds_s: tuple[float, ...], **settings: object) -> list[Schedule | None]:
    return [ExeGPT(bound_s=bound_s, **settings).search(place).best for bound_s in bounds_s]  # type: ignore[arg-type]


@pytest.mark.parametrize("means", [SUMMARISING, GENERATING])
def test_b_answers_keep_the_bound_and_rise_with_it(means: tuple[tuple[int, int], tuple[int, int]]) -> None:
    found = schedules(server(means), BOUNDS_S)
    assert any(found)
    for one, bound_s in zip(found, BOUNDS_S, strict=True):
        assert one is None or one.perf.latency_s <= bound_s
    rates = [0.0 if one is None else one.perf.throughput_per_s for one in found]
    assert rates == sorted(rates)


def test_branch_and_bound_is_near_the_best_of_all_points_with_few_of_them() -> None:
    place = server()
    for kind in ("rra", "waa-c"):
        quick, whole = (ExeGPT(kinds=(kind,), bound_s=5.0, tp=2, whole=w).search(place) for w in (False, True))  # type: ignore[arg-type]
        assert quick.best is not None
        assert whole.best is not None
        assert quick.best.perf.throughput_per_s >= 0.95 * whole.best.perf.throughput_per_s
        assert quick.evaluations < 0.2 * whole.evaluations
        assert whole.evaluations == whole.points == quick.points


def test_f_short_answers_favour_waa_and_short_memory_rra() -> None:
    (ample,) = schedules(server(), (5.0,))
    (tight,) = schedules(server(gpus=2, gpu_memory_utilization=0.68), (20.0,))
    assert ample is not None
    assert ample.kind == "waa-c"
    assert tight is not None
    assert tight.kind == "rra"


def test_g_equal_problems_have_equal_schedules() -> None:
    assert ExeGPT(bound_s=5.0).schedule(server()) == ExeGPT(bound_s=5.0).schedule(server())


def test_what_is_stated_is_not_searched() -> None:
    planner = ExeGPT(kinds=("rra",), encode_batch=20, decode_iterations=13, tp=4)
    search = planner.search(server())
    assert (search.evaluations, search.points) == (1, 1)
    assert planner.schedule(server()).encode_batch == 20
    assert [one.space.degree for one in ExeGPT(kinds=("rra",), tp=2, bound_s=9.0).search(server()).searched] == [2]


def test_a_problem_is_searched_once_and_another_anew() -> None:
    planner = ExeGPT(kinds=("rra",), bound_s=9.0)
    place = server()
    assert planner.search(place) is planner.search(replace(place, seed=1))
    assert planner.search(place) is not planner.search(server(GENERATING))


def test_the_slo_bounds_where_nothing_else_does() -> None:
    place = server()
    planner = ExeGPT(kinds=("rra",))
    assert planner.search(replace(place, slo=replace(place.slo, e2e_s=4.0))).bound_s == 4.0


def test_what_it_tells() -> None:
    first, *rest, last = ExeGPT(bound_s=5.0).explain(server())
    assert first.startswith("schedule within 5 s: WAA-C: B_E ")
    assert any(line.startswith("best RRA: ") for line in rest)
    assert "an exhaustive search has " in last


def test_a_bound_nothing_keeps_names_the_lowest_latency() -> None:
    with pytest.raises(InfeasibleError, match=r"the latency bound is 0\.01 s .*; the lowest latency .* is 0\.98\d+ s"):
        ExeGPT(bound_s=0.01).schedule(server())


def test_no_memory_is_named() -> None:
    with pytest.raises(
        InfeasibleError, match=r"no schedule of opt-13b on 1 GPUs fits their memory and max_num_seqs \(512\)"
    ):
        ExeGPT(gpus=1).schedule(server(gpus=1, gpu_memory_utilization=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 9}, "system.gpus is 9; the cluster has 4"),
        ({"gpu": "H100"}, "system.gpu is H100; the cluster has A40"),
        ({"tp": 3}, "system.tp is 3; opt-13b on 4 GPUs has 1, 2, 4"),
        ({"tp": 2, "tp_gpus": 3}, r"system.tp_gpus is 3; it must be whole groups of tp \(2\), at most 4 GPUs"),
        ({"tp_gpus": 3}, r"system.tp_gpus is 3; it must be whole groups of tp \(2 or more\)"),
        ({"kinds": ("waa-c",), "gpus": 1}, "system.schedule is waa-c; two pools take two GPUs, there is 1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExeGPT(**settings).schedule(server())


def test_gpus_of_two_types_are_named() -> None:
    mixed = Cluster.of(nodes=[{"gpu": "A40", "count": 1}, {"gpu": "L40S", "count": 1}])
    with pytest.raises(ConfigError, match="one schedule is for GPUs of one type, the cluster has A40, L40S"):
        ExeGPT().schedule(replace(server(), cluster=mixed))


def test_a_type_that_is_not_the_first_can_be_chosen() -> None:
    mixed = Cluster.of(nodes=[{"gpu": "L40S", "count": 2}, {"gpu": "A40", "count": 4}])
    chosen = ExeGPT(gpu="a40").schedule(replace(server(), cluster=mixed))
    alone = ExeGPT().schedule(server())
    assert {mixed.gpu(name).name for one in chosen.plan.replicas for name in one.gpus} == {"A40"}
    assert chosen.perf == alone.perf
