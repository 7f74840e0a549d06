"""The result JSON of ``vllm bench serve``: written, read back, and set beside a prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.runs.rundir import Run, read_run, write_run
from experiments.runs.vllm_bench import figures, goodput_slo, of_run, peaks, read_bench, write_bench
from sim import SYSTEMS, ConfigError, Slo
from sim.metrics import summarise
from sim.record import REQUEST_COLUMNS
from tests.toys import request, with_limits
from tests.toys import run as simulate

REAL = {
    "date": "20260101-120000",
    "duration": 10.0,
    "input_lens": [100, 50, 80],
    "output_lens": [3, 0, 1],
    "ttfts": [0.5, 0.0, 0.25],
    "itls": [[0.1, 0.2], [], []],
    "start_times": [1000.5, 1000.0, 1002.0],
    "errors": ["", "Bad Request", ""],
    "generated_texts": ["", "", ""],
}
"""As vLLM writes it: no latencies, a clock of its own, one request that failed."""


def finished_run(tokens: bool = True) -> Run:
    """Twelve requests on one GPU, of which one is rejected and one has a single token."""
    lengths = [(100 + 7 * n, 1 if n == 3 else 8 + n) for n in range(11)] + [(5000, 10)]
    requests = [request(n, 0.02 * n, *pair) for n, pair in enumerate(lengths)]
    result = simulate(with_limits(SYSTEMS["vllm"](replicas=1, tp=1), num_kv_blocks=100), requests)
    return Run.of("toy", result, {"name": "toy", **summarise(result)}, tokens=tokens)


@pytest.fixture
def real(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``REAL`` with fields changed; None drops one."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "real.json"
        fields = {name: value for name, value in (REAL | changes).items() if value is not None}
        path.write_text(json.dumps(fields))
        return path

    return write


def test_what_vllm_wrote_by_hand(real: Callable[..., Path]) -> None:
    bench = read_bench(real())
    rows = bench.requests
    assert tuple(rows.columns) == REQUEST_COLUMNS
    assert rows["arrival_s"].tolist() == [0.5, 0.0, 2.0]
    assert rows["outcome"].tolist() == ["completed", "failed", "completed"]
    assert rows["reason"].tolist() == ["", "Bad Request", ""]
    assert rows["e2e_s"].tolist()[::2] == [pytest.approx(0.8), 0.25]
    assert rows["tpot_s"][0] == pytest.approx(0.15)
    assert rows[["ttft_s", "tpot_s", "e2e_s"]].iloc[1].isna().all()
    assert np.isnan(rows["tpot_s"][2])
    summary = figures(bench, Slo(ttft_s=0.5, tpot_s=0.1))
    assert (summary["completed"], summary["failed"], summary["total_output_tokens"]) == (2, 1, 4)
    assert summary["request_goodput"] == 0.1  # the first one's TPOT is too long, a single token has none
    assert summary["total_token_throughput"] == 18.4
    assert summary["mean_ttft_ms"] == summary["median_ttft_ms"] == 375.0
    assert summary["std_itl_ms"] == pytest.approx(50.0)
    assert summary["p99_tpot_ms"] == pytest.approx(150.0)


def test_a_run_written_and_read_gives_the_same_metrics(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    run = finished_run()
    kept, slo = of_run(run), Slo(ttft_s=0.1, tpot_s=0.0105)
    write_bench(path, kept, slo=slo, model_id="tiny")
    written, back = json.loads(path.read_text()), read_bench(path)
    assert written["model_id"] == "tiny"
    assert figures(kept, slo) == {name: written[name] for name in figures(kept, slo)}
    assert figures(back, slo) == pytest.approx(figures(kept, slo), rel=1e-12)  # TPOT comes from seconds, not from ps
    for name in ("arrival_s", "input_tokens", "ttft_s", "e2e_s"):
        assert back.requests[name].to_numpy() == pytest.approx(run.requests[name].to_numpy(), nan_ok=True, abs=0)
    assert back.requests["reason"].tolist() == run.requests["reason"].tolist()
    assert 0 < written["request_goodput"] < written["request_throughput"]
    assert list(tmp_path.iterdir()) == [path]


def test_token_gaps_add_up_to_the_latency() -> None:
    run = finished_run()
    kept = of_run(run)
    done = run.requests["outcome"] == "completed"
    sums = run.requests["ttft_s"] + [gaps.sum() for gaps in kept.gaps_s]
    assert sums[done].to_numpy() == pytest.approx(run.requests["e2e_s"][done].to_numpy(), rel=1e-12)
    counts = np.array([len(gaps) for gaps in kept.gaps_s])
    assert counts[done].tolist() == (run.requests["output_tokens"][done] - 1).tolist()


def test_a_run_directory_keeps_its_tokens_on_request(tmp_path: Path) -> None:
    run = finished_run()
    back = read_run(write_run(tmp_path / "kept", run, "seed: 0\n"))
    assert back.tokens is not None
    assert figures(of_run(back)) == figures(of_run(run))
    bare = read_run(write_run(tmp_path / "bare", finished_run(tokens=False), "seed: 0\n"))
    assert bare.tokens is None
    with pytest.raises(ConfigError, match=r"--tokens"):
        of_run(bare)


def test_requests_are_in_order_of_sending() -> None:
    run = finished_run()
    turned = replace(run, requests=run.requests.iloc[::-1])
    assert of_run(turned).requests["arrival_s"].is_monotonic_increasing
    assert figures(of_run(turned)) == figures(of_run(run))


def test_nothing_served_is_none_not_zero(real: Callable[..., Path]) -> None:
    nothing = {"input_lens": [], "output_lens": [], "ttfts": [], "itls": [], "start_times": [], "errors": []}
    summary = figures(read_bench(real(duration=0.0, **nothing)))
    assert summary["completed"] == 0
    assert summary["mean_ttft_ms"] is summary["request_throughput"] is summary["request_goodput"] is None


def test_goodput_in_vllms_words() -> None:
    assert goodput_slo(["ttft:200", "tpot:50", "e2el:5000"]) == Slo(ttft_s=0.2, tpot_s=0.05, e2e_s=5.0)


@pytest.mark.parametrize("pair", ["ttft", "itl:5", "tpot:fast", "tpot:-1", "e2el:inf", "e2el:nan"])
def test_goodput_mistakes(pair: str) -> None:
    with pytest.raises(ConfigError, match=rf"--goodput {pair}"):
        goodput_slo([pair])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttfts": None}, "ttfts: missing; run 'vllm bench serve' with --save-detailed"),
        ({"itls": None}, "itls: missing"),
        ({"duration": None}, "duration: missing"),
        ({"duration": "long"}, "duration: 'long' must be"),
        ({"ttfts": [0.5, 0.0]}, "entries"),
        ({"output_lens": [3, 0]}, "output_lens has 2 entries, ttfts 3"),
        ({"errors": [""]}, "entries"),
        ({"ttfts": [0.5, -1.0, 0.1]}, "ttfts: -1.0 must be a number >= 0"),
        ({"itls": [["x"], [], []]}, "itls: 'x' must be"),
        ({"start_times": [1.0, 2.0]}, "start_times has 2 entries"),
    ],
)
def test_damaged_files_are_named(real: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    path = real(**changes)
    with pytest.raises(ConfigError, match=rf"real\.json: .*{message}"):
        read_bench(path)


def test_what_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ConfigError, match=r"x\.json: cannot be read"):
        read_bench(path)
    for text in ("{", "[]", "\x00", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.json: (not a JSON object|is not JSON|nested too deeply)"):
            read_bench(path)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100),  # start
            st.integers(1, 5000),  # input tokens
            st.floats(0.001, 50),  # TTFT
            st.lists(st.floats(0, 5), max_size=8),  # gaps
            st.booleans(),  # served
        ),
        min_size=1,
        max_size=12,
    )
)
def test_reading_and_writing_again_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[float, int, float, list[float], bool]]
) -> None:
    folder = tmp_path_factory.mktemp("bench")
    fields = {
        "duration": 10.0,
        "start_times": [shape[0] for shape in shapes],
        "input_lens": [shape[1] for shape in shapes],
        "ttfts": [shape[2] if shape[4] else 0.0 for shape in shapes],
        "itls": [shape[3] if shape[4] else [] for shape in shapes],
        "output_lens": [1 + len(shape[3]) if shape[4] else 0 for shape in shapes],
        "errors": ["" if shape[4] else "no" for shape in shapes],
    }
    folder.joinpath("a.json").write_text(json.dumps(fields))
    first = read_bench(folder / "a.json")
    write_bench(folder / "b.json", first)
    again = read_bench(folder / "b.json")
    assert figures(again) == figures(first)
    assert again.requests.equals(first.requests)


VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests", "rtfx", "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts",
    "errors",
    *(f"{word}_{name}_ms" for word in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip
"""What vllm/benchmarks/serve.py writes with --save-result --save-detailed."""


def test_every_field_of_vllm_is_written(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_bench(path, of_run(finished_run()), model_id="tiny", num_prompts=12)
    written = json.loads(path.read_text())
    assert VLLM_KEYS - written.keys() == set()
    assert (written["tokenizer_id"], written["request_rate"], written["label"]) == ("tiny", "inf", None)
    assert written["generated_texts"] == [""] * 12


def test_the_busiest_second(real: Callable[..., Path]) -> None:
    """By hand: sent at 0.5 and 2.0; served 0.5 + 0.5, 0.1, 0.2 s, and 2.0 + 0.25 s; seconds count from the first."""
    found = peaks(read_bench(real()))
    assert found == {"max_output_tokens_per_s": 3.0, "max_concurrent_requests": 1, "rtfx": 0.0}
    assert peaks(read_bench(real(start_times=[1.0, 1.5, 1.2])))["max_concurrent_requests"] == 2
