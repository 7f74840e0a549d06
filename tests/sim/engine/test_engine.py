"""A request's life, with times one can check by hand: one GPU, a pipeline, chunks, preemption, a queue."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster, ClusterEvent, Limits, Plan, PolicyError, Request, SimulationError, StalledError, simulate
from sim.batchers import PrefillFirst, TokenBudget
from sim.policy import Batch, RequestView, View
from sim.predictors import ConstantLength, TrueLength
from sim.types import Line, Reject, Route, Stage, Work
from tests.lab import ONE, PIPELINE, SPLIT, TWO, Way, system
from tests.toys import MS, TINY, Requests, ToyCost, cluster, problem, replica, request, run

NS = 10**3
US = 10**6


def decode_ps(context: int, seqs: int = 1) -> int:
    """ToyCost, one GPU: 10 ms + 10 us a token + 1 ns per token attended to."""
    return 10 * MS + 10 * US * seqs + NS * context


def test_one_request_on_one_gpu() -> None:
    result = run(system(), [request(0, input_tokens=100, output_tokens=3)], plan=ONE)
    first_ps = 10 * MS + 100 * 10 * US
    second_ps = first_ps + decode_ps(101)
    assert result.token_times_ps(0) == [first_ps, second_ps, second_ps + decode_ps(102)]
    row = result.requests.iloc[0]
    assert (row.outcome, row.queue_s, row.ttft_s, row.prefill_s) == ("completed", 0.0, 0.011, 0.011)
    assert row.tpot_s == pytest.approx((decode_ps(101) + decode_ps(102)) / 2e12)
    assert row.prefill_stage == row.decode_stage == "a"


def test_one_token_needs_no_decode() -> None:
    result = run(system(), [request(0, output_tokens=1)], plan=ONE)
    assert result.token_times_ps(0) == [11 * MS]
    assert result.iterations == 1
    assert np.isnan(result.columns["tpot_s"][0])


def test_a_long_decode_is_few_events() -> None:
    result = run(system(), [request(0, output_tokens=1001)], plan=ONE)
    assert result.iterations == 1001
    assert result.segments == 2
    assert result.token_times_ps(0)[-1] == 11 * MS + sum(decode_ps(context) for context in range(101, 1101))


def test_an_arrival_on_a_boundary_joins_the_batch_that_starts_there() -> None:
    requests = [request(0), request(1, 0.011), request(2, 0.011 + 2e-12)]
    result = run(system(), requests, plan=ONE)
    second_ps = 11 * MS + 10 * MS + 101 * 10 * US + 101 * NS  # decode of 0 with the prompt of 1
    assert [row.scheduled_ps for row in result.rows.requests] == [0, 11 * MS, second_ps]
    assert result.token_times_ps(0)[1] == result.token_times_ps(1)[0] == second_ps


def test_a_prompt_in_chunks_over_segments() -> None:
    """Chunks of 256 of 1000 tokens: each reads the ones before it, 3 ps per pair of tokens."""
    result = run(system(max_num_batched_tokens=256), [request(0, input_tokens=1000, output_tokens=1)], plan=ONE)
    chunks = [(256, 0), (256, 256), (256, 512), (232, 768)]
    assert result.token_times_ps(0) == [
        sum(10 * MS + tokens * 10 * US + 3 * tokens * before for tokens, before in chunks)
    ]
    assert [(step.iterations, step.prefill_tokens) for step in result.rows.steps] == [(3, 256), (1, 232)]


def test_chunks_ride_with_decodes() -> None:
    requests = [request(0, input_tokens=10, output_tokens=4), request(1, 0.001, input_tokens=500, output_tokens=1)]
    result = run(system(max_num_batched_tokens=256), requests, plan=ONE)
    first = 10 * MS + 10 * 10 * US
    second = first + 10 * MS + 256 * 10 * US + 11 * NS
    third = second + 10 * MS + 246 * 10 * US + 12 * NS + 3 * 245 * 255
    assert result.token_times_ps(0)[:3] == [first, second, third]
    assert result.token_times_ps(1) == [third]


# ------------------------------------------------------------ preemption


SHORT = {"input_tokens": 16, "output_tokens": 10}
"""One block for the prompt; the first decode takes the second, which lasts to the end."""


def test_preemption_by_recompute() -> None:
    """Three blocks: both prompts fit, one decode does. The later one starts over, its first token kept."""
    result = run(system(num_kv_blocks=3), [request(0, **SHORT), request(1, **SHORT)], plan=ONE)
    prefill = 10 * MS + 32 * 10 * US
    end = prefill + sum(decode_ps(context) for context in range(17, 26))
    again = end + 10 * MS + 17 * 10 * US  # prompt and one generated token
    rest = [again + sum(decode_ps(context) for context in range(18, last)) for last in range(19, 27)]
    assert result.token_times_ps(0)[-1] == end
    assert result.token_times_ps(1) == [prefill, again, *rest]
    assert [row.preemptions for row in result.rows.requests] == [0, 1]


def test_preemption_by_swap() -> None:
    """The victim's block goes to the host and comes back over PCIe; each way delays one iteration."""
    where = problem()
    requests = [request(0, **SHORT), request(1, **SHORT)]
    result = run(system(lambda: PrefillFirst("swap", watermark=0), num_kv_blocks=3), requests, where, plan=ONE)
    bytes_per_s = where.cluster.capacity_bytes_per_s["pcie:n0.g0:in"]
    swap = 5 * US + round(16 * TINY.kv_bytes_per_token() / bytes_per_s * 1e12)
    prefill = 10 * MS + 32 * 10 * US
    end = prefill + swap + sum(decode_ps(context) for context in range(17, 26))
    back = end + swap + decode_ps(17)
    rest = [back + sum(decode_ps(context) for context in range(18, last)) for last in range(19, 27)]
    assert result.token_times_ps(0)[-1] == end
    assert result.token_times_ps(1) == [prefill, back, *rest]
    assert [row.preemptions for row in result.rows.requests] == [0, 1]


