"""Splitwise (ISCA 2024; arXiv 2311.18677v2): prompt, token and mixed pools under a cluster-level scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from sim.batchers import PausingMixed
from sim.cost import PowerCapped, StepCost
from sim.planners.pools import Pool, Split
from sim.policy import Limits, ReplicaView, RequestView, Rescheduler, System, Transfer, View
from sim.reschedulers import RestorePlan
from sim.systems.layout import PoolOption
from sim.systems.split.splitwise_sim import NEVER_DUE, Detached, TokenCountOnly, kv_scale
from sim.transfers import ByLength, LayerByLayer, Whole, in_bits
from sim.types import Change, Chunk, ConfigError, Move, Plan, Reject, Role, Route, Signal

SERIAL_BELOW_TOKENS = 512
"""Section 4.3: shorter prompts are sent at once on H100, longer ones layer by layer."""
SYNC_S = {"A100": 0.008}
"""What stays visible of a layer-by-layer transfer, by the first part of the sender's name (figure 14)."""
SYNC_S_ELSE = 0.005
"""On H100, and for want of a measurement on all others."""
REPURPOSE_WINDOW_S = 300.0
REPURPOSE_TICK_S = 5.0


class ThreePools:
    """The cluster-level scheduler, section 4.1: a (prompt, token) pair of machines per request, on arrival.

    Join the shortest queue by pending tokens among prompt machines, by reserved KV among token machines; a machine
    that would be over its limit is refused, then the mixed pool is tried, then a machine of the opposite pool is
    drawn into the mixed pool. It returns home as soon as it has no work of the opposite kind. Both phases run on
    one machine only if no pair can be found. Reserves KV for the *predicted* output. What machines have pending it
    knows from reports that are at most ``status_delay_s`` old, and what it assigned since. ``all_heads``: it
    takes KV to be that of all attention heads.
    """

    def __init__(self, queue_limit_tokens: int, status_delay_s: float = 0.0, all_heads: bool = False) -> None:
        self.queue_limit_tokens = queue_limit_tokens
        self.status_delay_s = status_delay_s
        self.all_heads = all_heads
        self._reports: dict[str, tuple[float, int]] = {}  # when a machine last reported, and prompt tokens pending
        self._kv_scale = 1.0
        self._reserved: dict[str, int] = {}  # KV tokens promised per machine
        self._decoding: dict[str, int] = {}  # requests assigned for decode per machine
        self._mixed: dict[str, None] = {}
        self._kept: dict[int, tuple[str, int]] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        self._read_reports(view)
        self._send_home(view)
        tokens = request.input_tokens + 1 + request.predicted_output_tokens
        prompt = self._prompt_machine(request, view)
        token = self._token_machine(tokens, view)
        if prompt is None or token is None:
            prompt = token = min(view.replicas, key=self._pending_tokens)
        self._decoding[token.name] = self._decoding.get(token.name, 0) + 1
        self._reserved[token.name] = self._reserved.get(token.name, 0) + tokens
        self._kept[request.id] = (token.name, tokens)
        reported_s, pending = self._reports[prompt.name]
        self._reports[prompt.name] = (reported_s, pending + request.input_tokens)
        return Route(prompt.leg, token.leg)

    def finished(self, request: RequestView) -> None:
        name, tokens = self._kept.pop(request.id)
        self._decoding[name] -= 1
        self._reserved[name] -= tokens

    def _read_reports(self, view: View) -> None:
        if self.all_heads:
            self._kv_scale = kv_scale(view.problem.model)
        now_s = view.now_s
        due_s = now_s - self.status_delay_s
        for replica in view.up:
            reported = self._reports.get(replica.name)
            if reported is None or reported[0] <= due_s:
                self._reports[replica.name] = (now_s, replica.pending_prefill_tokens)

    # ------------------------------------------------------------ pools

    def _pool(self, view: View, role: str) -> list[ReplicaView]:
        return [replica for replica in view.replicas if replica.role == role and replica.name not in self._mixed]

    def _mixed_pool(self, view: View) -> list[ReplicaView]:
        return [replica for replica in view.replicas if replica.role == "mixed" or replica.name in self._mixed]

    def _send_home(self, view: View) -> None:
        """Mixed machines with no work of the opposite kind left go back to their own pool."""
        for replica in self._mixed_pool(view) if self._mixed else ():
            if replica.role == "prefill" and not self._decoding.get(replica.name, 0):
                self._mixed.pop(replica.name, None)
            if replica.role == "decode" and not self._reports[replica.name][1]:
                self._mixed.pop(replica.name, None)

    def _pending_tokens(self, replica: ReplicaView) -> int:
        return self._reports[replica.name][1] + self._decoding.get(replica.name, 0)

    def _free_tokens(self, replica: ReplicaView) -> int:
        """KV tokens not promised to anybody; the prompts queued there will need theirs too."""
        capacity = int(replica.total_blocks * replica.block_size / self._kv_scale)
        return capacity - self._reserved.get(replica.name, 0) - self._reports[replica.name][1]

    def _prompt_machine(self, request: RequestView, view: View) -> ReplicaView | None:
        for pool in (self._pool(view, "prefill"), self._mixed_pool(view)):
            if pool:
                best = min(pool, key=self._pending_tokens)
                pending = self._pending_tokens(best)
                if not pending or pending + request.input_tokens <= self.queue_limit_tokens:
                    return best
        drawn = self._pool(view, "decode")
        return self._draw(min(drawn, key=self._pending_tokens)) if drawn else None

    def _token_machine(self, tokens: int, view: View) -> ReplicaView | None:
        for pool in (self._pool(view, "decode"), self._mixed_pool(view)):
            if pool:
                best = max(pool, key=self._free_tokens)
                if tokens < self._free_tokens(best):
                    return best
        drawn = self._pool(view, "prefill")
        return self._draw(max(drawn, key=self._free_tokens)) if drawn else None

    def _draw(self, replica: ReplicaView) -> ReplicaView:
        self._mixed[replica.name] = None
        return replica


