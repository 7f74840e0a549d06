"""The simulator's engine against the real clock: worker processes compute its steps and carry its KV.

Router, batchers, ledgers and routes are those of a simulation, run by the very same engine (``sim.engine``), whose
``Hardware`` this is: an iteration ends when its workers say so, KV has moved when it has landed. What the cost model
says is read by policies only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibrate.execute.workers.crew import Part, link_shares, parts_of, workers_of
from calibrate.execute.workers.fleet import Fleet, Word, WorkerLostError
from sim.cluster import Cluster, Path
from sim.cost import StageCost, StepCost
from sim.engine.clock import BOUNDARY, Alarm, Clock
from sim.engine.links import Flow
from sim.engine.replica.job import Job
from sim.engine.replica.state import Delivery, Flight, ReplicaState
from sim.model import ModelSpec
from sim.types import PS_PER_S, ConfigError, Line, SimulationError, Stage, Work, to_ps

STUCK_S = 300.0
"""Workers that live but leave every order unanswered for so long, while nothing else is due, count as lost."""
Then = Callable[[int, list[Word]], None]


@dataclass(slots=True)
class Awaited:
    """Answers still to come to an order that went to several workers, and what to do after the last one."""

    count: int
    then: Then
    answers: list[Word] = field(default_factory=list)


class WallClock(Clock):
    """Alarms ring when their time has come; in between it listens to the workers."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._fleet = fleet
        self._awaited: dict[int, Awaited] = {}
        self._started_s = time.perf_counter()

    def await_answers(self, number: int, count: int, then: Then) -> None:
        """``then(ps, answers)`` when there are so many answers to the order of that number."""
        self._awaited[number] = Awaited(count, then)

    def nothing_left(self) -> bool:
        return super().nothing_left() and not self._awaited

    def run(self, until_ps: int | None = None) -> None:
        """Start the real clock, and go on until nothing is due or awaited (or up to ``until_ps``)."""
        self._started_s = time.perf_counter()
        while not self.nothing_left():
            due_ps = self.due_ps
            wake_ps = due_ps if until_ps is None else min(until_ps, until_ps if due_ps is None else due_ps)
            self._listen(wake_ps)
            now_ps = self._ps(time.perf_counter())
            while (due_ps := self.due_ps) is not None and due_ps <= now_ps and (until_ps is None or due_ps < until_ps):
                self.ring()
            if until_ps is not None and now_ps >= until_ps:
                return

    def _ps(self, at_s: float) -> int:
        return round((at_s - self._started_s) * PS_PER_S)

    def _listen(self, wake_ps: int | None) -> None:
        """What workers have said by now, or until the next alarm is due."""
        wait_s = STUCK_S if wake_ps is None else max(0.0, (wake_ps - self._ps(time.perf_counter())) / PS_PER_S)
        word = self._fleet.hear(wait_s)
        if word is None and wake_ps is None:
            raise WorkerLostError(f"{len(self._awaited)} orders have not been answered for {STUCK_S:.0f} s")
        while word is not None:
            awaited = self._awaited[word.header["number"]]
            awaited.answers.append(word)
            if len(awaited.answers) == awaited.count:
                del self._awaited[word.header["number"]]
                awaited.then(max(self.now_ps, self._ps(word.at_s)), awaited.answers)
            word = self._fleet.hear(0.0)


class ForPolicies:
    """A latency model as policies go on reading it, in a run whose steps are measured."""

    def __init__(self, cost: StepCost) -> None:
        self.name = f"measured; policies read {cost.name}"
        self._cost = cost

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> Guess:
        return Guess(self._cost.bind(model, stage, cluster, slow))


class Guess:
    """What a policy may expect of a stage; the run's own times do not come from here."""

    measured = True

    def __init__(self, cost: StageCost) -> None:
        self._cost = cost

    def line(self, work: Work) -> Line:
        return self._cost.line(work)._replace(extrapolated=False)


