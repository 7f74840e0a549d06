"""Metis's study: what must agree exactly does, and its own parts do what they say."""

from __future__ import annotations

from itertools import chain

import pytest

from experiments.runs.progress import Log
from experiments.studies.metis import (
    clusters,
    counts,
    forward_ms,
    machines,
    prices,
    roofline_profile,
    shape,
    t4_layers,
    training_gain,
    uniform_ms,
)
from experiments.studies.thunderserve.world import problem
from sim import SYSTEMS
from sim.planners.metis.training import Training


def test_exact_rows_are_exact() -> None:
    rows = [*counts(), *prices()]
    assert [row.kind for row in rows] == ["exact"] * 13
    assert [row.ratio for row in rows] == pytest.approx([1.0] * 13, rel=1e-5)


def test_training_gains_over_uniform_plans() -> None:
    (gain,) = training_gain(Log())
    assert gain.ours is not None
    assert 1.05 < gain.ours < 8.43
    alike = [machine._replace(kind="A100") for machine in machines()]
    on_a100 = Training(profile=roofline_profile(), machines=alike)
    assert on_a100.search()[0].step_ms < uniform_ms(on_a100)


def test_the_t4_gets_fewer_layers() -> None:
    assert forward_ms("T4", 2, 4) > 4 * forward_ms("A100-80G-SXM", 2, 4)
    (row,) = t4_layers()
    assert row.ours is not None
    assert 1 <= row.ours < 5


def test_a_plan_in_words() -> None:
    cluster = clusters()["4 A40 + 4 3090 Ti"]
    words = shape(SYSTEMS["metis"]().planner.plan(problem(cluster, "conversation")), cluster)
    assert words.startswith("prefill 1 x (1 A40: 30 + 1 A40: 30); decode 1 x (")
    layers = chain.from_iterable(part.split(" + ") for part in words.split("(")[2:])
    assert sum(int(part.split(": ")[1].rstrip(")")) for part in layers) == 60
