"""A real run's step and transfer times, played back to the simulator's engine on a virtual clock.

``Recorded`` is the ``Hardware`` (``sim.engine.hardware``) that does it. What then differs from the real run is what the
engine and its policies did; what each step should have taken by the latency model is noted beside what it took.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from sim.cluster import Cluster, Path
from sim.engine.clock import BOUNDARY, Alarm, Clock
from sim.engine.links import Flow, Links
from sim.engine.replica.state import Delivery, Flight, ReplicaState
from sim.policy import Transfer, View
from sim.record import LinkRow, Result, StepRow
from sim.types import PS_PER_S, Chunk, Move, SimulationError


class StepPair(NamedTuple):
    """One executed step, and what the latency model says of the very same one."""

    replica: str
    start_s: float
    prefill_tokens: int
    decode_seqs: int
    decode_context: int
    chunks: int
    measured_s: float
    predicted_s: float


class Recorded:
    """Fits ``sim.engine.hardware.Hardware``. ``moves``: transfers take their recorded times too, else the model's.

    Raises ``SimulationError`` as soon as the engine does another step or transfer than the real run did.
    """

    def __init__(self, real: Result, cluster: Cluster, *, moves: bool) -> None:
        self.clock = Clock()
        self.pairs: list[StepPair] = []
        self._links = Links(self.clock, cluster)
        self._steps: dict[str, deque[StepRow]] = defaultdict(deque)
        for step in sorted(real.rows.steps, key=attrgetter("start_ps")):
            self._steps[step.replica].append(step)
        self._moves: dict[int, deque[LinkRow]] = defaultdict(deque)
        self._replays_moves = moves
        for move in real.rows.links:
            self._moves[move.request].append(move)

    def compute(self, replica: ReplicaState, flight: Flight, done: Callable[[Alarm], None]) -> None:
        tokens = sum(count for _, count in flight.chunks)
        shape = (tokens, flight.cohort.size if flight.cohort is not None else 0, flight.decode_context)
        if not self._steps[replica.name]:
            raise SimulationError(f"replay: {replica.name} starts a step of {shape} that the real run did not have")
        step = self._steps[replica.name].popleft()
        if (step.prefill_tokens, step.decode_seqs, step.decode_context) != shape:
            raise SimulationError(f"replay: {replica.name} starts a step of {shape}; the real run had {step}")
        took_ps = step.end_ps - step.start_ps
        predicted_s = flight.first_ps / PS_PER_S
        self.pairs.append(
            StepPair(
                replica.name, step.start_ps / PS_PER_S, *shape, len(flight.chunks), took_ps / PS_PER_S, predicted_s
            )
        )
        flight.first_ps, flight.slope_ps = took_ps, 0
        self.clock.at(flight.boundary_ps(1), done, (replica, flight), BOUNDARY + replica.number)

    def start(self, path: Path, size_bytes: float, done: Callable[[Alarm], None], subject: Any = None) -> Flow:
        if not (self._replays_moves and isinstance(subject, Delivery)):
            return self._links.start(path, size_bytes, done, subject)
        if not self._moves[subject.job.id]:
            raise SimulationError(f"replay: KV of {subject.job} moves once more than in the real run")
        move = self._moves[subject.job.id].popleft()
        now_ps = self.clock.now_ps
        flow = Flow(path.usage, 0, size_bytes, done, subject, now_ps)
        flow.alarm = self.clock.at(now_ps + max(1, move.end_ps - move.start_ps), done, subject)
        return flow

    def sent(self, inner: Transfer) -> AsRecorded:
        """A transfer whose flows are modelled, and whose overhead (with a codec that was measured) is the record's."""
        return AsRecorded(inner, self._landed_in_s)

    def _landed_in_s(self, request: int) -> float:
        """From now to where a move landed."""
        if not self._moves[request]:
            raise SimulationError(f"replay: KV of request {request} moves once more than in the real run")
        left_ps = self._moves[request].popleft().end_ps - self.clock.now_ps
        if left_ps < 0:
            raise SimulationError(f"replay: KV of request {request} is {-left_ps} ps later than in the real run")
        return left_ps / PS_PER_S

    def cancel(self, flow: Flow) -> None:
        if not self._replays_moves:
            self._links.cancel(flow)
        elif flow.alarm is not None:
            flow.alarm.cancel()

    def scale(self, resource: str, factor: float) -> None:
        self._links.scale(resource, factor)


class AsRecorded:
    """Another transfer, with overheads that ``landed_in_s(request)`` says."""

    def __init__(self, inner: Transfer, landed_in_s: Callable[[int], float]) -> None:
        self.pull = inner.pull
        self._inner = inner
        self._landed_in_s = landed_in_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return self._inner.chunks(move, view)

    def overhead_s(self, move: Move) -> float:
        return self._landed_in_s(move.request_id)
