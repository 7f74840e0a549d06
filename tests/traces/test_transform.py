"""Transforms: lazy, in order, and with running numbers."""

from itertools import count, islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.types import ConfigError, Request
from traces import (
    RequestClass,
    TraceSource,
    between,
    by_arrival,
    clamp_context,
    limit,
    mix,
    renumber,
    scale_time,
    with_rate,
)


def trace(*lengths: tuple[int, int]) -> list[Request]:
    """Requests with these lengths, one a second."""
    return [Request(id=i, arrival_s=float(i), input_tokens=a, output_tokens=b) for i, (a, b) in enumerate(lengths)]


def endless():
    return (Request(id=i, arrival_s=float(i), input_tokens=i + 1, output_tokens=1) for i in count())


def test_cut_and_stretch_a_stream():
    requests = list(scale_time(between(endless(), 3, 6), 2))
    assert [(r.id, r.arrival_s, r.input_tokens) for r in requests] == [(0, 0.0, 4), (1, 2.0, 5), (2, 4.0, 6)]


def test_limit_takes_the_first():
    assert [r.input_tokens for r in limit(endless(), 2)] == [1, 2]


def test_renumber_keeps_all_but_the_id():
    requests = trace((1, 1), (2, 2), (3, 3))[1:]
    assert list(renumber(requests)) == [
        Request(id=0, arrival_s=1.0, input_tokens=2, output_tokens=2),
        Request(id=1, arrival_s=2.0, input_tokens=3, output_tokens=3),
    ]


def test_a_constant_rate_is_exact():
    requests = list(with_rate(trace((1, 1), (2, 2), (3, 3)), 4.0, arrivals="constant", rng=np.random.default_rng(0)))
    assert [r.arrival_s for r in requests] == [0.0, 0.25, 0.5]
    assert [r.input_tokens for r in requests] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arrivals", "cv", "variation"), [("poisson", None, 1.0), ("gamma", 3.0, 3.0), ("gamma", 0.5, 0.5)]
)
def test_resampled_arrivals_have_their_rate_and_burstiness(arrivals, cv, variation):
    rng = np.random.default_rng(1)
    arrivals_s = [r.arrival_s for r in islice(with_rate(endless(), 5.0, arrivals=arrivals, cv=cv, rng=rng), 20_001)]
    gaps = np.diff(arrivals_s)
    assert arrivals_s[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_one_seed_one_stream():
    first, again = (list(with_rate(trace((1, 1), (2, 2)), 1.0, rng=np.random.default_rng(5))) for _ in range(2))
    other = list(with_rate(trace((1, 1), (2, 2)), 1.0, rng=np.random.default_rng(6)))
    assert first == again != other


def test_too_long_requests_are_left_out_and_counted():
    clamped = clamp_context(trace((10, 5), (12, 4), (8, 8)), 15)
    assert [(r.id, r.input_tokens) for r in clamped] == [(0, 10)]
    assert (clamped.rejected, clamped.truncated) == (2, 0)


def test_truncation_spares_the_output():
    clamped = clamp_context(trace((10, 5), (12, 4), (8, 14), (8, 90)), 15, "truncate")
    assert [(r.input_tokens, r.output_tokens) for r in clamped] == [(10, 5), (11, 4), (1, 14), (1, 14)]
    assert (clamped.rejected, clamped.truncated) == (0, 3)


def test_truncation_drops_the_hashes_of_cut_blocks():
    request = Request(id=0, arrival_s=0, input_tokens=40, output_tokens=2, prefix=(1, 2, 3, 4), prefix_block_tokens=10)
    assert next(iter(clamp_context([request], 27, "truncate"))).prefix == (1, 2)


def test_a_long_request_can_be_an_error():
    with pytest.raises(
        ConfigError, match="request 1: 12 input and 4 output tokens exceed max_model_len 15; choose rule"
    ):
        list(clamp_context(trace((10, 5), (12, 4)), 15, "error"))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20),
    st.integers(2, 60),
    st.sampled_from(["reject", "truncate"]),
)
def test_nothing_too_long_passes_and_nothing_is_lost(lengths, max_model_len, rule):
    clamped = clamp_context(trace(*lengths), max_model_len, rule)
    passed = list(clamped)
    assert all(r.input_tokens + r.output_tokens <= max_model_len for r in passed)
    assert len(passed) + clamped.rejected == len(lengths)
    assert [r.id for r in passed] == list(range(len(passed)))
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(passed))


