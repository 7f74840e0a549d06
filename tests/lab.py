"""Systems put together for one test, and a spy that writes down every batch a scheduler makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from sim import Limits, Plan, Request, System
from sim.batchers import TokenBudget
from sim.planners.pools import Colocated, Pool
from sim.policy import Batch, Batcher, ReplicaView, RequestView, Rescheduler, Router, Transfer, View
from sim.reschedulers import KeepPlan
from sim.routers import LeastRequests
from sim.transfers import Whole
from sim.types import Change, Role, Route, Signal
from tests.toys import replica


def system(
    batcher: Callable[[], Batcher] = TokenBudget,
    *,
    router: Callable[[], Router] = LeastRequests,
    transfer: Callable[[], Transfer] = Whole,
    rescheduler: Callable[[], Rescheduler] = KeepPlan,
    **limits: Any,
) -> System:
    """A system of these parts; give ``run`` a plan."""
    return System(
        name="lab",
        mirrors="nothing",
        planner=Colocated(pool=Pool()),
        router=router,
        batcher=lambda role: batcher(),
        transfer=transfer,
        rescheduler=rescheduler,
        limits=Limits(**limits),
    )


ONE = Plan(replicas=(replica("a", ["n0.g0"]),))
"""One replica on one GPU."""
TWO = Plan(replicas=(replica("a", ["n0.g0"]), replica("b", ["n1.g0"])))
PIPELINE = Plan(replicas=(replica("a", ["n0.g0", "n0.g1"], pp=2),))
SPLIT = Plan(replicas=(replica("p", ["n0.g0"], "prefill"), replica("d", ["n1.g0"], "decode")))
"""Prefill on one machine, decode on another."""


@dataclass
class Way:
    """Every request takes the same way, or the one of its id."""

    prefill: str | Sequence[str]
    decode: str | Sequence[str]

    def route(self, request: RequestView, view: View) -> Route:
        names = [
            name if isinstance(name, str) else name[request.id % len(name)] for name in (self.prefill, self.decode)
        ]
        return Route(*(view.replica(name).leg for name in names))

    def finished(self, request: RequestView) -> None:
        pass


@dataclass
class Script:
    """A rescheduler that answers its n-th signal with the n-th change, and remembers what it saw."""

    changes: Sequence[Change | None]
    interval_s: float | None = None
    seen: list[Signal] = field(default_factory=list)

    def react(self, signal: Signal, view: View) -> Change | None:
        self.seen.append(signal)
        return self.changes[len(self.seen) - 1] if len(self.seen) <= len(self.changes) else None


@dataclass
class Fill:
    """What one call of a batcher did; ids of requests."""

    at_s: float
    role: Role
    limits: Limits
    total_blocks: int
    waiting: list[int]
    swapped: list[int]
    chunks: dict[int, int] = field(default_factory=dict)
    decodes: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    swapped_in: list[int] = field(default_factory=list)
    free_blocks: int = 0
    num_running: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.chunks.values()) + len(self.decodes)


class _SpiedBatch:
    """The batch, with every action noted."""

    def __init__(self, batch: Batch, fill: Fill) -> None:
        self._batch = batch
        self._fill = fill

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def preempt(self, request: RequestView, how: Any = "recompute") -> None:
        self._batch.preempt(request, how)
        self._fill.preempted.append(request.id)
        self._fill.chunks.pop(request.id, None)
        if request.id in self._fill.decodes:
            self._fill.decodes.remove(request.id)

    def admit(self, request: RequestView, tokens: int, **more: Any) -> bool:
        done = self._batch.admit(request, tokens, **more)
        if done:
            self._fill.admitted.append(request.id)
            self._fill.chunks[request.id] = tokens
        return done

    def prefill(self, request: RequestView, tokens: int) -> bool:
        done = self._batch.prefill(request, tokens)
        if done:
            self._fill.chunks[request.id] = tokens
        return done

    def swap_in(self, request: RequestView, **more: Any) -> bool:
        done = self._batch.swap_in(request, **more)
        if done:
            self._fill.swapped_in.append(request.id)
        return done

    def decode(self, leave_out: Iterable[RequestView] = ()) -> None:
        out = [request.id for request in leave_out]
        self._fill.decodes = [request.id for request in self._batch.decoding if request.id not in out]
        self._fill.left_out = out
        self._batch.decode([request for request in self._batch.decoding if request.id in out])


class Spy:
    """A batcher that fills as another does, and writes down what that did."""

    def __init__(self, batcher: Batcher, fills: list[Fill]) -> None:
        self._batcher = batcher
        self._fills = fills

    def fill(self, batch: Batch) -> None:
        fill = Fill(
            batch.now_s, batch.role, batch.limits, batch.total_blocks, [r.id for r in batch.waiting],
            [r.id for r in batch.swapped],
        )  # fmt: skip
        self._batcher.fill(_SpiedBatch(batch, fill))  # type: ignore[arg-type]
        fill.free_blocks, fill.num_running = batch.free_blocks, batch.num_running
        self._fills.append(fill)

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        lets_in = getattr(self._batcher, "lets_in", None)
        return lets_in is None or lets_in(request, blocks, replica)

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return self._batcher.refuse(request, total_tokens, total_blocks, limits)


def spied(system: System) -> tuple[System, list[Fill]]:
    """The system, and the list that its batches will be in (step by step: one per iteration)."""
    fills: list[Fill] = []
    batcher = system.batcher
    return replace(system, batcher=lambda role: Spy(batcher(role), fills)), fills


def longest_gap_s(times_ps: Sequence[int]) -> float:
    return max(b - a for a, b in pairwise(times_ps)) / 10**12


@dataclass
class Progress:
    """A request as the spy's notes retell it, one replica, step by step."""

    prompt: int
    output: int
    target: int
    computed: int = 0
    generated: int = 0
    chunks: list[int] = field(default_factory=list)
    running: bool = False

    @property
    def decoding(self) -> bool:
        return self.running and self.computed >= self.target


def retell(
    fills: Sequence[Fill], requests: Sequence[Request], *, swap: bool = False, steady: bool = False
) -> Iterator[tuple[Fill, dict[int, Progress]]]:
    """Every batch, with all requests as they are once it has run; checks what no schedule may get wrong.

    Chunks add up to the prompt, and after a recompute to prompt and generated tokens; only computed prompts decode;
    every request ends with its output. ``swap``: preemption keeps KV. ``steady``: decodes never skip a batch.
    """
    state = {r.id: Progress(r.input_tokens, r.output_tokens, r.input_tokens) for r in requests}
    for fill in fills:
        for number in fill.preempted:
            one = state[number]
            one.running = False
            if not swap or not one.computed >= one.target:
                one.computed, one.target, one.chunks = 0, one.prompt + one.generated, []
        for number in (*fill.admitted, *fill.swapped_in):
            state[number].running = True
        if steady:
            assert sorted(fill.decodes) == sorted(number for number, one in state.items() if one.decoding)
        for number in fill.decodes:
            assert state[number].decoding
        for number, tokens in fill.chunks.items():
            _compute(state[number], tokens)
        for number in fill.decodes:
            one = state[number]
            one.computed, one.target, one.generated = one.computed + 1, one.target + 1, one.generated + 1
        yield fill, state
        for one in state.values():
            one.running &= one.generated < one.output
    assert all(one.generated == one.output for one in state.values())


def _compute(one: Progress, tokens: int) -> None:
    assert one.running
    one.computed += tokens
    one.chunks.append(tokens)
    assert one.computed <= one.target
    if one.computed == one.target:
        assert sum(one.chunks) == one.prompt + one.generated
        one.generated += 1
