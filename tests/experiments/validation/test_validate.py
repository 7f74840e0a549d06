"""Predictions beside executions: alignment, replayed steps, errors, noise, and what is kept when a worker dies."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

pytest.importorskip("torch", reason="torch is not installed")

from calibrate.execute.how import Execution
from calibrate.execute.workers import fleet as fleet_module
from calibrate.execute.workers.fleet import Fleet
from experiments.cli import main
from experiments.cli.validate import print_report, tolerances
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import Setup, resolve
from experiments.scenario.system import OverheadSpec
from experiments.validation import validate as validation
from experiments.validation.recorded_steps import Recorded
from experiments.validation.validate import (
    Executed,
    RealRun,
    Validation,
    Watched,
    fitted_overhead,
    probe,
    validate,
)
from experiments.validation.validation_report import attribution, beyond, figures, request_table, summary
from sim.engine import simulate
from sim.engine.clock import BOUNDARY
from sim.record import Result
from sim.types import ConfigError, SimulationError
from tests.toys import MS, Requests, ToyCost, request

MEASURED = Execution(kv_blocks=200)
SPLIT: dict[str, Any] = {"name": "vllm", "prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
FOUR_BITS: dict[str, Any] = {
    "name": "splitwise", "prefill": {"replicas": 2, "tp": 1}, "decode": {"replicas": 2, "tp": 1}, "kv_bits": 4,
}  # fmt: skip
COLOCATED: dict[str, Any] = {"name": "sarathi-serve", "replicas": 1, "tp": 1, "token_budget": 64}


def scenario(folder: Path, system: dict[str, Any], requests: int = 12, **more: Any) -> Path:
    """A file with the two-layer model beside it."""
    fields = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 4096,
        "dtype": "float32",
    }  # fmt: skip
    folder.joinpath("small.json").write_text(json.dumps(fields))
    data = {
        "model": "small.json",
        "cluster": {
            "nodes": [{"gpu": "CPU", "count": 1, "nodes": 4 if system["name"] == "splitwise" else 2}],
            "links": {"inter_node": {"gbps": 1, "latency_us": 50}},
        },
        "workload": {
            "generate": {"requests": requests, "input": {"uniform": [20, 60]}, "output": {"uniform": [4, 12]}},
            "rate": 100,
        },
        "system": system | {"engine": {"num_kv_blocks": 200, "prefix_caching": False, "async_scheduling": False}},
        "latency": "roofline",
        **more,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def setup_of(folder: Path, system: dict[str, Any] = SPLIT, **more: Any) -> Setup:
    return resolve(Scenario.load(scenario(folder, system, **more)))


def real(result: Result) -> RealRun:
    return RealRun(result=result, late_s={}, pairs=(), replayed=result, diverged=None, load=None)


def test_a_prediction_is_compared_with_its_execution(tmp_path: Path) -> None:
    found = validate(setup_of(tmp_path), MEASURED, repeats=2)
    rows = {(row["metric"], row["statistic"]): row for row in figures(found)}
    assert len(found.runs) == 2
    for row in rows.values():
        middle = sum(row["runs"]) / 2
        assert row["error"] == pytest.approx(row["predicted"] / middle - 1)
        assert row["noise"] == pytest.approx(max(row["runs"]) / middle - 1)
    assert set(rows) >= {("ttft_s", "mean"), ("tpot_s", "p99"), ("e2e_s", "p50"), ("makespan_s", "")}


@pytest.mark.parametrize("system", [SPLIT, COLOCATED, FOUR_BITS], ids=["split", "colocated", "splitwise 4 bits"])
def test_replayed_steps_give_each_request_its_measured_times(tmp_path: Path, system: dict[str, Any]) -> None:
    found = validate(setup_of(tmp_path, system), MEASURED, repeats=1)
    scheduling = attribution(found)["scheduling"]
    assert scheduling["diverged"] == []
    assert scheduling["largest_ttft_error"] < 1e-9
    assert scheduling["largest_e2e_error"] < 1e-9


def test_splitwise_with_four_bits_runs_end_to_end_on_one_device(tmp_path: Path) -> None:
    """Two prefill and two decode machines, a real codec at every move."""
    out = tmp_path / "out"
    options = ["--mode", "measured-step", "--repeats", "1", "--overhead", "--out", str(out), "--quiet", "--json"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["validate", str(scenario(tmp_path, FOUR_BITS)), *options])
    found = json.loads((out / "summary.json").read_text())
    assert found["complete"]
    assert found["compared"] == 12
    assert found["attribution"]["scheduling"]["diverged"] == []
    assert found["attribution"]["transfer"]["moves"] == 12
    assert found["attribution"]["transfer"]["error"] != 0  # the prediction models the codec that the run measures


def test_a_replay_of_other_steps_is_noticed(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    result = setup.run(step_by_step=True)
    fewer = result.rows.step_fields.pop(3)
    recorded = Recorded(result, setup.problem.cluster, moves=False)
    with pytest.raises(SimulationError, match=f"replay: {fewer[0]} starts a step of"):
        simulate(setup.problem, setup.system, setup.requests.source(), predictor=setup.predictor, hardware=recorded)


def test_longer_recorded_steps_make_longer_requests(tmp_path: Path) -> None:
    """The replay's times come from the record, the predicted ones beside them from the model."""
    setup = setup_of(tmp_path, COLOCATED, requests=1)
    result = setup.run(step_by_step=True)
    plain = result.columns["e2e_s"][0]
    at_ps, slower = 0, []
    for replica, start_ps, end_ps, *rest in result.rows.step_fields:
        at_ps = at_ps or start_ps
        slower.append((replica, at_ps, at_ps + 3 * (end_ps - start_ps), *rest))
        at_ps = slower[-1][2]
    result.rows.step_fields[:] = slower
    recorded = Recorded(result, setup.problem.cluster, moves=False)
    replay = simulate(setup.problem, setup.system, setup.requests.source(), hardware=recorded)
    assert replay.columns["e2e_s"][0] == pytest.approx(3 * plain)
    assert all(isclose(pair.measured_s, 3 * pair.predicted_s, rel_tol=1e-9) for pair in recorded.pairs)


