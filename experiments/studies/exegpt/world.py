"""The servers, tasks and baselines of ExeGPT's evaluation (ASPLOS 2024, section 7), for its study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim import SYSTEMS, Cluster, Limits, ModelSpec, Problem, Request, Result, System, Workload, simulate
from sim.cost import Roofline
from sim.model import model
from sim.planners.exegpt import ExeGPT, Kind, Schedule
from sim.types import InfeasibleError
from traces import TraceSource, generate

KNOWN = 2000
"""Requests whose lengths a planner knows; others of the same distributions are served."""
BATCHES = (1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
"""Of the baselines."""
REPLANS = 4
ROUNDS, FEWEST = 8, 1600
"""So many batches of requests are served, all there from the beginning; the second to the sixth quarter count."""


@dataclass(frozen=True)
class Truncated:
    """A normal distribution between 0 and ``most``."""

    mean: float
    std: float
    most: int

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.special import ndtr, ndtri

        low, high = ndtr(-self.mean / self.std), ndtr((self.most - self.mean) / self.std)
        found: NDArray[np.float64] = np.clip(self.mean + self.std * ndtri(low + share * (high - low)), 1, self.most)
        return found


class Task(NamedTuple):
    name: str
    input: Truncated
    output: Truncated

    @property
    def longest(self) -> int:
        return self.input.most + self.output.most

    def requests(self, count: int, seed: int) -> list[Request]:
        drawn = generate(count, 1.0, input=self.input, output=self.output, seed=seed)
        return [replace(one, arrival_s=0.0) for one in drawn]


TASKS = {
    "S": Task("S", Truncated(256, 252, 512), Truncated(32, 13, 80)),
    "T": Task("T", Truncated(128, 81, 256), Truncated(128, 68, 320)),
    "G": Task("G", Truncated(64, 23, 128), Truncated(192, 93, 480)),
    "C1": Task("C1", Truncated(256, 115, 512), Truncated(64, 30, 160)),
    "C2": Task("C2", Truncated(512, 252, 1024), Truncated(256, 134, 640)),
}
"""Summarising, translating, generating, and two of conversation: means, deviations and maxima as printed."""


def gpt3(name: str, layers: int, heads: int) -> ModelSpec:
    """GPT-3 of another size: heads of 128; layers and heads are ours, chosen for the printed number of parameters."""
    size = 128 * heads
    return replace(
        model("gpt-3"), name=name, num_layers=layers, hidden_size=size, intermediate_size=4 * size, head_dim=128,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip


class Server(NamedTuple):
    """A model on machines; ``shapes``: (tp, pp) of the baselines' one instance."""

    model: ModelSpec
    gpus: int
    machines: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return self.model.name

    def problem(self, task: Task, limits: Limits | None = None) -> Problem:
        lengths = tuple((one.input_tokens, one.output_tokens) for one in task.requests(KNOWN, seed=1))
        return Problem(
            cluster=Cluster.of(
                nodes=[{"gpu": "A40", "count": self.gpus, "nodes": self.machines}],
                links={"inter_node": {"gbps": 100, "latency_us": 10}},
            ),
            model=self.model,
            cost=Roofline(),
            workload=Workload(rate_per_s=1.0, lengths=lengths),
            limits=limits or Limits(),
        )


OPT = Server(model("opt-13b"), 4, 1, ((4, 1), (2, 2), (1, 4)))
GPT_39B = Server(gpt3("gpt-3 39b", 48, 64), 8, 2, ((8, 2), (2, 8)))
GPT_101B = Server(gpt3("gpt-3 101b", 80, 80), 8, 4, ((8, 4), (2, 16)))
GPT_175B = Server(model("gpt-3"), 8, 4, ((8, 4), (2, 16)))


class Point(NamedTuple):
    """Requests/s under a full queue; seconds from a prompt's start to the last token, of the 99th-percentile output
    length; and how that was set."""

    rate_per_s: float
    latency_s: float
    setting: str


def measured(result: Result, setting: str) -> Point:
    """Latency: the mean of answers up to 5 % shorter than that length."""
    columns = result.columns
    order = np.argsort(columns["request"])
    quarter = len(order) // 4
    counted = order[quarter : 3 * quarter]
    ends_s, tokens = columns["e2e_s"][order], columns["output_tokens"][counted]
    span_s = ends_s[: 3 * quarter].max() - ends_s[:quarter].max()
    longest = np.quantile(columns["output_tokens"], 0.99)
    long = counted[(tokens <= longest) & (tokens >= 0.95 * longest)]
    return Point(2 * quarter / span_s, float((columns["e2e_s"] - columns["queue_s"])[long].mean()), setting)


def served(server: Server, task: Task, system: System, batch: float, setting: str) -> Point:
    requests = task.requests(max(FEWEST, ROUNDS * round(batch)), seed=0)
    return measured(simulate(server.problem(task), system, TraceSource(requests)), setting)


def baseline(server: Server, task: Task, name: str, batches: Sequence[int]) -> Iterator[Point]:
    """FasterTransformer; or vLLM's iteration-level scheduler, which is the paper's ORCA. Where memory has no room for
    a batch, fewer are served at once."""
    mode = {"mode": "paper"} if name == "vllm" else {}
    for tp, pp in server.shapes:
        for batch in batches:
            system = SYSTEMS[name](tp=tp, pp=pp, replicas=1, **mode)
            limits = replace(
                system.limits, max_num_seqs=batch, max_model_len=task.longest, max_num_batched_tokens=16384
            )
            yield served(server, task, system.with_limits(limits), batch, f"TP{tp} PP{pp}, {batch} at once")


def best_within(points: Sequence[Point], bound_s: float) -> Point | None:
    return max((one for one in points if one.latency_s <= bound_s), default=None)


def bounds_s(points: Sequence[Point]) -> list[float]:
    """At 10, 30 and 70 % of the latencies of FasterTransformer's first shape, and no bound."""
    first = [one.latency_s for one in points if one.setting.split(",")[0] == points[0].setting.split(",")[0]]
    return [*(min(first) + share * (max(first) - min(first)) for share in (0.1, 0.3, 0.7)), inf]


def planned(server: Server, task: Task, bound_s: float, kinds: Sequence[Kind]) -> Schedule | None:
    planner = ExeGPT(kinds=tuple(kinds), bound_s=bound_s)
    try:
        return planner.schedule(server.problem(task, SYSTEMS["exegpt"]().limits))
    except InfeasibleError:
        return None


def kept(server: Server, task: Task, bound_s: float, kinds: Sequence[Kind]) -> tuple[Schedule, Point] | None:
    """Planned for the bound and served; where that takes longer than the bound, planned again for as much less."""
    aim_s = bound_s
    for _ in range(REPLANS):
        schedule = planned(server, task, aim_s, kinds)
        if schedule is None:
            return None
        point = followed(server, task, schedule)
        if point.latency_s <= bound_s:
            return schedule, point
        aim_s *= 0.98 * bound_s / point.latency_s
    return None


def followed(server: Server, task: Task, schedule: Schedule) -> Point:
    """The schedule in the engine."""
    options = {
        "schedule": schedule.kind, "encode_batch": schedule.encode_batch, "tp": schedule.tensor.degree,
        "decode_iterations": schedule.decode_iterations, "tp_gpus": schedule.tensor.gpus or None,
    }  # fmt: skip
    system = SYSTEMS["exegpt"](**options)
    batch = max(schedule.decode_batch, schedule.encode_batch)
    return served(server, task, system, batch, str(schedule).rsplit(": ", 1)[0])
