"""ExeGPT's study: what follows from printed figures, and how servers and bounds are set."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pandas as pd
import pytest

from experiments.studies.exegpt import study as study_exegpt
from experiments.studies.exegpt import world as exegpt_world
from experiments.studies.exegpt.study import Cell, arithmetic, foreseen, means
from experiments.studies.exegpt.world import (
    GPT_39B,
    GPT_101B,
    GPT_175B,
    OPT,
    TASKS,
    Point,
    best_within,
    bounds_s,
    measured,
)
from sim import SYSTEMS
from tests.toys import ToyCost, cluster, problem, request, run, with_limits


def test_table_6_follows_from_its_own_figures() -> None:
    *exact, flight = arithmetic()
    assert [one.ratio for one in exact] == pytest.approx([1, 1], abs=0.01)
    assert flight.ours == pytest.approx(34, abs=1)


def test_models_have_the_printed_number_of_parameters() -> None:
    for server, billions in ((GPT_39B, 39), (GPT_101B, 101), (GPT_175B, 175)):
        spec = server.model
        parameters = spec.weight_bytes(0, spec.num_layers) / 2
        assert parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_tasks_have_the_printed_lengths() -> None:
    """The 99th percentiles that the paper prints, within 5 %; the prompts of S cannot have their deviation and mean."""
    for name, longest in (("S", 63), ("T", 292), ("G", 417), ("C1", 137), ("C2", 579)):
        outputs = pd.Series([one.output_tokens for one in TASKS[name].requests(20_000, seed=3)])
        assert outputs.quantile(0.99) == pytest.approx(longest, rel=0.05)
        assert outputs.max() <= TASKS[name].output.most
        assert outputs.min() >= 1


def test_rates_and_latencies_of_the_middle_of_a_run() -> None:
    """Eight batches of two, 10.2 ms of prompts of ten tokens and 9 iterations of 10.02 each: no tail, no start."""
    system = with_limits(SYSTEMS["fastertransformer"](replicas=1, tp=1), max_num_seqs=2)
    requests = [request(number, 0.0, 10, 10) for number in range(16)]
    found = measured(run(system, requests, problem(cluster(1), ToyCost(per_context_ps=0, per_pair_ps=0))), "")
    one_s = 0.0102 + 9 * 0.01002
    assert found.rate_per_s == pytest.approx(2 / one_s)
    assert found.latency_s == pytest.approx(one_s)


def test_bounds_and_what_keeps_them() -> None:
    points = [Point(1.0, 2.0, "TP4, 1"), Point(5.0, 12.0, "TP4, 9"), Point(9.0, 90.0, "TP2, 9")]
    assert bounds_s(points) == [3.0, 5.0, 9.0, inf]
    assert best_within(points, 12.0) == points[1]
    assert best_within(points, 1.0) is None


def test_gains_are_of_scenarios_that_both_serve() -> None:
    both = {"ExeGPT": Point(6.0, 1.0, ""), "FasterTransformer": Point(2.0, 1.0, ""), "vLLM (ORCA)": None}
    cells = [Cell("opt-13b", "S", 0, 1.0, both, {}), Cell("opt-13b", "S", 1, 1.0, {**both, "ExeGPT": None}, {})]
    assert [cell.gain("FasterTransformer") for cell in cells] == [3.0, None]
    assert cells[0].gain("vLLM (ORCA)") is None
    assert [one.ours for one in means(cells) if one.where == "Abstract"] == [3.0, 3.0]


def test_what_takes_longer_than_the_bound_is_planned_for_a_tighter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world where everything takes 1.2 times what is planned, and plans keep their bound exactly."""
    aims: list[float] = []

    def planned(server: object, task: object, bound_s: float, kinds: object) -> float | None:
        aims.append(bound_s)
        return None if bound_s < 1 else bound_s

    monkeypatch.setattr(exegpt_world, "planned", planned)
    monkeypatch.setattr(exegpt_world, "followed", lambda server, task, plan: Point(5.0, 1.2 * plan, ""))
    assert exegpt_world.kept(GPT_39B, TASKS["S"], 10.0, ("rra",)) == (
        pytest.approx(0.98 * 10 / 1.2), Point(5.0, pytest.approx(9.8), ""),
    )  # fmt: skip
    assert aims == pytest.approx([10, 9.8 / 1.2])
    assert exegpt_world.kept(GPT_39B, TASKS["S"], 1.1, ("rra",)) is None


def test_what_was_foreseen_is_the_engines_share_of_the_plan() -> None:
    plan = exegpt_world.planned(OPT, TASKS["S"], 10.0, ("rra",))
    assert plan is not None
    half = Point(plan.perf.throughput_per_s / 2, 1.0, "")
    cells = [
        Cell("opt-13b", "S", 0, 1.0, {"ExeGPT RRA": half, "ExeGPT WAA": None}, {"ExeGPT RRA": plan}),
        Cell("opt-13b", "S", 1, 1.0, {"ExeGPT RRA": None, "ExeGPT WAA": None}, {}),
    ]
    assert [(one.what.split(":")[0], one.ours) for one in foreseen(cells)] == [("ExeGPT RRA", pytest.approx(50))]


@pytest.mark.slow
def test_the_study_runs_in_quick_mode(tmp_path: Path) -> None:
    study_exegpt.main(["--out", str(tmp_path), "--quick"])
    table = pd.read_csv(tmp_path / "study_exegpt.csv")
    assert (table[table["kind"] == "exact"]["ratio"] - 1).abs().max() < 0.01
    gains = table[table["what"].str.contains("over FasterTransformer")]["ours"]
    assert len(gains) > 3
    assert gains.min() > 1
    assert {path.name for path in tmp_path.iterdir()} >= {"study_exegpt_bounds.png", "study_exegpt_bounds.csv"}
