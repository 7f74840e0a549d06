"""Sweeps over rates, seeds and systems."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.scenario.file import Scenario
from experiments.sweeps.sweep import Here, best_rates, means, points, process_pool, run_points
from sim import ConfigError
from sim.metrics import estimate
from sim.types import InfeasibleError
from tests.command import call

SCENARIO = """
model: llama-3.1-8b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 2}]
workload:
  rate: 1.0
  generate: {requests: 8, input: {mean: 300, median: 200, max: 900}, output: {fixed: 20}}
system: {name: vllm, tp: 1}
latency: roofline
slo: {ttft_s: 1.0, tpot_s: 0.05, attainment: 0.9}
seed: 5
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


def test_every_system_rate_and_seed_is_a_run(scenario: Path) -> None:
    todo = points(Scenario.load(scenario), rates_per_s=[1.0, 4.0], seeds=2, systems="vllm,sarathi-serve")
    rows, _ = run_points(todo, Here())
    keys = [(row["system"], row["rate_per_s"], row["seed"]) for row in rows]
    assert keys == [(s, r, seed) for s in ("vllm", "sarathi-serve") for r in (1.0, 4.0) for seed in (5, 6)]
    assert all(row["completed"] == 8 for row in rows)
    assert rows[0]["ttft_p50_s"] != rows[1]["ttft_p50_s"]  # another seed, other lengths
    assert rows[0]["makespan_s"] > rows[2]["makespan_s"]  # four times the rate
    assert rows[0]["tokens_per_s_per_user"] == pytest.approx(1 / rows[0]["tpot_p50_s"])
    assert rows[0]["tokens_per_s_per_gpu"] == pytest.approx(rows[0]["output_tokens_per_s"] / 2)
    assert rows[2]["good_requests_per_s"] == 4.0 * rows[2]["attainment"]


def test_any_executor_gives_the_same_rows(scenario: Path) -> None:
    todo = points(Scenario.load(scenario), rates_per_s=[1.0, 2.0], seeds=1, systems="vllm,sarathi-serve")
    counted: list[int] = []
    here = run_points(todo[:3], Here(), lambda: counted.append(1))
    assert len(counted) == 3
    with ThreadPoolExecutor(2) as threads:
        assert run_points(todo[:3], threads) == here
    with process_pool(2) as processes:
        assert run_points(todo[:3], processes) == here


def test_points_without_a_plan_are_left_out_and_named(scenario: Path) -> None:
    impossible = Scenario.load(scenario, ["slo.tpot_s=1e-6"])
    todo = points(impossible, rates_per_s=[1.0, 2.0], seeds=1, systems="melange,vllm")
    rows, no_plan = run_points(todo, Here())
    assert [(row["system"], row["rate_per_s"]) for row in rows] == [("vllm", 1.0), ("vllm", 2.0)]
    assert list(no_plan) == ["melange at 1/s", "melange at 2/s"]
    with pytest.raises(InfeasibleError, match=r"within slo\.tpot_s 1e-06"):
        run_points(todo[:2], Here())


def test_the_first_error_stops_the_sweep(scenario: Path) -> None:
    todo = points(Scenario.load(scenario, ["model=llama-2-70b"]), rates_per_s=[1.0], seeds=3, systems="vllm")
    counted: list[int] = []
    with pytest.raises(ConfigError, match="does not fit"):
        run_points(todo, Here(), lambda: counted.append(1))
    assert not counted


@pytest.mark.parametrize(
    ("rates", "seeds"), [([], 1), ([1.0], 0), ([0.0], 1), ([-2.0], 1), ([math.inf], 1), ([math.nan], 1)]
)
def test_mistakes(scenario: Path, rates: list[float], seeds: int) -> None:
    with pytest.raises(ConfigError, match="--rates"):
        points(Scenario.load(scenario), rates_per_s=rates, seeds=seeds)


# ---------------------------------------------------------------- over the seeds


def test_a_confidence_interval_by_hand() -> None:
    value = estimate([1.0, 2.0, 3.0])
    assert value is not None
    assert (value.mean, value.runs) == (2.0, 3)
    assert value.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # Student's t, 2 degrees of freedom
    assert estimate([5.0]) == (5.0, None, 1)
    assert estimate([float("nan"), 5.0]) == (5.0, None, 1)
    assert estimate([float("nan")]) is None
    narrow = estimate([1.0, 2.0, 3.0], level=0.5)
    assert narrow is not None
    assert narrow.half_width == pytest.approx(0.816497 / math.sqrt(3), rel=1e-6)


def rows(*attainments: tuple[str, float, float], usd_per_hour: float | None = 36.0) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"system": system, "rate_per_s": rate, "seed": n, "attainment": share, "cluster_usd_per_hour": usd_per_hour}
            for n, (system, rate, share) in enumerate(attainments)
        ]
    )


