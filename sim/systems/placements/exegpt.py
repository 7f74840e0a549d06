"""ExeGPT (ASPLOS 2024; arXiv 2404.07947): the schedule with the highest throughput within a latency bound."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import Literal

from sim.batchers.common import refuse_groups, refuse_if_full
from sim.batchers.phases import HandedOver, PromptPhases
from sim.planners.exegpt import ExeGPT
from sim.planners.exegpt.bound import TOLERANCE
from sim.planners.exegpt.lengths import RULES, Rule
from sim.planners.exegpt.schedule import BAND, KINDS, Kind, Schedule
from sim.policy import Batch, Limits, ReplicaView, RequestView, System, View
from sim.reschedulers import RestorePlan
from sim.routers import LeastLoadedPair
from sim.transfers import Whole
from sim.types import Chunk, ConfigError, Move, Reject, Role, Route

LIMITS = Limits(max_num_seqs=1024, max_num_batched_tokens=16384)
"""Ours: wide enough that memory and latency decide, and prompts of a phase saturate the GPUs."""
APART: tuple[Kind, ...] = ("waa-c", "waa-m")


def kinds_for(roles: Collection[Role]) -> tuple[Kind, ...]:
    """Schedules of replicas with these roles."""
    return ("rra",) if "mixed" in roles else APART


class Planned(LeastLoadedPair):
    """Routes as plans of this system want it: one replica, or a pair. Under a plan from elsewhere the schedule is
    searched when the first request comes."""

    def __init__(self, planner: ExeGPT) -> None:
        super().__init__()
        self._planner = planner
        self._known = False

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not self._known:
            self._planner.schedule(view.problem, kinds_for([one.role for one in view.plan.replicas]))
            self._known = True
        return super().route(request, view)


class Following:
    """The batcher of the schedule that the planner found, made when the first batch is filled."""

    def __init__(self, planner: ExeGPT, role: Role) -> None:
        self._planner = planner
        self._role = role
        self._batcher: PromptPhases | HandedOver | None = None

    def fill(self, batch: Batch) -> None:
        self._made().fill(batch)

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        batcher = self._made()
        return isinstance(batcher, PromptPhases) or batcher.lets_in(request, blocks, replica)

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)

    def _made(self) -> PromptPhases | HandedOver:
        if self._batcher is None:
            self._batcher = batcher_of(self._planner.last(kinds_for([self._role])), self._planner.band)
        return self._batcher


def batcher_of(schedule: Schedule, band: float) -> PromptPhases | HandedOver:
    if schedule.decode_iterations is not None:
        return PromptPhases(
            schedule.encode_batch, schedule.decode_iterations, schedule.decode_batch, schedule.prompt_tokens,
            len(schedule.plan.replicas[0].stages), band,
        )  # fmt: skip
    assert schedule.micro_batches is not None
    return HandedOver(
        schedule.encode_batch, schedule.micro_batches, schedule.most_decodes, schedule.prompt_tokens,
        len(schedule.plan.replicas[0].stages), band,
    )  # fmt: skip


class ThroughHost(Whole):
    """KV is stored in host memory before it is loaded: two hops over PCIe, one after the other (section 4.2).

    The links carry it as they carry any KV; what the two hops take beyond that passes after the last byte, and is not
    shared with other KV. Between machines the line counts instead, where that takes longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gpus: dict[str, tuple[str, ...]] = {}
        self._beyond_s: dict[int, float] = {}

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        cluster = view.problem.cluster
        self._gpus.update({one.name: one.gpus for one in view.plan.replicas})
        source, target = self._gpus[move.source], self._gpus[move.target]
        ways = (cluster.load_path(source), cluster.load_path(target), cluster.path(source, target))
        capacity = cluster.capacity_bytes_per_s
        out_s, in_s, straight_s = (way.latency_s + move.kv_bytes / way.bytes_per_s(capacity) for way in ways)
        self._beyond_s[move.request_id] = max(0.0, out_s + in_s - straight_s)
        return super().chunks(move, view)

    def overhead_s(self, move: Move) -> float:
        return self._beyond_s[move.request_id]


def exegpt(
    schedule: Literal["auto", "rra", "waa-c", "waa-m"] = "auto",
    latency_bound_s: float | None = None,
    encode_batch: int | None = None,
    decode_iterations: int | None = None,
    micro_batches: int | None = None,
    tp: int | None = None,
    tp_gpus: int | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    rule: Rule = "littles_law",
    band: float = BAND,
    tolerance: float = TOLERANCE,
) -> System:
    """ExeGPT: phases or pools, batches and partial TP of the highest throughput within a latency bound.

    ``schedule``: rra (prompts and ``decode_iterations`` of decodes in turn, on all GPUs), waa-c and waa-m (a prefill
    and a decode pool, shared out by compute time or by memory), or auto, the best of them. ``latency_bound_s``
    (default: slo.e2e_s, else none) is for the 99th-percentile output length, without queueing. What is stated is not
    searched: ``encode_batch`` prompts a phase, ``micro_batches`` of the decode pool, ``tp_gpus`` of the first ``gpus``
    of the type ``gpu`` in groups of ``tp``, the others alone. ``rule``: how many decode beside so many prompts; paper
    takes those in flight for like those that arrive. ``band``: by how much batches may be off before the next one mends
    it. ``tolerance``: shares by which throughput and latency may fall where the search has them rise.
    """
    _check(schedule, rule, latency_bound_s, band=band, tolerance=tolerance)
    _check_counts(
        encode_batch=encode_batch, decode_iterations=decode_iterations, micro_batches=micro_batches, tp=tp,
        tp_gpus=tp_gpus, gpus=gpus,
    )  # fmt: skip
    kinds = KINDS if schedule == "auto" else (schedule,)
    for name, value, where in (
        ("decode_iterations", decode_iterations, ("rra",)),
        ("micro_batches", micro_batches, APART),
    ):
        if value is not None and not set(where) & set(kinds):
            raise ConfigError(f"system.{name} is for {', '.join(where)}; with schedule {schedule} leave it out")
    planner = ExeGPT(
        kinds=kinds, bound_s=latency_bound_s, encode_batch=encode_batch, decode_iterations=decode_iterations,
        micro_batches=micro_batches, tp=tp, tp_gpus=tp_gpus, gpu=gpu, gpus=gpus, rule=rule, band=band,
        tolerance=tolerance,
    )  # fmt: skip
    return System(
        name="exegpt",
        mirrors="ExeGPT (ASPLOS 2024)",
        planner=planner,
        router=lambda: Planned(planner),
        batcher=lambda role: Following(planner, role),
        transfer=ThroughHost,
        rescheduler=RestorePlan,
        limits=LIMITS,
    )


def _check(schedule: str, rule: str, latency_bound_s: float | None, **shares: float) -> None:
    if schedule != "auto" and schedule not in KINDS:
        raise ConfigError(f"system.schedule is {schedule!r}; exegpt has auto, {', '.join(KINDS)}")
    if rule not in RULES:
        raise ConfigError(f"system.rule is {rule!r}; exegpt has {', '.join(RULES)}")
    if latency_bound_s is not None and not 0 < latency_bound_s < inf:
        raise ConfigError(f"system.latency_bound_s is {latency_bound_s}; it must be a number > 0, or left out")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"system.{name} is {share}; it must be in [0, 1)")


def _check_counts(**stated: int | None) -> None:
    for name, value in stated.items():
        if value is not None and value < 1:
            raise ConfigError(f"system.{name} is {value}; it must be a whole number >= 1")
