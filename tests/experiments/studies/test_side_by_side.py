"""Every system on one cluster: the scenario knows them all, and the page is made of their runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.plots.heat import heat
from experiments.runs.comparison import variants
from experiments.runs.rundir import Run
from experiments.scenario.file import Scenario
from experiments.studies.side_by_side import study as side_by_side
from sim import SYSTEMS

BESIDES = {"orca", "fastertransformer", "sarathi", "hexgen-2"}
"""Baselines of others' papers, older than what they were compared with, or a successor."""


def test_all_systems_take_part() -> None:
    labels = variants(Scenario.load(side_by_side.SCENARIO))
    assert set(labels) | BESIDES == set(SYSTEMS)


def test_the_page_has_a_row_a_system_and_says_who_has_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(scenario: Scenario, systems: str | None = None) -> dict[str, Scenario]:
        return variants(scenario, "vllm,melange,splitwise")

    monkeypatch.setattr(side_by_side, "variants", few)
    monkeypatch.setattr(side_by_side, "RATES_PER_S", (7.0, 40.0))
    side_by_side.main(["--out", str(tmp_path), "--limit", "60"])
    shares = pd.read_csv(tmp_path / "side_by_side.csv").set_index("system")
    assert set(shares.index) == {"vllm", "melange", "splitwise"}
    assert pd.isna(shares.loc["melange", "40.0"])
    page = (tmp_path / "side_by_side.md").read_text()
    assert sum(line.startswith("| `") for line in page.splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} >= {"side_by_side.png", "side_by_side_point.svg"}


def test_who_keeps_most_comes_first_and_gaps_count_as_nothing() -> None:
    def run(share: float) -> Run:
        empty = pd.DataFrame()
        tables = dict.fromkeys(("requests", "steps", "links", "memory", "replicas"), empty)
        return Run(name="", summary={"slo": {"attainment": share}}, **tables)

    runs = {1.0: {"a": run(0.5), "b": run(0.9)}, 2.0: {"a": run(0.5), "c": run(0.2)}}
    table = side_by_side.attainments(runs, ["a", "b", "c"])
    assert table.index.tolist() == ["a", "b", "c"]
    assert table.loc["b"].tolist()[0] == 0.9
    assert table.isna().sum().sum() == 2
    texts = [text.get_text() for text in heat(table, "t", "x").figure.axes[0].texts]
    assert texts == ["50%", "50%", "90%", "no plan", "no plan", "20%"]
