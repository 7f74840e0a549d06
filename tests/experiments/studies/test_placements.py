"""The studies of Helix and AlpaServe: exact rows exactly, the rest in small."""

from __future__ import annotations

import pytest

from experiments.runs.progress import Log
from experiments.studies import alpaserve as study_alpaserve
from experiments.studies import helix as study_helix
from sim.planners.helix import END, HelixPlacement

QUIET = Log(quiet=True)


def test_alpaserves_theory_is_exact() -> None:
    """Section 3: roots found numerically are those of the printed formulas."""
    for row in study_alpaserve.theory():
        assert row.ours == pytest.approx(row.published, rel=1e-9), row.what


def test_the_gain_of_sharing_gpus() -> None:
    """Figure 2, as readers report it."""
    for row in study_alpaserve.gains(100_000):
        assert row.ratio == pytest.approx(1.0, abs=0.12), row.what


def test_attainment_with_and_without_groups() -> None:
    """The artifact's result files, five times the latency; engine and quick simulator agree within two points."""
    scale = study_alpaserve.Scale(1000, 1000, (5.0,))
    rows = {row.what: row for row in study_alpaserve.table_2(scale, QUIET)}
    apart = rows["SR (no groups), requests within 5x the latency"].ours
    shared = rows["AlpaServe, requests within 5x the latency"].ours
    assert apart is not None
    assert shared is not None
    assert apart + 20 < shared <= 100
    assert rows["AlpaServe, 5x: by the engine over by the quick simulator"].ours == pytest.approx(1.0, abs=0.02)


def test_helixs_flow_is_above_its_baselines_and_below_its_bound() -> None:
    """The artifact's readme: 1,290 tokens/s under a bound of 2,804; Swarm's placement 758."""
    where = study_helix.problem("llama-2-70b")
    scale = study_helix.Scale(60.0, 150, (8,))
    plans = dict(study_helix.placed(where, scale, QUIET))
    plans |= {name: study_helix.shipped(where, layers) for name, layers in study_helix.SHIPPED.items()}
    flow = {name: sum(f for (source, _), f in plan.flows.items() if source == END) for name, plan in plans.items()}
    assert flow[study_helix.OURS] >= flow["Petals"] > flow["Swarm"]
    assert flow["Helix"] < HelixPlacement().network(where).upper_bound
    for row in study_helix.flows(where, plans):
        assert row.ratio == pytest.approx(1.15, abs=0.35), row.what


def test_answer_tokens_are_counted_from_the_warm_up_on() -> None:
    where = study_helix.problem("llama-2-70b")
    plan = HelixPlacement(placement="swarm").plan(where)
    scale = study_helix.Scale(90.0, 0, (8,))
    tokens_per_s = study_helix.rate(where, plan, scale, 8)
    assert 1.0 < tokens_per_s < 100.0
