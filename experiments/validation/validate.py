"""Does a prediction hold? The same scenario predicted, executed several times, and compared request by request.

``validate`` does it; read ``Validation`` first. ``validation_report.py`` has the figures; ``docs/validate.md`` says how
to read them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.scenario.resolve import Setup, resolve
from experiments.scenario.system import OverheadSpec
from experiments.validation.recorded_steps import Recorded, StepPair
from sim.cost import Overhead
from sim.engine import simulate
from sim.policy import Source, System
from sim.record import Result
from sim.types import ConfigError, Request, SimulationError

if TYPE_CHECKING:
    from calibrate.execute.how import Execution

OVERHEAD_REQUESTS = 80
"""Of each execution that an overhead is fitted to."""
HELD_UP = 2.0
LEAST_SLOWDOWN = 0.1
"""No machine is ten times as fast as when it was calibrated."""


class Watched:
    """A source that also notes when requests truly arrived (of an open loop), and when they were done."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.late_s: dict[int, float] = {}
        """How much after its time a request was taken in."""
        self.ended: list[tuple[Request, float]] = []

    def next(self, now_s: float, finished: Request | None) -> Any:
        if finished is None:
            return self._arriving()
        self.ended.append((finished, now_s))
        return self._inner.next(now_s, finished)

    def _arriving(self) -> Iterator[Request]:
        """The engine asks for the first request right before time begins, and for another when one has arrived."""
        began_s: float | None = None
        for request in self._inner.next(0.0, None):
            began_s = time.perf_counter() if began_s is None else began_s
            yield request
            self.late_s[request.id] = time.perf_counter() - began_s - request.arrival_s


class Executed(NamedTuple):
    """An execution, and what was noted of it: when requests came, and the state of the machine."""

    result: Result
    source: Watched
    reference_s: float | None
    """Mean seconds of a fixed matrix product between its steps (``calibrate.execute.pace``), if that was watched."""
    load: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    """One execution, its replay with recorded times (None where the replay went another way), and the machine then."""

    result: Result
    late_s: Mapping[int, float]
    pairs: tuple[StepPair, ...]
    replayed: Result | None
    diverged: str | None
    load: float | None
    """Load average of the machine over the last minute, when the run ended."""
    reference_s: float | None = None
    """See ``Executed``."""


@dataclass(slots=True, kw_only=True)
class Validation:
    """A prediction and its real runs. ``lost``: why executions ended early; ``ended``: what the lost run had done.

    ``measured_steps``: results of executions with a virtual clock beside those of the wall clock.
    """

    setup: Setup
    mode: str
    device: str
    predicted: Result
    runs: list[RealRun] = field(default_factory=list)
    measured_steps: list[Result] = field(default_factory=list)
    lost: str | None = None
    ended: list[tuple[Request, float]] = field(default_factory=list)


