"""Requests on paths: every token of a request passes the nodes of its route in order, prompt and answer alike.

A plan whose replicas hold a part of the layers is a plan of *nodes*. A route then names the stages of a chain of nodes
that together hold all layers; prefill and decode take the same chain. A node batches what has come to it and computes
the layers that are still missing; the last one's output goes back to where the chain begins, by way of the
coordinator. Iterations of different nodes are out of step with each other, so none of them collapse: both modes of the
engine are one and the same here. Read ``node.py`` first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from sim.cost import StageCost
from sim.engine.clock import BOUNDARY, Alarm
from sim.engine.links import Links, cut_for_good
from sim.engine.node import Hop, Journey, Node, NodeDraft
from sim.engine.replica.job import Job
from sim.engine.replica.state import Flight
from sim.record import ON_THE_WAY
from sim.types import ConfigError, Line, PolicyError, Route, Work, to_ps

if TYPE_CHECKING:
    from sim.engine.run import Engine

TOKEN_BYTES = 4
"""A token's number on its way to and from the coordinator."""


class Paths:
    """All journeys of a run."""

    def __init__(self, engine: Engine) -> None:
        if engine.system.limits.prefix_caching:
            raise ConfigError(
                "system.engine.prefix_caching: true: nodes with a part of the layers share no prefixes; use false"
            )
        if engine.hardware is not None:
            raise ConfigError("plan: nodes with a part of the layers are simulated only; give every replica all layers")
        if engine.system.limits.async_scheduling:
            raise ConfigError("system.engine.async_scheduling: true: nodes with a part of the layers do not; use false")
        assert isinstance(engine.links, Links)
        self._engine = engine
        self._links = engine.links
        self._held_up: list[tuple[Node, Node, list[Journey]]] = []
        self._journeys: dict[Job, Journey] = {}
        self._costs: dict[Hashable, StageCost] = {}

    # ------------------------------------------------------------ begin

    def enter(self, job: Job, route: Route) -> None:
        """Queue a routed job at its first node; reject it where it can never fit."""
        engine = self._engine
        if route.decode != route.prefill:
            raise PolicyError(
                f"{type(engine.router).__name__} routes {job} over two paths; nodes keep their KV: use one"
            )
        hops = self._hops(route.prefill, job)
        job.route = route
        reason = self._never_fits(job, hops)
        if reason is not None:
            engine.finish(job, "rejected", reason)
            return
        job.places = (ON_THE_WAY.join(hop.node.name for hop in hops),) * 2
        self._queue(job, hops)
        engine.nudge(hops[0].node)

    def _queue(self, job: Job, hops: tuple[Hop, ...]) -> None:
        self._journeys[job] = hops[0].node.prompts[job] = Journey(job, hops, [0] * len(hops))

    def _hops(self, leg: tuple[str, ...], job: Job) -> tuple[Hop, ...]:
        """The chain's nodes, each with the layers that those before it do not hold."""
        layer, hops = 0, []
        for name in leg:
            node = self._engine.resolve((name,), job)
            assert isinstance(node, Node)
            stage = node.spec.stages[0]
            if not stage.first_layer <= layer < stage.end_layer:
                raise PolicyError(
                    f"{type(self._engine.router).__name__} routes {job} to {name}, which holds layers "
                    f"{stage.first_layer} to {stage.end_layer}, where layer {layer} is next"
                )
            hops.append(Hop(node, layer, stage.end_layer))
            layer = stage.end_layer
        if layer != self._engine.problem.model.num_layers:
            raise PolicyError(f"{type(self._engine.router).__name__} routes {job} over {layer} layers only: {leg}")
        return tuple(hops)

    def _never_fits(self, job: Job, hops: Sequence[Hop]) -> str | None:
        if job.samples > 1:
            return f"{job.samples} samples of a request: nodes with a part of the layers serve one"
        total = job.input_tokens + job._output_tokens
        reasons = (self._engine.over_context(total), *(hop.node.too_long(job, total - 1) for hop in hops))
        return next((reason for reason in reasons if reason is not None), None)

    # ------------------------------------------------------------ be computed

    def start(self, node: Node, now_ps: int) -> None:
        """The node's next batch, of what has come."""
        if node.flights or not (node.prompts or node.tokens):
            return
        stage = node.spec.stages[0]
        whole = self._cost(node, stage.first_layer, stage.end_layer)
        draft = NodeDraft(node, now_ps, lambda work: whole.line(work).first_ps, self._start_over)
        node.batcher.fill(draft)
        if not draft.journeys:
            if draft.preempted:  # nobody is admitted beside a preemption: decide again
                self._engine.clock.at(now_ps + 1, self._room, node)
            return
        line, work = self._price(node, draft.journeys)
        for journey in draft.journeys:
            if journey.job.first_scheduled_ps is None:
                journey.job.first_scheduled_ps = now_ps
        flight = Flight(None, [], now_ps, line.first_ps, 0, 1, work.decode_context, (line,), 1)
        node.flights.append(flight)
        node.passing = draft.journeys
        rows, engine = self._engine.rows, self._engine
        engine.iterations_outside += line.extrapolated
        used = node.ledger.used // node.num_layers
        rows.memory_fields.append((node.name, now_ps, used, node.total_blocks, node.num_waiting, node.num_running))
        end_ps = now_ps + line.first_ps
        fields = (node.name, now_ps, end_ps, 1, work.tokens - work.decode_seqs, work.decode_seqs, work.decode_context)
        flight.alarm = engine.clock.at(end_ps, self._computed, (node, flight, fields), BOUNDARY + node.number)

    def _price(self, node: Node, journeys: Sequence[Journey]) -> tuple[Line, Work]:
        """The batch's time: layers that only some of it needs are computed for these alone."""
        stage = node.spec.stages[0]
        bounds = sorted({journey.hop.first_layer for journey in journeys} | {stage.end_layer})
        total_ps, outside = 0, False
        for first, end in pairwise(bounds):
            work = _work([journey for journey in journeys if journey.hop.first_layer <= first])
            line = self._cost(node, first, end).line(work)
            total_ps += line.first_ps
            outside |= line.extrapolated
        return Line(total_ps, 0, 1, outside), _work(journeys)

    def _cost(self, node: Node, first: int, end: int) -> StageCost:
        """Of these layers there; nodes of one GPU of a kind share it, as it may keep large tables."""
        problem, stage = self._engine.problem, node.spec.stages[0]
        slow = max(self._engine.changes.slow.get(gpu, 1.0) for gpu in node.gpus)
        where: Hashable = problem.cluster.gpu(node.gpus[0]).name if stage.tp == 1 else node.gpus
        dense = max(0, min(end, problem.model.first_dense_layers) - first)
        key = where, end - first, dense, first == 0, end == problem.model.num_layers, slow
        if key not in self._costs:
            part = replace(stage, first_layer=first, end_layer=end)
            self._costs[key] = self._engine.cost.bind(problem.model, part, problem.cluster, slow)
        return self._costs[key]

    def _computed(self, alarm: Alarm) -> None:
        """A batch's end: everyone in it goes on to the next node, or has a token."""
        node, flight, fields = alarm.subject
        engine, now_ps = self._engine, self._engine.clock.now_ps
        node.flights.clear()
        engine.iterations += 1
        engine.rows.step_fields.append(fields)
        node.stage_busy_ps[0] += flight.first_ps
        passed, node.passing = [journey for journey in node.passing if self._is_on(journey)], []
        onward: dict[Node, list[Journey]] = {}
        for journey in passed:
            if journey.at + 1 == len(journey.hops):
                self._emit(journey, now_ps)
                journey.at = -1
            if self._is_on(journey):
                journey.at += 1
                onward.setdefault(journey.hop.node, []).append(journey)
        for target, group in onward.items():
            self._send(node, target, group)
        self.start(node, now_ps)
        if node.retiring:
            engine.changes.maybe_drained(node)

    def _emit(self, journey: Journey, now_ps: int) -> None:
        job = journey.job
        job.computed_tokens = job.target_tokens = journey.kv_tokens
        job.tokens.append(now_ps)
        job.generated_tokens += 1
        if job.first_token_ps is None:
            job.first_token_ps = job.prefill_end_ps = job.kv_ready_ps = now_ps
        if not job.tokens_left:
            self.leave(job, now=journey.hop.node)
            self._engine.finish(job, "completed", "", now_ps)

    # ------------------------------------------------------------ go on

    def _send(self, source: Node, target: Node, group: list[Journey]) -> None:
        """To the next node: one message after the other on the link between two, each alone on it.

        What has passed the last node goes back to the first by way of the coordinator: two hops, a token's number each.
        Where the link is cut they wait until some link changes.
        """
        clock, path = self._engine.clock, self._engine.problem.cluster.path(source.gpus, target.gpus)
        bytes_per_s = self._links.bytes_per_s(path)
        if not bytes_per_s:
            self._held_up.append((source, target, group))
            return
        back = group[0].at == 0
        per_token = TOKEN_BYTES if back else self._engine.problem.model.hidden_size * 2
        size_bytes = per_token * sum(journey.tokens for journey in group)
        start_ps = max(clock.now_ps, source.link_free_ps.get(target.name, 0))
        sent_ps = start_ps + to_ps(size_bytes / bytes_per_s)
        source.link_free_ps[target.name] = sent_ps
        clock.at(sent_ps + max(1, to_ps((1 + back) * path.latency_s)), self._come, group)

    def links_changed(self) -> None:
        """Send what a cut link has kept back."""
        held_up, self._held_up = self._held_up, []
        for source, target, group in held_up:
            group = [journey for journey in group if self._is_on(journey)]
            if group:
                self._send(source, target, group)

    def strand(self) -> int:
        """Nothing is left to happen: whoever waits for a cut link never goes on. Returns how many failed."""
        held_up, self._held_up = self._held_up, []
        lost = [(source, target, journey) for source, target, group in held_up for journey in group]
        lost = [(source, target, journey) for source, target, journey in lost if self._is_on(journey)]
        for source, target, journey in lost:
            self.leave(journey.job)
            self._engine.finish(journey.job, "failed", cut_for_good(source.name, target.name))
        return len(lost)

    def _come(self, alarm: Alarm) -> None:
        group: list[Journey] = [journey for journey in alarm.subject if self._is_on(journey)]
        engine = self._engine
        if not group:
            return
        node = group[0].hop.node
        for journey in group:
            if engine.by_leg.get(node.leg) is not node:
                engine.clock.at(engine.clock.now_ps, self._target_gone, journey)
            else:
                (node.prompts if journey.job.remaining_tokens else node.tokens)[journey.job] = journey
        if engine.by_leg.get(node.leg) is node:
            engine.nudge(node)

    def _target_gone(self, alarm: Alarm) -> None:
        if self._is_on(alarm.subject):  # else something else has happened to it at this instant
            self._engine.changes.reroute(alarm.subject.job)

    def _is_on(self, journey: Journey) -> bool:
        return self._journeys.get(journey.job) is journey

    # ------------------------------------------------------------ give up, end

    def _start_over(self, journey: Journey, by: Node) -> None:
        """Preempted by a node's batcher: its KV goes, and its prompt and tokens are computed again on the same path."""
        job, first = journey.job, journey.hops[0].node  # which is up: it held KV there
        self.leave(job, now=by)
        job.start_over()
        self._queue(job, journey.hops)
        first.prompts.move_to_end(job, last=False)
        self._engine.clock.at(self._engine.clock.now_ps + 1, self._room, first)

    def leave(self, job: Job, now: Node | None = None) -> None:
        """Off its path: whatever it holds is free, and who waits for room elsewhere is told a tick later."""
        journey = self._journeys.pop(job, None)
        if journey is None:
            return
        engine = self._engine
        for hop, blocks in zip(journey.hops, journey.blocks, strict=True):
            node = hop.node
            for place in (node.prompts, node.tokens, node.held):
                place.pop(job, None)
            if blocks and engine.by_leg.get(node.leg) is node:
                node.ledger.give(blocks * hop.layers)
                if node is not now and (node.prompts or node.tokens or node.retiring):
                    engine.clock.at(engine.clock.now_ps + 1, self._room, node)

    def _room(self, alarm: Alarm) -> None:
        node: Node = alarm.subject
        if self._engine.by_leg.get(node.leg) is node:
            self._engine.nudge(node)
            if node.retiring:
                self._engine.changes.maybe_drained(node)


def _work(journeys: Iterable[Journey]) -> Work:
    """Prompts as chunks with nothing before them, tokens as decodes."""
    chunks, seqs, context = [], 0, 0
    for journey in journeys:
        if journey.job.remaining_tokens:
            chunks.append((journey.tokens, 0))
        else:
            seqs += 1
            context += journey.kv_tokens
    return Work(tuple(chunks), seqs, context)
