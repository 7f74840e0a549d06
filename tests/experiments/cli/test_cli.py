"""The command ``phasewise``: results on stdout, mistakes in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import phasewise as pw
from experiments.runs.comparison import run_all, variants
from experiments.runs.progress import Log
from experiments.runs.rundir import TABLES, read_run
from experiments.runs.tables import print_comparison, winners
from experiments.scenario.file import Scenario
from tests.command import call

SCENARIO = """\
model: llama-2-7b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 2}]
workload:
  generate: {requests: 30, input: {uniform: [50, 500]}, output: {uniform: [1, 40]}}
  rate: 10
system: {name: vllm, tp: 1}
compare:
  vllm: {tp: 1}
  splitwise: {prefill: {tp: 1, replicas: 1}, decode: {tp: 1}}
slo: {ttft_s: 1, tpot_s: 0.1}
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small scenario in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


def test_run_prints_one_json_object(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", scenario, "--json", "--set", "workload.rate=5") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["requests"], summary["completed"], summary["rejected"], summary["failed"]) == (30, 30, 0, 0)
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert {"mean", "p50", "p90", "p95", "p99"} <= set(summary[name])
    keys = {"makespan_s", "output_tokens_per_s", "usd_per_million_tokens", "cluster_usd_per_hour",
            "simulated_requests_per_s"}  # fmt: skip
    assert keys <= set(summary)
    assert 0 < summary["slo"]["attainment"] <= 1


def test_run_prints_a_table(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", scenario, "--set", "latency=roofline") == 0
    out = capsys.readouterr().out
    assert "TTFT (s)" in out
    assert "cost ($ per 1M output tokens)" in out
    assert "step times of A100-80G-SXM are a roofline estimate" in out


def test_equal_seeds_give_equal_runs_and_steps_do_not_matter(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(*options: str) -> dict[str, Any]:
        call("run", scenario, "--json", *options)
        summary: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {key: summary[key] for key in ("makespan_s", "ttft_s", "tpot_s", "e2e_s", "preemptions")}

    assert outcome("--seed", "3") == outcome("--seed", "3") == outcome("--seed", "3", "--step-by-step")
    assert outcome("--seed", "3") != outcome("--seed", "4")


def test_a_run_directory_can_be_read_run_again_and_replaced(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", scenario, "--out", "kept", "--quiet", "--set", "workload.limit=20") == 0
    names = {"scenario.yaml", "summary.json", "environment.json", *(f"{table}.parquet" for table in TABLES)}
    assert names <= {path.name for path in Path("kept").iterdir()}
    kept = read_run(Path("kept"))
    assert len(kept.requests) == kept.summary["requests"] == 20
    assert json.loads(Path("kept/environment.json").read_text())["packages"]["simpy"]
    assert not capsys.readouterr().err

    assert call("run", "kept/scenario.yaml", "--out", "again") == 0
    pd.testing.assert_frame_equal(read_run(Path("again")).requests, kept.requests)
    assert call("run", scenario, "--out", "again", "--set", "workload.limit=5") == 0
    assert len(read_run(Path("again")).requests) == 5
    assert {path.name for path in Path().iterdir()} == {"small.yaml", "kept", "again"}


def test_plot_draws_a_run_directory(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("run", scenario, "--out", "kept", "--quiet")
    capsys.readouterr()
    assert call("plot", "kept", "--from", "0", "--to", "2") == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 18
    assert all(path.is_file() and path.parent == Path("kept/plots") for path in paths)


def test_compare_prints_winners_and_keeps_everything(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", scenario) == 0
    out, err = capsys.readouterr()
    assert "vllm" in out
    assert "splitwise" in out
    assert "*" in out
    assert "runs/small-compare" in err
    folder = Path("runs/small-compare")
    for name in ("overview", "latency-cdf", "slo-attainment", "kv-and-queue", "timeline-vllm", "timeline-splitwise"):
        assert all((folder / f"{name}.{suffix}").is_file() for suffix in ("png", "svg", "csv"))
    table = pd.read_csv(folder / "comparison.csv")
    assert table.columns.tolist() == ["metric", "vllm", "splitwise"]
    again = yaml.safe_load((folder / "splitwise" / "scenario.yaml").read_text())
    assert again["system"]["prefill"] == {"tp": 1, "replicas": 1}
    assert read_run(folder / "splitwise").links["bytes"].sum() > 0
    assert call("plot", folder, "--out", "elsewhere") == 0
    assert Path("elsewhere/overview.png").is_file()


def test_compare_json_and_chosen_systems(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", scenario, "--systems", "sarathi-serve,vllm", "--json", "--out", "c", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["systems"]) == ["sarathi-serve", "vllm"]
    assert set(found["winners"]) >= {"TTFT p99 (s)", "goodput (requests/s)"}


def test_a_system_that_finds_no_plan_is_left_out_and_said(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ("--set", "slo={tpot_s: 1.0e-6}", "--out", "c", "--quiet")
    assert call("compare", scenario, "--systems", "melange,vllm", *cut) == 0
    assert "melange is left out: " in capsys.readouterr().out
    found = json.loads(Path("c/summary.json").read_text())
    assert list(found["systems"]) == ["vllm"]
    assert "within slo.tpot_s 1e-06" in found["left_out"]["melange"]
    assert call("compare", scenario, "--systems", "melange", *cut) == 2


def test_many_systems_get_a_row_each(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = "orca,fastertransformer,sarathi,sarathi-serve,splitwise,vllm,tetriinfer"
    runs, left_out = run_all(variants(Scenario.load(scenario), chosen), Log(quiet=True))
    print_comparison({label: run.summary for label, run in runs.items()}, left_out, title="many")
    firsts = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    assert [name for name in firsts if name in chosen.split(",")] == chosen.split(",")
    assert "goodput" not in firsts


def test_winners_by_hand() -> None:
    def summary(ttft_s: float | None, goodput_per_s: float) -> dict[str, Any]:
        spread = dict.fromkeys(("p50", "p99"), ttft_s)
        return {
            "ttft_s": spread, "tpot_s": spread, "e2e_s": spread,
            "slo": {"attainment": 0.5, "goodput_per_s": goodput_per_s},
            "output_tokens_per_s": None, "usd_per_million_tokens": None, "joules_per_token": None, "makespan_s": 1,
            "completed": 1, "rejected": 0,
            "failed": 0, "preemptions": 0, "bytes_moved": 1,
        }  # fmt: skip

    best = winners({"a": summary(1.0, 3.0), "b": summary(2.0, 4.0), "c": summary(None, 4.0)})
    assert best["TTFT p50 (s)"] == ["a"]
    assert best["goodput (requests/s)"] == ["b", "c"]
    assert best["SLO attainment (%)"] == best["output tokens/s"] == best["KV moved (GB)"] == []


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "no.yaml"),
        ("run", "small.yaml", "--set", "cluster.nodes[0].gpu=H10O"),
        ("run", "small.yaml", "--set", "model=opt-175b", "--set", "system.tp=1"),
        ("run", "small.yaml", "--set", "system.tp=64"),
        ("run", "small.yaml", "--seed", "-1"),
        ("run", "small.yaml", "--set", "workload={trace: no.csv}"),
        ("compare", "small.yaml", "--systems", "vllm,orcas"),
        ("compare", "small.yaml", "--systems", ","),
        ("compare", "small.yaml", "--set", "compare.vllm.tq=1"),
        ("plot", "."),
        ("trace", "stats", "no.csv"),
        ("trace", "stats", "small.yaml"),
        ("trace", "stats", "sample", "--limit", "0"),
        ("trace", "convert", "sample", "out.txt"),
        ("trace", "generate", "out.csv", "--rate", "-1"),
        ("trace", "generate", "out.csv", "--input", "{fixed: -3}"),
        ("trace", "generate", "out.csv", "--input", "{"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    scenario: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments, *(["--out", "new"] if arguments[0] in ("run", "compare") else [])) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("phasewise: ")
    assert err.count("\n") == 1
    assert [path.name for path in scenario.parent.iterdir()] == ["small.yaml"]


def test_a_link_without_bandwidth_on_a_needed_route(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = "cluster={nodes: [{gpu: A100-80G-SXM, count: 1, nodes: 2}], links: {inter_node: {gbps: 0}}}"
    assert call("compare", scenario, "--systems", "splitwise", "--set", cluster, "--out", "new") == 2
    err = capsys.readouterr().err
    assert "0 gbps" in err
    assert not Path("new").exists()


def test_folders_that_are_not_ours_are_left_alone(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("precious").mkdir()
    Path("precious/thesis.tex").write_text("years")
    for target in ("precious", "small.yaml", "small.yaml/below"):
        assert call("run", scenario, "--out", target) == 2
        assert target.split("/")[0] in capsys.readouterr().err
    assert Path("precious/thesis.tex").read_text() == "years"
    assert scenario.read_text() == SCENARIO


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = scenario.parent / "locked"
    locked.mkdir(mode=0o500)
    assert call("run", scenario, "--out", locked / "new") == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_when_nothing_completes_the_reasons_are_printed(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_long = ("--set", "system.engine.max_model_len=20")
    assert call("run", scenario, *too_long) == 1
    out = capsys.readouterr().out
    assert "no request completed" in out
    assert "30 not served: tokens exceed system.engine.max_model_len, 20" in out
    assert call("run", scenario, "--json", *too_long) == 1
    assert json.loads(capsys.readouterr().out)["ttft_s"]["p50"] is None


def test_a_damaged_run_directory(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("run", scenario, "--out", "kept", "--quiet")
    Path("kept/requests.parquet").write_text("no")
    capsys.readouterr()
    assert call("plot", "kept") == 2
    assert "damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- lists, schema, traces


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("systems", {"vllm", "sarathi-serve", "splitwise"}),
        ("gpus", {"A100-80G-SXM", "H100-SXM", "L4"}),
        ("models", {"llama-2-70b", "opt-13b"}),
    ],
)
def test_lists(command: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--json") == 0
    assert names <= {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert call(command) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_profiles_show_source_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profiles", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert any("A100-80G-SXM" in row["gpus"] and row["source"] and row["held_out"] for row in rows)
    assert call("profiles") == 0
    assert "splitwise-2023" in capsys.readouterr().out


def test_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["cluster"]


def test_trace_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.5,10,4\n2023-11-16 18:00:02.5,30,8\n")
    assert call("trace", "stats", path, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["requests"], figures["duration_s"]) == (2, 2.0)
    assert (figures["mean_input_tokens"], figures["mean_output_tokens"]) == (20.0, 6.0)
    assert call("trace", "stats", path) == 0
    assert "mean_input_tokens" in capsys.readouterr().out


def test_trace_generate_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, cut = tmp_path / "made.csv", tmp_path / "cut.parquet"
    assert call("trace", "generate", made, "--requests", 50, "--rate", 5, "--output", "{fixed: 9}", "--seed", 1) == 0
    assert call("trace", "convert", made, cut, "--limit", 10, "--time-scale", 2, "--quiet") == 0
    assert "wrote 50 requests" in capsys.readouterr().err
    whole, part = pd.read_csv(made), pd.read_parquet(cut)
    assert (whole["output_tokens"] == 9).all()
    assert part["arrival_s"].to_numpy() == pytest.approx(2 * whole["arrival_s"].to_numpy()[:10])


def test_a_malformed_trace_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,1,1\n1,x,1\n")
    assert call("trace", "convert", path, tmp_path / "out.csv") == 2
    assert f"{path}:3: field input_tokens is 'x'" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_run_loads_no_plots_and_help_is_quick(scenario: Path) -> None:
    def loaded(*arguments: str) -> set[str]:
        code = (
            "import sys\nfrom experiments.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        )
        code += "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return set(done.stderr.split())

    assert not {"matplotlib", "torch", "pandas"} & loaded("run", str(scenario), "--json", "--quiet")
    assert not {"matplotlib", "torch", "pandas", "numpy", "pydantic"} & loaded("--help")


def test_trace_stats_draws_and_bursts_come_from_the_command_line(tmp_path: Path) -> None:
    trace, plot = tmp_path / "bursts.csv", tmp_path / "bursts.png"
    bursts = ["--arrivals", "bursts", "--arrival", "on_s=5", "--arrival", "off_s=10"]
    assert call("trace", "generate", trace, "--requests", 200, "--rate", 5, *bursts) == 0
    assert call("trace", "stats", trace, "--plot", plot) == 0
    assert plot.stat().st_size > 10_000
    assert call("trace", "stats", trace, "--plot", tmp_path / "nowhere" / "bursts.png") == 2
    assert call("trace", "generate", trace, "--rate", 5, "--arrivals", "bursts") == 2


# ---------------------------------------------------------------- the same requests for all


LONG = """
model: llama-2-7b
cluster: {nodes: [{gpu: H100-SXM, count: 1}]}
workload: {rate: 1, generate: {requests: 30, input: {uniform: [2500, 3500]}, output: {fixed: 20}}}
system: {name: vllm, tp: 1}
compare:
  v1: {name: vllm, tp: 1}
  v0: {name: vllm, tp: 1, mode: v0}
  orca: {name: orca, tp: 1}
  sarathi: {name: sarathi, tp: 1}
  short: {name: vllm, tp: 1, engine: {max_model_len: 3000}}
"""


def test_prompts_are_limited_by_the_model_under_every_system(tmp_path: Path) -> None:
    """Llama-2's context is 4,096: batchers whose own default is 2,048 take prompts beyond it as well."""
    file = tmp_path / "long.yaml"
    file.write_text(LONG)
    found = pw.compare(pw.load(file), ["v1", "v0", "orca", "sarathi"])
    assert {label: run.summary["completed"] for label, run in found.runs.items()} == dict.fromkeys(found.runs, 30)
    assert len({run.summary["served"]["sum"] for run in found.runs.values()}) == 1


def test_who_served_other_requests_gets_no_star(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long.yaml"
    file.write_text(LONG)
    assert call("compare", str(file), "--systems", "v1,v0,short", "--out", str(tmp_path / "out"), "--quiet") == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["apart"]) == ["short"]
    assert all("short" not in labels for labels in summary["winners"].values())
    assert "short: it served another set of requests" in shown
