"""Results of load generators: each by its own name, in its own units, or refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.readers.agree import contradictions, load_remarks
from experiments.readers.read import READERS, read_measured
from sim.types import ConfigError


def saved(folder: Path, *records: Any, name: str = "r.json") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


SGLANG = {
    "backend": "sglang", "duration": 4.0, "completed": 2, "total_output_tokens_retokenized": 9,
    "request_rate": float("inf"), "request_throughput": 0.5, "output_throughput": 5.0, "mean_ttft_ms": 50.0,
    "mean_tpot_ms": 10.0,
    "mean_e2e_latency_ms": 140.0, "median_e2e_latency_ms": 130.0, "max_concurrency": 4,
}  # fmt: skip
INFERENCEX = {"hw": "h200", "tp": 8, "conc": 16, "model": "m", "output_tput_per_gpu": 250.0, "median_ttft": 0.45,
              "p99_e2el": 14.2, "median_tpot": 0.012}  # fmt: skip
AIPERF = {
    "aiperf_version": "0.3", "time_to_first_token": {"unit": "ms", "avg": 50.0, "p50": 40.0},
    "request_latency": {"unit": "sec", "avg": 0.25}, "request_count": {"unit": "requests", "avg": 6.0},
    "request_throughput": {"unit": "requests/sec", "avg": 2.0}, "input_config": {"endpoint": {"model_names": ["m-8b"]}},
}  # fmt: skip
INFERENCE_PERF = {
    "load_summary": {"count": 10},
    "successes": {
        "count": 10,
        "latency": {"request_latency": {"mean": 2.0, "median": 1.5}, "time_to_first_token": {"mean": 0.05, "p99": 0.5}},
        "throughput": {"requests_per_sec": 2.5, "output_tokens_per_sec": 70.0},
    },
    "failures": {"count": 1},
}
TRTLLM = {
    "engine": {"model": "meta-llama/Llama-3.1-8B"}, "world_info": {"tp_size": 2}, "request_info": {"num_requests": 6},
    "performance": {"total_latency_ms": 3400.0, "avg_request_latency_ms": 242.5},
    "streaming_metrics": {"avg_ttft_ms": 52.5, "ttft_percentiles": {"p50": 51.0, "p99": 60.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "tool", "expected"),
    [
        (SGLANG, "sglang", {"TTFT mean (s)": 0.05, "E2E mean (s)": 0.14, "E2E p50 (s)": 0.13, "makespan (s)": 4.0}),
        (INFERENCEX, "InferenceX", {"TTFT p50 (s)": 0.45, "E2E p99 (s)": 14.2, "output tokens/s": 2000.0}),
        (AIPERF, "aiperf", {"TTFT mean (s)": 0.05, "TTFT p50 (s)": 0.04, "E2E mean (s)": 0.25, "makespan (s)": 3.0}),
        (INFERENCE_PERF, "inference-perf", {"requests": 11, "completed": 10, "E2E p50 (s)": 1.5, "makespan (s)": 4.0}),
        (TRTLLM, "trtllm-bench", {"TTFT p99 (s)": 0.06, "E2E mean (s)": 0.2425, "makespan (s)": 3.4, "requests": 6}),
    ],
)
def test_summaries_in_seconds_under_the_tools_own_name(tmp_path, fields, tool, expected) -> None:
    measured = read_measured(saved(tmp_path, fields))
    assert measured.source == tool
    assert {name: measured.measures[name] for name in expected} == pytest.approx(expected)


def record(number: int, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"request_start_ns": 10**18 + number * 10**9, "benchmark_phase": "profiling", **more},
        "metrics": {
            "input_sequence_length": {"value": 100, "unit": "tokens"},
            "output_sequence_length": {"value": 11, "unit": "tokens"},
            "time_to_first_token": {"value": 50.0, "unit": "ms"},
            "request_latency": {"value": 0.25, "unit": "s"},
        },
    }


def test_the_requests_of_aiperf(tmp_path: Path) -> None:
    lines = [record(0, benchmark_phase="warmup"), record(1), record(2), record(3, was_cancelled=True)]
    measured = read_measured(saved(tmp_path, *lines, name="profile_export.jsonl"))
    assert measured.bench is not None
    rows = measured.bench.requests
    assert rows["outcome"].tolist() == ["completed", "completed", "failed"]
    assert rows["arrival_s"].tolist() == pytest.approx([0, 1, 2], abs=1e-6)
    assert measured.measures["TPOT mean (s)"] == pytest.approx(0.02)


def test_the_raw_export_of_genai_perf(tmp_path: Path) -> None:
    requests = [
        {"timestamp": n * 10**9, "response_timestamps": [n * 10**9 + 5 * 10**7, n * 10**9 + 10**8]} for n in (1, 2)
    ]
    fields = {"service_kind": "openai", "experiments": [
        {"experiment": {"mode": "request_rate", "value": 1.0}, "requests": requests}]}  # fmt: skip
    measured = read_measured(saved(tmp_path, fields))
    found = {name: measured.measures[name] for name in ("TTFT mean (s)", "E2E p99 (s)", "ITL p50 (s)", "makespan (s)")}
    assert found == pytest.approx(dict(zip(found, (0.05, 0.1, 0.05, 1.1), strict=True)))
    assert measured.measures["TPOT mean (s)"] is None
    assert measured.facts == {"request_rate": 1.0}


def test_a_sampled_report_of_guidellm_counts_by_its_metrics(tmp_path: Path) -> None:
    request = {"prompt_tokens": 5, "output_tokens": 3, "request_start_time": 1.0, "time_to_first_token_ms": 50.0,
               "inter_token_latency_ms": 10.0}  # fmt: skip
    totals = {"successful": 100, "errored": 2, "incomplete": 1, "total": 103}
    metrics = {
        "request_totals": totals,
        "time_to_first_token_ms": {
            "successful": {"mean": 70.0, "median": 60.0, "percentiles": {"p90": 90.0, "p99": 99.0}}
        },
        "request_latency": {"successful": {"mean": 1.5}},
        "requests_per_second": {"successful": {"mean": 2.0}},
    }
    report = {"benchmarks": [{"requests": {"successful": [request]}, "metrics": metrics, "duration": 50.0,
                              "config": {"backend": {"model": "m-8b"}}}]}  # fmt: skip
    measured = read_measured(saved(tmp_path, report))
    assert measured.bench is None
    assert "a sample of 1 of 100 requests" in measured.remarks[0]
    expected = {"completed": 100, "requests": 103, "TTFT mean (s)": 0.07, "TTFT p99 (s)": 0.099, "E2E mean (s)": 1.5}
    assert {name: measured.measures[name] for name in expected} == pytest.approx(expected)
    totals["successful"] = 1
    whole = read_measured(saved(tmp_path, report))
    assert whole.bench is not None
    assert whole.measures["E2E mean (s)"] == pytest.approx(0.07)


def test_several_runs_in_a_file_and_compressed_ones(tmp_path: Path) -> None:
    path = saved(tmp_path, SGLANG, {**SGLANG, "mean_ttft_ms": 60.0}, name="r.jsonl")
    with pytest.raises(ConfigError, match="it has 2 benchmarks; choose one with --benchmark 0, 1"):
        read_measured(path)
    assert read_measured(path, 1).measures["TTFT mean (s)"] == 0.06
    packed = tmp_path / "r.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(AIPERF).encode()))
    assert read_measured(packed).source == "aiperf"
    with pytest.raises(ConfigError, match="has one benchmark only"):
        read_measured(packed, 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {**SGLANG, "mean_ttft_ms": 0.05},
            "a mean TTFT of 5e-05 s is not possible: were seconds written as milliseconds",
        ),
        ({**SGLANG, "mean_tpot_ms": 0.01}, "a mean TPOT of 1e-05 s is not possible"),
        ({**SGLANG, "mean_e2e_latency_ms": 9000.0}, "a mean E2E of 9 s is longer than the benchmark's 4 s"),
        ({**SGLANG, "mean_ttft_ms": 1400.0}, "a mean TTFT of 1.4 s is more than the mean E2E of 0.14 s"),
        ({**INFERENCEX, "median_ttft": 450.0, "duration": 60.0}, "were milliseconds written as seconds"),
        ({**AIPERF, "request_latency": {"unit": "hours", "avg": 1}}, "request_latency.unit: 'hours' must be one of"),
        ({"elapsed_time": 1.0, "tokens_per_second": 5.0}, "looks like a result of vllm bench throughput; not read"),
        ({"avg_latency": 1.0, "percentiles": {}}, "looks like a result of vllm bench latency; not read"),
        ({"a": 1, "b": 2}, "not a result that is known .found a, b.; known: guidellm"),
        ([1, 2], "not a JSON object"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, fields: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_measured(saved(tmp_path, fields))


@pytest.mark.parametrize(
    ("facts", "remarks"),
    [
        ({"model": "meta-llama/Llama-3.1-8B-Instruct", "gpu": "NVIDIA H100 80GB HBM3", "tp": 1}, []),
        ({"model": "Meta-Llama-3.1-8B-FP8"}, []),
        ({"model": "zai-org/GLM-5-FP8"}, [False]),
        ({"model": "meta-llama/Llama-3.1-70B-Instruct"}, [True]),
        ({"gpu": "h200"}, [True]),
        ({"gpu": "node-7"}, [False]),
        ({"tp": 4}, [True]),
    ],
)
def test_facts_that_contradict_the_scenario(facts: dict[str, Any], remarks: list[bool]) -> None:
    found = contradictions(facts, model="llama-3.1-8b", gpus=["H100-SXM"], tps=[1])
    assert [void for _, void in found] == remarks


def test_loads_that_differ() -> None:
    facts = {"max_concurrency": 16, "request_rate": "inf"}
    assert len(list(load_remarks(facts, rate=2.0, clients=None))) == 2
    assert list(load_remarks(facts, rate=None, clients=16)) == []
    assert list(load_remarks({"request_rate": 2.02}, rate=2.0, clients=None)) == []


def test_every_reader_says_what_it_reads() -> None:
    assert len({reader.tool for reader in READERS}) == len(READERS)
    assert all(reader.reads for reader in READERS)
