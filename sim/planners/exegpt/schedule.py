"""The two kinds of schedule, their control variables, and what each point of them gives (ExeGPT, sections 4 and 5).

RRA: one pipeline over all GPUs has a phase of prompts, then so many iterations of decodes. WAA: prompts and decodes
have GPUs of their own, shared out by compute time (WAA-C) or by memory (WAA-M), and do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Literal

from sim.planners.exegpt.bound import NOTHING, Perf, Point
from sim.planners.exegpt.layout import Tensor, groups, shared
from sim.planners.exegpt.lengths import Rule, Traffic, latency_s
from sim.planners.exegpt.timing import REFERENCE_BATCH, Pipeline, Timing
from sim.types import Plan

Kind = Literal["rra", "waa-c", "waa-m"]
KINDS: tuple[Kind, ...] = ("rra", "waa-c", "waa-m")
BAND = 0.1
"""theta, which the paper does not print: how far prompt tokens and decode batches may be off before they are mended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a runtime follows. ``decode_iterations``: of a phase (RRA); ``micro_batches``: of the decode pool (WAA)."""

    kind: Kind
    encode_batch: int
    decode_batch: float
    """Sequences that decode: when a phase begins (RRA), or at any time (WAA)."""
    most_decodes: int
    """Sequences that the decoding replica has room for."""
    decode_iterations: int | None
    micro_batches: int | None
    tensor: Tensor
    prompt_tokens: float
    """Of a prompt, in the mean."""
    perf: Perf
    plan: Plan

    def __str__(self) -> str:
        own = (
            f"N_D {self.decode_iterations}"
            if self.decode_iterations is not None
            else f"{len(self.plan.replicas[0].gpus)} + {len(self.plan.replicas[1].gpus)} GPUs, "
            f"{self.micro_batches} micro-batch{'' if self.micro_batches == 1 else 'es'}"
        )
        tp = f"TP{self.tensor.degree} on {self.tensor.gpus} GPUs" if self.tensor.gpus else "no TP"
        return (
            f"{self.kind.upper()}: B_E {self.encode_batch}, B_D {self.decode_batch:.0f}, {own}, {tp}: "
            f"{self.perf.throughput_per_s:.4g} requests/s, {self.perf.latency_s:.4g} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all points have in common."""

    timing: Timing
    traffic: Traffic
    gpus: tuple[str, ...]
    rule: Rule = "littles_law"
    band: float = BAND

    def passes(self, prompts: int, stages: int) -> int:
        """Batches in which a phase's prompts are computed: one a stage, more if they would be too long."""
        limit = self.timing.problem.limits.max_num_batched_tokens or inf
        return max(stages, ceil(prompts * self.traffic.prompt_tokens / limit))

    def most(self, pool: Pipeline, blocks: float) -> int:
        """Sequences of so many blocks for which there is room, with the band above them."""
        return min(self.timing.problem.limits.max_num_seqs, int(pool.blocks / blocks / (1 + self.band)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A kind of schedule at one degree of tensor parallelism: a grid of its control variables.

    Each is listed so that throughput and latency rise along it: more prompts a phase; fewer iterations a phase (RRA);
    fewer GPUs with tensor parallelism. Micro-batches (WAA) are one for each stage of the decode pool, or as stated:
    fewer are worse in both figures, and the engine has no more in flight.
    """

    world: World
    kind: Kind
    degree: int
    encode_batches: Sequence[int]
    paces: Sequence[int]
    """Decode iterations of a phase from many to few, or the most micro-batches."""
    joined: Sequence[int]
    """GPUs in tensor-parallel groups: from many to few."""
    _splits: dict[int, int] = field(default_factory=dict)

    @property
    def sides(self) -> Point:
        return len(self.encode_batches), len(self.paces), len(self.joined)

    def price(self, point: Point) -> Perf:
        return self.at(point).perf

    def at(self, point: Point) -> Schedule:
        encode_batch, pace, joined = (
            values[at] for values, at in zip((self.encode_batches, self.paces, self.joined), point, strict=True)
        )
        tensor = Tensor(self.degree, joined)
        if self.kind == "rra":
            return round_robin(self.world, encode_batch, pace, tensor)
        return self._workload_aware(encode_batch, pace, tensor)

    def _workload_aware(self, encode_batch: int, micro_batches: int, tensor: Tensor) -> Schedule:
        if encode_batch not in self._splits:
            self._splits[encode_batch] = encode_gpus(self.world, self.kind, encode_batch)
        return workload_aware(self.world, self.kind, encode_batch, micro_batches, tensor, self._splits[encode_batch])


# ---------------------------------------------------------------- RRA


def round_robin(world: World, encode_batch: int, iterations: int, tensor: Tensor) -> Schedule:
    """Phase time, throughput and latency of RRA.

    With P stages a phase passes the pipeline in P batches, and so do the decodes. Where it turns from prompts to
    decodes a stage waits for the last prompts to come through: P - 1 times the difference of the two.
    """
    timing, traffic = world.timing, world.traffic
    pool = timing.pipeline("round_robin", "mixed", groups(world.gpus, tensor))
    stages = pool.stages
    first, mean = traffic.batch(encode_batch, iterations, world.rule)
    passes = world.passes(encode_batch, stages)
    encode_s, way_s = pool.encode_s(ceil(encode_batch / passes))
    decode_s, token_s = pool.decode_s(ceil(mean / stages))
    bubble_s = (stages - 1) * max(0.0, encode_s - decode_s)
    phase_s = max(passes * encode_s, way_s) + iterations * max(stages * decode_s, token_s) + bubble_s
    blocks = timing.blocks_of(traffic.context_tokens) + timing.blocks_of(iterations)
    most = world.most(pool, blocks)
    wait_s = latency_s(traffic.bounded_iterations, iterations, phase_s) if first <= most else inf
    return Schedule(
        kind="rra", encode_batch=encode_batch, decode_batch=first, most_decodes=most, decode_iterations=iterations,
        micro_batches=None, tensor=tensor, prompt_tokens=traffic.prompt_tokens,
        perf=Perf(encode_batch / phase_s, wait_s), plan=Plan(replicas=(pool.replica,)),
    )  # fmt: skip


# ---------------------------------------------------------------- WAA


def encode_gpus(world: World, kind: Kind, encode_batch: int) -> int:
    """GPUs of the prefill pool: by the compute time of a request in either phase (WAA-C), or such that the peak bytes
    of a GPU are as equal as can be (WAA-M)."""
    timing, traffic, total = world.timing, world.traffic, len(world.gpus)
    encode_s, decode_s = timing.whole_s(1)
    encode_s, decode_s = encode_s / REFERENCE_BATCH, traffic.decode_iterations * decode_s / REFERENCE_BATCH
    if kind == "waa-c":
        return min(total - 1, max(1, round(total * encode_s / (encode_s + decode_s))))
    model = timing.problem.model
    weights = model.weight_bytes(0, model.num_layers)
    kv_bytes = model.kv_bytes_per_token()

    def peak(number: int) -> float:
        """Where prompts take all the time of ``number`` GPUs, a stage each; a decode iteration is as long as on one."""
        turn_s = encode_batch * encode_s / number
        decodes = encode_batch * traffic.decode_iterations * timing.whole_s(1)[1] / turn_s
        prompts = (number / world.passes(encode_batch, 1) + 1) * encode_batch
        held = weights + prompts * traffic.prompt_tokens * kv_bytes
        return max(held / number, (weights + decodes * traffic.context_tokens * kv_bytes) / (total - number))

    return min(range(1, total), key=peak)


def workload_aware(
    world: World, kind: Kind, encode_batch: int, micro_batches: int, tensor: Tensor, number: int
) -> Schedule:
    """Throughput and latency of WAA with so many GPUs in the prefill pool."""
    timing, traffic = world.timing, world.traffic
    own = shared(tensor, number, len(world.gpus) - number)
    encode = timing.pipeline("encode", "prefill", groups(world.gpus[:number], own[0]))
    decode = timing.pipeline("decode", "decode", groups(world.gpus[number:], own[1]))
    passes = world.passes(encode_batch, 1)
    stage_s, way_s = encode.encode_s(ceil(encode_batch / passes))
    part_s, over_s = timing.hand_over_s(encode.gpus, decode.gpus, encode_batch)
    period_s = max(passes * stage_s, part_s)
    micro_batches = min(micro_batches, decode.stages)
    most = world.most(decode, timing.blocks_of(traffic.context_tokens) + 1)
    batch = _decodes(world, decode, micro_batches, encode_batch, period_s, most)
    token_s = _iteration_s(decode, micro_batches, batch)
    perf = NOTHING
    if batch > 0:
        throughput = min(encode_batch / period_s, batch / (traffic.decode_iterations * token_s))
        way_s = max(way_s, encode.stages * stage_s) + (passes - 1) * stage_s
        wait_s = way_s + over_s + traffic.bounded_iterations * token_s
        held = (encode.stages / passes + 1) * encode_batch  # a pass in each stage, and a batch that has not left
        fits = held <= world.most(encode, timing.blocks_of(traffic.prompt_tokens)) and batch <= most
        perf = Perf(throughput, wait_s if fits else inf)
    return Schedule(
        kind=kind, encode_batch=encode_batch, decode_batch=batch, most_decodes=most, decode_iterations=None,
        micro_batches=micro_batches, tensor=Tensor(tensor.degree, own[0].gpus + own[1].gpus),
        prompt_tokens=traffic.prompt_tokens, perf=perf, plan=Plan(replicas=(encode.replica, decode.replica)),
    )  # fmt: skip


def _iteration_s(pool: Pipeline, micro_batches: int, batch: float) -> float:
    """One token for everybody: the micro-batches follow each other through the stages."""
    stage_s, way_s = pool.decode_s(ceil(batch / micro_batches))
    return max(micro_batches * stage_s, way_s)


def _decodes(world: World, pool: Pipeline, micro_batches: int, encode_batch: int, period_s: float, most: int) -> float:
    """B_D. ``paper``: a hand-over every iteration, so B_E S_D. Else by Little's law: as many as come in the time that
    a request decodes; at most as many as there is room for, and the prefill pool waits for them (ours)."""
    tokens = world.traffic.decode_iterations
    if world.rule == "paper":
        return encode_batch * tokens
    per_iteration = encode_batch * tokens / period_s

    def comes(batch: int) -> float:
        return per_iteration * _iteration_s(pool, micro_batches, batch)

    if most < 1 or comes(most) >= most:
        return most
    low, high = 0, most  # the smallest batch that is at least what comes while it computes a token
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if comes(middle) <= middle else (middle, high)
    return comes(high)
