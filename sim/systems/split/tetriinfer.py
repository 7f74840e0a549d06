"""TetriInfer (arXiv 2401.11181v1): prefill in fixed chunks, decodes placed by predicted length, roles that flip."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sim.batchers.two_phase import Admission, Order, TwoPhase
from sim.cost import PaddedChunks
from sim.planners.pools import Pool, Split
from sim.policy import Limits, ReplicaView, RequestView, Rescheduler, System, Transfer, View
from sim.predictors import LengthRange
from sim.reschedulers import RestorePlan
from sim.systems.layout import PoolOption
from sim.transfers import ChunkByChunk, Whole
from sim.types import Change, ConfigError, Plan, Reject, Replica, Role, Route, Signal

HEAVY_DECODE_TOKENS = 128
"""A decode is heavy above it: the median answer of ShareGPT."""
PREDICTOR_SHARE = 0.1
"""Of the prefill's time: the predictor is about ten times as fast as the model it predicts."""
FLIP_TICK_S = 1.0
DEFAULT_CHUNK = 512
Dispatch = Literal["power-of-two", "random"]


@dataclass(slots=True)
class Load:
    """What a decode instance last reported."""

    free_tokens: int
    heavy: int
    light: int

    def heavier_than(self, other: Load) -> bool:
        """By the ratio of heavy to light decodes; of none at all, neither."""
        return self.heavy * other.light > other.heavy * self.light

    def with_one(self, is_heavy: bool) -> Load:
        return replace(self, heavy=self.heavy + is_heavy, light=self.light + (not is_heavy))


class TwoLevels:
    """The global scheduler, and the dispatchers of the prefill instances.

    On arrival: the prefill instance with the fewest prompt tokens queued. After the prompt: among decode instances
    that had room for the predicted answer at the last report (at most ``monitor_s`` old), two are drawn and the one
    is taken whose ratio of heavy to light decodes is lower with the request (``random``: the first one). Without room
    anywhere the KV stays until the next report. ``at_once``: the decode instance is chosen on arrival.
    """

    def __init__(self, monitor_s: float = 0.1, dispatch: Dispatch = "power-of-two", at_once: bool = False) -> None:
        self.monitor_s = monitor_s
        self.two = dispatch == "power-of-two"
        self.at_once = at_once
        self._reported_s: float | None = None
        self._loads: dict[str, Load] = {}
        self._counts: dict[str, list[int]] = {}  # [light, heavy] decodes now, by instance
        self._placed: dict[int, tuple[str, bool]] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills = view.with_role("prefill")
        if not prefills or not view.with_role("decode"):
            return Reject(f"no {'decode' if prefills else 'prefill'} instance is up")
        prefill = min(prefills, key=lambda replica: replica.pending_prefill_tokens)
        if not self.at_once:
            return Route(prefill.leg, None)
        self._read_reports(view)
        return Route(
            prefill.leg, self._place(request, self._with_room(request, view) or view.with_role("decode"), view)
        )

    def dispatch(self, request: RequestView, view: View) -> tuple[str, ...] | float | Reject:
        if not view.with_role("decode"):
            return Reject("no decode instance is up")
        self._read_reports(view)
        able = self._with_room(request, view)
        if able:
            return self._place(request, able, view)
        assert self._reported_s is not None
        return max(1e-3, self._reported_s + self.monitor_s - view.now_s)

    def finished(self, request: RequestView) -> None:
        if request.id in self._placed:
            name, heavy = self._placed.pop(request.id)
            self._counts[name][heavy] -= 1

    # ------------------------------------------------------------ reports

    def _read_reports(self, view: View) -> None:
        if self._reported_s is not None and view.now_s < self._reported_s + self.monitor_s:
            return
        self._reported_s = view.now_s
        for replica in view.up:
            light, heavy = self._counts.setdefault(replica.name, [0, 0])
            self._loads[replica.name] = Load(replica.free_blocks * replica.block_size, heavy, light)

    def _with_room(self, request: RequestView, view: View) -> Sequence[ReplicaView]:
        """Instances, of those that have reported, that had room for what the request is predicted to need."""
        need = request.input_tokens + request.predicted_output_tokens + 1
        return [
            replica
            for replica in view.with_role("decode")
            if replica.name in self._loads
            and min(need, replica.total_blocks * replica.block_size) <= self._loads[replica.name].free_tokens
        ]

    def _place(self, request: RequestView, able: Sequence[ReplicaView], view: View) -> tuple[str, ...]:
        heavy = request.predicted_output_tokens > HEAVY_DECODE_TOKENS
        drawn = view.rng.choice(len(able), size=min(2, len(able)), replace=False).tolist()
        chosen: ReplicaView
        first, last = able[min(drawn)], able[max(drawn)]
        if not self.two:
            chosen = able[drawn[0]]
        elif self._loads_with(first, heavy).heavier_than(self._loads_with(last, heavy)):
            chosen = last
        else:
            chosen = first
        self._counts.setdefault(chosen.name, [0, 0])[heavy] += 1
        self._placed[request.id] = (chosen.name, heavy)
        return chosen.leg

    def _loads_with(self, replica: ReplicaView, heavy: bool) -> Load:
        return self._loads.get(replica.name, Load(0, 0, 0)).with_one(heavy)


