"""Statistics of a stream, by hand and against numpy, and in bounded memory."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.types import ConfigError, Request
from traces import Fixed, generate, read, statistics, survey
from traces.statistics import Reuse, Timeline


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
        "prefix_sample": None,
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
    found = statistics(requests)
    assert (found["prefix_reuse"], found["prefix_sample"]) == (20 / 120, 1.0)


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


def test_a_stream_out_of_order_is_refused():
    requests = [Request(id=i, arrival_s=1.0 - i, input_tokens=1, output_tokens=1) for i in range(2)]
    with pytest.raises(ConfigError, match=r"arrives at 0.0 s, before the one ahead of it at 1.0 s"):
        statistics(requests)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(2, 64))
def test_a_timeline_loses_nothing_and_stays_short(arrivals, most):
    timeline = type("Short", (Timeline,), {"MOST": most, "__slots__": ()})()
    for time_s in sorted(arrivals):
        timeline.add(time_s, 10, 2.0)
    assert len(timeline.requests) <= most
    counts, _ = np.histogram(arrivals, np.arange(len(timeline.requests) + 1) * timeline.width_s)
    assert timeline.requests == counts.tolist()
    assert timeline.input_tokens == (counts * 10).tolist()
    assert timeline.reused_tokens == (counts * 2).tolist()


def test_dispersion_is_1_for_poisson_at_every_window_and_grows_with_waves():
    lengths = {"input": Fixed(tokens=1), "output": Fixed(tokens=1)}
    poisson = survey(generate(50_000, 10.0, seed=3, **lengths)).timeline.dispersion()
    assert all(b == 2 * a for (a, _), (b, _) in pairwise(poisson))
    assert [index for window_s, index in poisson if window_s < 100] == pytest.approx([1] * 5, rel=0.25)
    waves = survey(generate(50_000, 10.0, arrivals="bursts", on_s=100, off_s=100, **lengths)).timeline.dispersion()
    assert max(index for _, index in waves) > 50


def test_dispersion_by_hand():
    timeline = Timeline()
    timeline.width_s, timeline.requests = 1.0, [2.0, 0.0] * 8 + [1.0]
    assert timeline.dispersion() == [(1.0, 1.0), (2.0, 0.0)]


def test_gaps_by_size():
    requests = [Request(id=i, arrival_s=t, input_tokens=1, output_tokens=1) for i, t in enumerate([0, 0, 1, 3, 3.5])]
    assert survey(requests).gaps.sizes == {None: 1, 0: 1, 4: 1, -4: 1}


def chained(number: int):
    """Conversations of ten turns, the blocks of each being those before and ten more."""
    for i in range(number):
        blocks = tuple(range(i // 10 * 1000, i // 10 * 1000 + i % 10 * 10 + 10))
        yield Request(
            id=i, arrival_s=float(i), input_tokens=16 * len(blocks), output_tokens=1, prefix=blocks,
            prefix_block_tokens=16,
        )  # fmt: skip


def test_reuse_is_estimated_when_there_are_too_many_hashes(monkeypatch):
    exact = statistics(chained(4000))
    assert exact["prefix_sample"] == 1.0
    assert exact["prefix_reuse"] == 45 / 55
    monkeypatch.setattr(Reuse, "MOST", 2000)
    found = survey(chained(4000))
    assert len(found.reuse.seen) <= 2000
    assert found.statistics["prefix_sample"] == 2**-5
    assert found.statistics["prefix_reuse"] == pytest.approx(45 / 55, rel=0.05)


BAR = """
import re, sys
import numpy as np
from traces import read, statistics, with_rate
done = []
stream = read(sys.argv[1], progress=lambda *bytes_: done.append(bytes_))
found = statistics(with_rate(stream, 50.0, rng=np.random.default_rng(0)))
assert done == sorted(done) and done[-1][0] == done[-1][1], done[-1:]
assert abs(found["rate_per_s"] - 50) < 0.5, found
peak = re.search(r"VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())  # ru_maxrss would count the parent's
print(found["requests"], len(done), int(peak[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read from /proc")
def test_a_million_lines_are_read_resampled_and_summarised_in_little_memory(tmp_path):
    """The bar is 10 million lines under 500 MB; memory does not depend on the number (10 million: 45 MB)."""
    path = tmp_path / "long.csv"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("arrival_s,input_tokens,output_tokens\n")
        for block in range(100):
            lengths = rng.integers(1, 100_000, (10_000, 2)).tolist()
            file.writelines(f"{block * 1000 + i / 10},{a},{b}\n" for i, (a, b) in enumerate(lengths))
    run = subprocess.run([sys.executable, "-c", BAR, path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    requests, calls, megabytes = map(int, run.stdout.split())
    assert requests == 1_000_000
    assert 20 <= calls <= 200
    assert megabytes < 150


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_progress_goes_from_the_first_bytes_to_the_last(tmp_path, suffix, monkeypatch):
    from traces import write

    monkeypatch.setattr("traces.wrapping.TELL_BYTES", 1)
    path, seen = tmp_path / f"trace{suffix}", []
    if suffix == ".jsonl":
        path.write_text('{"timestamp": 1, "input_length": 2, "output_length": 3}\n' * 2000)
    else:
        write(path, generate(20_000, 1.0, input=Fixed(tokens=9), output=Fixed(tokens=9)))
    reader = read(path, "guidellm" if suffix == ".jsonl" else None, progress=lambda *bytes_: seen.append(bytes_))
    assert seen == []
    assert sum(1 for _ in reader) >= 2000
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)
