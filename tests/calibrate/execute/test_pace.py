"""The machine's pace: what is read between steps, and how an overhead is brought from one pace to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibrate.execute import pace  # noqa: E402
from calibrate.execute.how import Execution  # noqa: E402
from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.stage import Stage  # noqa: E402
from calibrate.execute.pace import Pace, mean_s  # noqa: E402
from calibrate.execute.run import execute  # noqa: E402
from calibrate.execute.step_cost import MeasuredStage, MeasuredSteps  # noqa: E402
from experiments.validation.recorded_steps import StepPair  # noqa: E402
from experiments.validation.validate import Executed, Probe, at_pace  # noqa: E402
from sim import SYSTEMS, ConfigError  # noqa: E402
from sim.types import Stage as StageSpec  # noqa: E402
from sim.types import Work  # noqa: E402
from tests.calibrate.execute.test_measured import SMALL  # noqa: E402
from tests.toys import Requests, cluster, problem, request, with_limits  # noqa: E402


def test_a_reading_is_the_mean_of_the_products_and_not_too_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Stage(Architecture.of(SMALL), blocks=4).decoder
    own = Pace(decoder)
    assert own.read() is None
    monkeypatch.setattr(pace, "EVERY_S", 0.0)
    clock = iter([10.0, 10.0, 10.5])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    own._read_s = 9.0
    assert own.read() == pytest.approx(0.5 / SMALL.num_layers)
    assert own._read_s == 10.5


def test_readings_that_something_held_up_do_not_count() -> None:
    assert mean_s([]) is None
    assert mean_s([1.0, 1.2, 1.1, 50.0]) == pytest.approx(1.1)


@pytest.mark.parametrize("mode", ["measured-step", "wall-clock"])
def test_executions_hand_over_their_readings_where_they_are_wanted(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "measured-step":
        monkeypatch.setattr(pace, "EVERY_S", 0.0)
    system = with_limits(SYSTEMS["vllm"](), num_kv_blocks=200)
    what = Requests([request(0, 0.0, 20, 4), request(1, 1.3, 20, 4)])  # workers read once a second
    setup, how = replace(problem(), model=SMALL), Execution(mode=mode)
    readings: list[float] = []
    paced = execute(setup, system, what, how, readings=readings)
    assert readings
    assert all(0 < reading_s < 1 for reading_s in readings)
    assert [row.outcome for row in paced.rows.requests] == ["completed"] * 2


def test_measured_steps_count_as_at_the_pace_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that takes 2 ms now, and one of 6 ms asked for: every step counts threefold."""
    monkeypatch.setattr(Pace, "at_once", lambda self: 2e-3)
    monkeypatch.setattr(Pace, "read", lambda self: None)
    monkeypatch.setattr(MeasuredStage, "_run", lambda self, work: 0.1)
    stage = StageSpec(name="s", gpus=("n0.g0",), first_layer=0, end_layer=SMALL.num_layers)
    costs = [MeasuredSteps(paced=True, reference_s=reference_s) for reference_s in (6e-3, None)]
    assert [cost.bind(SMALL, stage, cluster()).line(Work(((8, 0),), 0, 0)).first_ps for cost in costs] == [
        3 * 10**11,
        10**11,
    ]


def test_the_wall_clock_has_its_own_pace() -> None:
    with pytest.raises(ConfigError, match="reference_s"):
        Execution(mode="wall-clock", reference_s=1e-3)


def executed(reference_s: float | None) -> Executed:
    return Executed(result=None, source=None, reference_s=reference_s, load=None)  # type: ignore[arg-type]


def test_steps_are_brought_to_the_pace_of_the_middle_run() -> None:
    pair = StepPair("r", 0.0, 0, 4, 100, 0, measured_s=1.0, predicted_s=0.9)
    probes = [Probe([pair], 1e-3), Probe([pair, pair], 4e-3), Probe([pair], None)]
    runs = [executed(2e-3), executed(9e-3), executed(1e-3)]
    assert [one.measured_s for one in at_pace(probes, runs)] == [2.0, 0.5, 0.5, 1.0]
    assert [one.measured_s for one in at_pace(probes, [executed(None)])] == [1.0] * 4
    assert [one.predicted_s for one in at_pace(probes, runs)] == [0.9] * 4