def validate(
    setup: Setup,
    how: Execution,
    repeats: int,
    said: Callable[[str], None] = lambda _: None,
    *,
    overhead: bool = False,
    both_modes: bool = False,
) -> Validation:
    """Execute ``repeats`` times, and predict. A worker that dies ends it early; what was done is kept.

    ``both_modes``: after each run by the wall clock, one with measured steps, that the two can be told apart; with
    ``overhead`` at the pace of the former.

    ``overhead``: of the steps, fitted to executions of other requests before, between and after those that are
    compared, at the pace that the machine then has (machines do not keep it). ``ConfigError`` for what cannot be
    executed.
    """
    if setup.events:
        raise ConfigError(f"{setup.scenario.where}: events: real machines have no made-up faults; leave them out")
    if both_modes and (how.mode == "measured-step" or how.folder is not None):
        raise ConfigError("--both-modes: the wall clock and measured steps, which draw weights; no --mode or --weights")
    others = _others(setup) if overhead else None
    executed: list[Executed] = []
    beside: list[Executed] = []
    probes: list[Probe] = []
    lost, ended = None, []
    source = Watched(setup.requests.source())
    try:
        for number in range(repeats):
            probes += [probe(others, how)] if others else []
            source = Watched(setup.requests.source())
            executed.append(_execute(setup, source, how, paced=overhead))
            said(f"run {number + 1} of {repeats}: {_told(executed[-1])}")
            if both_modes:
                virtual = replace(how, mode="measured-step", emulate_links=False, reference_s=executed[-1].reference_s)
                beside.append(_execute(setup, Watched(setup.requests.source()), virtual, paced=overhead))
                said(f"the same with measured steps: {_told(beside[-1])}")
        probes += [probe(others, how)] if others else []
    except ConfigError:
        raise
    except SimulationError as error:
        lost, ended = str(error), source.ended if len(executed) < repeats else []
    if probes:
        setup = _with_overhead(setup, fitted_overhead(at_pace(probes, executed)), said)
    return Validation(
        setup=setup,
        mode=how.mode,
        device=how.device,
        predicted=_simulate(setup, as_executed(setup.system, how.mode)),
        runs=[_with_replay(setup, one, how.mode) for one in executed],
        measured_steps=[one.result for one in beside],
        lost=lost,
        ended=ended,
    )


def as_executed(system: System, mode: str) -> System:
    """What is predicted: the system, with the transfer that workers have (see ``calibrate.execute.run.AtOnce``)."""
    from calibrate.execute.run import AtOnce

    return system if mode == "measured-step" else replace(system, transfer=lambda: AtOnce(system.transfer()))


def as_recorded(system: System, recorded: Recorded, mode: str) -> System:
    """What replays a record: on the virtual clock a measured codec's seconds are in the overhead of transfers."""
    own = as_executed(system, mode)
    return own if mode == "wall-clock" else replace(own, transfer=lambda: recorded.sent(own.transfer()))


def _simulate(setup: Setup, system: System, hardware: Recorded | None = None) -> Result:
    return simulate(
        setup.problem, system, setup.requests.source(), predictor=setup.predictor, until_s=setup.scenario.until_s,
        hardware=hardware,
    )  # fmt: skip


def _execute(setup: Setup, source: Watched, how: Execution, *, paced: bool) -> Executed:
    from calibrate.execute.pace import mean_s
    from calibrate.execute.run import execute

    readings: list[float] = []
    result = execute(
        setup.problem, setup.system, source, how, predictor=setup.predictor, until_s=setup.scenario.until_s,
        readings=readings if paced else None,
    )  # fmt: skip
    return Executed(result, source, mean_s(readings), os.getloadavg()[0] if hasattr(os, "getloadavg") else None)


def _told(run: Executed) -> str:
    pace = "" if run.reference_s is None else f", reference product {run.reference_s * 1e6:,.0f} us"
    return f"{run.result.makespan_s:.1f} s, load average {run.load or 0:.2f}{pace}"


def _with_replay(setup: Setup, run: Executed, mode: str) -> RealRun:
    result = run.result
    recorded = Recorded(result, setup.problem.cluster, moves=mode == "wall-clock")
    replayed, diverged = None, None
    try:
        replayed = _simulate(setup, as_recorded(setup.system, recorded, mode), recorded)
    except SimulationError as error:
        diverged = str(error)
    return RealRun(
        result=result,
        late_s=run.source.late_s if mode == "wall-clock" else {},
        pairs=tuple(recorded.pairs),
        replayed=replayed,
        diverged=diverged,
        load=run.load,
        reference_s=run.reference_s,
    )


# ---------------------------------------------------------------- what a step takes beside its kernels


def _others(setup: Setup) -> Setup:
    """Of the same scenario without overhead, and of another seed: requests that nothing is compared with."""
    scenario = setup.scenario
    if scenario.overhead is not None:
        raise ConfigError(f"--overhead: {scenario.where} has an overhead already; drop one of them")
    return resolve(scenario.model_copy(update={"seed": scenario.seed + 1000, "overhead": OverheadSpec()}))


