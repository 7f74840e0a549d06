"""Which share of the requests goes from which prefill to which decode group: a transportation problem, as an LP.

Source: ThunderServe (MLSys 2025): maximise the sum of Z_ij D_ij, Z_ij being the share of requests prefilled by i and
decoded by j and D_ij the part of them that meets the SLO. The capacity rows are ours: without them the LP
sends everything to the single best pair. Since D falls with the load, the LP is solved at up to ``ROUNDS`` loads,
each time with D as it is when every group is loaded that far, and the best routing by D at its own loads is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim.planners.thunderserve.balance import Resource, balanced
from sim.planners.thunderserve.parallel import Layouts, link
from sim.planners.thunderserve.replay import Floats, Server, attainment
from sim.transfers import Quantized
from sim.types import Move, Stage

ROUNDS = 3
LINK_SHARE = 0.9
"""Of a link's bandwidth that KV may take."""
MOST_CARRY_S = 30.0
"""A link slower than that fills its decode group with KV on the way, however slow it is."""
SERVED_ANYWAY = 1e-3
"""Weight of a request that misses its SLO against one that meets it (below what a replay can tell apart)."""


class Row(NamedTuple):
    """A resource that pairs share: how much of it each takes per unit of Z, and how much there is."""

    name: str
    usage: Floats
    capacity: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flow:
    """The LP's answer. ``prices``: by name, how much the optimum would gain if that capacity grew by its own size."""

    shares: Floats
    value: float
    prices: Mapping[str, float]


