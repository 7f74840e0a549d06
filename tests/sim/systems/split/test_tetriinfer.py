"""TetriInfer: chunk, order, admission and dispatch rules, and the invariants of its spec (arXiv 2401.11181)."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ConfigError, Problem, Request, Result
from sim.batchers import TwoPhase
from sim.cost import PaddedChunks
from sim.engine.replica.job import Job
from sim.predictors import LengthRange, TrueLength
from sim.types import Stage, Work
from tests.lab import Fill, spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import MS, TINY, ToyCost, cluster, problem, request, run, with_limits


def tetri(prefills: int = 1, decodes: int = 1, **options: Any) -> Any:
    limits = {key: options.pop(key) for key in ("num_kv_blocks", "max_num_seqs") if key in options}
    given = {"prefill": {"replicas": prefills, "tp": 1}, "decode": {"replicas": decodes, "tp": 1}, **options}
    return with_limits(SYSTEMS["tetriinfer"](**given), **limits)


def where(gpus: int = 2, gbps: float = 1e6) -> Problem:
    return problem(cluster(1, gpus, gbps))


def watched(system: Any, requests: list[Request], **more: Any) -> tuple[Result, list[Fill]]:
    system, fills = spied(system)
    return run(system, requests, where(), step_by_step=True, **more), fills


def test_a_request_is_prefilled_on_one_instance_and_decoded_on_another() -> None:
    """One padded chunk: 10 ms and 512 tokens of 10 us, and a tenth for the predictor."""
    row = run(tetri(), [request(0)], where()).rows.requests[0]
    assert (row.prefill_stage, row.decode_stage, row.outcome) == ("prefill0", "decode0", "completed")
    assert row.first_token_ps == round((10 * MS + 512 * MS // 100) * 1.1)


# ------------------------------------------------------------ prompts


def test_a_chunk_may_end_one_prompt_and_begin_the_next() -> None:
    """Prompts of 300, 400 and 500 end to end, cut every 512 tokens; the last chunk of 176 is padded."""
    _, fills = watched(tetri(order="fcfs"), [request(0, 0, 300), request(1, 0, 400), request(2, 0, 500)])
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 300, 1: 212}, {1: 188, 2: 324}, {2: 176}]


def test_every_chunk_costs_what_a_full_one_does() -> None:
    """The toy's linear part is in proportion to tokens; attention to earlier tokens comes on top."""
    stage = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=TINY.num_layers)
    bound = PaddedChunks(inner=ToyCost(), chunk_tokens=512, prompt_factor=1.0).bind(TINY, stage, problem().cluster)
    full = bound.line(Work(((512, 0),), 0, 0)).first_ps
    assert [bound.line(Work(chunks, 0, 0)).first_ps for chunks in (((1, 0),), ((100, 0), (30, 0)))] == [full, full]
    assert bound.line(Work(((100, 50),), 0, 0)).first_ps == full + 3 * 100 * 50
    assert bound.line(Work(((600, 0),), 0, 0)).first_ps > full
    assert bound.line(Work((), 3, 100)) == ToyCost().bind(TINY, stage, problem().cluster).line(Work((), 3, 100))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_chunks_add_up_to_prompts_and_hold_no_decodes(data: st.DataObject) -> None:
    requests = data.draw(traffic())
    options = {"order": data.draw(st.sampled_from(["fcfs", "sjf", "ljf"])), "group": data.draw(st.integers(1, 5))}
    _, fills = watched(tetri(chunk_tokens=64, **options), requests)
    done: Counter[int] = Counter()
    for fill in fills:
        assert not (fill.chunks and fill.decodes)
        assert sum(fill.chunks.values()) <= 64
        done.update(fill.chunks)
    assert done == {one.id: one.input_tokens for one in requests}


def waiting_s(order: str, group: int, lengths: list[int]) -> float:
    requests = [request(number, 0.0, tokens, 1) for number, tokens in enumerate(lengths)]
    result = run(tetri(order=order, group=group), requests, problem(cluster(1, 2, 1e6), ToyCost(per_pair_ps=0)))
    return mean(row.first_token_ps or 0 for row in result.rows.requests) / 10**12


