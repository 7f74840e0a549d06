"""``phasewise compare-run``: a real result beside its prediction, from any of the tools that write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.runs.rundir import MARK
from experiments.runs.vllm_bench import Bench, read_bench, write_bench
from experiments.scenario.file import Scenario
from experiments.validation.measured import compare, measures, predict, read_measured
from sim.types import ConfigError
from tests.experiments.cli.test_cli import call

SCENARIO = """\
model: llama-2-7b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 1}]
workload:
  generate: {requests: 40, input: {uniform: [50, 500]}, output: {uniform: [2, 40]}}
  rate: 8
system: {name: vllm, tp: 1}
"""
BY_HAND = {
    "duration": 4.0,
    "input_lens": [100, 60, 50],
    "output_lens": [3, 0, 1],
    "ttfts": [0.5, 0.0, 0.25],
    "itls": [[0.1, 0.2], [], []],
    "start_times": [1000.0, 1000.5, 1002.0],
    "errors": ["", "Bad Request", ""],
}


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small scenario in the current folder, and its run directory beside it."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SCENARIO)
    assert call("run", "small.yaml", "--out", "run", "--tokens", "--quiet") == 0
    return Path("small.yaml")


def written(fields: dict[str, Any], name: str = "real.json") -> Path:
    path = Path(name)
    path.write_text(json.dumps(fields))
    return path


def slower(factor: float) -> Path:
    """What the scenario's own run would be on a server that takes ``factor`` times as long."""
    assert call("export", "run", "--vllm-bench", "same.json") == 0
    fields = json.loads(Path("same.json").read_text())
    for name in ("ttfts", "latencies"):
        fields[name] = [factor * value for value in fields[name]]
    fields["itls"] = [[factor * gap for gap in gaps] for gaps in fields["itls"]]
    return written(fields, "slower.json")


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], dict[str, Any]]:
    capsys.readouterr()
    code = call("compare-run", *arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    return code, {row["metric"]: row for row in found["metrics"]}, found


def test_a_run_beside_itself_has_no_error(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = slower(1.0)
    code, rows, found = rows_of(capsys, scenario, real, "--tolerance", 1e-6)
    assert code == 0
    assert {name for name, row in rows.items() if row["error"] is None} == {"requests"}
    assert all(row["error"] == pytest.approx(0, abs=1e-7) for row in rows.values() if row["error"] is not None)
    assert found["requests"]["E2E"] == {"p50": pytest.approx(0, abs=1e-7), "p90": pytest.approx(0, abs=1e-7)}


@pytest.mark.parametrize("prediction", ["small.yaml", "run"])
def test_a_server_twice_as_slow(scenario: Path, capsys: pytest.CaptureFixture[str], prediction: str) -> None:
    real = slower(2.0)
    code, rows, found = rows_of(capsys, prediction, real, "--tolerance", 0.3)
    assert code == 1
    for name in ("TTFT p50", "TPOT mean", "ITL p99", "E2E p90"):
        assert rows[f"{name} (s)"]["error"] == pytest.approx(-0.5, abs=1e-6)
    assert rows["output tokens/s"]["error"] == pytest.approx(0, abs=1e-6)
    assert found["requests"]["TTFT"]["p50"] == pytest.approx(0.5, abs=1e-6)
    code, _, _ = rows_of(capsys, prediction, real, "--tolerance", 0.6)
    assert code == 0


def test_a_prediction_that_rejects_is_beyond_any_tolerance(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--set", "system.engine.max_model_len=100"]
    code, rows, _ = rows_of(capsys, scenario, slower(1.0), "--tolerance", 0.2, *short)
    assert code == 1
    assert rows["completed"]["error"] < -0.5
    code, rows, found = rows_of(
        capsys, scenario, slower(1.0), "--tolerance", 0.9, "--set", "system.engine.max_model_len=3"
    )
    assert (code, rows["completed"]["error"], rows["TTFT mean (s)"]["error"]) == (1, -1.0, None)
    assert found["requests"]["TTFT"]["p50"] is None


def test_metrics_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = measures(read_bench(written(BY_HAND)))
    assert (found["requests"], found["completed"], found["makespan (s)"]) == (3, 2, 4.0)
    assert found["TTFT mean (s)"] == 0.375
    assert found["TPOT p50 (s)"] == found["ITL mean (s)"] == pytest.approx(0.15)
    assert found["ITL p90 (s)"] == pytest.approx(0.19)
    assert found["E2E mean (s)"] == pytest.approx((0.8 + 0.25) / 2)
    assert (found["requests/s"], found["output tokens/s"]) == (0.5, 1.0)


def test_what_was_served_is_simulated_when_it_was_sent(scenario: Path) -> None:
    measured = read_measured(written(BY_HAND))
    predicted = predict(Scenario.load(scenario), measured, own=False).requests
    assert predicted["arrival_s"].tolist() == [0.0, 2.0]
    assert predicted["input_tokens"].tolist() == [100, 50]
    assert predicted["output_tokens"].tolist() == [3, 1]
    own = predict(Scenario.load(scenario), measured, own=True)
    assert len(own.requests) == 40
    assert compare(measured, own).requests is None


def test_arrays_in_any_order_are_paired_by_time(scenario: Path) -> None:
    measured = read_measured(written({**BY_HAND, "start_times": [1005.0, 1000.5, 1002.0]}))
    comparison = compare(measured, predict(Scenario.load(scenario), measured, own=False))
    assert comparison.requests is not None
    assert comparison.requests["input_tokens"].tolist() == [50, 100]
    assert comparison.requests["TTFT measured (s)"].tolist() == [0.25, 0.5]
    assert comparison.requests["TPOT measured (s)"].tolist() == [
        pytest.approx(float("nan"), nan_ok=True),
        pytest.approx(0.15),
    ]


def test_summaries_are_enough_for_the_scenarios_own_requests(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "duration": 5.0, "completed": 40, "failed": 0, "mean_ttft_ms": 50.0, "median_tpot_ms": 8.0,
        "p99_e2el_ms": 1000.0, "output_throughput": 170.0, "request_throughput": 8.0,
    }  # fmt: skip
    real = written(fields)
    assert call("compare-run", scenario, real) == 2
    assert "--workload scenario" in capsys.readouterr().err
    code, rows, found = rows_of(capsys, scenario, real, "--workload", "scenario")
    assert (code, found["requests"]) == (0, {})
    assert rows["TTFT mean (s)"]["measured"] == 0.05
    assert rows["TPOT p50 (s)"]["error"] == pytest.approx(rows["TPOT p50 (s)"]["predicted"] / 0.008 - 1)
    assert (rows["E2E p99 (s)"]["measured"], rows["ITL p90 (s)"]["measured"]) == (1.0, None)
    assert rows["ITL p90 (s)"]["error"] is None


def test_figures_and_tables(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = slower(1.1)
    assert call("compare-run", scenario, real, "--out", "compared") == 0
    names = {f"{name}.{suffix}" for name in ("latency", "requests") for suffix in ("png", "svg", "csv")}
    assert {path.name for path in Path("compared").iterdir()} == names | {"metrics.csv", MARK}
    assert len(pd.read_csv("compared/requests.csv")) == 40
    assert set(pd.read_csv("compared/latency.csv")["run"]) == {"measured", "predicted"}
    assert "TTFT of each request: off by 9.1% (median)" in capsys.readouterr().out
    assert call("compare-run", scenario, real, "--out", "compared") == 0  # again


def test_partial_and_coarse_measurements_say_so(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coarse = {**BY_HAND, "output_lens": [6, 0, 1], "phasewise": {"partial": True, "stopped": "interrupted"}}
    _, _, found = rows_of(capsys, scenario, written(coarse))
    assert found["remarks"] == [
        "the measurement is partial: interrupted",
        "the server sent 1.75 tokens per event: measured ITL is between events, not tokens",
    ]


# ---------------------------------------------------------------- guidellm


def guidellm_request(start_s: float, inputs: int, outputs: int, ttft_ms: float, gap_ms: float | None) -> dict[str, Any]:
    return {"request_start_time": start_s, "prompt_tokens": inputs, "output_tokens": outputs, "request_latency": 9.9,
            "time_to_first_token_ms": ttft_ms, "inter_token_latency_ms": gap_ms,
            "time_per_output_token_ms": 77.0}  # fmt: skip


def guidellm_report(*, old: bool = False) -> dict[str, Any]:
    good = [guidellm_request(50.0, 100, 5, 200.0, 50.0), guidellm_request(49.0, 80, 1, 100.0, None)]
    for item in good if old else ():
        item["start_time"] = item.pop("request_start_time")
        item["inter_token_latency_ms"] = item["inter_token_latency_ms"] or 0.0
    bad = [{"prompt_tokens": 7, "output_tokens": None, "request_start_time": 49.5, "error": "timeout"}]
    return {"benchmarks": [{"requests": {"successful": good, "incomplete": [], "errored": bad}}]}


@pytest.mark.parametrize("old", [False, True])
def test_guidellms_tpot_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    measured = read_measured(written(guidellm_report(old=old)))
    assert measured.source == "guidellm"
    assert measured.bench is not None
    rows = measured.bench.requests
    assert rows["arrival_s"].tolist()[:2] == [1.0, 0.0]
    assert rows["tpot_s"][0] == pytest.approx(0.05)
    assert rows["e2e_s"].tolist()[:2] == [pytest.approx(0.4), pytest.approx(0.1)]
    assert rows["reason"].tolist() == ["", "", "timeout"]
    assert measured.measures["makespan (s)"] == pytest.approx(1.4)
    assert (measured.measures["ITL p50 (s)"], measured.measures["completed"]) == (None, 2)


def test_a_report_of_several_benchmarks(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = guidellm_report()
    real = written({"benchmarks": [report["benchmarks"][0], {"requests": {"successful": []}}]})
    assert call("compare-run", scenario, real) == 2
    assert "it has 2 benchmarks; choose one with --benchmark" in capsys.readouterr().err
    assert call("compare-run", scenario, real, "--benchmark", 2) == 2
    assert "--benchmark 2: it has 2" in capsys.readouterr().err
    code, rows, _ = rows_of(capsys, scenario, real, "--benchmark", 0)
    assert (code, rows["completed"]["predicted"]) == (0, 2)
    assert call("compare-run", scenario, real, "--benchmark", 1) == 2
    assert "no request that was served" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmarks": []}, "benchmarks: must be a list"),
        ({"benchmarks": [{}]}, r"benchmarks\[0\].requests.successful: missing"),
        ({"benchmarks": [{"requests": {"successful": [3]}}]}, "must be an object"),
        (
            {"benchmarks": [{"requests": {"successful": [{"prompt_tokens": 5}]}}]},
            "output_tokens: None must be a number",
        ),
        (
            {"benchmarks": [{"requests": {"successful": [guidellm_request(1, 5, 5, -1, 5)]}}]},
            "time_to_first_token_ms: -1",
        ),
        ({"duration": "x", "ttfts": []}, "duration: 'x' must be"),
        ({}, "not a result that is known"),
        ({"duration": 1, "mean_ttft_ms": "soon"}, "mean_ttft_ms: 'soon' must be a number"),
        ({**BY_HAND, "ttfts": [1]}, "entries"),
    ],
)
def test_damaged_results_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"real\.json: .*{message}"):
        read_measured(written(fields))


def test_a_result_without_sending_times(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = written({name: value for name, value in BY_HAND.items() if name != "start_times"})
    assert call("compare-run", scenario, real) == 2
    assert "does not say when requests were sent" in capsys.readouterr().err
    assert call("compare-run", scenario, real, "--workload", "trace") == 2
    assert call("compare-run", scenario, "absent.json") == 2
    assert call("compare-run", scenario, real, "--benchmark", 0) == 2


def test_reading_what_was_written_pairs_with_itself(scenario: Path) -> None:
    measured = read_measured(slower(1.5))
    assert measured.bench is not None
    write_bench(Path("again.json"), measured.bench)
    again: Bench = read_bench(Path("again.json"))
    comparison = compare(measured, again)
    assert comparison.requests is not None
    assert comparison.beyond(1e-9) == []


def test_a_tolerance_that_judged_no_latency_fails(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"duration": 5.0, "completed": 40, "request_throughput": 8.0, "mean_ttft_ms": None, "median_ttft_ms": None}
    assert call("compare-run", "run", written(fields), "--tolerance", 1000) == 1
    assert "no latency was compared" in capsys.readouterr().err


def test_a_result_of_another_model_is_told(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**BY_HAND, "model_id": "zai-org/GLM-5"}
    assert call("compare-run", scenario, written(other)) == 0
    assert "the result is of model 'zai-org/GLM-5', the scenario of 'llama-2-7b'" in capsys.readouterr().err
    larger = written({**BY_HAND, "model_id": "meta-llama/Llama-2-70b-hf"})
    assert call("compare-run", scenario, larger) == 2
    assert call("compare-run", "run", larger) == 2
    assert call("compare-run", scenario, larger, "--despite") == 0
