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
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.recorded_steps import Recorded, StepPair
from experiments.resolve import Setup, resolve
from experiments.scenario import OverheadSpec
from sim.cost import Overhead
from sim.engine import simulate
from sim.policy import Source, System
from sim.record import Result
from sim.types import ConfigError, Request, SimulationError

if TYPE_CHECKING:
    from calibrate.execute.run import Execution

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    """One execution, its replay with recorded times (None where the replay went another way), and the load then."""

    result: Result
    late_s: Mapping[int, float]
    pairs: tuple[StepPair, ...]
    replayed: Result | None
    diverged: str | None
    load: float | None
    """Load average of the machine over the last minute, when the run ended."""


@dataclass(slots=True, kw_only=True)
class Validation:
    """A prediction and its real runs. ``lost``: why executions ended early; ``ended``: what the lost run had done."""

    setup: Setup
    mode: str
    device: str
    predicted: Result
    runs: list[RealRun] = field(default_factory=list)
    lost: str | None = None
    ended: list[tuple[Request, float]] = field(default_factory=list)


def validate(
    setup: Setup,
    how: Execution,
    repeats: int,
    said: Callable[[str], None] = lambda _: None,
    *,
    overhead: bool = False,
) -> Validation:
    """Execute ``repeats`` times, and predict. A worker that dies ends it early; what was done is kept.

    ``overhead``: of the steps, fitted to executions of other requests before, between and after those that are
    compared, since machines do not keep their pace. ``ConfigError`` for what cannot be executed.
    """
    if setup.events:
        raise ConfigError(f"{setup.scenario.where}: events: real machines have no made-up faults; leave them out")
    others = _others(setup) if overhead else None
    executed: list[tuple[Result, Watched, float | None]] = []
    probes: list[StepPair] = []
    lost, ended = None, []
    source = Watched(setup.requests.source())
    try:
        for number in range(repeats):
            probes += probe(others, how) if others else ()
            source = Watched(setup.requests.source())
            result = _execute(setup, source, how)
            executed.append((result, source, os.getloadavg()[0] if hasattr(os, "getloadavg") else None))
            said(f"run {number + 1} of {repeats}: {result.makespan_s:.1f} s, load average {executed[-1][2] or 0:.2f}")
        probes += probe(others, how) if others else ()
    except ConfigError:
        raise
    except SimulationError as error:
        lost, ended = str(error), source.ended if len(executed) < repeats else []
    if probes:
        setup = _with_overhead(setup, fitted_overhead(probes), said)
    return Validation(
        setup=setup,
        mode=how.mode,
        device=how.device,
        predicted=_simulate(setup, as_executed(setup.system, how.mode)),
        runs=[_with_replay(setup, *one, how.mode) for one in executed],
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


def _execute(setup: Setup, source: Source, how: Execution) -> Result:
    from calibrate.execute.run import execute

    return execute(setup.problem, setup.system, source, how, predictor=setup.predictor, until_s=setup.scenario.until_s)


def _with_replay(setup: Setup, result: Result, source: Watched, load: float | None, mode: str) -> RealRun:
    recorded = Recorded(result, setup.problem.cluster, moves=mode == "wall-clock")
    replayed, diverged = None, None
    try:
        replayed = _simulate(setup, as_recorded(setup.system, recorded, mode), recorded)
    except SimulationError as error:
        diverged = str(error)
    return RealRun(
        result=result,
        late_s=source.late_s if mode == "wall-clock" else {},
        pairs=tuple(recorded.pairs),
        replayed=replayed,
        diverged=diverged,
        load=load,
    )


# ---------------------------------------------------------------- what a step takes beside its kernels


def _others(setup: Setup) -> Setup:
    """Of the same scenario without overhead, and of another seed: requests that nothing is compared with."""
    scenario = setup.scenario
    if scenario.overhead is not None:
        raise ConfigError(f"--overhead: {scenario.where} has an overhead already; drop one of them")
    return resolve(scenario.model_copy(update={"seed": scenario.seed + 1000, "overhead": OverheadSpec()}))


def probe(setup: Setup, how: Execution, count: int = OVERHEAD_REQUESTS) -> Sequence[StepPair]:
    """The steps of an execution, each with what the latency model says of it."""
    source = Watched(First(setup.requests.source(), count))
    recorded = Recorded(_execute(setup, source, how), setup.problem.cluster, moves=how.mode == "wall-clock")
    simulate(
        setup.problem, as_recorded(setup.system, recorded, how.mode), First(setup.requests.source(), count),
        predictor=setup.predictor, until_s=setup.scenario.until_s, hardware=recorded,
    )  # fmt: skip
    return recorded.pairs


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