def test_errors_are_those_of_the_median_run_and_noise_is_what_runs_tell_of_each_other(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, COLOCATED)
    slow = [
        replace(setup, problem=replace(setup.problem, cost=ToyCost(base_ps=round(10 * MS * factor))))
        for factor in (2.0, 2.2, 1.9)
    ]
    found = Validation(setup=setup, mode="measured-step", device="cpu", predicted=setup_with(setup, 1.0))
    found.runs = [real(one.run()) for one in slow]
    tpot = next(row for row in figures(found) if (row["metric"], row["statistic"]) == ("tpot_s", "mean"))
    assert tpot["error"] == pytest.approx(-0.5, abs=0.05)
    assert tpot["noise"] == pytest.approx(0.1, abs=0.05)
    assert beyond(figures(found), {"tpot": 0.4, "makespan": 0.9}) == ["tpot"]
    table = request_table(found)
    assert list(table["request"]) == list(range(12))
    assert (table["predicted_tpot_s"] < table["real_tpot_s"]).all()


def setup_with(setup: Setup, factor: float) -> Result:
    return replace(setup, problem=replace(setup.problem, cost=ToyCost(base_ps=round(10 * MS * factor)))).run()


def test_only_requests_that_completed_everywhere_are_compared(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, COLOCATED)
    cut = replace(setup, scenario=setup.scenario.model_copy(update={"until_s": 0.05}))
    short = cut.run()
    done = int((short.columns["outcome"] == "completed").sum())
    assert 0 < done < 12
    found = Validation(setup=setup, mode="measured-step", device="cpu", predicted=setup.run(), runs=[real(short)])
    assert summary(found, {}, "x")["compared"] == done == len(request_table(found))