def test_whoever_preempts_itself_lets_in_what_has_arrived() -> None:
    """One seat, three blocks, one of them the other's that has arrived: the first, which wants a third, starts over,
    and the other decodes at that very boundary."""
    limited = system(router=lambda: Way("p", "d"), num_kv_blocks=3, max_num_seqs=1)
    long = {"input_tokens": 16, "output_tokens": 20}
    result = run(limited, [request(0, **long), request(1, **long)], problem(cluster(2, 2)), plan=SPLIT)
    assert [row.outcome for row in result.rows.requests] == ["completed", "completed"]
    assert [row.preemptions for row in result.rows.requests] == [1, 0]
    boundary = result.token_times_ps(0)[16]
    assert result.token_times_ps(1)[1] == boundary + decode_ps(17)


def test_what_leaves_by_swap_delays_whoever_takes_its_room() -> None:
    """The same, with the two blocks of the first going to the host."""
    where = problem(cluster(2, 2))
    limited = system(
        lambda: PrefillFirst("swap", watermark=0), router=lambda: Way("p", "d"), num_kv_blocks=3, max_num_seqs=1
    )
    long = {"input_tokens": 16, "output_tokens": 20}
    result = run(limited, [request(0, **long), request(1, **long)], where, plan=SPLIT)
    bytes_per_s = where.cluster.capacity_bytes_per_s["pcie:n1.g0:in"]
    swap = 5 * US + round(32 * TINY.kv_bytes_per_token() / bytes_per_s * 1e12)
    assert [row.preemptions for row in result.rows.requests] == [1, 0]
    assert result.token_times_ps(1)[1] == result.token_times_ps(0)[16] + swap + decode_ps(17)


class Seesaw(TokenBudget):
    """Swaps every decode out, and in and out again."""

    def fill(self, batch: Batch) -> None:
        if batch.swapped:
            batch.swap_in(batch.swapped[0])
        if batch.decoding:
            batch.preempt(batch.decoding[0], "swap")
        else:
            super().fill(batch)


def test_a_batcher_that_goes_round_in_circles_is_noticed() -> None:
    with pytest.raises(StalledError, match="1 requests are unfinished"):
        run(system(Seesaw), [request(0)], plan=ONE)


# ------------------------------------------------------------ pipelines


