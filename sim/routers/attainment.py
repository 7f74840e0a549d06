"""The router that estimates which pair of replicas keeps a request within the SLO."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple

from sim.policy import Problem, ReplicaView, RequestView, Transfer, View
from sim.types import ConfigError, Move, Plan, Reject, Replica, Route, Slo, Work, to_s

OWED_WEIGHT = 0.01
"""Of the SLO: what a request that a pair is owed by its share counts, against what the request would use of the SLO."""
MOST_OWED = 5.0
PROMPT_STEP, CONTEXT_STEP = 64, 512
"""Tokens to which prompts and contexts are rounded, so that prices can be remembered."""
MOST_PROMPTS = 16
LEAST_GAIN = 0.1
"""A batch of twice as many prompts is worth it if it saves so much of their time (as ``Saturating`` has it)."""


class Gauge:
    """A replica's own step times: what its queue and its batch will take."""

    def __init__(self, replica: Replica, problem: Problem) -> None:
        cluster, model = problem.cluster, problem.model
        self._costs = [problem.cost.bind(model, stage, cluster) for stage in replica.stages]
        paths = [cluster.path(a.gpus, b.gpus) for a, b in pairwise(replica.stages)]
        self._hops_s = sum(path.latency_s for path in paths)
        token_bytes = model.hidden_size * 2
        self._hops_s_per_token = sum(token_bytes / path.bytes_per_s(cluster.capacity_bytes_per_s) for path in paths)
        self._prompts: dict[int, tuple[float, float]] = {}
        self._steps: dict[tuple[int, int], float] = {}

    def _seconds(self, work: Work) -> tuple[float, float]:
        """Through all stages, and on the slowest."""
        stages = [to_s(cost.line(work).first_ps) for cost in self._costs]
        return sum(stages) + self._hops_s + work.tokens * self._hops_s_per_token, max(stages)

    def prompt_s(self, tokens: int) -> tuple[float, float]:
        """A prompt alone; and each of many that wait, in batches as large as saves time."""
        key = -(-tokens // PROMPT_STEP)
        if key not in self._prompts:
            chunk = (key * PROMPT_STEP, 0)
            alone_s, each_s = self._seconds(Work((chunk,), 0, 0))
            count = 2
            while count <= MOST_PROMPTS:
                batched_s = self._seconds(Work((chunk,) * count, 0, 0))[1] / count
                if batched_s > (1 - LEAST_GAIN) * each_s:
                    break
                each_s, count = batched_s, 2 * count
            self._prompts[key] = alone_s, each_s
        return self._prompts[key]

    def step_s(self, seqs: int, context: float) -> float:
        """From one token of a sequence to its next, as many micro-batches under way as there are stages."""
        stages = len(self._costs)
        key = -(-seqs // stages), int(context) // CONTEXT_STEP
        if key not in self._steps:
            tokens = key[0] * (key[1] * CONTEXT_STEP + CONTEXT_STEP // 2)
            through_s, slowest_s = self._seconds(Work((), key[0], tokens))
            self._steps[key] = max(through_s, stages * slowest_s)
        return self._steps[key]


class Decoding(NamedTuple):
    """What a request may expect of a decode replica: seconds a token, seconds until it has room, KV before it."""

    step_s: float
    wait_s: float
    ahead: int


class Pair(NamedTuple):
    """A prefill and a decode replica, and the KV's way between them, alone."""

    prefill: str
    decode: str
    share: float
    latency_s: float
    s_per_token: float
    codec_s_per_token: float


class ByAttainment:
    """Split: the (prefill, decode) pair where a request is best within its SLO, by the pairs' state as it arrives.

    ThunderServe (MLSys 2025) dispatches by an estimate of SLO attainment; its form is ours. TTFT: the prompts queued at
    the prefill replica, at its own step times, and then this one. TPOT: the step of a batch of all that are assigned to
    the decode replica, and the KV's way there, behind what is under way or, if the KV cache will be full, until
    there is room, spread over the tokens predicted. The root of the sum of squares of estimate over bound is what the
    request would use of its SLO; least is best. Without bounds the time to the last token counts, in seconds.

    Shares are weights: pairs without one are left out, and a pair that got fewer requests than its share is
    preferred by ``OWED_WEIGHT`` of the SLO for each, so that they decide where states are alike. A plan without
    shares counts every linked pair alike.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._seen: tuple[Sequence[ReplicaView], Plan] | None = None
        self._gauges: dict[str, Gauge] = {}
        self._pairs: list[Pair] = []
        self._owed: list[float] = []
        self._prefills: list[str] = []
        self._decodes: list[str] = []
        self._mean_input = 1
        self._replicas: dict[str, ReplicaView] = {}
        self._assigned: dict[str, int] = defaultdict(int)
        self._tokens: dict[str, float] = defaultdict(float)
        self._place: dict[int, tuple[str, float]] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if self._seen is None or self._seen[0] is not view.up or self._seen[1] is not view.plan:
            self._look(view)
        if not self._pairs:
            return Reject("no (prefill, decode) pair of the plan is up")
        slo = view.problem.slo
        best = self._best(request, slo.classes.get(request.klass, slo) if request.klass else slo, self._able(view))
        pair = self._pairs[best]
        for place, known in enumerate(self._pairs):
            self._owed[place] = min(MOST_OWED, self._owed[place] + known.share)
        self._owed[best] = max(-MOST_OWED, self._owed[best] - 1.0)
        tokens = _tokens(request)
        self._assigned[pair.decode] += 1
        self._tokens[pair.decode] += tokens
        self._place[request.id] = pair.decode, tokens
        return Route(self._replicas[pair.prefill].leg, self._replicas[pair.decode].leg)

    def finished(self, request: RequestView) -> None:
        name, tokens = self._place.pop(request.id)
        self._assigned[name] -= 1
        self._tokens[name] -= tokens

    # ------------------------------------------------------------ one request

    def _able(self, view: View) -> Sequence[int]:
        """Places of pairs that can hold the request, if there are any."""
        places = range(len(self._pairs))
        if view.replicas is view.up:
            return places
        names = {replica.name for replica in view.replicas}
        return [n for n in places if self._pairs[n].prefill in names and self._pairs[n].decode in names] or places

    def _best(self, request: RequestView, slo: Slo, places: Sequence[int]) -> int:
        ttft_s = {name: self._ttft_s(request, name) for name in self._prefills}
        decoding = {name: self._decoding(request, name) for name in self._decodes}
        later = request.predicted_output_tokens - 1
        best, least = places[0], inf
        for place in places:
            pair = self._pairs[place]
            first_s, there = ttft_s[pair.prefill], decoding[pair.decode]
            behind_s = max(there.wait_s, there.ahead * self._mean_input * pair.s_per_token)
            own_s = pair.latency_s + request.input_tokens * (pair.s_per_token + pair.codec_s_per_token)
            rest_s = behind_s + own_s + later * there.step_s if later > 0 else 0.0
            used = _used(slo, first_s, rest_s, later) - OWED_WEIGHT * (self._owed[place] + pair.share)
            if used < least:
                best, least = place, used
        return best

    def _ttft_s(self, request: RequestView, name: str) -> float:
        replica, gauge = self._replicas[name], self._gauges[name]
        if request.input_tokens > replica.total_blocks * replica.block_size:
            return inf
        count = replica.num_prefilling
        wait_s = count * gauge.prompt_s(replica.pending_prefill_tokens // count)[1] if count else 0.0
        return wait_s + gauge.prompt_s(request.input_tokens)[0]

    def _decoding(self, request: RequestView, name: str) -> Decoding:
        """Among all that are assigned, those in prefill included."""
        replica = self._replicas[name]
        room = replica.total_blocks * replica.block_size
        if request.input_tokens + request.predicted_output_tokens > room:
            return Decoding(inf, inf, 0)
        count, tokens = self._assigned[name] + 1, self._tokens[name] + _tokens(request)
        together = max(1, min(count, replica.max_num_seqs, int(count * room / tokens)))
        step_s = self._gauges[name].step_s(together, tokens / count)
        turns = (count - together) / together  # of the whole batch, before there is room
        here = replica.num_running + replica.num_waiting + replica.num_swapped
        return Decoding(
            step_s, turns * request.predicted_output_tokens * step_s, max(0, replica.num_decoding - here)
        )  # fmt: skip

    # ------------------------------------------------------------ what is up

    def _look(self, view: View) -> None:
        self._seen = view.up, view.plan
        self._replicas = {replica.name: replica for replica in view.up}
        self._mean_input = max(1, round(view.problem.workload.mean_input_tokens))
        pairs = list(self._linked(view))
        total = sum(pair.share for pair in pairs)
        self._pairs = [pair._replace(share=pair.share / total) for pair in pairs]
        self._owed = [0.0] * len(pairs)
        self._prefills = list(dict.fromkeys(pair.prefill for pair in pairs))
        self._decodes = list(dict.fromkeys(pair.decode for pair in pairs))
        specs = {one.name: one for one in view.plan.replicas}
        self._gauges = {
            name: Gauge(specs[name], view.problem) for name in dict.fromkeys([*self._prefills, *self._decodes])
        }

    def _linked(self, view: View) -> Iterator[Pair]:
        problem, shares = view.problem, view.plan.shares
        tokens, token_bytes = self._mean_input, problem.model.kv_bytes_per_token()
        for a in [one for one in view.up if one.role != "decode"]:
            for b in [one for one in view.up if one.role != "prefill"]:
                share = shares.get((a.name, b.name), 0.0) if shares else 1.0
                if share <= 0:
                    continue
                try:
                    path = problem.cluster.path(a.gpus, b.gpus)
                except ConfigError:  # no link
                    continue
                move = Move(0, tokens, tokens * token_bytes, problem.model.num_layers, a.name, b.name)
                sent = sum(part.share for part in self._transfer.chunks(move, view))
                rate = path.bytes_per_s(problem.cluster.capacity_bytes_per_s)
                codec_s = self._transfer.overhead_s(move) / tokens
                yield Pair(a.name, b.name, share, path.latency_s, sent * token_bytes / rate if rate else inf, codec_s)


def _tokens(request: RequestView) -> float:
    """KV that a request holds while it decodes, on average."""
    return request.input_tokens + request.predicted_output_tokens / 2


def _used(slo: Slo, first_s: float, rest_s: float, later: int) -> float:
    """What a request would use of its SLO; ``rest_s``: from the first token to the last, ``later`` tokens."""
    used = 0.0
    if slo.ttft_s is not None:
        used += (first_s / slo.ttft_s) ** 2
    if slo.tpot_s is not None and later > 0:
        used += (rest_s / later / slo.tpot_s) ** 2
    if slo.e2e_s is not None:
        used += ((first_s + rest_s) / slo.e2e_s) ** 2
    if slo.ttft_s is slo.tpot_s is slo.e2e_s is None:
        return first_s + rest_s
    return sqrt(used)
