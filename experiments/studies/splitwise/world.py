"""The clusters, traces and latency tables of Splitwise's evaluation (ISCA 2024, sections 5 and 6), for its study.

A machine has eight GPUs and holds the whole model (TP8). H100 machines send 400 Gbit/s a GPU, A100 machines 200
(table 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from calibrate.importers.splitwise import DTYPES, Setup, Steps, fit_step
from calibrate.profile.file import read_profile, shipped_profiles
from sim import SYSTEMS, Cluster, Problem, Request, Result, System, Workload, simulate
from sim.cluster import gpu
from sim.cost import Fitted, Profile, ProfileEntry, Table
from sim.model import model
from sim.planners.pools import Colocated, Pool
from sim.planners.provisioning import Alone, Design, SlowdownLimits, alone, slowdowns
from sim.policy import RequestView, Source, View
from sim.predictors import TrueLength
from sim.types import Reject, Route, Stage
from traces import Lengths, Quantiles, TraceSource, generate
from traces.sample import INPUT_TOKENS, OUTPUT_TOKENS, SHARES

Letter = Literal["A", "H", "C"]
"""A machine of A100s, of H100s, or of power-capped H100s."""
GPUS: Mapping[Letter, str] = {"A": "A100-80G-SXM", "H": "H100-SXM", "C": "H100-SXM"}
NIC_GBPS: Mapping[Letter, float] = {"A": 1600, "H": 3200, "C": 3200}
USD_PER_HOUR: Mapping[Letter, float] = {"A": 17.6, "H": 38.0, "C": 38.0}
"""Table 1."""
POWER: Mapping[Letter, float] = {"A": 1.0, "H": 1.75, "C": 1.23}
"""Provisioned, in units of an A100 machine's (section 5)."""
ROUNDING = 1e-9
MACHINE_BYTES = 640e9
"""What splitwise-sim gives to weights and KV; our own rule leaves room for activations and the runtime."""

CODE_INPUT_TOKENS = (
    3, 17, 44, 75, 147, 232, 386, 578, 770, 939, 1075, 1261, 1469,
    1909, 2164, 2433, 2744, 3192, 3920, 5188, 7303, 7435, 7436, 7437, 7437,
)  # fmt: skip
CODE_OUTPUT_TOKENS = (
    6, 6, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 16, 18, 20, 24, 29, 39, 55, 90, 145, 251, 825, 1899,
)  # fmt: skip
"""Quantiles at ``traces.sample.SHARES`` of AzureLLMInferenceTrace_code.csv (8,819 requests), as the sample's."""


def _quantiles(tokens: tuple[int, ...]) -> Lengths:
    return Quantiles(points=tuple(zip(SHARES, tokens, strict=True)))


TRACES: Mapping[str, tuple[Lengths, Lengths]] = {
    "coding": (_quantiles(CODE_INPUT_TOKENS), _quantiles(CODE_OUTPUT_TOKENS)),
    "conversation": (_quantiles(INPUT_TOKENS), _quantiles(OUTPUT_TOKENS)),
}
"""Input and output lengths, drawn independently of each other as in the authors' traces."""

BLOOM_H100_PROMPT_S = {
    128: 0.04828, 256: 0.05118, 512: 0.07549, 1024: 0.13262, 2048: 0.25311, 4096: 0.68870, 8192: 1.53540,
}  # fmt: skip
BLOOM_H100_DECODE_S = {1: 0.03615, 2: 0.03691, 4: 0.03806, 8: 0.03814, 16: 0.04064, 32: 0.04584, 64: 0.06382}
"""Medians of five (Mutinifni/splitwise-sim 8f99e7d, perf_model.csv, MIT): single prompts; decodes after 512 tokens."""