@given(st.lists(st.integers(1, 900), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_within_a_group_the_shortest_first_wait_least(lengths: list[int]) -> None:
    sjf, fcfs, ljf = (waiting_s(order, 16, lengths) for order in ("sjf", "fcfs", "ljf"))
    assert sjf <= fcfs + 1e-9
    assert fcfs <= ljf + 1e-9
    assert waiting_s("sjf", 1, lengths) == waiting_s("ljf", 1, lengths) == fcfs


def test_a_group_is_computed_to_the_last_before_the_next_is_looked_at() -> None:
    """A short prompt that comes late does not overtake the group under way, but goes before a long one after it."""
    requests = [request(0, 0.0, 512), request(1, 0.0, 512), request(2, 0.001, 512), request(3, 0.002, 40)]
    _, fills = watched(tetri(group=2), requests)
    order = [number for fill in fills for number in fill.admitted]
    assert order == [0, 1, 3, 2]


# ------------------------------------------------------------ predicted lengths


def test_a_right_prediction_is_the_lower_end_of_its_range() -> None:
    perfect = LengthRange(200, accuracy=1.0)
    assert [perfect.predict(request(0, output_tokens=tokens)) for tokens in (1, 199, 200, 555)] == [0, 0, 200, 400]


@pytest.mark.parametrize("output_tokens", [50, 500, 5000])
def test_so_many_predictions_are_right(output_tokens: int) -> None:
    predictor = LengthRange(200, accuracy=0.749, seed=3)
    said = [predictor.predict(request(number, output_tokens=output_tokens)) for number in range(4000)]
    right = sum(tokens == output_tokens // 200 * 200 for tokens in said) / len(said)
    assert right == pytest.approx(0.749, abs=0.02)
    assert min(said) >= 0


def test_a_prediction_does_not_depend_on_what_came_before() -> None:
    a, b = LengthRange(seed=1), LengthRange(seed=1)
    asked = [request(number, output_tokens=700) for number in range(50)]
    assert [a.predict(one) for one in asked] == [b.predict(one) for one in reversed(asked)][::-1]


# ------------------------------------------------------------ admission to the decode batch


def let_in(admission: str, predicted: int, free_blocks: int, running: tuple[int, ...] = (), landing: int = 0) -> bool:
    """A prompt of 32 (2 blocks) beside running ones of 32 prompt and so many answer tokens; all predicted alike."""

    def job(number: int, emitted: int) -> Job:
        one = Job(request(number, input_tokens=32), predicted)
        one.generated_tokens = emitted
        return one

    replica: Any = SimpleNamespace(
        running=[job(number, emitted) for number, emitted in enumerate(running)],
        landing=[job(90 + number, 1) for number in range(landing)],
        num_swapped=0, free_blocks=free_blocks, block_size=16, max_num_seqs=4,
    )  # fmt: skip
    return TwoPhase(admission=admission).lets_in(job(99, 1), 2, replica)  # type: ignore[arg-type]


def test_greedy_looks_at_the_next_token_only_and_static_at_the_whole_answer() -> None:
    """32 tokens and one more are 3 blocks, and 40 more 5."""
    assert [let_in("greedy", 40, free) for free in (2, 3)] == [False, True]
    assert [let_in("reserve-static", 40, free) for free in (4, 5)] == [False, True]


def test_dynamic_counts_what_the_next_to_end_will_free() -> None:
    """The one nearest its end has 32 + 20 tokens: 4 blocks. The next token needs its block now, in any case."""
    assert [let_in("reserve-dynamic", 40, free) for free in (4, 5)] == [False, True]
    assert [let_in("reserve-dynamic", 40, free, running=(3, 20)) for free in (2, 3)] == [False, True]
    assert [let_in("reserve-dynamic", 100, free, running=(3, 20)) for free in (4, 5)] == [False, True]


def test_commit_keeps_what_the_others_are_predicted_to_take() -> None:
    """5 blocks each at the end: one with 20 tokens said has 4 of them, one that is landing 2."""
    assert [let_in("commit", 40, free, running=(20,)) for free in (5, 6)] == [False, True]
    assert [let_in("commit", 40, free, running=(20,), landing=1) for free in (8, 9)] == [False, True]


@given(st.integers(0, 30), st.integers(0, 200), st.lists(st.integers(1, 150), max_size=3).map(tuple))
def test_whom_static_lets_in_dynamic_lets_in_too(free: int, predicted: int, running: tuple[int, ...]) -> None:
    if let_in("reserve-static", predicted, free, running):
        assert let_in("reserve-dynamic", predicted, free, running)


def preemptions(admission: str, accuracy: float, requests: list[Request]) -> int:
    predictor = TrueLength() if accuracy == 1.0 else LengthRange(40, accuracy)
    result = run(tetri(admission=admission, num_kv_blocks=24), requests, where(), predictor=predictor)
    assert {row.outcome for row in result.rows.requests} <= {"completed", "rejected"}
    return sum(row.preemptions for row in result.rows.requests)


@given(traffic())
@settings(max_examples=25, deadline=None)
def test_with_true_lengths_and_commitment_nobody_is_swapped(requests: list[Request]) -> None:
    assert preemptions("commit", 1, requests) == 0


def test_reserving_swaps_less_than_greed() -> None:
    """The decode instance of 24 blocks has room for four whole requests of 6 blocks."""
    requests = [request(number, 0.002 * number, 32, 64) for number in range(40)]
    greedy = preemptions("greedy", 0.749, requests)
    assert greedy > 0
    for admission in ("reserve-static", "reserve-dynamic", "commit"):
        assert preemptions(admission, 0.749, requests) < greedy


# ------------------------------------------------------------ dispatch


def test_heavy_decodes_are_spread_where_turns_would_gather_them() -> None:
    """Every second answer is heavy: taking turns puts all heavy ones on one of two instances."""
    requests = [request(number, 0.02 * number, 40, 300 if number % 2 else 20) for number in range(60)]
    system = tetri(1, 2, accuracy=1.0, monitor_s=0.001)
    rows = run(system, requests, where(3)).rows.requests
    heavy = Counter(row.decode_stage for row in rows if row.request.output_tokens == 300)
    assert abs(heavy["decode0"] - heavy["decode1"]) <= 6


def test_only_instances_with_room_at_the_last_report_are_chosen() -> None:
    """One instance is full for long: all that come go to the other one."""
    requests = [request(0, 0.0, 345, 35), *(request(number, 0.1 + 0.05 * number, 40, 5) for number in range(1, 4))]
    system = tetri(1, 2, num_kv_blocks=24, monitor_s=0.05)
    rows = run(system, requests, where(3), predictor=TrueLength()).rows.requests
    first = next(row.decode_stage for row in rows if row.request.id == 0)
    assert {row.decode_stage for row in rows} - {first} == {row.decode_stage for row in rows if row.request.id}


def test_without_room_anywhere_the_kv_waits_at_the_prefill_instance() -> None:
    requests = [request(0, 0.0, 300, 60), request(1, 0.1, 300, 5)]
    rows = run(tetri(num_kv_blocks=24), requests, where(), predictor=TrueLength()).rows.requests
    first, second = sorted(rows, key=lambda row: row.request.id)
    assert second.transfer_ps > 0.3 * 10**12
    assert (second.finish_ps or 0) > (first.finish_ps or 0)


def test_a_chosen_on_arrival_sends_early_chunks_before_the_prompt_is_done() -> None:
    """2048 tokens in 4 chunks over a slow link: three quarters flow while the last chunk runs."""
    late, early = (
        run(tetri(transfer=transfer), [request(0, 0.0, 2048, 3)], where(gbps=100)).rows.requests[0]
        for transfer in ("request", "chunk")
    )
    assert early.first_token_ps == late.first_token_ps
    assert early.bytes_moved == late.bytes_moved == 2048 * 32768
    assert early.transfer_ps < 0.35 * late.transfer_ps


# ------------------------------------------------------------ flips


def test_an_idle_instance_flips_once_drained_and_nothing_is_lost() -> None:
    """Long answers wait for the one decode instance (room for two), the prefill instances have nothing to do."""
    requests = [request(number, 0.11 * number, 40, 400) for number in range(12)]
    system = tetri(2, 1, flip="load", flip_window_s=2.0, num_kv_blocks=60)
    result = run(system, requests, where(3))
    assert {row.outcome for row in result.rows.requests} == {"completed"}
    reasons = [note.text for note in result.rows.notes if note.kind == "change"]
    assert reasons[:2] == [
        "prefill1 has little to do: it drains to flip", "prefill1 is drained: it becomes decode",
    ]  # fmt: skip
    assert len(result.rows.replicas) == 3
    still = run(tetri(2, 1, num_kv_blocks=60), requests, where(3))
    assert max(row.finish_ps or 0 for row in result.rows.requests) < max(
        row.finish_ps or 0 for row in still.rows.requests
    )


def test_the_last_of_a_role_never_flips() -> None:
    requests = [request(number, 0.0, 40, 200) for number in range(12)]
    result = run(tetri(1, 1, flip="load", flip_window_s=2.0, max_num_seqs=2), requests, where())
    assert not result.rows.notes


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"order": "longest"}, "system.order is 'longest'"),
        ({"admission": "all"}, "system.admission is 'all'"),
        ({"chunk_tokens": 0}, "system.chunk_tokens is 0"),
        ({"accuracy": 1.5}, "accuracy 1.5"),
        ({"flip": "often"}, "system.flip is 'often'"),
        ({"transfer": "token"}, "system.transfer is 'token'"),
        ({"dispatch": "turns"}, "system.dispatch is 'turns'"),
        ({"monitor_s": 0.0}, "monitor_s 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run(tetri(**options), [request(0)], where())


def test_a_request_shows_how_much_it_has_said() -> None:
    job = Job(request(0), 10)
    assert job.emitted_tokens == 0