def test_two_micro_batches_fill_a_pipeline_of_two_stages() -> None:
    """Stage: 5 ms + 5 us a token + half a ns per context token; hop: 1 us a token."""
    where = problem(_one_us_per_token_hops())
    both = [request(0, output_tokens=2), request(1, output_tokens=2)]
    result = run(system(max_num_batched_tokens=100), both, where, plan=PIPELINE)
    stage, hop = 5500 * US, 100 * US
    first = stage + hop + stage
    second = first + stage  # one stage behind; the hop hides behind the stage's work
    assert [result.token_times_ps(number)[0] for number in (0, 1)] == [first, second]
    decode = 5 * MS + 5 * US + 101 * NS // 2
    assert result.token_times_ps(0)[1] == second + decode  # stage 1 is busy with the other prompt until then
    assert result.token_times_ps(1)[1] == second + decode + US + decode
    assert result.rows.replicas[0].stage_busy_s == tuple([(2 * stage + 2 * decode) / 1e12] * 2)


def test_a_lone_micro_batch_leaves_bubbles() -> None:
    """With one request, each stage is idle while the other works: no faster than one GPU."""
    where = problem(_one_us_per_token_hops())
    result = run(system(), [request(0, output_tokens=3)], where, plan=PIPELINE)
    prompt, first, second = 11 * MS + 100 * US, decode_ps(101) + US, decode_ps(102) + US
    assert result.token_times_ps(0) == [prompt, prompt + first, prompt + first + second]


def _one_us_per_token_hops() -> Cluster:
    """An activation is 4096 x 2 bytes; the link carries one per microsecond."""
    return Cluster.of([{"gpu": "A100-80G-SXM", "count": 2}], links={"intra_node": {"gbps": 65.536}})


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=8),
    slow_at_ms=st.one_of(st.none(), st.integers(0, 500)),
)
def test_a_pipeline_is_under_the_law_whenever_requests_arrive(
    shapes: list[tuple[int, int, int]], slow_at_ms: int | None
) -> None:
    """A collapsed decode alone in the pipeline is met by prompts at any millisecond, stages still busy with it."""
    requests = [request(n, at / 1000, *shape) for n, (at, *shape) in enumerate(sorted(shapes))]
    slow = [ClusterEvent(at_s=at / 1000, kind="gpu_slow", target="n0.g1", factor=1.5) for at in [slow_at_ms] if at]
    collapsed, stepped = (
        run(system(), requests, plan=PIPELINE, events=slow, step_by_step=mode) for mode in (False, True)
    )
    assert collapsed.log() == stepped.log()
    assert collapsed.rows.replicas[0].stage_busy_s == stepped.rows.replicas[0].stage_busy_s


# ------------------------------------------------------------ a queue with a known answer


def test_an_m_d_1_queue() -> None:
    """Constant service, one at a time: every wait equals Lindley's recursion, their mean rho S / 2 (1 - rho)."""
    service_s, load, count = 0.011, 0.5, 24_000
    gaps = np.random.default_rng(1).exponential(service_s / load, count)
    arrivals = np.cumsum(gaps)
    requests = [request(number, float(at), output_tokens=1) for number, at in enumerate(arrivals)]
    result = run(system(max_num_seqs=1), requests, plan=ONE)
    waits_ps, free_ps = [], 0
    for at in arrivals:
        at_ps = round(float(at) * 1e12)
        waits_ps.append(max(0, free_ps - at_ps))
        free_ps = max(free_ps, at_ps) + 11 * MS
    scheduled = [row.scheduled_ps - round(row.request.arrival_s * 1e12) for row in result.rows.requests]
    assert scheduled == waits_ps
    assert float(np.mean(result.columns["queue_s"])) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.02)


# ------------------------------------------------------------ published arithmetic


@dataclass(frozen=True)
class FalconStage:
    """Sarathi-Serve, section 3.3: Falcon-180B on two stages, a 4k prompt 1150 ms, 32 decodes 200 ms a stage."""

    measured: bool = False

    def line(self, work: Work) -> Line:
        return Line(1150 * MS if work.tokens >= 4000 else 200 * MS, 0, 1 << 30)