class FlipIdle:
    """An instance that had work at no more than ``busy_share`` of the ticks of ``window_s`` takes on the other role.

    It must be wanted: more requests wait for the other role than it has instances; and its own role must keep one. It
    first drains, labelled ``mixed``, while nothing new is sent to it. The paper's trigger is not certain: idle for
    a minute (``busy_share`` 0), or a prefill load under 10 % (0.1). A flip takes 5 to 7 ms once drained: less than a
    tick, after which it is seen.
    """

    def __init__(self, busy_share: float = 0.0, window_s: float = 60.0, interval_s: float = FLIP_TICK_S) -> None:
        self.interval_s: float | None = interval_s
        self.busy_share = busy_share
        self._ticks = round(window_s / interval_s)
        self._busy: dict[str, deque[bool]] = {}
        self._flipping: dict[str, Role] = {}
        self._restore = RestorePlan()

    def react(self, signal: Signal, view: View) -> Change | None:
        if signal.kind != "tick":
            return self._restore.react(signal, view)
        for replica in view.replicas:
            self._busy.setdefault(replica.name, deque(maxlen=self._ticks)).append(not _empty(replica))
        for replica in view.replicas:
            role = self._flipping.get(replica.name)
            if role is not None and _empty(replica):
                del self._flipping[replica.name]
                return self._relabel(view.plan, replica.name, role, f"{replica.name} is drained: it becomes {role}")
        if self._flipping:
            return None
        return next((change for replica in view.replicas if (change := self._flip(replica, view))), None)

    def _flip(self, replica: ReplicaView, view: View) -> Change | None:
        seen = self._busy[replica.name]
        if len(seen) < self._ticks or sum(seen) > self.busy_share * self._ticks:
            return None
        other: Role = "decode" if replica.role == "prefill" else "prefill"
        if len(view.with_role(replica.role)) < 2 or _waiting(view, other) <= len(view.with_role(other)):
            return None
        seen.clear()
        self._flipping[replica.name] = other
        return self._relabel(view.plan, replica.name, "mixed", f"{replica.name} has little to do: it drains to flip")

    def _relabel(self, plan: Plan, name: str, role: Role, reason: str) -> Change:
        def relabelled(spec: Replica) -> Replica:
            return replace(spec, role=role) if spec.name == name else spec

        new = Plan(replicas=tuple(map(relabelled, plan.replicas)), shares=plan.shares)
        self._restore = RestorePlan(new)
        return Change(plan=new, reason=reason)


