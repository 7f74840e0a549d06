"""DistServe: batches of one phase, KV pulled when there is room, back-pressure, pairs, replanning, rehearsals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, Cluster, ConfigError, Problem, Request, Slo, Workload, simulate
from sim.batchers import Disaggregated
from sim.cost import Roofline, seconds
from sim.goodput import attained
from sim.model import model
from sim.planners.distserve import DistServe, Search, Shape, Unit, paired_plan
from sim.systems.split.distserve import (
    LIMITS,
    FreePrompts,
    Rehearsal,
    ReplanOnShift,
    distserve,
    enough,
    placed,
    poisson,
    shifted,
)
from sim.types import Plan, Stage, Work
from tests.lab import spied
from tests.toys import MS, TINY, Requests, ToyCost, cluster, problem, replica, request, run, with_limits

POOLS: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
APART = cluster(gpus=1, nodes=2)


def traffic(count: int, gap_s: float, input_tokens: int = 300, output_tokens: int = 20) -> list[Request]:
    return [request(number, number * gap_s, input_tokens, output_tokens) for number in range(count)]


def test_a_prompt_its_pull_and_its_decodes() -> None:
    """11 ms of prompt, 20 us to ask and to begin a link of 10 us, KV at 12.5 GB/s, steps of 10 ms."""
    where = problem(APART)
    row = run(distserve(**POOLS), [request(0, 0.0, 100, 3)], where).rows.requests[0]
    assert row.first_token_ps == 11 * MS
    kv_ps = round(100 * TINY.kv_bytes_per_token() / 12.5e9 * 1e12)
    assert row.transfer_ps == pytest.approx(20 * MS // 1000 + kv_ps, abs=2 * MS // 1000)
    steps_ps = sum(10 * MS + MS // 100 + 1000 * context for context in (101, 102))
    assert row.finish_ps is not None
    assert row.finish_ps - row.first_token_ps - row.transfer_ps == pytest.approx(steps_ps, abs=2)


def test_prompts_are_batched_up_to_their_number_and_tokens_and_long_ones_run_alone() -> None:
    lengths = [100, 100, 100, 100, 700, 300, 250, 30]
    requests = [request(number, 0.0, tokens, 2) for number, tokens in enumerate(lengths)]
    system, fills = spied(with_limits(distserve(max_prompts=3, **POOLS), max_num_batched_tokens=600))
    run(system, requests, problem(APART), step_by_step=True)
    batches = [list(fill.chunks.values()) for fill in fills if fill.chunks]
    assert batches == [[100, 100, 100], [100], [700], [300, 250, 30]]
    assert all(not (fill.chunks and fill.decodes) for fill in fills)


def chunks_of(requests: list[Request], **options: Any) -> list[list[int]]:
    system, fills = spied(with_limits(distserve(**options, **POOLS), max_num_batched_tokens=8192))
    run(system, requests, problem(APART), step_by_step=True)
    return [list(fill.chunks.values()) for fill in fills if fill.chunks]


def test_prompts_are_batched_up_to_the_length_that_saturates() -> None:
    """Of 10 ms and 10 us a token: 4,096 tokens give 80.4 a ms, 90 % of it needs 2,614 tokens, or 41 tiles of 64."""
    requests = [request(number, 0.0, tokens, 2) for number, tokens in enumerate([1024, 1600, 1024, 1601, 3000])]
    assert chunks_of(requests) == [[1024, 1600], [1024], [1601], [3000]]
    assert chunks_of(requests, prompt_tokens=1024) == [[1024], [1600], [1024], [1601], [3000]]
    assert chunks_of(requests, prompt_tokens=9000) == [[1024, 1600, 1024, 1601], [3000]]
    with pytest.raises(ConfigError, match=r"system\.prompt_tokens is 0; it must be a whole number >= 1"):
        chunks_of(requests, prompt_tokens=0)


def test_a_full_decode_instance_stops_prefill_and_all_is_served_in_the_end() -> None:
    """24 blocks of 16 tokens at either end: KV that waits to be fetched keeps its blocks at its source."""
    requests = traffic(30, 0.0, 150, 100)
    system, fills = spied(with_limits(distserve(**POOLS), num_kv_blocks=24))
    result = run(system, requests, problem(APART), step_by_step=True)
    assert Counter(row.outcome for row in result.rows.requests) == {"completed": 30}
    prefills = sorted(row.first_token_ps for row in result.rows.requests)  # type: ignore[type-var]
    free = run(with_limits(distserve(**POOLS), num_kv_blocks=1000), requests, problem(APART))
    assert prefills[-1] > 5 * max(row.first_token_ps for row in free.rows.requests)  # type: ignore[type-var]
    assert all(0 <= fill.free_blocks <= 24 for fill in fills)
    waiting = [fill for fill in fills if fill.role == "prefill" and fill.waiting and not fill.chunks]
    assert waiting  # it had prompts and could not start them


def test_without_decode_capacity_prefill_stops() -> None:
    """The link to the decode instance is cut: prompts fill the prefill instance's memory and no more."""
    from sim.types import ClusterEvent

    requests = traffic(30, 0.05, 150, 10)
    cut = ClusterEvent(at_s=0.4, kind="link_scaled", target="nic:n1:in", factor=0.0)
    result = run(
        with_limits(distserve(**POOLS), num_kv_blocks=48), requests, problem(APART), events=(cut,), until_s=60.0
    )
    outcomes = Counter(row.outcome for row in result.rows.requests)
    assert outcomes["completed"] == 8
    prefilled = [row for row in result.rows.requests if row.outcome == "running" and row.first_token_ps is not None]
    assert len(prefilled) == 4  # of ten blocks each
    assert outcomes["running"] == 22