@cache
def latencies() -> Fitted:
    """The shipped Splitwise profile, and BLOOM on H100, which it lacks."""
    setup = Setup(model("bloom-176b"), gpu(GPUS["H"]), 8)
    counts, seqs = list(BLOOM_H100_PROMPT_S), list(BLOOM_H100_DECODE_S)
    prompts = _steps(counts, [0] * len(counts), list(BLOOM_H100_PROMPT_S.values()))
    decodes = _steps(seqs, [576] * len(seqs), list(BLOOM_H100_DECODE_S.values()))
    step = fit_step(setup, prompts, decodes)
    entry = ProfileEntry(
        gpus=(setup.gpu.name,),
        model=setup.model.name,
        num_layers=setup.model.num_layers,
        tp=8,
        dtypes=DTYPES,
        linear=Table(counts=tuple(map(int, step.tokens)), seconds=tuple(map(float, step.linear_s))),
        head=Table(counts=tuple(map(int, step.seqs)), seconds=tuple(map(float, step.head_s))),
        included=frozenset({"collective", "embedding", "overhead"}),
    )
    shipped = read_profile(shipped_profiles()["splitwise-2023"])
    ours = Profile(name="bloom-h100", provenance=shipped.provenance, entries=(entry,))
    return Fitted(profiles=(shipped, ours))