class Repurpose:
    """Section 4.1: a machine that was in the mixed pool for long changes its role for good.

    The paper gives no rule; ours: at more than half of the ticks of the last ``window_s``. The last machine of a role
    keeps it. Otherwise as ``RestorePlan``.
    """

    def __init__(self, window_s: float = REPURPOSE_WINDOW_S, interval_s: float = REPURPOSE_TICK_S) -> None:
        self.interval_s: float | None = interval_s
        self._ticks = round(window_s / interval_s)
        self._was_mixed: dict[str, deque[bool]] = {}
        self._restore = RestorePlan()

    def react(self, signal: Signal, view: View) -> Change | None:
        if signal.kind != "tick":
            return self._restore.react(signal, view)
        for machine in view.replicas:
            seen = self._was_mixed.setdefault(machine.name, deque(maxlen=self._ticks))
            seen.append(bool(machine.num_decoding if machine.role == "prefill" else machine.num_prefilling))
        for machine in view.replicas:
            seen = self._was_mixed[machine.name]
            if len(seen) == self._ticks and sum(seen) > self._ticks / 2 and len(view.with_role(machine.role)) > 1:
                return self._change(machine, view)
        return None

    def _change(self, machine: ReplicaView, view: View) -> Change:
        del self._was_mixed[machine.name]
        role: Role = "decode" if machine.role == "prefill" else "prefill"
        plan = Plan(
            replicas=tuple(replace(r, role=role) if r.name == machine.name else r for r in view.plan.replicas),
            shares=view.plan.shares,
        )
        self._restore = RestorePlan(plan)
        return Change(plan=plan, reason=f"{machine.name} was mixed for long: it becomes a {role} machine")