def test_means_over_the_seeds() -> None:
    table = means(rows(("a", 1.0, 0.8), ("a", 1.0, 1.0), ("a", 2.0, 0.5)).assign(tpot_p50_s=[0.1, None, None]))
    shares = table[table["metric"] == "attainment"].set_index("rate_per_s")
    assert shares.loc[1.0, "mean"] == pytest.approx(0.9)
    assert shares.loc[1.0, "high"] - 0.9 == pytest.approx(12.7062 * 0.1, rel=1e-5)  # t with 1 degree of freedom
    assert shares.loc[1.0, "mean"] - shares.loc[1.0, "low"] == pytest.approx(shares.loc[1.0, "high"] - 0.9)
    assert math.isnan(shares.loc[2.0, "low"])
    assert shares["runs"].tolist() == [2, 1]
    assert table[table["metric"] == "tpot_p50_s"]["runs"].tolist() == [1]  # at rate 2 nobody has a value


def test_the_highest_rate_that_reaches_the_target() -> None:
    table = rows(("a", 1.0, 1.0), ("a", 2.0, 0.8), ("a", 2.0, 1.0), ("a", 4.0, 0.5), ("b", 1.0, 0.89))
    a, b = best_rates(table, target=0.9, gpus=4)
    assert (a["rate_per_s"], a["rate_per_s_per_gpu"]) == (2.0, 0.5)
    assert a["requests_per_usd"] == pytest.approx(2 * 3600 / 36)
    assert (b["rate_per_s"], b["rate_per_s_per_gpu"], b["requests_per_usd"]) == (None, None, None)
    (free,) = best_rates(rows(("a", 1.0, 1.0), usd_per_hour=None), target=0.9, gpus=1)
    assert free["rate_per_s"] == 1.0
    assert free["requests_per_usd"] is None


# ---------------------------------------------------------------- the command


def test_the_command_writes_tables_and_figures(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rates", "1,8", "--seeds", 2, "--systems", "vllm,sarathi-serve", "--workers", 1)
    assert call("sweep", scenario, *options, "--out", "swept") == 0
    out, err = capsys.readouterr()
    assert "sarathi-serve" in out
    assert "rates.png" in err
    folder = Path("swept")
    assert len(pd.read_csv(folder / "runs.csv")) == 8
    for name in ("rates", "pareto"):
        assert all(folder.joinpath(f"{name}.{suffix}").stat().st_size > 500 for suffix in ("png", "svg", "csv"))
    summary = json.loads(folder.joinpath("summary.json").read_text())
    assert [row["rate_per_s"] for row in summary["best_rates"]] == [8.0, 8.0]
    again = Scenario.load(folder / "scenario.yaml")
    assert again.seed == 5
    first = folder.joinpath("means.csv").read_bytes()
    assert call("sweep", scenario, *options, "--out", "swept", "--json", "--quiet") == 0  # replaces its own
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["runs"]) == 8
    assert folder.joinpath("means.csv").read_bytes() == first


def test_exit_code_1_if_no_rate_reaches_the_target(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: tuple[Any, ...] = ("--rates", "2", "--seeds", 1, "--systems", "vllm", "--workers", 1, "--quiet")
    assert call("sweep", scenario, *options, "--set", "slo.ttft_s=0.000001", "--out", "swept") == 1


@pytest.mark.parametrize("rates", ["fast", "0", ",", "-1"])
def test_bad_rates_are_one_line(scenario: Path, capsys: pytest.CaptureFixture[str], rates: str) -> None:
    assert call("sweep", scenario, f"--rates={rates}", "--out", "swept") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("swept").exists()


def test_a_run_is_exported_and_compares_with_itself(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("run", scenario, "--out", "kept", "--tokens", "--quiet")
    call("run", scenario, "--out", "bare", "--quiet")
    capsys.readouterr()
    goodput = ("--goodput", "ttft:1000", "--goodput", "tpot:50")
    assert call("export", "kept", "--perfetto", "trace.json", "--vllm-bench", "bench.json", *goodput) == 0
    assert capsys.readouterr().out.split() == ["trace.json", "bench.json"]
    assert json.loads(Path("bench.json").read_text())["num_prompts"] == 8
    assert call("compare-run", "kept", "bench.json", "--tolerance", "1e-9", "--quiet") == 0
    assert "TTFT p99" in capsys.readouterr().out
    for arguments in (("kept",), ("kept", "--vllm-bench", "x", "--goodput", "itl:5"), ("bare", "--vllm-bench", "x")):
        assert call("export", *arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("x").exists()
