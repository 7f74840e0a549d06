"""How well a prefill and a decode group would serve: sampled requests through two queues, without the engine.

A prompt waits first come first served for its prefill group (a pipeline takes the next one when its slowest stage
is free), its KV crosses the link, and it decodes in a continuous batch that grows while KV has room. Each side is
replayed once per load, alone; a pair's latencies are sums of both sides and the link (ThunderServe, MLSys 2025, section
on orchestration; the form of the replay is ours).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf

import numpy as np
from numpy.typing import NDArray

from sim.policy import Problem
from sim.types import InfeasibleError, Slo, Stage

Floats = NDArray[np.float64]
REQUESTS = 256
"""Replayed per decode group and load, after as many to warm up."""
PROMPTS = 2048
"""Replayed per prefill group and load: near saturation fewer tell little of how long the queue is."""
E2E_SHARE = 0.5
"""Of the bound on the whole, for the prompt, where TTFT has none."""
STRATA = 16
CARRY_STEP_S = 0.05
LOAD_STEPS = 50
"""Loads are rounded to this part of a group's capacity, so that replays can be remembered."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Requests drawn from the workload, with unit-mean gaps of a Poisson process.

    ``prompts``: which of them come in a long run, with ``prompt_gaps``; ``shuffle``: which wait of that run, in order
    of length, each request gets, since how long one waits does not depend on one's own prompt.
    """

    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    gaps: Floats
    prompts: NDArray[np.int64]
    prompt_gaps: Floats
    shuffle: NDArray[np.int64]
    fitting_share: float
    """Of the workload's requests; the others exceed the model's context and are refused anywhere."""
    longest_tokens: int

    @classmethod
    def of(cls, problem: Problem) -> Sample:
        """Drawn by the problem's seed; ``InfeasibleError`` if no request fits the model's context."""
        longest = min(problem.limits.max_model_len or inf, problem.model.max_position_embeddings or inf)
        fitting = np.array([pair for pair in problem.workload.lengths if sum(pair) <= longest], dtype=np.int64)
        share = len(fitting) / len(problem.workload.lengths)
        if not share:
            raise InfeasibleError(
                f"workload: none of the {len(problem.workload.lengths)} sampled requests fits the context of "
                f"{longest:.0f} tokens of {problem.model.name}; take another model or shorter requests"
            )
        rng = np.random.default_rng(np.random.SeedSequence(problem.seed).spawn(3)[2])
        rows = _stratified(fitting, rng.permutation(len(fitting)))
        gaps, prompt_gaps = rng.exponential(size=2 * REQUESTS), rng.exponential(size=PROMPTS)
        return cls(
            inputs=fitting[rows, 0],
            outputs=fitting[rows, 1],
            gaps=gaps / gaps.mean(),
            prompts=rng.permutation(np.resize(np.arange(REQUESTS), PROMPTS)),
            prompt_gaps=prompt_gaps / prompt_gaps.mean(),
            shuffle=rng.permutation(REQUESTS),
            fitting_share=share,
            longest_tokens=int(fitting.sum(axis=1).max()),
        )

    @property
    def mean_input(self) -> float:
        return float(self.inputs.mean())

    @property
    def mean_tokens(self) -> float:
        return float((self.inputs + self.outputs).mean())

    @property
    def mean_context(self) -> float:
        """Tokens a decoding sequence attends to: half of its output is there, long outputs count longer."""
        steps = self.outputs - 1
        if not steps.sum():
            return self.mean_input
        return float(((self.inputs + self.outputs / 2) * steps).sum() / steps.sum())


def _stratified(lengths: NDArray[np.int64], shuffled: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of as many requests as are replayed, in the order of ``shuffled``, whose means are nearly those of all.

    Even steps through all of them, in order of the answer and, among those with answers alike, of the prompt.
    """
    by_answer = np.array_split(np.argsort(lengths[:, 1], kind="stable"), STRATA)
    order = np.concatenate([part[np.argsort(lengths[part, 0], kind="stable")] for part in by_answer])
    chosen = order[((np.arange(REQUESTS) + 0.5) * len(order) / REQUESTS).astype(np.int64)]
    return chosen[np.argsort(np.argsort(shuffled)[chosen], kind="stable")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Server:
    """A group's stages, priced. ``weakest``: what limits it, with ``{name}`` for the replica's name."""

    stages: tuple[Stage, ...]
    weakest: str
    _at: dict[tuple[int, int], Floats] = field(default_factory=dict)

    @property
    def capacity_per_s(self) -> float:
        """Requests per second that it can go on serving."""
        raise NotImplementedError

    def latency_at(self, load_per_s: float, sample: Sample, carry_s: float = 0.0) -> Floats:
        """Seconds of each sampled request here, waiting included, at a Poisson load.

        ``carry_s``: how long KV is on its way here, in which it has its room already (that time not counted).
        """
        step = max(1, round(load_per_s / self.capacity_per_s * LOAD_STEPS))
        carry = round(carry_s / CARRY_STEP_S)
        if (step, carry) not in self._at:
            load_per_s = step * self.capacity_per_s / LOAD_STEPS
            self._at[step, carry] = self._replay(load_per_s, sample, carry * CARRY_STEP_S)
        return self._at[step, carry]

    def _replay(self, load_per_s: float, sample: Sample, carry_s: float) -> Floats:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefiller(Server):
    """``stage_s``: of each stage (rows) for each sampled prompt alone; ``hop_s``: from one stage to the next."""

    stage_s: Floats
    hop_s: Floats
    _capacity_per_s: float = inf

    @property
    def capacity_per_s(self) -> float:
        return self._capacity_per_s

    @property
    def alone_s(self) -> Floats:
        """Of each sampled prompt, when nothing else is there."""
        alone: Floats = self.stage_s.sum(axis=0) + (len(self.stage_s) - 1) * self.hop_s
        return alone

    def sized(self, sample: Sample) -> Prefiller:
        """With the capacity that it has when prompts never stop coming."""
        ends_s = self._starts(np.zeros(PROMPTS), sample)[-1] + self.stage_s.max(axis=0).mean()
        return replace(self, _capacity_per_s=PROMPTS / float(ends_s), _at={})

    def _replay(self, load_per_s: float, sample: Sample, carry_s: float) -> Floats:
        arrival_s = np.cumsum(sample.prompt_gaps) / load_per_s
        wait_s = np.sort(self._starts(arrival_s, sample) - arrival_s)
        places = (np.arange(REQUESTS) * 2 + 1) * PROMPTS // (2 * REQUESTS)
        waited: Floats = wait_s[places][sample.shuffle] + self.alone_s
        return waited

    def _starts(self, arrival_s: Floats, sample: Sample) -> Floats:
        """When each prompt would start if nothing held it up any more once it has; first come first served."""
        if len(self.stage_s) == 1:  # Lindley's recursion, solved by a running maximum
            busy_s = self.stage_s[0][sample.prompts]
            before_s = np.concatenate(([0.0], np.cumsum(busy_s)[:-1]))
            starts: Floats = np.maximum.accumulate(arrival_s - before_s) + before_s
            return starts
        return _through_pipeline(arrival_s, self.stage_s[:, sample.prompts], self.hop_s[sample.prompts])


def _through_pipeline(arrival_s: Floats, stage_s: Floats, hop_s: Floats) -> Floats:
    """End less the time alone, prompt by prompt: as many are under way as there are stages, each stage has one."""
    stages = len(stage_s)
    free_s = [0.0] * stages
    ends_s = [0.0] * stages
    starts_s = np.empty(len(arrival_s))
    alone_s = stage_s.sum(axis=0) + (stages - 1) * hop_s
    rows = zip(arrival_s.tolist(), stage_s.T.tolist(), hop_s.tolist(), alone_s.tolist(), strict=True)
    for number, (at_s, times_s, hop, alone) in enumerate(rows):
        at_s = max(at_s, ends_s[number % stages])
        for place, time_s in enumerate(times_s):
            at_s = free_s[place] = max(at_s, free_s[place]) + time_s
            at_s += hop
        ends_s[number % stages] = at_s - hop
        starts_s[number] = at_s - hop - alone
    return starts_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder(Server):
    """``step_s[b]`` plus ``step_s_per_context[b]`` times the mean context: seconds a token in a batch of ``b``."""

    step_s: Floats
    step_s_per_context: Floats
    kv_tokens: int
    most_seqs: int
    _capacity_per_s: float = inf

    @property
    def capacity_per_s(self) -> float:
        return self._capacity_per_s

    def sized(self, sample: Sample) -> Decoder:
        """With the capacity that the sample's lengths leave."""
        seqs = np.arange(1, self.most_seqs + 1)
        token_s = self.step_s[seqs] + self.step_s_per_context[seqs] * sample.mean_context
        steps = max(float((sample.outputs - 1).mean()), 1 / REQUESTS)
        return replace(self, _capacity_per_s=float((seqs / token_s).max()) / steps, _at={})

    def _replay(self, load_per_s: float, sample: Sample, carry_s: float) -> Floats:
        arrival_s = (np.cumsum(sample.gaps) / load_per_s).tolist()
        steps = (np.tile(sample.outputs, 2) - 0.5).tolist()  # it joins half an iteration after it came
        held = np.tile(sample.inputs + sample.outputs, 2).tolist()
        context = np.tile(sample.inputs + sample.outputs / 2, 2).tolist()
        done_s = _continuous_batch(arrival_s, steps, held, context, carry_s, self)
        taken = (np.array(done_s) - np.array(arrival_s))[REQUESTS:] - carry_s
        return np.where(sample.outputs > 1, taken, 0.0)


def _continuous_batch(
    arrival_s: Sequence[float],
    steps: Sequence[float],
    held: Sequence[int],
    context: Sequence[float],
    carry_s: float,
    server: Decoder,
) -> list[float]:
    """When each request is done: it waits for room, then for its KV, then decodes.

    All that decode advance alike, so each ends at a known sum of advances.
    """
    base, slope = server.step_s.tolist(), server.step_s_per_context.tolist()
    most, free = len(base) - 1, server.kv_tokens
    ends: list[tuple[float, int]] = []
    carried: deque[tuple[float, int]] = deque()
    done_s = [0.0] * len(arrival_s)
    now_s = advanced = contexts = 0.0
    came = admitted = running = 0
    total = len(arrival_s)
    while admitted < total or running or carried:
        event_s = min(arrival_s[came] if came < total else inf, carried[0][0] if carried else inf)
        end_s = inf
        if running:
            step_s = base[running] + slope[running] * contexts / running
            end_s = now_s + (ends[0][0] - advanced) * step_s
        if event_s <= end_s:
            if running:
                advanced += (event_s - now_s) / step_s
            now_s = event_s
            if carried and carried[0][0] <= now_s:
                number = carried.popleft()[1]
                heappush(ends, (advanced + steps[number], number))
                running, contexts = running + 1, contexts + context[number]
            else:
                came += 1
        else:
            advanced, number = heappop(ends)
            now_s = done_s[number] = end_s
            running, free, contexts = running - 1, free + held[number], contexts - context[number]
        while admitted < came and running + len(carried) < most and held[admitted] <= free:
            carried.append((now_s + carry_s, admitted))
            free -= held[admitted]
            admitted += 1
    return done_s


def attainment(ttft_s: Floats, carry_s: Floats, decode_s: Floats, sample: Sample, slo: Slo) -> Floats:
    """D: the share of requests that meet every target, for each (prefill, decode) pair.

    ``ttft_s``: (prefills, requests); ``carry_s``: the KV's way, (prefills, decodes, requests); ``decode_s``: (decodes,
    requests). The first token comes out of the prefill group, so the KV's way counts in TPOT.
    """
    several = sample.outputs > 1
    later_s = np.where(several, carry_s + decode_s[None], 0.0)
    good = np.broadcast_to(several | True, later_s.shape)
    if slo.ttft_s is not None:
        good = good & (ttft_s <= slo.ttft_s)[:, None, :]
    if slo.tpot_s is not None:
        good = good & (later_s <= slo.tpot_s * np.maximum(sample.outputs - 1, 1))
    if slo.e2e_s is not None:
        good = good & (ttft_s[:, None, :] + later_s <= slo.e2e_s)
    share: Floats = good.mean(axis=2) * sample.fitting_share
    return share


def keeps(server: Server, sample: Sample, slo: Slo, step: int) -> bool:
    """Whether a prefill group, its queue its own, keeps TTFT at ``step`` of ``LOAD_STEPS`` of its capacity."""
    return _kept(server.latency_at(step * server.capacity_per_s / LOAD_STEPS, sample), slo)


def safe_load(server: Server, alone_s: Floats, sample: Sample, slo: Slo) -> float:
    """The part of its capacity at which a prefill group, its queue its own, keeps TTFT; 0 if not even alone."""
    if not _kept(alone_s, slo):
        return 0.0
    low, high = 0, LOAD_STEPS
    while high - low > 1:
        step = (low + high) // 2
        if keeps(server, sample, slo, step):
            low = step
        else:
            high = step
    return max(1, low) / LOAD_STEPS


def _kept(waited_s: Floats, slo: Slo) -> bool:
    bound_s = inf if slo.e2e_s is None else E2E_SHARE * slo.e2e_s
    bound_s = bound_s if slo.ttft_s is None else min(slo.ttft_s, slo.e2e_s or inf)
    return float((waited_s <= bound_s).mean()) >= slo.attainment