def test_lateness_is_that_of_the_moment_a_request_is_taken_in() -> None:
    import time

    source = Watched(Requests([request(0, 0.0), request(1, 0.01)]))
    stream = iter(source.next(0.0, None))
    next(stream)
    time.sleep(0.03)
    next(stream)
    assert 0.03 <= source.late_s[0] < 0.2
    assert next(stream, None) is None
    assert 0.02 <= source.late_s[1] <= source.late_s[0]
    source.next(1.5, request(0))
    assert [(item.id, at_s) for item, at_s in source.ended] == [(0, 1.5)]


def test_an_overhead_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take 1.2 times the predicted time, 3 ms, and 0.5 ms a sequence; every third is held up for a second."""
    setup = setup_of(tmp_path, COLOCATED, requests=40, overhead={"step_s": 0})

    def executed(setup: Setup, source: Any, how: Execution, *, paced: bool) -> Executed:
        spec = OverheadSpec(step_s=0.003, sequence_s=0.0005, slowdown=1.2)
        dear = resolve(setup.scenario.model_copy(update={"overhead": spec}))
        result = simulate(dear.problem, dear.system, source, predictor=dear.predictor, hardware=Disturbed(dear))
        return Executed(result, source, None, None)

    monkeypatch.setattr(validation, "_execute", executed)
    found = fitted_overhead(probe(setup, MEASURED, count=30).pairs)
    assert found.step_s == pytest.approx(0.003, rel=1e-6)
    assert found.sequence_s == pytest.approx(0.0005, rel=1e-6)
    assert found.slowdown == pytest.approx(1.2, rel=1e-6)


class Disturbed(Recorded):
    """Steps as predicted; every third takes a second more."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.run(), setup.problem.cluster, moves=False)
        self.steps = 0

    def compute(self, replica: Any, flight: Any, done: Any) -> None:
        self.steps += 1
        flight.first_ps, flight.slope_ps = flight.first_ps + (self.steps % 3 == 0) * 10**12, 0
        self.clock.at(flight.boundary_ps(1), done, (replica, flight), BOUNDARY + replica.number)


def test_tolerances_are_per_metric() -> None:
    assert tolerances(["tpot=0.06", "0.1"]) == {
        "ttft": 0.1, "tpot": 0.06, "e2e": 0.1, "makespan": 0.1, "throughput": 0.1
    }  # fmt: skip
    for text in ("tpott=0.1", "tpot=-1", "x", "ttft=nan"):
        with pytest.raises(ConfigError, match="--tolerance"):
            tolerances([text])


def test_measured_steps_stand_beside_the_wall_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = setup_of(tmp_path, COLOCATED)
    runs = [setup_with(setup, factor) for factor in (1.0, 1.2, 1.1)]
    found = Validation(
        setup=setup, mode="wall-clock", device="cpu", predicted=setup.run(), runs=[real(run) for run in runs],
        measured_steps=[setup_with(setup, factor) for factor in (2.0, 1.1, 1.32)],
    )  # fmt: skip
    rows = {(row["metric"], row["statistic"]): row for row in figures(found)}
    assert rows["tpot_s", "mean"]["runs"] == [run.columns["tpot_s"].mean() for run in runs]
    beside, real_s = (one.columns["tpot_s"].mean() for one in (found.measured_steps[2], runs[2]))
    assert rows["tpot_s", "mean"]["measured_steps"] == beside
    assert rows["tpot_s", "mean"]["apart"] == pytest.approx(beside / real_s - 1)
    print_report(summary(found, {}, "it"))
    assert "apart" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


def test_the_command_saves_figures_tables_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, SPLIT)
    arguments = ["validate", str(path), "--mode", "measured-step", "--repeats", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--json", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert done.value.code == 0
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (found["complete"], found["compared"], found["runs"]) == (True, 12, 1)
    assert found["attribution"]["step_time"]["all"]["steps"] > 12
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"requests.png", "requests.svg", "requests.csv", "distributions.png", "steps.csv", "scenario.yaml"}
    assert len(pd.read_csv(tmp_path / "out" / "requests.csv")) == 12