def _waiting(view: View, role: Role) -> int:
    """Requests that wait for an instance of this role; KV that found no decode instance waits at the other one."""
    kept = sum(one.num_departing for one in view.with_role("prefill")) if role == "decode" else 0
    return kept + sum(one.num_waiting for one in view.with_role(role))


def _empty(replica: ReplicaView) -> bool:
    return not (replica.num_waiting or replica.num_running or replica.num_prefilling or replica.num_decoding)


FLIPS = {"idle": 0.0, "load": 0.1}


def tetriinfer(
    chunk_tokens: int | Literal["auto"] = DEFAULT_CHUNK,
    group: int = 16,
    order: Order = "sjf",
    admission: Admission = "reserve-dynamic",
    dispatch: Dispatch = "power-of-two",
    bucket_tokens: int = 200,
    accuracy: float = 0.749,
    predictor_share: float = PREDICTOR_SHARE,
    monitor_s: float = 0.1,
    flip: Literal["idle", "load"] | None = None,
    flip_window_s: float = 60.0,
    transfer: Literal["request", "chunk"] = "request",
    seed: int = 0,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """TetriInfer: prompts in fixed chunks, decodes placed and admitted by their predicted lengths, roles that flip.

    ``chunk_tokens``: where prefill saturates (512 for OPT-13B on the authors' GPU; auto: by the latency model). Prompts
    are put in ``order`` (fcfs, sjf, ljf) within a ``group``. Lengths are predicted in ranges of ``bucket_tokens``,
    right with ``accuracy``, drawn by ``seed`` and request; the predictor adds ``predictor_share`` to prompt steps.
    ``admission``: greedy, reserve-static, reserve-dynamic, or commit. ``dispatch``: power-of-two or random. Loads are
    known ``monitor_s`` late. ``flip``: idle (no work for ``flip_window_s``) or load (hardly any). ``transfer``: request
    (KV is sent when the prompt is done, and the decode instance chosen then), or chunk (chosen on arrival; KV leaves
    chunk by chunk).
    """
    if transfer not in ("request", "chunk"):
        raise ConfigError(f"system.transfer is {transfer!r}; it must be request or chunk")
    if dispatch not in ("power-of-two", "random"):
        raise ConfigError(f"system.dispatch is {dispatch!r}; it must be power-of-two or random")
    if flip not in (None, *FLIPS):
        raise ConfigError(f"system.flip is {flip!r}; it must be {' or '.join(FLIPS)}, or left out")
    if not monitor_s > 0 or not predictor_share >= 0 or not flip_window_s >= FLIP_TICK_S:
        raise ConfigError(
            f"system: monitor_s {monitor_s} must be > 0, predictor_share {predictor_share} >= 0, "
            f"flip_window_s {flip_window_s} at least {FLIP_TICK_S:g}"
        )

    if isinstance(chunk_tokens, str) and chunk_tokens != "auto":
        raise ConfigError(f"system.chunk_tokens is {chunk_tokens!r}; it must be a whole number >= 1, or auto")
    chunk = None if chunk_tokens == "auto" else chunk_tokens

    def sending() -> Transfer:
        return ChunkByChunk(chunk or DEFAULT_CHUNK) if transfer == "chunk" else Whole()

    def flipping() -> Rescheduler:
        return RestorePlan() if flip is None else FlipIdle(FLIPS[flip], flip_window_s)

    return System(
        name="tetriinfer",
        mirrors="TetriInfer (arXiv 2401.11181v1, January 2024), from its abstract and notes of readers",
        planner=Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode")),
        router=lambda: TwoLevels(monitor_s, dispatch, at_once=transfer == "chunk"),
        batcher=lambda role: TwoPhase(chunk, group, order, admission),
        transfer=sending,
        rescheduler=flipping,
        limits=Limits(max_num_batched_tokens=chunk or DEFAULT_CHUNK),
        cost=lambda step: PaddedChunks(inner=step, chunk_tokens=chunk, prompt_factor=1 + predictor_share),
        predictor=LengthRange(bucket_tokens, accuracy, seed),
    )
