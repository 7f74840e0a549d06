"""Sources: who sends the next request, when, and how long it is; and that the engine's law holds under them."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, simulate
from sim.types import ConfigError, Request
from tests.toys import problem, with_limits
from traces import (
    ClosedLoop,
    Fixed,
    Sessions,
    TraceSource,
    Uniform,
    by_arrival,
    generate,
    generate_sessions,
    read,
    write,
)

LENGTHS = {"input": Uniform(low_tokens=20, high_tokens=200), "output": Uniform(low_tokens=1, high_tokens=30)}


def turn(number: int, session: str | None, input_tokens: int, output_tokens: int, **more: object) -> Request:
    return Request(
        id=number,
        arrival_s=float(number),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        session=session,
        **more,
    )


def run(source, *, step_by_step: bool = False, prefix_caching: bool = False):
    system = with_limits(SYSTEMS["vllm"](replicas=1, tp=1), prefix_caching=prefix_caching, num_kv_blocks=400)
    return simulate(problem(), system, source, step_by_step=step_by_step)


def rows(result) -> list:
    return sorted(result.rows.requests, key=lambda row: row.request.id)


def test_a_closed_loop_of_one_user_sends_one_request_after_the_other():
    source = ClosedLoop(generate(4, 100.0, **LENGTHS), users=1, think_s=2.0, think_cv=0)
    done = rows(run(source))
    assert [row.outcome for row in done] == ["completed"] * 4
    assert done[0].request.arrival_s == 2.0
    for before, after in pairwise(done):
        assert after.request.arrival_s == before.finish_ps / 1e12 + 2.0


def test_users_take_the_requests_in_turn():
    requests = list(generate(7, 1.0, **LENGTHS))
    source = ClosedLoop(requests, users=3)
    assert [r.id for r in source.next(0.0, None)] == [0, 1, 2]
    assert [(r.id, r.arrival_s) for r in source.next(5.0, requests[1])] == [(4, 5.0)]
    assert [(r.id, r.input_tokens) for r in source.next(6.0, requests[3])] == [(6, requests[6].input_tokens)]
    assert list(source.next(7.0, requests[4])) == []


def test_no_more_requests_are_under_way_than_there_are_users():
    done = rows(run(ClosedLoop(generate(60, 1.0, **LENGTHS), users=4, think_s=0.05)))
    assert len(done) == 60
    events = sorted([(r.request.arrival_s, 1) for r in done] + [(r.finish_ps / 1e12, -1) for r in done])
    under_way = most = 0
    for _, change in events:
        under_way += change
        most = max(most, under_way)
    assert most == 4


def test_think_times_have_their_mean_and_spread():
    source = ClosedLoop(generate(20_000, 1.0, **LENGTHS), users=1, think_s=3.0, think_cv=0.5)
    thinks = [turn.think_s for turn in source.following.values()]
    mean = sum(thinks) / len(thinks)
    assert mean == pytest.approx(3.0, rel=0.02)
    assert sum((t - mean) ** 2 for t in thinks) / len(thinks) == pytest.approx(1.5**2, rel=0.05)


def test_fewer_requests_than_users():
    assert len(rows(run(ClosedLoop(generate(2, 1.0, **LENGTHS), users=5)))) == 2


def test_a_conversation_grows_by_its_prompts_and_answers():
    recorded = [turn(0, "a", 32, 8), turn(1, "b", 50, 5), turn(2, "a", 10, 6), turn(3, "a", 20, 1), turn(4, None, 7, 7)]
    source = Sessions(recorded, think_s=1.0, think_cv=0)
    assert [(r.id, r.arrival_s) for r in source.next(0.0, None)] == [(0, 0.0), (1, 1.0), (4, 4.0)]
    first = next(iter(source.next(0.0, None)))
    (second,) = source.next(10.0, first)
    (third,) = source.next(20.0, second)
    assert [(r.id, r.arrival_s, r.input_tokens) for r in (second, third)] == [(2, 11.0, 50), (3, 21.0, 76)]
    assert list(source.next(30.0, third)) == []
    assert [len(r.prefix) for r in (first, second, third)] == [2, 3, 4]  # prompts and answers of 40, 56, 77 tokens
    assert third.prefix[:3] == second.prefix
    assert second.prefix[:2] == first.prefix


def test_conversations_share_no_blocks_and_single_requests_have_none():
    source = Sessions([turn(0, "a", 64, 1), turn(1, "b", 64, 1), turn(2, None, 64, 1), turn(3, "c", 14, 1)])
    a, b, single, short = source.next(0.0, None)
    assert not set(a.prefix) & set(b.prefix)
    assert (single.prefix, single.prefix_block_tokens) == ((), None)
    assert (short.prefix, short.prefix_block_tokens) == ((), None)


def test_whole_prompts_stay_as_recorded():
    recorded = [turn(0, "a", 32, 8), turn(1, "a", 48, 6), turn(2, "a", 30, 1)]
    source = Sessions(recorded, inputs="whole")
    (first,) = source.next(0.0, None)
    (second,) = source.next(1.0, first)
    (third,) = source.next(2.0, second)
    assert [r.input_tokens for r in (first, second, third)] == [32, 48, 30]
    assert second.prefix[:2] == first.prefix
    assert not set(third.prefix) & set(first.prefix)  # 30 tokens cannot hold the 54 before: the context was cut


def test_recorded_hashes_are_kept_with_whole_prompts_only():
    recorded = [turn(0, "a", 32, 8, prefix=(5,), prefix_block_tokens=32)]
    (first,) = Sessions(recorded, inputs="whole").next(0.0, None)
    assert first.prefix == (5,)
    with pytest.raises(ConfigError, match=r"request 0 has prefix hashes, .* set inputs='whole'"):
        Sessions(recorded)


def test_a_prefix_cache_hits_on_later_turns():
    """The second prompt begins with the first one and its answer: 160 and 24 tokens, of whose KV all but the last's is
    in memory when the first turn ends."""
    source = Sessions([turn(0, "a", 160, 24), turn(1, "a", 10, 6)], think_s=1.0)
    cached = [row.cached_tokens for row in rows(run(source, prefix_caching=True))]
    assert cached == [0, 176]
    assert [row.cached_tokens for row in rows(run(source))] == [0, 0]


def test_a_conversation_goes_on_after_a_turn_that_was_rejected():
    done = rows(run(Sessions([turn(0, "a", 100_000, 8), turn(1, "b", 10, 6), turn(2, "b", 5, 1)])))
    assert [row.outcome for row in done] == ["rejected", "completed", "completed"]


def test_generated_conversations():
    turns = Uniform(low_tokens=1, high_tokens=3)
    requests = list(generate_sessions(300, 2.0, turns=turns, arrivals="constant", **LENGTHS))
    assert [r.id for r in requests] == list(range(len(requests)))
    starts = {r.session: r.arrival_s for r in requests}
    assert list(starts.values()) == [number / 2 for number in range(300)]
    numbers = [sum(r.session == session for r in requests) for session in starts]
    assert set(numbers) == {1, 2, 3}
    assert sum(numbers) / 300 == pytest.approx(2, abs=0.15)
    fewer = list(generate_sessions(20, 2.0, turns=turns, arrivals="constant", **LENGTHS))
    assert requests[: len(fewer)] == fewer


def test_conversations_survive_our_format(tmp_path):
    requests = list(generate_sessions(20, 5.0, turns=Fixed(tokens=3), **LENGTHS))
    write(tmp_path / "talks.csv", requests)
    assert run(Sessions(read(tmp_path / "talks.csv"), think_s=0.1)).log() == run(Sessions(requests, think_s=0.1)).log()


sources = st.one_of(
    st.builds(
        lambda count, users, think_s, cv, seed: ClosedLoop(
            generate(count, 1.0, seed=seed, **LENGTHS), users=users, think_s=think_s, think_cv=cv, seed=seed
        ),
        st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 0.01, 0.3]), st.sampled_from([0.0, 1.0]),
        st.integers(0, 99),
    ),
    st.builds(
        lambda count, rate, think_s, seed: Sessions(
            generate_sessions(count, rate, turns=Uniform(low_tokens=1, high_tokens=4), seed=seed, **LENGTHS),
            think_s=think_s, seed=seed,
        ),
        st.integers(1, 12), st.sampled_from([1.0, 20.0, 500.0]), st.sampled_from([0.0, 0.05]), st.integers(0, 99),
    ),
)  # fmt: skip


@settings(max_examples=40)
@given(sources, st.booleans())
def test_the_law_holds_under_closed_loops_and_conversations(source, prefix_caching):
    collapsed, stepped = (run(source, step_by_step=flag, prefix_caching=prefix_caching) for flag in (False, True))
    assert collapsed.log() == stepped.log()
    ids = [row.request.id for row in collapsed.rows.requests]
    assert ids == list(range(len(ids)))


def test_the_request_log_of_a_run_is_a_trace_that_gives_the_same_run(tmp_path):
    first = run(TraceSource(list(generate(80, 30.0, **LENGTHS))))
    first.requests.to_parquet(tmp_path / "requests.parquet", index=False)
    again = run(TraceSource(read(tmp_path / "requests.parquet")))
    assert again.log() == first.log()
    write(tmp_path / "trace.csv", (row.request for row in first.rows.requests))
    assert run(TraceSource(read(tmp_path / "trace.csv"))).log() == first.log()


def test_what_a_closed_loop_sent_is_a_trace(tmp_path):
    done = run(Sessions(generate_sessions(20, 50.0, turns=Fixed(tokens=3), **LENGTHS), think_s=0.1))
    sent = list(by_arrival(row.request for row in done.rows.requests))
    assert write(tmp_path / "sent.parquet", sent) == 60
    assert list(read(tmp_path / "sent.parquet")) == sent
    assert all(r.session for r in sent)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClosedLoop([], users=0), "users is 0; expected a whole number >= 1"),
        (lambda: ClosedLoop([], users=1, think_s=-1), "think_s is -1; expected a finite number > 0"),
        (lambda: ClosedLoop([], users=1, think_s=1, think_cv=-1), "think_cv is -1"),
        (lambda: Sessions([], inputs="old"), "inputs is 'old'; known: new, whole"),
        (lambda: Sessions([], block_tokens=0), "block_tokens is 0"),
        (lambda: generate_sessions(0, 1, turns=Fixed(tokens=1), **LENGTHS), "count is 0"),
        (
            lambda: generate_sessions(1, 1, turns=Fixed(tokens=1), rank_correlation=2, **LENGTHS),
            "rank_correlation is 2",
        ),
    ],
)
def test_bad_settings_are_refused_at_once(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