def transport(
    scores: Floats, prefill_caps: Floats, decode_caps: Floats, pair_caps: Floats, shared: Sequence[Row] = ()
) -> Flow:
    """max sum Z*scores; sum Z <= 1, rows of Z within prefill_caps, columns within decode_caps, Z within pair_caps.

    All capacities are shares of the traffic. Names of ``prices``: traffic, prefill 0, decode 0 ... and the rows'.
    """
    from scipy.optimize import linprog

    m, n = scores.shape
    rows = np.vstack(
        [
            np.ones((1, m * n)),
            np.kron(np.eye(m), np.ones((1, n))),
            np.kron(np.ones((1, m)), np.eye(n)),
            *(row.usage.reshape(1, -1) for row in shared),
        ]
    )
    limits = np.concatenate(([1.0], prefill_caps, decode_caps, [row.capacity for row in shared]))
    bounds = [(0.0, min(1.0, cap)) for cap in pair_caps.ravel().tolist()]
    solved = linprog(-scores.ravel(), A_ub=rows, b_ub=limits, bounds=bounds, method="highs")
    if solved.x is None:
        raise ArithmeticError(f"the routing LP of {m} x {n} groups ended with: {solved.message}")
    names = ["traffic", *(f"prefill {i}" for i in range(m)), *(f"decode {j}" for j in range(n))]
    names += [row.name for row in shared]
    gains = -solved.ineqlin.marginals * limits
    shares = np.clip(solved.x, 0.0, None).reshape(m, n)
    return Flow(
        shares=shares, value=float((shares * scores).sum()), prices=dict(zip(names, gains.tolist(), strict=True))
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Shares of all requests by (prefill, decode) group, what they achieve, and what holds them back.

    ``served``: the part of the requests within every capacity; below 1 queues grow and ``attainment`` is that of
    a replay that sees them grow. ``headroom``: how many times the rate could flow by the LP, links
    included; ``binds``: what is full first.
    """

    shares: Floats
    attainment: float
    served: float
    headroom: float
    pair_scores: Floats
    binds: str

    @property
    def rank(self) -> tuple[float, float, float]:
        """Greater is better."""
        return round(self.attainment, 9), round(self.served, 9), round(self.headroom, 9)


NOTHING = Routing(
    shares=np.zeros((0, 0)), attainment=0.0, served=0.0, headroom=0.0, pair_scores=np.zeros((0, 0)), binds="link"
)


class Links:
    """The KV's way between groups: remembered by shape, since the GPUs of a machine are alike."""

    def __init__(self, layouts: Layouts, transfer: Quantized) -> None:
        self._layouts = layouts
        self._known: dict[
            tuple[tuple[Stage, ...], tuple[Stage, ...]], tuple[float, float, tuple[tuple[str, float], ...]]
        ]
        self._known = {}
        problem, sample = layouts.problem, layouts.sample
        token_bytes = problem.model.kv_bytes_per_token()
        self.sent_bytes = sample.inputs * token_bytes * transfer.share
        self.codec_s = np.array(
            [
                transfer.overhead_s(Move(0, tokens, tokens * token_bytes, problem.model.num_layers, "", ""))
                for tokens in sample.inputs.tolist()
            ]
        )

    def between(self, a: Server, b: Server) -> tuple[float, float, tuple[tuple[str, float], ...]]:
        """Latency, bytes/s alone (0: no link), and the shared resources."""
        key = (a.stages, b.stages)
        if key not in self._known:
            source = tuple(gpu for stage in a.stages for gpu in stage.gpus)
            target = tuple(gpu for stage in b.stages for gpu in self._from_the_end(stage))
            self._known[key] = link(self._layouts.problem, source, target)
        return self._known[key]

    def of(self, a: Sequence[Stage], b: Sequence[Stage]) -> tuple[float, float, tuple[tuple[str, float], ...]]:
        """The same between replicas that have their GPUs."""
        source = tuple(gpu for stage in a for gpu in stage.gpus)
        target = tuple(gpu for stage in b for gpu in stage.gpus)
        return link(self._layouts.problem, source, target)

    def _from_the_end(self, stage: Stage) -> list[str]:
        """Groups are laid out on a machine's first GPUs; the other end of a link takes its last ones."""
        ids = self._layouts.cluster.node(stage.gpus[0]).gpu_ids
        return [ids[-1 - ids.index(gpu)] for gpu in stage.gpus]


class Ways(NamedTuple):
    """Between prefill groups (rows) and decode groups: seconds, bytes/s alone (0: no link), and what pairs share."""

    latency_s: Floats
    bytes_per_s: Floats
    shared: tuple[Row, ...]


class Headroom(NamedTuple):
    """Times the rate, and the stage, link or memory that is full at that."""

    headroom: float
    binds: str


def _only(values: Floats, i: int, j: int) -> Floats:
    kept: Floats = np.zeros_like(values)
    kept[i, j] = values[i, j]
    return kept


class Orchestrator:
    """Routes a workload over groups. Loads and capacities are shares of its rate."""

    def __init__(self, layouts: Layouts, transfer: Quantized) -> None:
        self.layouts = layouts
        self.links = Links(layouts, transfer)
        self.rate_per_s = layouts.problem.workload.rate_per_s
        self.traffic_bytes_per_s = self.rate_per_s * float(self.links.sent_bytes.mean())

    def route(self, prefills: Sequence[Server], decodes: Sequence[Server]) -> Routing:
        """The best shares found; ``NOTHING`` if no pair has a link."""
        ways = self.ways(prefills, decodes)
        rate = ways.bytes_per_s
        if not rate.any():
            return NOTHING
        mu, nu = self.capacities(prefills), self.capacities(decodes)
        most = self.headroom(prefills, decodes, ways)
        best = NOTHING
        for mu_load, nu_load in zip(loads(1 / float(mu.sum())), loads(1 / float(nu.sum())), strict=True):
            caps = mu_load * mu, nu_load * nu
            scores = self._scores(prefills, decodes, ways, *caps, np.zeros_like(rate))
            weights = scores + SERVED_ANYWAY * (rate > 0)
            flow = transport(weights, *caps, self.pair_caps(ways), ways.shared)
            served = float(flow.shares.sum())
            if served <= 0:
                continue
            found = self.predict(
                prefills, decodes, ways, flow.shares / served, min(1.0, served), most.headroom, most.binds
            )
            best = max(best, found, key=lambda routing: routing.rank)
            if best.attainment >= self.layouts.sample.fitting_share - 1e-9:
                break
        return best

    def headroom(self, prefills: Sequence[Server], decodes: Sequence[Server], ways: Ways) -> Headroom:
        """How many times the rate could flow, links included, and what would be full then."""
        linked = ways.bytes_per_s > 0
        own = np.divide(1.0, self.pair_caps(ways), out=np.zeros(linked.shape), where=linked)
        rows = [Resource(name=row.name, usage=row.usage / row.capacity) for row in ways.shared]
        rows += [
            Resource(name=f"prefill{i} > decode{j}", usage=_only(own, i, j)) for i, j in np.argwhere(linked).tolist()
        ]
        found = balanced(self.capacities(prefills), self.capacities(decodes), np.zeros(0), linked, rows)
        if found is None:
            return Headroom(0.0, "link")
        side, _, place = found.binds.partition(" ")
        if side not in ("prefill", "decode") or not place.isdecimal():
            return Headroom(found.headroom, f"link {found.binds}")
        server = (prefills if side == "prefill" else decodes)[int(place)]
        return Headroom(found.headroom, server.weakest.format(name=f"{side}{place}"))

    def predict(
        self, prefills: Sequence[Server], decodes: Sequence[Server], ways: Ways, shares: Floats,
        served: float, headroom: float, binds: str,
    ) -> Routing:  # fmt: skip
        """What shares that add up to 1 achieve, at the loads that follow from them."""
        link_load = np.zeros_like(shares)
        for row in ways.shared:
            load = float((row.usage * shares).sum()) * LINK_SHARE / row.capacity
            link_load = np.maximum(link_load, (row.usage > 0) * load)
        scores = self._scores(prefills, decodes, ways, shares.sum(axis=1), shares.sum(axis=0), link_load)
        return Routing(
            shares=shares,
            attainment=float((shares * scores).sum()),
            served=served,
            headroom=headroom,
            pair_scores=scores,
            binds=binds,
        )

    def capacities(self, servers: Sequence[Server]) -> Floats:
        return np.array([server.capacity_per_s for server in servers]) / self.rate_per_s

    def pair_caps(self, ways: Ways) -> Floats:
        """Of each pair's own link."""
        caps: Floats = LINK_SHARE * ways.bytes_per_s / self.traffic_bytes_per_s
        return caps

    def ways(self, prefills: Sequence[Server], decodes: Sequence[Server]) -> Ways:
        shape = (len(prefills), len(decodes))
        latency_s, rate, usage = np.zeros(shape), np.zeros(shape), dict[str, Floats]()
        for i, a in enumerate(prefills):
            for j, b in enumerate(decodes):
                latency_s[i, j], rate[i, j], uses = self.links.between(a, b)
                for name, share in uses:
                    usage.setdefault(name, np.zeros(shape))[i, j] = share
        capacity = self.layouts.cluster.capacity_bytes_per_s
        rows = [Row(name, used, LINK_SHARE * capacity[name] / self.traffic_bytes_per_s) for name, used in usage.items()]
        return Ways(latency_s, rate, tuple(rows))

    def _scores(
        self, prefills: Sequence[Server], decodes: Sequence[Server], ways: Ways,
        prefill_load: Floats, decode_load: Floats, link_load: Floats,
    ) -> Floats:  # fmt: skip
        """D at these loads (of links: the part of their bandwidth in use, which slows what crosses them)."""
        rate, linked = ways.bytes_per_s, ways.bytes_per_s > 0
        sample, rate_per_s = self.layouts.sample, self.rate_per_s
        left = np.where(linked, rate * (1 - np.minimum(link_load, 0.99)), 1.0)
        carry_s = ways.latency_s[..., None] + self.links.sent_bytes / left[..., None] + self.links.codec_s
        soonest_s = np.where(linked, carry_s.mean(axis=2), np.inf).min(axis=0, initial=MOST_CARRY_S).tolist()
        ttft_s = np.array(
            [server.latency_at(load * rate_per_s, sample) for server, load in zip(prefills, prefill_load, strict=True)]
        )
        decode_s = np.array(
            [
                server.latency_at(load * rate_per_s, sample, carry)
                for server, load, carry in zip(decodes, decode_load, soonest_s, strict=True)
            ]
        )
        return attainment(ttft_s, carry_s, decode_s, sample, self.layouts.problem.slo) * linked


def loads(least: float) -> list[float]:
    """Shares of every group's capacity at which the LP is solved: just enough for the rate, halfway, and all."""
    enough = min(1.0, 1.05 * least)
    return [enough, (1 + enough) / 2, 1.0][:ROUNDS]