class Probe(NamedTuple):
    """The steps of an execution that nothing is compared with, and the machine's pace during it."""

    pairs: Sequence[StepPair]
    reference_s: float | None


def probe(setup: Setup, how: Execution, count: int = OVERHEAD_REQUESTS) -> Probe:
    """Execute the first requests; the steps come with what the latency model says of them."""
    run = _execute(setup, Watched(First(setup.requests.source(), count)), how, paced=True)
    recorded = Recorded(run.result, setup.problem.cluster, moves=how.mode == "wall-clock")
    simulate(
        setup.problem, as_recorded(setup.system, recorded, how.mode), First(setup.requests.source(), count),
        predictor=setup.predictor, until_s=setup.scenario.until_s, hardware=recorded,
    )  # fmt: skip
    return Probe(recorded.pairs, run.reference_s)


def at_pace(probes: Sequence[Probe], runs: Sequence[Executed]) -> list[StepPair]:
    """All steps of the probes, as long as they would have taken at the pace of the middle one of the runs.

    The pace is that of a matrix product between the steps; the runs' own steps and requests are not looked at. Too
    short to be told, it counts as unchanged.
    """
    paces = [run.reference_s for run in runs if run.reference_s is not None]
    now_s = median(paces) if paces else None
    found: list[StepPair] = []
    for pairs, then_s in probes:
        factor = now_s / then_s if now_s is not None and then_s is not None else 1.0
        found += [pair._replace(measured_s=pair.measured_s * factor) for pair in pairs]
    return found


def _with_overhead(setup: Setup, found: Overhead, said: Callable[[str], None]) -> Setup:
    said(
        f"kernels take {found.slowdown:.3f} times as long as in the profile; beside them a step takes "
        f"{found.step_s * 1e3:.2f} ms, and {found.sequence_s * 1e3:.3f} ms a sequence"
    )
    spec = OverheadSpec(step_s=found.step_s, sequence_s=found.sequence_s, slowdown=found.slowdown)
    return resolve(setup.scenario.model_copy(update={"overhead": spec}))


def fitted_overhead(pairs: Sequence[StepPair]) -> Overhead:
    """Seconds per step and per sequence, and how much slower kernels are than the latency model says.

    Least squares of relative errors, since queues feel the mean, over the steps that took at most ``HELD_UP`` times
    what a fit by least absolute deviations says: those that something else held up for long do not count.
    """
    from scipy.optimize import lsq_linear

    shares = np.array([(1, pair.decode_seqs + pair.chunks, pair.predicted_s) for pair in pairs])
    measured_s = np.array([pair.measured_s for pair in pairs])
    expected = shares @ _least_deviations(shares / measured_s[:, None])
    kept = measured_s <= HELD_UP * expected
    rows = shares[kept] / expected[kept, None]
    measured = measured_s[kept] / expected[kept]
    found = lsq_linear(rows, measured, bounds=([0, 0, LEAST_SLOWDOWN], np.inf)).x
    return Overhead(step_s=float(found[0]), sequence_s=float(found[1]), slowdown=float(found[2]))


def _least_deviations(design: np.ndarray) -> np.ndarray:
    """Non-negative factors of the columns that bring the rows nearest to 1, by the sum of absolute deviations."""
    from scipy.optimize import linprog

    count = len(design)
    over = np.eye(count)
    costs = [0, 0, 0, *np.ones(2 * count)]
    bounds = [(0, None), (0, None), (LEAST_SLOWDOWN, None), *[(0, None)] * (2 * count)]
    found = linprog(costs, A_eq=np.hstack([design, over, -over]), b_eq=np.ones(count), bounds=bounds)
    assert found.x is not None, "every overhead is feasible, and the sum is at least 0"
    return np.asarray(found.x[:3], dtype=float)


class First:
    """The first requests of a source."""

    def __init__(self, inner: Source, count: int) -> None:
        self._inner = inner
        self._count = count

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return islice(self._inner.next(now_s, None), self._count) if finished is None else ()