@dataclass(frozen=True)
class FalconCost:
    name: str = "Falcon-180B"

    def bind(self, model: object, stage: Stage, cluster: object, slow: float = 1.0) -> FalconStage:
        return FalconStage()


def test_sarathi_serve_section_3_3_a_long_prompt_leaves_a_bubble_of_950_ms() -> None:
    free = Limits(max_num_seqs=64, max_num_batched_tokens=4000)
    no_hops = Cluster.of([{"gpu": "A100-80G-SXM", "count": 2}], links={"intra_node": {"gbps": 1e15}})
    decodes = [request(number, input_tokens=1, output_tokens=5) for number in range(32)]
    prompt = request(99, 0.401, input_tokens=4000, output_tokens=1)  # while the first decodes are on stage 0
    result = run(
        system(PrefillFirst).with_limits(free), [*decodes, prompt], problem(no_hops, FalconCost()), plan=PIPELINE
    )
    decodes_done = result.token_times_ps(0)[1]
    prompt_on_stage_1 = result.token_times_ps(99)[0] - 1150 * MS
    assert decodes_done == 800 * MS
    assert prompt_on_stage_1 - decodes_done == 950 * MS
    assert result.token_times_ps(0)[2] == result.token_times_ps(99)[0] + 200 * MS  # and it stalls the decodes


# ------------------------------------------------------------ admission, sources, ends


def test_what_never_fits_is_rejected_with_its_reason() -> None:
    requests = [
        request(0, input_tokens=5000),  # TINY has a context of 4096
        request(1, input_tokens=150, output_tokens=20),
        request(2, input_tokens=90),
    ]
    result = run(system(num_kv_blocks=10), requests, plan=ONE)
    assert [row.outcome for row in result.rows.requests] == ["rejected", "rejected", "completed"]
    assert result.rows.requests[0].reason == "5010 tokens exceed the model's context of 4096"
    assert result.rows.requests[1].reason == "169 tokens exceed the 160 that the KV cache of a holds"
    assert result.rows.requests[1].finish_ps is None


def test_a_batchers_refusal_is_named() -> None:
    result = run(
        system(PrefillFirst, max_num_batched_tokens=64),
        [request(0, input_tokens=65), request(1, input_tokens=64)],
        plan=ONE,
    )
    assert result.rows.requests[0].reason == "a: a prompt of 65 tokens exceeds max_num_batched_tokens 64"
    assert result.rows.requests[1].outcome == "completed"


def test_max_model_len_counts() -> None:
    result = run(system(max_model_len=105), [request(0, output_tokens=5), request(1, output_tokens=6)], plan=ONE)
    assert [row.outcome for row in result.rows.requests] == ["completed", "rejected"]


def test_a_split_request_needs_room_for_its_prompt_here_and_all_of_it_there() -> None:
    result = run(
        system(router=lambda: Way("p", "d"), num_kv_blocks=7),
        [request(0, output_tokens=14), request(1, output_tokens=13)], problem(cluster(1, 2)), plan=SPLIT,
    )  # fmt: skip
    assert result.rows.requests[0].reason == "113 tokens exceed the 112 that the KV cache of d holds"
    assert result.rows.requests[1].outcome == "completed"


class ClosedLoop:
    """One user who sends the next request a second after the last answer."""

    def __init__(self, count: int) -> None:
        self.left = count - 1

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        if finished is None:
            return [request(0, output_tokens=1)]
        if not self.left:
            return []
        self.left -= 1
        return [request(finished.id + 1, now_s + 1.0, output_tokens=1)]


def test_a_source_may_answer_completions() -> None:
    result = simulate(problem(), system(), ClosedLoop(4), plan=ONE)
    assert [row.finish_ps for row in result.rows.requests] == [11 * MS + n * 1011 * MS for n in range(4)]


def test_requests_out_of_order_are_an_error() -> None:
    with pytest.raises(SimulationError, match="request 1 arrives before the one ahead of it"):
        run(system(), [request(0, 2.0), request(1, 1.0)], plan=ONE)


