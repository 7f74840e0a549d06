"""Statistics of a stream, by hand and against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.types import ConfigError, Request
from traces import statistics


def test_four_requests_described():
    lengths = [(10, 1), (20, 2), (30, 3), (60, 6)]
    arrivals = [0.0, 1.0, 2.0, 6.0]
    requests = [
        Request(id=i, arrival_s=t, input_tokens=a, output_tokens=b)
        for i, (t, (a, b)) in enumerate(zip(arrivals, lengths, strict=True))
    ]
    assert statistics(iter(requests)) == {
        "requests": 4,
        "duration_s": 6.0,
        "rate_per_s": 0.5,
        "mean_input_tokens": 30.0,
        "min_input_tokens": 10,
        "p50_input_tokens": 20,
        "p90_input_tokens": 60,
        "p99_input_tokens": 60,
        "max_input_tokens": 60,
        "mean_output_tokens": 3.0,
        "min_output_tokens": 1,
        "p50_output_tokens": 2,
        "p90_output_tokens": 6,
        "p99_output_tokens": 6,
        "max_output_tokens": 6,
        "burstiness": pytest.approx(2**0.5 / 2),  # gaps 1, 1, 4: mean 2, variance 2
        "prefix_reuse": None,
    }


def test_what_cannot_be_measured_is_unknown():
    one = statistics([Request(id=0, arrival_s=3.0, input_tokens=1, output_tokens=1)])
    assert (one["duration_s"], one["rate_per_s"], one["burstiness"]) == (0.0, None, None)
    together = [Request(id=i, arrival_s=0, input_tokens=1, output_tokens=1) for i in range(3)]
    assert statistics(together)["burstiness"] is None


def test_prefix_reuse_counts_leading_blocks_seen_before():
    prefixes = [(1, 2, 3), (1, 2, 9), (8, 2, 3)]  # reused: none, two blocks, none (its first block is new)
    requests = [
        Request(id=i, arrival_s=i, input_tokens=40, output_tokens=1, prefix=p, prefix_block_tokens=10)
        for i, p in enumerate(prefixes)
    ]
    assert statistics(requests)["prefix_reuse"] == 20 / 120


def test_nothing_to_describe():
    with pytest.raises(ConfigError, match="no requests"):
        statistics([])


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 500)), min_size=3, max_size=40))
def test_agrees_with_numpy(rows):
    rows = sorted(rows)
    requests = [Request(id=i, arrival_s=t, input_tokens=n, output_tokens=1) for i, (t, n) in enumerate(rows)]
    found = statistics(requests)
    tokens, gaps = np.array([n for _, n in rows]), np.diff([t for t, _ in rows])
    assert found["mean_input_tokens"] == pytest.approx(tokens.mean())
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[f"{name}_input_tokens"] == np.quantile(tokens, share, method="inverted_cdf")
    if gaps.mean() > 1e-6:
        assert found["burstiness"] == pytest.approx(gaps.std() / gaps.mean(), abs=1e-6)