def _steps(counts: list[int], contexts: list[int], seconds: list[float]) -> Steps:
    return Steps(*(np.array(column, dtype=float) for column in (counts, contexts, seconds)))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is replayed where: machine types, model, lengths, and whether splitwise-sim's defects are repeated.

    ``token`` None: a baseline, every machine does both phases and requests go to the least loaded.
    """

    prompt: Letter
    token: Letter | None
    trace: str
    model: str = "bloom-176b"
    compat: bool = True
    duration_s: float = 120.0
    seed: int = 0

    @property
    def name(self) -> str:
        if self.token is None:
            return f"Baseline-{GPUS[self.prompt].split('-')[0]}"
        return f"Splitwise-{self.prompt}{self.token}".replace("C", "Hcap")

    def cluster(self, design: Design) -> Cluster:
        counts = ((self.prompt, design.prompts), (self.token, design.tokens))
        nodes = [
            {"gpu": GPUS[letter], "count": 8, "nodes": count, "nic_gbps": NIC_GBPS[letter], "name": "pt"[place]}
            for place, (letter, count) in enumerate(counts)
            if letter and count
        ]
        return Cluster.of(nodes=nodes, links={"inter_node": {"gbps": 3200, "latency_us": 10}})

    def problem(self, design: Design, rate_per_s: float) -> Problem:
        return Problem(
            cluster=self.cluster(design),
            model=replace(model(self.model), max_position_embeddings=16384),  # the traces are longer than 2048
            cost=latencies(),
            workload=Workload(rate_per_s=rate_per_s, lengths=((1500, 100),)),
            seed=self.seed,
        )

    def system(self, design: Design) -> System:
        system = self._system(design)
        if not self.compat:
            return system
        spec = model(self.model)
        free_bytes = MACHINE_BYTES - spec.weight_bytes(0, spec.num_layers)
        blocks = int(free_bytes / spec.kv_bytes_per_token() / system.limits.block_size)
        return system.with_limits(replace(system.limits, num_kv_blocks=blocks))

    def _system(self, design: Design) -> System:
        compat: Literal["splitwise_sim"] | None = "splitwise_sim" if self.compat else None
        if self.token is None:
            system = SYSTEMS["splitwise"](compat=compat)
            colocated = Colocated(pool=Pool(replicas=design.prompts, tp=8))
            return replace(system, name=self.name, planner=colocated, router=LeastPendingTokens)
        return SYSTEMS["splitwise"](
            compat=compat,
            prefill={"replicas": design.prompts, "tp": 8},
            decode={"replicas": design.tokens, "tp": 8},
            power_capped=[] if self.token != "C" else capped_nodes(design),
        )

    def requests(self, rate_per_s: float) -> list[Request]:
        inputs, outputs = TRACES[self.trace]
        count = 10 + round(2 * rate_per_s * self.duration_s)
        stream = generate(count, rate_per_s, input=inputs, output=outputs, seed=self.seed)
        return list(takewhile(lambda request: request.arrival_s < self.duration_s, stream))

    def replay(self, design: Design, rate_per_s: float) -> Result:
        return self._simulated(design, rate_per_s, TraceSource(self.requests(rate_per_s)))

    def _simulated(self, design: Design, rate_per_s: float, source: Source) -> Result:
        return simulate(self.problem(design, rate_per_s), self.system(design), source, predictor=TrueLength())

    def slowdowns(self, design: Design, rate_per_s: float) -> dict[str, tuple[float, ...]]:
        return self._slowdowns(self.replay(design, rate_per_s))

    def _slowdowns(self, result: Result) -> dict[str, tuple[float, ...]]:
        columns = result.columns
        lengths = zip(columns["input_tokens"].tolist(), columns["output_tokens"].tolist(), strict=True)
        return slowdowns(columns, [on_a100(self.model, self.compat, *pair) for pair in lengths])

    def feasible(self, design: Design, rate_per_s: float) -> bool:
        """All nine slowdowns of table 6 are met; the replay ends as soon as they cannot be any more."""
        watched = Watched(self, self.requests(rate_per_s))
        try:
            return SlowdownLimits().met(self._slowdowns(self._simulated(design, rate_per_s, watched)))
        except HopelessError:
            return False

    def amount(self, design: Design, per_machine: Mapping[Letter, float]) -> float:
        """Dollars per hour, or power, of a design."""
        return design.prompts * per_machine[self.prompt] + design.tokens * per_machine[self.token or self.prompt]


class HopelessError(Exception):
    """So many requests took too long that whatever the others do a limit is missed."""


class Watched:
    """A trace that ends the replay when more requests exceed a limit of E2E than may."""

    def __init__(self, world: World, requests: Sequence[Request]) -> None:
        self.world = world
        self.requests = requests
        self.left = [[limit, allowed] for limit, allowed in SlowdownLimits().allowed("e2e", len(requests))]

    def next(self, now_s: float, finished: Request | None) -> Sequence[Request]:
        if finished is None:
            return self.requests
        whole = on_a100(self.world.model, self.world.compat, finished.input_tokens, finished.output_tokens).e2e_s
        slowdown = (now_s - finished.arrival_s) / whole
        for place in self.left:
            if slowdown > place[0] * (1 + ROUNDING):
                place[1] -= 1
                if place[1] < 0:
                    raise HopelessError
        return ()


def capped_nodes(design: Design) -> list[str]:
    """Names of the token machines, as the cluster numbers them."""
    return [f"t{place}" for place in range(design.tokens)] if design.tokens > 1 else ["t"]


@cache
def on_a100(name: str, compat: bool, input_tokens: int, output_tokens: int) -> Alone:
    """The request alone on an A100 machine: what slowdowns are measured against."""
    return alone(reference(name, compat, "A"), input_tokens, output_tokens)


@cache
def reference(name: str, compat: bool, letter: Letter) -> Any:
    """Step times of one machine."""
    world = World(prompt=letter, token=None, trace="coding", model=name, compat=compat)
    problem = world.problem(Design(1, 0), 1.0)
    stage = Stage(name="alone", gpus=problem.cluster.gpu_ids, first_layer=0, end_layer=problem.model.num_layers)
    return world.system(Design(1, 0)).cost(problem.cost).bind(problem.model, stage, problem.cluster)


class LeastPendingTokens:
    """The baselines' router: join the queue with the fewest tokens pending, a decode counting as one."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        best = min(view.replicas, key=lambda machine: machine.pending_prefill_tokens + machine.num_decoding)
        return Route(best.leg, best.leg)

    def finished(self, request: RequestView) -> None:
        pass