def test_every_kv_byte_is_pulled_once() -> None:
    requests = traffic(40, 0.02, 200, 30)
    result = run(with_limits(distserve(**POOLS), num_kv_blocks=120), requests, problem(APART))
    moved = Counter(row.request for row in result.rows.links)
    assert set(moved.values()) == {1}
    assert len(moved) == 40
    assert {row.bytes for row in result.rows.links} == {200 * TINY.kv_bytes_per_token()}


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=25))
def test_memory_is_never_overdrawn_and_prompts_wait_in_order(rows: list[tuple[int, int, int]]) -> None:
    arrivals = np.cumsum([gap for gap, _, _ in rows]) / 1000
    requests = [
        request(number, float(arrivals[number]), inputs, outputs) for number, (_, inputs, outputs) in enumerate(rows)
    ]
    system, fills = spied(with_limits(distserve(**POOLS), num_kv_blocks=24))
    result = run(system, requests, problem(APART), step_by_step=True)
    assert all(row.outcome in ("completed", "rejected") for row in result.rows.requests)
    assert all(0 <= fill.free_blocks <= fill.total_blocks for fill in fills)
    admitted = [number for fill in fills for number in fill.admitted]
    assert admitted == sorted(admitted)
    assert all(fill.decodes == [] for fill in fills if fill.role == "prefill")
    assert all(fill.chunks == {} for fill in fills if fill.role == "decode")


def test_decodes_do_not_feel_prompts() -> None:
    """Long prompts of one token each take the prefill instance; the others' decodes go on as before."""
    plain = traffic(40, 0.1, 50, 40)
    prompts = [request(100 + number, 0.02 + number * 0.1, 2000, 1) for number in range(40)]
    loaded = sorted([*plain, *prompts], key=lambda one: one.arrival_s)
    both = {
        name: run(distserve(**POOLS), some, problem(APART)) for name, some in (("plain", plain), ("loaded", loaded))
    }
    tpot = {
        name: np.nanmean(result.columns["tpot_s"][result.columns["output_tokens"] == 40])
        for name, result in both.items()
    }
    assert tpot["loaded"] == pytest.approx(tpot["plain"], rel=0.02)
    colocated = run(SYSTEMS["vllm"](mode="v0", replicas=2, tp=1), loaded, problem(APART)).columns
    assert np.nanmean(colocated["tpot_s"][colocated["output_tokens"] == 40]) > 1.15 * tpot["loaded"]


def test_shortest_prefill_queue_and_least_loaded_decode() -> None:
    system = distserve(prefill={"replicas": 2, "tp": 1}, decode={"replicas": 2, "tp": 1})
    rows = run(system, traffic(4, 0.001), problem(cluster(gpus=4))).rows.requests
    assert sorted(row.prefill_stage for row in rows) == ["prefill0", "prefill0", "prefill1", "prefill1"]
    assert sorted(row.decode_stage for row in rows) == ["decode0", "decode0", "decode1", "decode1"]


def test_pairs_stay_together() -> None:
    parts = [
        replica(f"{role[0]}{n}", [f"n{n}.g{g}"], role) for n in (0, 1) for g, role in enumerate(("prefill", "decode"))
    ]
    plan = Plan(replicas=tuple(parts), shares={("p0", "d0"): 0.5, ("p1", "d1"): 0.5})
    requests = [request(n, 0.01 * n, 50 + 400 * (n % 3 == 0), 5 + 60 * (n % 4 == 0)) for n in range(40)]
    rows = run(distserve(**POOLS), requests, problem(cluster(gpus=2, nodes=2)), plan=plan).rows.requests
    assert {(row.prefill_stage, row.decode_stage) for row in rows} == {("p0", "d0"), ("p1", "d1")}


# ------------------------------------------------------------ replanning