def test_a_cut_off_reports_what_still_runs() -> None:
    requests = [request(0, output_tokens=500), request(1, 0.5), request(2, 1.0, output_tokens=500), request(3, 99.0)]
    result = run(system(max_num_seqs=2), requests, plan=ONE, until_s=1.005)
    rows = {row.request.id: row for row in result.rows.requests}
    assert rows[1].outcome == "completed"
    assert {rows[n].outcome for n in (0, 2)} == {"running"}
    assert 3 not in rows  # has not arrived
    emitted = [at for at in result.token_times_ps(0) if at]
    assert emitted
    assert emitted[-1] <= 1005 * MS
    whole = run(system(max_num_seqs=2), requests[:3], plan=ONE)
    assert whole.token_times_ps(0)[: len(emitted)] == emitted


def test_progress_is_told_every_thousand() -> None:
    told: list[int] = []
    run(system(), [request(n, output_tokens=1) for n in range(2500)], plan=ONE, progress=told.append)
    assert told == [1000, 2000]


def test_predictions_reach_policies_and_lengths_do_not() -> None:
    seen: list[int] = []

    class Curious(Way):
        def route(self, request: RequestView, view: View) -> Route:
            seen.append(request.predicted_output_tokens)
            assert not hasattr(request, "output_tokens")
            return super().route(request, view)

    for predictor in (TrueLength(), ConstantLength(77), None):
        run(system(router=lambda: Curious("a", "a")), [request(0, output_tokens=5)], plan=ONE, predictor=predictor)
    assert seen == [5, 77, 10]  # without a predictor: the workload's mean


# ------------------------------------------------------------ illegal routes and plans


def test_a_route_over_unknown_stages_is_a_policy_error() -> None:
    class Lost(Way):
        def route(self, request: RequestView, view: View) -> Route:
            return Route(("x.0",), ("a.0",))

    with pytest.raises(PolicyError, match=r"Lost routes request 0 over \('x.0',\).*up \(a\)"):
        run(system(router=lambda: Lost("a", "a")), [request(0)], plan=ONE)


def test_a_routers_refusal_is_a_rejection() -> None:
    class Full(Way):
        def route(self, request: RequestView, view: View) -> Reject:  # type: ignore[override]
            return Reject("full")

    result = run(system(router=lambda: Full("a", "a")), [request(0)], plan=ONE)
    assert (result.rows.requests[0].outcome, result.rows.requests[0].reason) == ("rejected", "full")


def test_a_view_names_who_is_up() -> None:
    with pytest.raises(PolicyError, match="asks for replica 'z'; up are a, b"):
        run(system(router=lambda: Way("z", "a")), [request(0)], problem(cluster(1, 2)), plan=TWO)


def test_the_planner_is_asked_when_no_plan_is_given() -> None:
    result = run(system(), [request(n) for n in range(4)], problem(cluster(2)))
    assert [row.replica for row in result.rows.replicas] == ["mixed0", "mixed1"]
    assert {row.prefill_stage for row in result.rows.requests} == {"mixed0", "mixed1"}


def test_costs_may_be_wrapped_by_the_system() -> None:
    slow = replace(system(), cost=lambda cost: ToyCost(base_ps=20 * MS))
    assert run(slow, [request(0, output_tokens=1)], plan=ONE).token_times_ps(0) == [21 * MS]


def test_an_empty_stream_is_an_empty_result() -> None:
    result = simulate(problem(), system(TokenBudget), Requests([]), plan=Plan(replicas=(replica("a", ["n0.g0"]),)))
    assert (result.rows.requests, result.makespan_s, result.iterations) == ([], 0.0, 0)
    assert result.itl_s().size == 0


def test_a_run_is_freed_with_its_result_and_leaves_nothing_to_the_garbage_collector() -> None:
    batchers: list[weakref.ref[TokenBudget]] = []

    def batcher() -> TokenBudget:
        made = TokenBudget()
        batchers.append(weakref.ref(made))
        return made

    gc.disable()
    try:
        result = run(system(batcher), [request(n, n * 0.01) for n in range(5)], problem(cluster(2, 2)), plan=SPLIT)
        assert len(result.rows.requests) == 5
        assert [alive() for alive in batchers] == [None, None]
    finally:
        gc.enable()