def test_past_the_tolerance_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, COLOCATED, requests=3, overhead={"step_s": 5})
    arguments = ["validate", str(path), "--mode", "measured-step", "--repeats", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--tolerance", "tpot=0.5", "--quiet"])
    assert done.value.code == 1
    assert "past the tolerance of 50%: tpot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"events": [{"at_s": 1, "kind": "gpu_lost", "target": "n0.g0"}]}, [], "events: real machines have no made-up"),
        ({"overhead": {"step_s": 0.1}}, ["--overhead"], "has an overhead already"),
        ({}, ["--mode", "wall"], "mode: 'wall' is unknown"),
        ({}, ["--both-modes"], "no --mode or --weights"),
        ({}, ["--minutes", "1", "--profile", "roofline"], "measure a profile or name one, not both"),
        ({}, ["--set", "system.engine.num_kv_blocks=null"], "num_kv_blocks: is not set"),
        ({}, ["--set", "system.engine.num_kv_blocks=999999999"], "GB are missing"),
    ],
)
def test_what_cannot_be_validated_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, options: list[str], message: str
) -> None:
    path = scenario(tmp_path, COLOCATED, **change)
    with pytest.raises(SystemExit) as done:
        main(["validate", str(path), "--mode", "measured-step", "--out", str(tmp_path / "out"), "--quiet", *options])
    error = capsys.readouterr().err
    assert done.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- with processes


@pytest.mark.slow
def test_the_wall_clock_is_replayed_to_the_tick(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, SPLIT, requests=40)
    how = Execution(mode="wall-clock", emulate_links=True)
    found = validate(setup, how, repeats=2, both_modes=True)
    assert [len(result.rows.requests) for result in found.measured_steps] == [40, 40]
    parts = attribution(found)
    assert parts["scheduling"]["diverged"] == []
    assert parts["scheduling"]["largest_ttft_error"] < 0.01
    assert parts["scheduling"]["largest_e2e_error"] < 0.01
    assert parts["transfer"]["moves"] == 80
    assert 0 <= parts["workload"]["mean_late_s"] < 0.05


@pytest.mark.slow
def test_a_killed_worker_leaves_a_marked_partial_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, started = Fleet.__enter__, []

    def second_dies(fleet: Fleet) -> Fleet:
        started.append(enter(fleet))
        if len(started) == 2:
            threading.Timer(1.0, os.kill, (next(iter(fleet.pids.values())), signal.SIGKILL)).start()
        return started[-1]

    monkeypatch.setattr(fleet_module.Fleet, "__enter__", second_dies)
    path = scenario(tmp_path, SPLIT, requests=60)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        main(["validate", str(path), "--set", "workload.rate=20", "--out", str(out), "--quiet"])
    assert done.value.code == 1
    assert "incomplete: worker" in capsys.readouterr().out
    found = json.loads((out / "summary.json").read_text())
    assert (found["complete"], found["runs"]) == (False, 1)
    assert "is gone" in found["lost"] or "hung up" in found["lost"]
    assert len(pd.read_csv(out / "requests.csv")) == 60
    assert 0 < len(pd.read_csv(out / "lost_run.csv")) < 60


def test_a_first_run_that_dies_is_reported_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(setup: Setup, source: Any, how: Execution, *, paced: bool) -> Result:
        list(source.next(0.0, None))
        raise SimulationError("worker x is gone")

    monkeypatch.setattr(validation, "_execute", dies)
    found = validate(setup_of(tmp_path), MEASURED, repeats=2)
    kept = summary(found, {"tpot": 0.1}, "tiny")
    assert (kept["complete"], kept["runs"], kept["beyond_tolerance"]) == (False, 0, ["tpot"])
    print_report(kept)
    assert "incomplete: worker x is gone" in capsys.readouterr().out