def test_classes_are_mixed_in_order_of_arrival():
    chat = [Request(id=i, arrival_s=i, input_tokens=5, output_tokens=5) for i in range(3)]
    batch = [Request(id=0, arrival_s=1.0, input_tokens=900, output_tokens=9)]
    mixed = mix([RequestClass(name="batch", requests=batch), RequestClass(name="chat", requests=chat, priority=-1)])
    assert [(r.id, r.arrival_s, r.klass, r.priority, r.input_tokens) for r in mixed] == [
        (0, 0.0, "chat", -1, 5),
        (1, 1.0, "batch", 0, 900),
        (2, 1.0, "chat", -1, 5),
        (3, 2.0, "chat", -1, 5),
    ]


def test_sessions_and_prefixes_of_classes_are_kept_apart():
    request = Request(
        id=0, arrival_s=0, input_tokens=32, output_tokens=1, session="s", prefix=(1, 2), prefix_block_tokens=16
    )
    same = list(mix([RequestClass(name="a", requests=[request, request])]))
    assert same[0].prefix == same[1].prefix
    two = list(mix([RequestClass(name=name, requests=[request]) for name in ("a", "b")]))
    assert [r.session for r in two] == ["a/s", "b/s"]
    assert not set(two[0].prefix) & set(two[1].prefix)


def test_mixing_is_lazy():
    mixed = mix([RequestClass(name=name, requests=endless()) for name in "ab"])
    assert [r.klass for r in islice(mixed, 4)] == ["a", "b", "a", "b"]


@given(st.lists(st.lists(st.floats(0, 100), max_size=10).map(sorted), min_size=1, max_size=4))
def test_mixing_loses_nothing(classes):
    streams = [
        RequestClass(
            name=str(k),
            requests=[Request(id=i, arrival_s=t, input_tokens=k + 1, output_tokens=1) for i, t in enumerate(times)],
        )
        for k, times in enumerate(classes)
    ]
    mixed = list(mix(streams))
    assert [r.id for r in mixed] == list(range(len(mixed)))
    assert sorted((r.arrival_s, r.input_tokens) for r in mixed) == [(r.arrival_s, r.input_tokens) for r in mixed]
    assert len(mixed) == sum(map(len, classes))


def test_by_arrival_sorts_and_numbers():
    requests = [Request(id=i, arrival_s=t, input_tokens=i + 1, output_tokens=1) for i, t in enumerate([2.0, 0.0, 1.0])]
    assert [(r.id, r.arrival_s, r.input_tokens) for r in by_arrival(requests)] == [(0, 0, 2), (1, 1, 3), (2, 2, 1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix([]), "classes to mix: none; expected at least one"),
        (lambda: mix([RequestClass(name="a", requests=[])] * 2), "classes to mix: a, a; .* with different names"),
        (lambda: RequestClass(name="a\nb", requests=[]), "expected a name of one line"),
        (lambda: limit([], 0), "limit is 0"),
        (lambda: between([], 5, 5), "expected 0 <= start_s < end_s"),
        (lambda: scale_time([], 0), "factor is 0; expected a finite number > 0"),
        (lambda: clamp_context([], 1), "max_model_len is 1"),
        (lambda: clamp_context([], 9, "trunc"), "did you mean 'truncate'"),
        (lambda: with_rate([], 1, arrivals="posson", rng=np.random.default_rng(0)), "did you mean 'poisson'"),
        (lambda: with_rate([], float("nan"), rng=np.random.default_rng(0)), "rate_per_s is nan"),
        (
            lambda: with_rate([], 1, arrivals="gamma", rng=np.random.default_rng(0)),
            "arrivals 'gamma' needs cv and got nothing",
        ),
        (lambda: with_rate([], 1, cv=2, rng=np.random.default_rng(0)), "arrivals 'poisson' needs nothing and got cv"),
        (lambda: with_rate([], 1, arrivals="gamma", cv=0, rng=np.random.default_rng(0)), "cv is 0"),
    ],
)
def test_bad_settings_are_refused_at_once(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_source_gives_its_stream_once():
    requests = trace((1, 1), (2, 2))
    source = TraceSource(endless())
    assert list(islice(source.next(0.0, None), 2)) == [
        Request(id=i, arrival_s=i, input_tokens=i + 1, output_tokens=1) for i in (0, 1)
    ]
    assert list(source.next(3.0, requests[0])) == []