class SyncBySender:
    """A transfer whose synchronisation takes as long as was measured on the sending GPU type, or ``sync_s``."""

    def __init__(self, inner: Transfer, sync_s: float | None = None) -> None:
        self.pull = inner.pull
        self.inner = inner
        self.sync_s = sync_s
        self._by_source: dict[str, float] = {}

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        if move.source not in self._by_source:
            self._by_source |= {machine.name: self._seconds(machine, view) for machine in view.replicas}
        return self.inner.chunks(move, view)

    def _seconds(self, machine: ReplicaView, view: View) -> float:
        kind = view.problem.cluster.gpu(machine.gpus[0]).name.split("-")[0]
        return SYNC_S.get(kind, SYNC_S_ELSE) if self.sync_s is None else self.sync_s

    def overhead_s(self, move: Move) -> float:
        """A machine that retires before anybody's first transfer is not seen, and counts as one of the others."""
        return self._by_source.get(move.source, SYNC_S_ELSE) + self.inner.overhead_s(move)


TRANSFERS: Mapping[str, Callable[[], Transfer]] = {
    "auto": partial(ByLength, SERIAL_BELOW_TOKENS),
    "serial": Whole,
    "per-layer": LayerByLayer,
}


def splitwise(
    transfer: Literal["auto", "serial", "per-layer"] = "auto",
    sync_s: float | None = None,
    kv_bits: int = 16,
    prompt_queue_tokens: int = 8192,
    max_pauses: int = 4,
    status_delay_s: float = 0.0,
    repurpose: bool = False,
    power_capped: Sequence[str] = (),
    power_cap_prompt_factor: float = 1.3,
    compat: Literal["splitwise_sim"] | None = None,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """Splitwise: prompt and token machines paired per request, a mixed pool between them, KV sent layer by layer.

    ``transfer``: serial, per-layer, or auto (serial for prompts under 512 tokens); ``sync_s`` follows every one
    (default: 8 ms from A100, 5 ms from others); ``kv_bits`` a value of KV on the way, 16 as it is (fewer are not in the
    paper). A machine refuses prompts once ``prompt_queue_tokens`` are pending, as
    known ``status_delay_s`` late; a decode is paused for prompts at most ``max_pauses`` times. ``repurpose``: a machine
    mixed for more than half of 5 min changes its role. ``power_capped``: nodes on which steps with prompts take
    ``power_cap_prompt_factor`` as long (1.3 is derived, not measured). ``compat``: splitwise_sim repeats the known
    defects of the authors' simulator, to compare with their figures; KV is then that of all heads in transfers and
    reservations.
    """
    if transfer not in TRANSFERS:
        raise ConfigError(f"system.transfer is {transfer!r}; splitwise has {', '.join(TRANSFERS)}")
    if compat not in (None, "splitwise_sim"):
        raise ConfigError(f"system.compat is {compat!r}; it must be splitwise_sim, or left out")
    if compat is not None and kv_bits != 16:
        raise ConfigError(f"system.kv_bits is {kv_bits}; splitwise-sim sends KV as it is: leave out kv_bits or compat")
    for name, value in (("sync_s", sync_s), ("status_delay_s", status_delay_s)):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"system.{name} is {value}; it must be a number >= 0")

    def cost(step: StepCost) -> StepCost:
        known = TokenCountOnly(inner=step) if compat else step
        if not power_capped:
            return known
        return PowerCapped(inner=known, nodes=frozenset(power_capped), prompt_factor=power_cap_prompt_factor)

    def sending() -> Transfer:
        if compat:
            return Detached(serial=transfer == "serial")
        return in_bits(SyncBySender(TRANSFERS[transfer](), sync_s), kv_bits)

    sending()  # so that a wrong option is told before the run

    rescheduler: Callable[[], Rescheduler] = Repurpose if repurpose else RestorePlan
    return System(
        name="splitwise",
        mirrors="splitwise-sim 8f99e7d" if compat else "Splitwise (ISCA 2024), without splitwise-sim's defects",
        planner=Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode")),
        router=lambda: ThreePools(prompt_queue_tokens, status_delay_s, all_heads=compat is not None),
        batcher=lambda role: PausingMixed(NEVER_DUE if compat else max_pauses),
        transfer=sending,
        rescheduler=rescheduler,
        limits=Limits(max_num_seqs=512, max_num_batched_tokens=2048),
        cost=cost,
    )
