"""Sweeps over rates, seeds and systems."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.jobs.executor import Jobs
from experiments.jobs.workers import Here, local, process_pool
from experiments.scenario.file import Scenario
from experiments.sweeps.grid import changes_of, grid_of, read_study
from experiments.sweeps.sweep import Asked, Point, best_rates, frame, labelled, means, points, run_points
from sim import ConfigError
from sim.metrics import estimate
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
    asked = Asked(scenario=Scenario.load(scenario), rates_per_s=(1.0, 4.0), seeds=2, systems="vllm,sarathi-serve")
    rows = run_points(points(asked), Here())
    keys = [(row["system"], row["rate_per_s"], row["seed"]) for row in rows]
    assert keys == [(s, r, seed) for s in ("vllm", "sarathi-serve") for r in (1.0, 4.0) for seed in (5, 6)]
    assert all(row["completed"] == 8 for row in rows)
    assert rows[0]["ttft_p50_s"] != rows[1]["ttft_p50_s"]  # another seed, other lengths
    assert rows[0]["makespan_s"] > rows[2]["makespan_s"]  # four times the rate
    assert rows[0]["tokens_per_s_per_user"] == pytest.approx(1 / rows[0]["tpot_p50_s"])
    assert rows[0]["tokens_per_s_per_gpu"] == pytest.approx(rows[0]["output_tokens_per_s"] / 2)
    assert rows[2]["good_requests_per_s"] == 4.0 * rows[2]["attainment"]


def test_any_executor_gives_the_same_rows(scenario: Path) -> None:
    todo = asked(scenario, rates_per_s=(1.0, 2.0), systems="vllm,sarathi-serve")[:3]
    counted: list[int] = []
    here = run_points(todo, Here(), lambda: counted.append(1))
    assert len(counted) == 3
    with ThreadPoolExecutor(2) as threads:
        assert run_points(todo, threads) == here
    with process_pool(2) as processes:
        assert run_points(todo, processes) == here


def asked(scenario: Path, overrides: tuple[str, ...] = (), **more: Any) -> list[Point]:
    return points(Asked(scenario=Scenario.load(scenario, overrides), **more))


def test_points_without_a_plan_have_a_row_that_says_so(scenario: Path) -> None:
    todo = asked(scenario, ("slo.tpot_s=1e-6",), rates_per_s=(1.0,), systems="melange,vllm")
    first, second = run_points(todo, Jobs(local(1)))
    assert "within slo.tpot_s 1e-06" in first["failure"]
    assert (second["failure"], second["completed"]) == (None, 8)


def test_a_point_that_fails_leaves_the_others(scenario: Path) -> None:
    changes: tuple[dict[str, Any], ...] = ({"model": "llama-2-70b"}, {"model": "llama-3.1-8b"})
    rows = run_points(asked(scenario, rates_per_s=(1.0,), changes=changes), Jobs(local(1)))
    assert "does not fit" in rows[0]["failure"]
    assert rows[1]["failure"] is None
    table = frame(rows)
    assert table["model"].tolist() == ["llama-2-70b", "llama-3.1-8b"]
    assert table.columns[-1] == "failure"


@pytest.mark.parametrize(("rates", "seeds"), [([1.0], 0), ([0.0], 1), ([-2.0], 1), ([math.inf], 1), ([math.nan], 1)])
def test_mistakes(scenario: Path, rates: list[float], seeds: int) -> None:
    with pytest.raises(ConfigError, match=r"--rates|--seeds"):
        asked(scenario, rates_per_s=tuple(rates), seeds=seeds)


# ---------------------------------------------------------------- any field


def test_any_field_is_varied(scenario: Path) -> None:
    changes = tuple(changes_of(grid_of(["system.engine.max_num_seqs=1,8", "cluster.nodes[0].count=1,2"]), None))
    rows = frame(run_points(asked(scenario, changes=changes), Here()))
    keys = rows[["system.engine.max_num_seqs", "cluster.nodes[0].count", "gpus"]].to_numpy().tolist()
    assert keys == [[1, 1, 1], [1, 2, 2], [8, 1, 1], [8, 2, 2]]
    assert (rows["rate_per_s"] > 0).all()  # the scenario's own arrivals
    names = labelled(rows, ["system.engine.max_num_seqs", "cluster.nodes[0].count"])["system"].tolist()
    assert names[:2] == ["vllm, max_num_seqs=1, count=1", "vllm, max_num_seqs=1, count=2"]
    with pytest.raises(ConfigError, match="max_num_seq"):
        asked(scenario, changes=({"system.engine.max_num_seq": 4},))


def test_a_study_file_has_grids_lists_and_samples(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("""
grid: {system.tp: [1, 2], seed: [3]}
list: [{workload.rate: 2.5}]
random: {samples: 3, seed: 1, fields: {a: {uniform: [1, 2]}, b: {log_uniform: [1, 100]}, c: {integers: [1, 2]},
         d: {choice: [x, y]}}}
""")
    points = read_study(file)
    assert points[:3] == [{"system.tp": 1, "seed": 3}, {"system.tp": 2, "seed": 3}, {"workload.rate": 2.5}]
    for point in points[3:]:
        assert 1 <= point["a"] <= 2
        assert 1 <= point["b"] <= 100
        assert point["c"] in (1, 2)
        assert point["d"] in ("x", "y")
    assert read_study(file) == points
    assert len(changes_of({"seed": [1, 2]}, file)) == 12


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "a study is a mapping"),
        ("grids: {a: [1]}", "'grids' is unknown"),
        ("grid: {a: 1}", "is not a list of values"),
        ("list: []", "list of mappings"),
        ("random: {samples: 0, fields: {a: {choice: [1]}}}", "samples"),
        ("random: {samples: 2, fields: {a: {uniform: [2, 1]}}}", "uniform"),
        ("random: {samples: 2, fields: {a: {normal: [0, 1]}}}", "normal"),
        ("random: {samples: 2, fields: {a: {log_uniform: [0, 1]}}}", "log_uniform"),
    ],
)
def test_mistakes_in_a_study_file(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_study(file)


@pytest.mark.parametrize("text", ["a", "a=", "=1,2", "a=[1"])
def test_mistakes_in_a_grid(text: str) -> None:
    with pytest.raises(ConfigError, match="--grid"):
        grid_of([text])


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
            {
                "system": system,
                "rate_per_s": rate,
                "seed": n,
                "attainment": share,
                "cluster_usd_per_hour": usd_per_hour,
                "gpus": 4,
            }
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
    a, b = best_rates(table, target=0.9)
    assert (a["rate_per_s"], a["rate_per_s_per_gpu"]) == (2.0, 0.5)
    assert a["requests_per_usd"] == pytest.approx(2 * 3600 / 36)
    assert (b["rate_per_s"], b["rate_per_s_per_gpu"], b["requests_per_usd"]) == (None, None, None)
    (free,) = best_rates(rows(("a", 1.0, 1.0), usd_per_hour=None), target=0.9)
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