class Wall:
    """Fits ``sim.engine.hardware.Hardware``.

    ``emulate_links``: KV leaves no faster than the
    cluster's path would carry it alone, else as fast as the processes can. ``kv_bits``: 4 quantises KV on the way.
    """

    def __init__(
        self,
        fleet: Fleet,
        cluster: Cluster,
        *,
        vocab_size: int,
        kv_heads: int,
        seed: int,
        kv_bits: int = 16,
        emulate_links: bool,
    ) -> None:
        self.clock = WallClock(fleet)
        self.tokens: dict[int, list[int]] = {}
        self.readings: list[float] = []
        """Of the workers' pace, in seconds (``pace.py``)."""
        self._inputs: dict[int, int] = {}
        self._fleet = fleet
        self._cluster = cluster
        self._vocab_size = vocab_size
        self._kv_heads = kv_heads
        self._seed = seed
        self._kv_bits = kv_bits
        self._emulate_links = emulate_links
        self._held: dict[str, set[int]] = {}
        self._swapped: dict[str, set[int]] = {}
        self._parts: dict[tuple[str, str], list[Part]] = {}
        self._numbers = 0

    @property
    def outputs(self) -> dict[int, list[int]]:
        """Generated tokens by request."""
        return {number: tokens[self._inputs[number] :] for number, tokens in self.tokens.items()}

    # ------------------------------------------------------------ steps

    def compute(self, replica: ReplicaState, flight: Flight, done: Callable[[Alarm], None]) -> None:
        items = [self._item(job, job.computed_tokens, count) for job, count in flight.chunks]
        if flight.cohort is not None:
            items += [self._item(job, job.kv_tokens, 1) for job in flight.cohort.members()]
        number = self._number()
        free = self._make_room(replica)
        held = self._held[replica.name]
        again = [sequence for sequence, position, *_ in items if position == 0 and sequence in held]
        held.update(item[0] for item in items)
        order = {"do": "step", "number": number, "items": items, "free": free + again}
        crews = [workers_of(stage) for stage in replica.spec.stages]

        def computed(at_ps: int, answers: list[Word]) -> None:
            said = {word.worker: word.header for word in answers}
            self.readings += [header["reference_s"] for header in said.values() if header["reference_s"] is not None]
            for sequence, token in said[crews[-1][0]]["tokens"]:
                self.tokens[sequence].append(token)
            flight.first_ps, flight.slope_ps = at_ps - flight.start_ps, 0
            slowest_s = [max(said[worker]["seconds"] for worker in crew) for crew in crews]
            flight.stage_lines = tuple(Line(to_ps(seconds), 0, 1) for seconds in slowest_s)
            self.clock.at(at_ps, done, (replica, flight), BOUNDARY + replica.number)

        self.clock.await_answers(number, sum(len(crew) for crew in crews), computed)
        self._say(replica, order)

    def _say(self, replica: ReplicaState, header: dict[str, Any]) -> None:
        for stage in replica.spec.stages:
            for worker in workers_of(stage):
                self._fleet.say(worker, header)

    def _make_room(self, replica: ReplicaState) -> list[int]:
        """Let the batcher's swaps be done, before anything takes the blocks; whose KV is still to be forgotten."""
        free = self._no_longer_held(replica)
        wanted, before = {job.id for job in replica.swapped}, self._swapped.get(replica.name, set())
        if wanted == before:
            return free
        self._swapped[replica.name] = wanted
        self._say(replica, {"do": "swap", "free": free, "out": sorted(wanted - before), "in": sorted(before - wanted)})
        return []

    def _item(self, job: Job, position: int, count: int) -> tuple[int, int, list[int], bool]:
        """What a worker must compute of a job; it wants the next token if no known one follows."""
        if job.samples > 1:
            raise ConfigError(f"wall-clock: {job} wants {job.samples} samples; workers make one")
        if job.id not in self.tokens:
            prompt = np.random.default_rng([self._seed, job.id]).integers(0, self._vocab_size, job.input_tokens)
            self.tokens[job.id], self._inputs[job.id] = prompt.tolist(), job.input_tokens
        known = self.tokens[job.id]
        return job.id, position, known[position : position + count], position + count == len(known)

    def _no_longer_held(self, replica: ReplicaState) -> list[int]:
        """Sequences whose KV the workers of a replica can forget: finished, preempted or moved away."""
        places = (replica.running, replica.departing, replica.arrived, replica.arriving, replica.swapped)
        current = {job.id for place in places for job in place}
        held = self._held.setdefault(replica.name, set())
        gone = held - current
        held -= gone
        return sorted(gone)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    # ------------------------------------------------------------ KV moves

    def start(self, path: Path, size_bytes: float, done: Callable[[Alarm], None], subject: Any = None) -> Flow:
        if not isinstance(subject, Delivery):
            raise ConfigError("wall-clock: replicas cannot be loaded during the run; give one plan for all of it")
        delivery = subject
        number = self._number()
        parts = self._parts_of(delivery)
        free = self._make_room(delivery.target)
        self._held[delivery.target.name].add(delivery.job.id)

        def landed(at_ps: int, answers: list[Word]) -> None:
            delivery.sent_bytes = sum(word.header["bytes"] for word in answers)
            self.clock.at(at_ps, done, delivery)

        self.clock.await_answers(number, len(parts), landed)
        senders: set[str] = set()
        for index, (part, share) in enumerate(zip(parts, link_shares(parts), strict=True)):
            order = self._order(delivery, part) | {"number": number, "part": index}
            self._fleet.say(part.target, order | {"do": "expect", "free": free})
            pace = self._pace(path, share, latency=part.source not in senders)
            self._fleet.say(part.source, order | pace | {"do": "send"})
            senders.add(part.source)
        return Flow(path.usage, to_ps(path.latency_s), size_bytes, done, delivery, self.clock.now_ps)

    def _parts_of(self, delivery: Delivery) -> list[Part]:
        ends = (delivery.source.name, delivery.target.name)
        if ends not in self._parts:
            self._parts[ends] = parts_of(delivery.source.spec, delivery.target.spec, self._kv_heads)
        return self._parts[ends]

    def _pace(self, path: Path, share: float, *, latency: bool) -> dict[str, Any]:
        if not self._emulate_links:
            return {"bytes_per_s": None, "latency_s": 0.0}
        bytes_per_s = path.bytes_per_s(self._cluster.capacity_bytes_per_s) * share
        return {"bytes_per_s": bytes_per_s, "latency_s": path.latency_s if latency else 0.0}

    def _order(self, delivery: Delivery, part: Part) -> dict[str, Any]:
        """What both ends must know of a part of a move."""
        return {
            "from": part.source,
            "to": part.target,
            "port": self._fleet.ports[part.target],
            "sequence": delivery.job.id,
            "tokens": delivery.move.tokens,
            "first": part.first,
            "end": part.end,
            "source_head": part.source_head,
            "target_head": part.target_head,
            "heads": part.heads,
            "bits": self._kv_bits,
        }

    def cancel(self, flow: Flow) -> None:
        raise SimulationError("wall-clock: KV that is on its way cannot be stopped")

    def scale(self, resource: str, factor: float) -> None:
        raise ConfigError(f"wall-clock: the link {resource} is real; its bandwidth cannot be scaled")
