"""The race of layouts: only who beats the best is measured, and what is carried is told from a queue that grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments.planning.race import GAIN, Contender, Race, Trials
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import Setup, resolve

WORLD: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": {"nodes": [{"gpu": "A100-80G-SXM", "count": 2}]},
    "workload": {"generate": {"requests": 50, "input": {"fixed": 500}, "output": {"fixed": 100}}, "rate": 4.0},
    "system": {"name": "vllm"},
    "latency": "roofline",
    "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
}


class Known(Trials):
    """Layouts whose capacity is written in their label."""

    def passed(self, one: Contender, rate_per_s: float, *, whole: bool = False) -> bool:
        self.count += 1
        return rate_per_s <= float(one.label)


@pytest.fixture
def setup() -> Setup:
    return resolve(Scenario.of(WORLD))


def contender(setup: Setup, tp: int, carries: float, **figures: float) -> Contender:
    plan = resolve(Scenario.of({**WORLD, "system": {"name": "vllm", "tp": tp}}))
    layout = plan.system.planner.plan(plan.problem)
    return Contender(setup=setup, plan=layout, label=str(carries), likely_per_s=10.0, **figures)


def test_the_best_is_found_and_measured(setup: Setup) -> None:
    race = Race(Known(), most_trials=100)
    assert race.enter([contender(setup, 1, 8.0, most_per_s=12.0), contender(setup, 2, 9.0, most_per_s=12.0)])
    assert race.best is not None
    assert race.best.label == "9.0"
    assert 9.0 / 1.015 <= race.rate_per_s <= 9.0


def test_who_cannot_win_is_not_simulated(setup: Setup) -> None:
    race = Race(Known(), most_trials=100)
    race.enter([contender(setup, 1, 9.0, most_per_s=12.0)])
    before = race.trials.count
    assert not race.enter([contender(setup, 2, 100.0, most_per_s=5.0)])
    assert race.trials.count == before


def test_who_loses_costs_one_trial(setup: Setup) -> None:
    race = Race(Known(), most_trials=100)
    race.enter([contender(setup, 1, 9.0, most_per_s=12.0)])
    before = race.trials.count
    assert not race.enter([contender(setup, 2, 9.0 * GAIN * 0.99, most_per_s=12.0)])
    assert race.trials.count == before + 1


def test_a_rate_that_queues_grow_at_is_not_carried(setup: Setup) -> None:
    """The workload goes on as long as a trial needs: its 50 requests alone would never fill a queue."""
    trials = Trials()
    one = replace(contender(setup, 1, 0.0), label="vllm")
    assert trials.passed(one, 4.0)
    assert not trials.passed(one, 400.0)
