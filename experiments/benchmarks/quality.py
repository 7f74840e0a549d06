"""Do plans win? Clusters of many kinds: the LP bound, the plan's goodput, and the best of the simple layouts.

``python -m experiments.benchmarks.bench_plan --quality``. Simple layouts are what one lays out by hand: colocated vLLM
on all GPUs and on each type alone, and every division of the types into prefill and decode under ThunderServe's
runtime, each at TP 1, 2 and 4 (and 8, colocated). They race by themselves, by the trials that the plan is judged by.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.planning.climb import Ascent
from experiments.planning.plan import climbed, found
from experiments.planning.race import Race, Trials
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import Setup, resolve
from sim.types import ConfigError

CHAT = {"input": {"mean": 1155, "median": 1020, "max": 4000}, "output": {"mean": 211, "median": 129, "max": 800}}
CODING = {"input": {"mean": 2048, "median": 1469, "max": 6000}, "output": {"mean": 28, "median": 13, "max": 300}}
LONG = {"input": {"mean": 6000, "median": 5000, "max": 16000}, "output": {"mean": 300, "median": 220, "max": 1000}}
SHORT = {"input": {"mean": 600, "median": 500, "max": 1500}, "output": {"mean": 150, "median": 110, "max": 400}}
"""Means and medians of Azure's traces of 2023 for chat and coding; the others are ours."""
TIGHT, LOOSE = (0.5, 0.05), (4.0, 0.25)
MOST_SIMPLE_TRIALS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Machines: (GPU, of a machine, machines, region). ``slo``: seconds to the first token and per token."""

    name: str
    model: str
    machines: tuple[tuple[str, int, int, str], ...]
    gbps: float
    lengths: dict[str, Any]
    slo: tuple[float, float]
    region_gbps: float = 5.0

    def scenario(self) -> Scenario:
        nodes = [
            {"gpu": gpu, "count": count, "nodes": nodes, "region": region}
            for gpu, count, nodes, region in self.machines
        ]
        links = {
            "inter_node": {"gbps": self.gbps, "latency_us": 30},
            "inter_region": {"gbps": self.region_gbps, "latency_us": 10000},
        }
        return Scenario.of(
            {
                "model": self.model,
                "cluster": {"nodes": nodes, "links": links},
                "workload": {"generate": {"requests": 2000, **self.lengths}, "rate": 2.0},
                "system": {"name": "thunderserve"},
                "slo": {"ttft_s": self.slo[0], "tpot_s": self.slo[1], "attainment": 0.9},
            }
        )


def _one(*machines: tuple[str, int, int]) -> tuple[tuple[str, int, int, str], ...]:
    return tuple((*machine, "a") for machine in machines)


CASES = (
    Case(name="6: A100 + L4, chat", model="llama-3.1-8b", machines=_one(("A100-80G-SXM", 2, 1), ("L4", 4, 1)),
         gbps=25, lengths=CHAT, slo=(1.0, 0.1)),
    Case(name="8: A40 + 3090 Ti, chat, tight", model="llama-3.1-8b",
         machines=_one(("A40", 4, 1), ("RTX-3090-Ti", 4, 1)), gbps=40, lengths=CHAT, slo=TIGHT),
    Case(name="16: A100 + L4 + A10G, chat", model="llama-3.1-8b",
         machines=_one(("A100-80G-SXM", 4, 1), ("L4", 4, 2), ("A10G", 4, 1)), gbps=50, lengths=CHAT, slo=(1.0, 0.1)),
    Case(name="16: A100 + L4 + A10G, coding", model="llama-3.1-8b",
         machines=_one(("A100-80G-SXM", 4, 1), ("L4", 4, 2), ("A10G", 4, 1)), gbps=50, lengths=CODING, slo=(2.0, 0.1)),
    Case(name="12: H100 + L40S, long prompts", model="llama-3.1-8b", machines=_one(("H100-SXM", 4, 1), ("L40S", 4, 2)),
         gbps=100, lengths=LONG, slo=LOOSE),
    Case(name="16: H100 + A100, 70B, chat", model="llama-3.1-70b",
         machines=_one(("H100-SXM", 8, 1), ("A100-80G-SXM", 8, 1)), gbps=400, lengths=CHAT, slo=(2.0, 0.1)),
    Case(name="24: A100 + L40S, 70B, coding", model="llama-3.1-70b",
         machines=_one(("A100-80G-SXM", 8, 1), ("L40S", 8, 2)), gbps=100, lengths=CODING, slo=LOOSE),
    Case(name="32: A6000 + A5000 + A40 + 3090 Ti, 30B", model="llama-30b",
         machines=_one(("A6000", 4, 2), ("A5000", 4, 2), ("A40", 8, 1), ("RTX-3090-Ti", 4, 2)), gbps=40,
         lengths=SHORT, slo=LOOSE),
    Case(name="32: the same at 10 Gbps, tight", model="llama-30b",
         machines=_one(("A6000", 4, 2), ("A5000", 4, 2), ("A40", 8, 1), ("RTX-3090-Ti", 4, 2)), gbps=10,
         lengths=SHORT, slo=(1.5, 0.12)),
    Case(name="16: A100 + A6000, MoE, chat", model="mixtral-8x7b",
         machines=_one(("A100-80G-SXM", 8, 1), ("A6000", 4, 2)), gbps=100, lengths=CHAT, slo=(2.0, 0.1)),
    Case(name="16: two regions, A100 | L4, chat", model="llama-3.1-8b",
         machines=(("A100-80G-SXM", 4, 1, "a"), ("L4", 4, 3, "b")), gbps=50, lengths=CHAT, slo=(1.5, 0.1),
         region_gbps=2.0),
    Case(name="20: two regions, A100 + L4 | A10G, coding", model="llama-3.1-8b",
         machines=(("A100-80G-SXM", 4, 1, "a"), ("L4", 4, 2, "a"), ("A10G", 4, 2, "b")), gbps=25, lengths=CODING,
         slo=LOOSE),
    Case(name="64: A100 + L4 + A10G + L40S, chat", model="llama-3.1-8b",
         machines=_one(("A100-80G-SXM", 8, 1), ("L4", 4, 6), ("A10G", 4, 4), ("L40S", 8, 2)), gbps=100, lengths=CHAT,
         slo=(1.0, 0.1)),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Rates in requests/s; ``seconds``: of the processor, for the plan."""

    name: str
    bound_per_s: float
    plan_per_s: float
    layout: str
    simple_per_s: float
    simple: str
    seconds: float

    @property
    def over_simple(self) -> float:
        return self.plan_per_s / self.simple_per_s if self.simple_per_s else float("nan")

    @property
    def of_bound(self) -> float:
        return self.plan_per_s / self.bound_per_s if self.bound_per_s else float("nan")