def test_what_counts_as_a_shift() -> None:
    before = Workload(rate_per_s=10.0, lengths=((100, 10),))
    assert not shifted(before, Workload(rate_per_s=11.9, lengths=((119, 8),) * 400))
    assert shifted(before, Workload(rate_per_s=12.1, lengths=((100, 10),) * 400))
    assert shifted(before, Workload(rate_per_s=10.0, lengths=((79, 10),) * 400))
    assert shifted(before, Workload(rate_per_s=10.0, lengths=((100, 13),) * 400))


def test_what_chance_may_do_is_no_shift() -> None:
    """A quarter more requests, or longer ones, may be chance if there are few of them or if they differ much."""
    before = Workload(rate_per_s=10.0, lengths=((100, 10),))
    for count, is_shift in ((100, False), (400, True)):
        assert shifted(before, Workload(rate_per_s=12.5, lengths=((100, 10),) * count)) is is_shift
        mixed = ((25, 10), (225, 10)) * (count // 2)  # mean 125, standard deviation 100
        assert shifted(before, Workload(rate_per_s=10.0, lengths=mixed)) is is_shift


class Growing:
    """One decode instance up to 100 prompt tokens, two for longer prompts; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Workload] = []

    def plan(self, where: Problem) -> Plan:
        self.asked.append(where.workload)
        decodes = 1 if where.workload.mean_input_tokens <= 100 else 2
        names = [replica("prefill0", ["n0.g0"], "prefill")]
        return Plan(replicas=(*names, *(replica(f"decode{n}", [f"n0.g{n + 1}"], "decode") for n in range(decodes))))


def test_a_shift_of_lengths_brings_an_instance_up_that_loads_its_weights() -> None:
    planner = Growing()
    system = replace(
        distserve(**POOLS), planner=planner,
        rescheduler=lambda: ReplanOnShift(planner, interval_s=2.0, window_s=4.0, fewest_requests=20),
    )  # fmt: skip
    requests = [request(number, number * 0.1, 100 if number < 100 else 300, 20) for number in range(300)]
    where = replace(problem(cluster(gpus=4)), workload=Workload(rate_per_s=10.0, lengths=((100, 20),)))
    result = run(system, requests, where)
    notes = [(note.kind, note.text) for note in result.rows.notes]
    assert [text for kind, text in notes if kind == "up"] == ["decode1"]
    assert "of 100 + 20 tokens became" in next(text for kind, text in notes if kind == "change")
    assert [round(workload.rate_per_s) for workload in planner.asked] == [10] * len(planner.asked)
    assert 2 <= len(planner.asked) <= 4
    assert all(row.outcome == "completed" for row in result.rows.requests)
    assert {row.decode_stage for row in result.rows.requests} == {"decode0", "decode1"}
    calm = run(system, requests[:100], where)
    assert not [note for note in calm.rows.notes if note.kind == "change"]


# ------------------------------------------------------------ rehearsals


def world(**more: Any) -> Problem:
    return Problem(
        cluster=Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 4}]),
        model=model("opt-13b"), cost=Roofline(), limits=LIMITS,
        workload=Workload(rate_per_s=4.0, lengths=((400, 100), (900, 30), (150, 200))),
        slo=Slo(ttft_s=0.4, tpot_s=0.04), **more,
    )  # fmt: skip


def test_poisson_traffic_only_comes_closer_together() -> None:
    slow, fast = (poisson(((10, 2), (20, 3)), rate, 500, 0) for rate in (1.0, 4.0))
    assert [row.input_tokens for row in slow] == [row.input_tokens for row in fast]
    assert [row.arrival_s for row in fast] == pytest.approx([row.arrival_s / 4 for row in slow])
    assert slow[-1].arrival_s == pytest.approx(500, rel=0.15)
    assert {(row.input_tokens, row.output_tokens) for row in slow} == {(10, 2), (20, 3)}


def test_free_prompts_leave_decodes_as_they_are() -> None:
    stage = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=TINY.num_layers)
    plain, free = (cost.bind(TINY, stage, cluster()) for cost in (ToyCost(), FreePrompts(inner=ToyCost())))
    assert free.line(Work((), 3, 300)) == plain.line(Work((), 3, 300))
    assert free.line(Work(((50, 0),), 3, 300)) == plain.line(Work((), 3, 300))
    assert seconds(free, Work(((50, 0),), 0, 0)) == 1e-12


def test_a_pair_serves_what_the_lesser_of_its_phases_serves() -> None:
    where, judge = world(), Rehearsal(simulate=simulate, requests=150)
    search = Search(judge=judge, tolerance=0.1)
    one = Shape(1, 1)
    prefill, decode, pair = search.rate(where, [Unit(prefill=one), Unit(decode=one), Unit(prefill=one, decode=one)])
    assert pair.rate_per_s <= 1.1 * min(prefill.rate_per_s, decode.rate_per_s)
    assert pair.rate_per_s >= 0.5 * min(prefill.rate_per_s, decode.rate_per_s)


def test_a_judge_is_the_simulated_share() -> None:
    where = world()
    unit, rate = Unit(prefill=Shape(1, 1), decode=Shape(1, 1)), 20.0
    requests = poisson(where.workload.lengths, rate, 200, 0)
    columns = simulate(where, distserve(**POOLS), Requests(requests), plan=paired_plan(where, unit, 1)).columns
    share = attained(columns, where.slo)
    assert 0 < share < 1
    for target, expected in ((share, True), (share + 0.004, False)):
        asked = replace(where, slo=replace(where.slo, attainment=target))
        assert Rehearsal(simulate=simulate, requests=200, spans=0)(asked, unit, rate) is expected


def test_trials_are_long_enough_to_fill_an_instance() -> None:
    """Mean output 110 tokens: a request may take 0.4 + 110 x 0.04 = 4.8 s."""
    assert enough(world(), 1.0, 100, 3.0) == 100
    assert enough(world(), 9.9, 100, 3.0) == 143


@pytest.mark.parametrize("placement", ["high", "low", "vllm++"])
def test_a_placement_is_searched_and_serves_what_it_was_rated_for(placement: Any) -> None:
    where = world()
    system = distserve(placement=placement, search_requests=100, simulate=simulate)
    planner = system.planner
    plan = planner.plan(where)
    shapes = Counter((part.role, Shape(part.stages[0].tp, len(part.stages))) for part in plan.replicas)
    rated = [
        count * planner.search.rate(where, [Unit(**{role: shape})])[0].rate_per_s  # type: ignore[attr-defined]
        for (role, shape), count in shapes.items()
    ]
    rate = min(rated)
    requests = poisson(where.workload.lengths, 0.8 * rate, 150, 1)
    result = simulate(where, system, Requests(requests), plan=plan)
    assert attained(result.columns, where.slo) >= 0.85
    assert {row.outcome for row in result.rows.requests} == {"completed"}


def test_scenarios_can_ask_for_a_placement() -> None:
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve
    from experiments.scenario.system import SystemSpec

    scenario = Scenario.of(
        {
            "model": "opt-13b",
            "cluster": {"nodes": [{"gpu": "A100-80G-SXM", "count": 2}]},
            "workload": {"rate": 2.0, "generate": {"requests": 30, "input": {"fixed": 300}, "output": {"fixed": 20}}},
            "system": {"name": "distserve", "placement": "high", "search_requests": 50},
            "slo": {"ttft_s": 0.5, "tpot_s": 0.1},
        }
    )
    result = resolve(scenario).run()
    assert {row.replica for row in result.rows.replicas} == {"prefill0", "decode0"}
    options = scenario.system.model_dump(exclude={"engine"})
    with pytest.raises(ConfigError, match=r"system.simulate"):
        resolve(scenario._with(system=SystemSpec(**options, simulate=None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replan": True}, "set placement to high or low"),
        ({"placement": "high", "prefill": {"tp": 1}}, "drop one of the two"),
        ({"placement": "middle"}, "they are one of high, low and vllm"),
        ({"placement": "low"}, "pass simulate=sim.simulate, or state prefill and decode"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distserve(**options)


def test_a_search_can_be_shared() -> None:
    search = Search(judge=lambda where, unit, rate: rate <= unit.gpus)
    systems = [placed(search, placement) for placement in ("high", "low")]
    assert [system.planner.search is search for system in systems] == [True, True]  # type: ignore[attr-defined]
    assert isinstance(systems[0].planner, DistServe)
    assert isinstance(placed(search, "high", replan=True).rescheduler(), ReplanOnShift)


# ------------------------------------------------------------ the decode instance is chosen late, and fetches


def test_the_decode_instance_is_chosen_when_the_prompt_is_done() -> None:
    """On arrival the second would have found the first on decode0; when its prompt is done, that one has ended."""
    requests = [request(0, 0.0, 20, 2), request(1, 0.001, 20, 60), request(2, 0.002, 3000, 4)]
    system = distserve(prefill={"tp": 1, "replicas": 1}, decode={"tp": 1, "replicas": 2})
    rows = run(system, requests, problem(cluster(gpus=4))).rows.requests
    assert {row.request.id: row.decode_stage for row in rows} == {0: "decode0", 1: "decode0", 2: "decode1"}


def test_kv_is_fetched_while_what_waits_takes_less_than_a_twentieth() -> None:
    batcher = Disaggregated()
    landing = [request(0, input_tokens=40)]

    def lets_in(total_blocks: int) -> bool:
        replica: Any = SimpleNamespace(landing=landing, block_size=16, total_blocks=total_blocks)
        return batcher.lets_in(cast("Any", request(1)), 7, replica)

    assert [lets_in(blocks) for blocks in (60, 61)] == [False, True]  # 3 blocks
