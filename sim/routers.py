"""Routers: which replica prefills and which decodes a request, chosen once on arrival.

A router may read the view and its own counts; it must not look into queues behind the view, nor keep requests.
Ties go to the replica that the plan names first, so equal runs stay equal.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from math import inf, sqrt
from operator import attrgetter
from typing import Literal, NamedTuple

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


class LeastRequests:
    """Colocated: the replica with the fewest requests waiting or running."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        best = min(view.replicas, key=lambda replica: replica.num_waiting + replica.num_running)
        return Route(best.leg, best.leg)

    def finished(self, request: RequestView) -> None:
        pass


class RoundRobin:
    """Colocated: replicas in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        replica = view.replicas[self._turn % len(view.replicas)]
        self._turn += 1
        return Route(replica.leg, replica.leg)

    def finished(self, request: RequestView) -> None:
        pass


class LeastLoadedPair:
    """Split: the prefill replica with the fewest prompt tokens pending, the decode replica with the fewest
    requests assigned (those not there yet included). ``mixed`` replicas can serve either leg."""

    def __init__(self) -> None:
        self._assigned: dict[str, int] = defaultdict(int)
        self._place: dict[int, str] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills, decodes = view.with_role("prefill", "mixed"), view.with_role("decode", "mixed")
        if not prefills or not decodes:
            return Reject(f"no {'prefill' if not prefills else 'decode'} replica is up")
        prefill = min(prefills, key=attrgetter("pending_prefill_tokens"))
        assigned = self._assigned
        decode = min(decodes, key=lambda replica: assigned[replica.name])
        assigned[decode.name] += 1
        self._place[request.id] = decode.name
        return Route(prefill.leg, decode.leg)

    def finished(self, request: RequestView) -> None:
        self._assigned[self._place.pop(request.id)] -= 1


class PrefixAware:
    """Where least has to be done for a request: prompt tokens to compute, those that wait included, and KV held.

    The form is that of NVIDIA Dynamo's KV router: ``overlap_weight`` x prefill blocks + blocks in use, both with the
    request; the least wins. Prefill blocks are those of the prompts under way less what each found in the replica's
    prefix cache when it was sent. The weight is ours: the compute of a prompt's block counts for far more than that
    decodes read a block (Dynamo's is 1 and meant to be raised for TTFT). In a split the decode replica is the one
    with fewest blocks in use and to come. ``index_age_s``: see ``matched_tokens``.
    """

    def __init__(self, overlap_weight: float = 20.0, index_age_s: float = 0.0) -> None:
        self.overlap_weight = overlap_weight
        self.index_age_s = index_age_s
        self._sent: dict[str, deque[int]] = defaultdict(deque)
        """By replica: prompt tokens that the latest requests had to have computed there."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills, decodes = view.with_role("prefill", "mixed"), view.with_role("decode", "mixed")
        if not prefills or not decodes:
            return Reject(f"no {'prefill' if not prefills else 'decode'} replica is up")
        prefill = min(prefills, key=lambda one: self._cost(request, one))
        self._sent[prefill.name].append(self._missing(request, prefill))
        if prefill.role == "mixed":
            return Route(prefill.leg, prefill.leg)
        decode = min(decodes, key=lambda one: self._to_hold(request, one))
        return Route(prefill.leg, decode.leg)

    def finished(self, request: RequestView) -> None:
        pass

    def _missing(self, request: RequestView, replica: ReplicaView) -> int:
        return request.input_tokens - replica.matched_tokens(request, self.index_age_s)

    def _cost(self, request: RequestView, replica: ReplicaView) -> tuple[float, int]:
        sent = self._sent[replica.name]
        while len(sent) > replica.num_prefilling:
            sent.popleft()  # first come, first served: those that were sent last are not done
        tokens = self._missing(request, replica) + min(sum(sent), replica.pending_prefill_tokens)
        held = replica.total_blocks - replica.free_blocks
        load = self.overlap_weight * tokens / replica.block_size + held
        return load, replica.num_waiting + replica.num_running

    def _to_hold(self, request: RequestView, replica: ReplicaView) -> float:
        coming = replica.num_decoding - replica.num_running
        missing = self._missing(request, replica) / replica.block_size
        return missing * (1 + coming) + replica.total_blocks - replica.free_blocks


class ByShare:
    """Split: (prefill, decode) pairs by the plan's shares, in a smooth weighted round robin, or drawn at random.

    Shares of pairs that are not up are spread over the others; a request is refused if no pair is up. A plan without
    shares counts every pair alike. The round robin starts anew when the pairs or their shares change.
    """

    def __init__(self, draw: Literal["round-robin", "random"] = "round-robin") -> None:
        self._draw = draw
        self._plan: Plan | None = None
        self._legs: dict[str, tuple[str, ...]] = {}
        self._shares: dict[tuple[str, str], float] = {}
        self._credit: dict[tuple[str, str], float] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        legs = {replica.name: replica.leg for replica in view.up}
        if view.plan is not self._plan or legs != self._legs:
            self._plan, self._legs = view.plan, legs
            self._look(self._up(view, legs))
        if not self._shares:
            return Reject("no (prefill, decode) pair of the plan is up")
        able = self._able(view)
        prefill, decode = self._random(able, view) if self._draw == "random" else self._next(able)
        return Route(legs[prefill], legs[decode])

    def finished(self, request: RequestView) -> None:
        pass

    def _up(self, view: View, legs: Container[str]) -> dict[tuple[str, str], float]:
        planned = view.plan.shares
        if not planned:
            decodes = [one.name for one in view.up if one.role != "prefill"]
            planned = {(one.name, d): 1.0 for one in view.up if one.role != "decode" for d in decodes}
        up = {pair: share for pair, share in planned.items() if share > 0 and pair[0] in legs and pair[1] in legs}
        total = sum(up.values())
        return {pair: share / total for pair, share in up.items()}

    def _look(self, shares: dict[tuple[str, str], float]) -> None:
        if shares != self._shares:
            self._shares, self._credit = shares, dict.fromkeys(shares, 0.0)

    def _able(self, view: View) -> list[tuple[str, str]]:
        """Pairs that can hold the request, if there are any."""
        pairs = list(self._shares)
        if view.replicas is view.up:
            return pairs
        names = {replica.name for replica in view.replicas}
        return [pair for pair in pairs if names.issuperset(pair)] or pairs

    def _random(self, pairs: Sequence[tuple[str, str]], view: View) -> tuple[str, str]:
        total = sum(self._shares[pair] for pair in pairs)
        return pairs[int(view.rng.choice(len(pairs), p=[self._shares[pair] / total for pair in pairs]))]

    def _next(self, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Whoever is owed most; each request owes every pair its share."""
        for pair, share in self._shares.items():
            self._credit[pair] += share
        chosen = max(pairs, key=lambda pair: self._credit[pair])
        self._credit[chosen] -= 1.0
        return chosen


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