def measured(case: Case) -> Row:
    """Plan, then let the simple layouts race among themselves."""
    setup = resolve(case.scenario())
    started_s = time.process_time()
    plan = climbed(setup, found(setup), top=1)
    seconds = time.process_time() - started_s
    assert plan.bound is not None
    best = plan.options[0]
    label, rate = simple(setup)
    return Row(
        name=case.name, bound_per_s=plan.bound.rate_per_s, plan_per_s=best.goodput_per_s or 0.0,
        layout=f"{best.setup.system.name}: {best.layout} ({best.label})", simple_per_s=rate, simple=label,
        seconds=seconds,
    )  # fmt: skip


def simple(setup: Setup) -> tuple[str, float]:
    """The best of the simple layouts and its rate."""
    ascent = Ascent(setup, colocated=True, seconds=None, progress=lambda step, best: None)
    race = Race(Trials(), MOST_SIMPLE_TRIALS)
    race.enter([*ascent.by_hand(), *ascent.colocated_vllm()])
    race.confirm()
    return ("none", 0.0) if race.best is None else (race.best.label, race.rate_per_s)


def rows(names: Sequence[str]) -> Iterator[Row]:
    """Of the cases whose name holds one of these; all without."""
    chosen = [case for case in CASES if not names or any(name in case.name for name in names)]
    if not chosen:
        raise ConfigError(
            f"--only {', '.join(names)}: no case is called so; they are {'; '.join(c.name for c in CASES)}"
        )
    yield from map(measured, chosen)


def report(names: Sequence[str]) -> None:
    """A line a cluster, then the means."""
    print(f"{'GPUs, cluster':<44}{'bound':>8}{'plan':>8}{'simple':>8}{'x simple':>9}{'of bound':>9}{'cpu s':>7}")
    done = []
    for row in rows(names):
        done.append(row)
        print(
            f"{row.name:<44}{row.bound_per_s:8.2f}{row.plan_per_s:8.2f}{row.simple_per_s:8.2f}{row.over_simple:9.2f}"
            f"{row.of_bound:9.2f}{row.seconds:7.1f}   {row.layout}; simple: {row.simple}",
            flush=True,
        )
    over = np.array([row.over_simple for row in done])
    print(
        f"geometric mean over the best simple layout {np.exp(np.log(over).mean()):.3f}, least {over.min():.3f}; "
        f"of the bound: mean {np.mean([row.of_bound for row in done]):.3f}, least {min(r.of_bound for r in done):.3f}"
    )
