"""DistServe's tables and figures beside ours.

``python -m experiments.studies.distserve --out docs/studies/distserve [--part P]``.

Zhong et al., DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving,
OSDI 2024 (arXiv 2401.09670v3). Parts: arithmetic, table2, table3, rates, and md1 (a plot of its own).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from calibrate.profile.file import read_profile, shipped_profiles
from experiments.plots.style import save
from experiments.runs.progress import Log
from experiments.studies.distserve.plots import md1_curves, rate_and_scale_curves
from experiments.studies.distserve.world import (
    APPLICATIONS,
    CHAT_13B,
    CHAT_66B,
    CHAT_175B,
    PROMPT_DECILES,
    RUN,
    Application,
    deciles,
)
from experiments.studies.published import Comparison, write
from sim import SYSTEMS, Cluster, Plan, Problem, System, simulate
from sim.cost import Fitted, StageCost, StepCost
from sim.goodput import bisected_rate, bracketing
from sim.metrics import Columns, attainment, attainment_curve
from sim.model import ModelSpec, model
from sim.planners.distserve import BestColocated, DistServe, Search, Shape, Unit, paired_plan
from sim.systems.split.distserve import SPANS, Rehearsal, distserve, enough, poisson
from sim.types import Stage
from traces import TraceSource

INTRO = """
DistServe (OSDI 2024) places prefill and decode instances by simulated goodput. Step times of OPT-13B and OPT-66B are
the authors' released terms for their engine and for the vLLM of their baseline (profiles distserve-a100 and
distserve-a100-vllm); none are public for OPT-175B, where all rows are our roofline's.

Table 2 does not state its setting. Assumed is what the released runs of those rates have: OPT-13B, ShareGPT, one GPU
for vLLM, (2,1)/(1,1) for DistServe; and section 6.1's SLO. Their lengths cannot be those of Table 2, though: vLLM alone
on a GPU takes more than 250 ms for the longest sixth of the prompts, and in the released run at 1 request/s a like
share does, where the table has 3 % of misses. The same with prompts three quarters as long shows how much depends on
them.

Lengths are synthesised, outputs cut to the context of 2,048. In tables 2 and 3 they are drawn independently from the
deciles of the 100 ShareGPT requests of a released run (LLMServe/DistServe 20a1633); for the rates these are scaled to
means of about 755 and 200 tokens. HumanEval has short prompts (170 and 95), LongBench prompts near the model's context
(1,690 and 90). Those means are our defaults. So factors are to be compared by direction and size, not by digits. Rates
are those of one instance or pair, per GPU, each run at least three times as long as a request may take; 90 % of the
requests within both bounds. DistServe has table 3's placement, and of OPT-66B (4,1)/(4,1) besides; vLLM has the paper's
parallelism (TP 1, 4, 8), Sarathi-Serve the same and a budget of 512 tokens. The tighter SLO is what DistServe attains
at the rate that vLLM just serves. Each printed range stands in the ratio by its geometric mean.

For the rates DistServe's prefill batches stop at the fewest tokens that reach 90 % of the best throughput, by our price
of a step: the paper's L_m; 90 % is ours. In tables 2 and 3 they hold up to 8,192 tokens, as in the released scripts.

On the roofline's times OPT-175B comes out the other way round: the printed placement serves less than vLLM. The rows
headed "engines" say why. The roofline gives both systems one engine; the authors' own terms give vLLM's prefill at
OPT-66B and TP 4 1.41 times the time per token. On the roofline OPT-66B is reversed as well. Were vLLM's steps of
OPT-175B longer by that factor, the two would be about equal. Batches of 8,192 tokens take three tenths off DistServe's
rate: a full one takes 5 s through the three stages, and the bound on TTFT is 4 s. So no claim rests on the rows of
OPT-175B.

Table 3 is searched as the released code does (algorithm 2 on one machine, a grid of 0.16 requests/s and GPU), with the
degrees for which it has memory sizes. Of OPT-66B (4,1)/(2,2) and (4,1)/(4,1) come out equal on that grid; a finer
search prefers the second. With the TP 4 terms that are published too, OPT-13B would get (4,1)/(2,1).

Regenerate with `python -m experiments.studies.distserve --out docs/studies/distserve`.

![Attainment by rate and by SLO scale](study_distserve_rates.png)

![M/D/1](study_distserve_md1.png)
"""
RELEASED_TOKENS = 8192
"""Of a prefill batch, in the released scripts."""
VLLM_SLOWER = 0.21287 / 0.15135
"""Released prefill terms per token of OPT-66B, TP 4: the baseline's vLLM over DistServe's engine."""
SCALES = tuple(round(float(scale), 3) for scale in np.geomspace(0.1, 4, 41))


class Scale(NamedTuple):
    """Requests of a trial, tolerance of the searches, seeds of table 2, points of a curve."""

    requests: int
    tolerance: float
    seeds: int
    points: int


FULL, QUICK = Scale(300, 0.05, 5, 8), Scale(60, 0.3, 1, 3)


@dataclass(slots=True, kw_only=True)
class Served:
    """One way to serve an application: a system on a plan of so many GPUs, and its goodput per GPU."""

    application: Application
    system: System
    problem: Problem
    plan: Plan
    per_gpu: float = 0.0
    shape: str = ""

    @property
    def gpus(self) -> int:
        return sum(len(replica.gpus) for replica in self.plan.replicas)

    def columns(self, rate_per_gpu: float, scale: Scale, seed: int = 0, count: int | None = None) -> Columns:
        rate_per_s = rate_per_gpu * self.gpus
        count = count or enough(self.problem, rate_per_s, scale.requests, SPANS)
        requests = poisson(self.problem.workload.lengths, rate_per_s, count, seed)
        return simulate(self.problem, self.system, TraceSource(requests), plan=self.plan).columns

    def share(self, rate_per_gpu: float, scale: Scale) -> float:
        return attainment(self.columns(rate_per_gpu, scale), self.application.slo)["attainment"] or 0.0

    def find(self, scale: Scale) -> Served:
        """Bisect the rate per GPU."""
        target = self.application.slo.attainment
        search = bracketing(0.5, 32.0, scale.tolerance)
        self.per_gpu = bisected_rate(lambda rate: self.share(rate, scale) >= target, search)
        return self


# ---------------------------------------------------------------- arithmetic, and table 2


def arithmetic() -> Iterator[Comparison]:
    """Section 3.3, and the KV capacities of the released code."""
    kv_gib = 512 * model("opt-66b").kv_bytes_per_token() / 2**30
    yield _row("Sec. 3.3", "OPT-66B, KV of 512 tokens", 1.13, kv_gib, "GiB", kind="exact", basis="arithmetic")
    yield _row("Sec. 3.3", "OPT-66B, KV at 10 requests/s", 90, 80 * kv_gib, "Gib/s", kind="exact", basis="arithmetic")
    from sim.memory import kv_blocks
    from sim.planners.pools import Colocated, Pool

    for app, tp, pp, tokens in (
        (CHAT_13B, 1, 1, 66144), (CHAT_13B, 2, 1, 163008), (CHAT_66B, 2, 1, 11600), (CHAT_66B, 4, 1, 78496),
        (CHAT_66B, 2, 2, 78512), (CHAT_175B, 3, 3, 76192), (CHAT_175B, 4, 3, 126160),
    ):  # fmt: skip
        problem = app.problem("distserve-a100")
        stages = Colocated(pool=Pool(replicas=1, tp=tp, pp=pp)).plan(problem).replicas[0].stages
        ours = kv_blocks(problem, stages, problem.limits) * problem.limits.block_size
        what = f"{app.model}, TP {tp}, PP {pp}, KV capacity"
        yield _row("released code", what, tokens, ours, "tokens", basis="arithmetic")


REAL = {
    "vllm": (97.0, 65.5, 52.8, 44.9, 36.7, 27.8, 23.6),
    "distserve": (100.0, 100.0, 99.3, 87.3, 83.0, 77.3, 70.0),
}
"""Table 2, measured attainment (%) at 1, 1.5, ... 4 requests/s and GPU."""


def table_2(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Attainment at each rate, and the mean error, that also with prompts three quarters as long."""
    for factor in (1.0, 0.75):
        prompts = deciles([max(1, round(factor * tokens)) for tokens in PROMPT_DECILES])
        app = replace(CHAT_13B, lengths=(prompts, RUN[1]))
        for name, server in (("vllm", vllm(app)), ("distserve", on_pair(app, app.unit, RELEASED_TOKENS))):
            shares = [_mean_share(server, 1 + place / 2, scale) for place in range(len(REAL[name]))]
            errors = [ours - printed for ours, printed in zip(shares, REAL[name], strict=True)]
            for place, (ours, printed) in enumerate(zip(shares, REAL[name], strict=True)) if factor == 1.0 else ():
                what = f"{name}, {1 + place / 2:g} requests/s and GPU, attainment"
                yield _row("Table 2", what, printed, ours, "%", note=f"{ours - printed:+.1f} points")
            error = float(np.mean(np.abs(errors)))
            what = f"{name}, mean error" + (", prompts x 0.75" if factor < 1 else "")
            yield _row("Table 2", what, None, error, "points", text="below 2", kind="aim")
            log.say(f"table 2: {what}: {error:.1f} points")


def _mean_share(server: Served, rate_per_gpu: float, scale: Scale) -> float:
    """Percent within the SLO, over the seeds; runs are as long as the released ones of either engine."""
    count = 300 if server.system.name == "distserve" else round(100 * rate_per_gpu)
    runs = [server.columns(rate_per_gpu, scale, seed, count) for seed in range(scale.seeds)]
    return 100 * float(np.mean([attainment(run, server.application.slo)["attainment"] or 0.0 for run in runs]))


# ---------------------------------------------------------------- table 3


def table_3(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Degrees that algorithm 2 chooses on the released code's grid, as four numbers each."""
    for app, tensor, printed in (
        (CHAT_13B, (1, 2), ((2, 1), (1, 1))),
        (CHAT_66B, (2, 4), ((4, 1), (2, 2))),
    ):
        problem = replace(app, lengths=RUN).problem("distserve-a100", nodes=1)
        profile = read_profile(shipped_profiles()["distserve-a100"])
        known = tuple(terms for terms in profile.polynomials if terms.tp in tensor)
        problem = replace(problem, cost=Fitted(profiles=(replace(profile, polynomials=known),)))
        judge = Rehearsal(simulate=simulate, requests=scale.requests, spans=0, prompt_tokens=RELEASED_TOKENS)
        search = Search(judge=judge, width_per_gpu=0.25, most_per_gpu=5)
        unit = DistServe(search=search, affinity="low").placement(problem).prefill.unit
        found = (unit.prefill or Shape(0, 0), unit.decode or Shape(0, 0))
        for phase, ours, theirs in zip(("prefill", "decode"), found, printed, strict=True):
            for what, mine, published in zip(("TP", "PP"), ours, theirs, strict=True):
                yield _row("Table 3", f"{app.name}, {phase} {what}", published, mine, "", kind="exact")
        log.say(f"table 3: {app.name}: {_shape(unit)}")


# ---------------------------------------------------------------- figures 8, 9 and 11


def vllm(app: Application) -> Served:
    system = SYSTEMS["vllm"](mode="v0", tp=app.vllm_tp, replicas=1)
    return _colocated(app, system)


def sarathi(app: Application) -> Served:
    return _colocated(app, SYSTEMS["sarathi-serve"](token_budget=512, tp=app.vllm_tp, replicas=1))


def _colocated(app: Application, system: System) -> Served:
    problem = app.problem("distserve-a100-vllm", limits=system.limits)
    return Served(
        application=app, system=system, problem=problem, plan=system.planner.plan(problem), shape=f"TP {app.vllm_tp}"
    )


def on_pair(app: Application, unit: Unit, prompt_tokens: int | None = None) -> Served:
    problem = app.problem("distserve-a100")
    system = distserve(prompt_tokens=prompt_tokens)
    return Served(
        application=app, system=system, problem=problem, plan=paired_plan(problem, unit, 1), shape=_shape(unit)
    )


def high_per_gpu(app: Application, scale: Scale, log: Log) -> float:
    """Algorithm 1 on 32 GPUs: with many instances, goodputs of the phases add up as resistances do."""
    trials = 0
    judge = Rehearsal(simulate=simulate, requests=scale.requests)

    def counted(problem: Problem, unit: Unit, rate_per_s: float) -> bool:
        nonlocal trials
        trials += 1
        return judge(problem, unit, rate_per_s)

    started_s = time.perf_counter()
    search = Search(judge=counted, tolerance=scale.tolerance)
    placement = DistServe(search=search).placement(app.problem("distserve-a100"))
    took_s = time.perf_counter() - started_s
    log.say(
        f"{app.name}: algorithm 1 took {took_s:.0f} s, {trials} simulations of {scale.requests} requests, "
        f"{trials / took_s:.1f} a second: {_shape(placement.prefill.unit)}, {_shape(placement.decode.unit)}"
    )
    return 1 / (1 / placement.prefill.per_gpu + 1 / placement.decode.per_gpu)


def plus_plus(app: Application, scale: Scale) -> float:
    search = Search(judge=Rehearsal(simulate=simulate, requests=scale.requests), tolerance=scale.tolerance)
    limits = SYSTEMS["vllm"](mode="v0").limits
    return BestColocated(search=search).placement(app.problem("distserve-a100-vllm", limits=limits)).per_gpu


def figures(scale: Scale, log: Log, curves: list[dict[str, Any]]) -> Iterator[Comparison]:
    for app in APPLICATIONS:
        ways = {"vllm": vllm(app), "sarathi-serve": sarathi(app), "distserve": on_pair(app, app.unit)}
        if app.wider is not None:
            ways["distserve, finer search"] = on_pair(app, app.wider)
        for way in ways.values():
            way.find(scale)
        base, split = ways["vllm"], ways["distserve"]
        log.say(f"{app.name}: " + ", ".join(f"{name} {way.per_gpu:.3f} ({way.shape})" for name, way in ways.items()))
        basis: Any = "roofline" if app.roofline else "measured profile"
        for name in (name for name in ways if name.startswith("distserve")):
            way = ways[name]
            note = f"{way.per_gpu:.2f} ({way.shape}) and {base.per_gpu:.2f} requests/s and GPU"
            note += "" if base.per_gpu else ": vLLM reaches 90 % at no rate"
            ratio = way.per_gpu / base.per_gpu if base.per_gpu else None
            yield _factor(app, f"rate of {name}, over vLLM", app.faster, ratio, basis, note)
        over = split.per_gpu / ways["sarathi-serve"].per_gpu if ways["sarathi-serve"].per_gpu else None
        yield _factor(app, "rate of DistServe over Sarathi-Serve", None, over, basis, "not in the paper")
        if app.tighter is not None and base.per_gpu:
            theirs, ours = (tightest(way, base.per_gpu, scale) for way in (base, split))
            note = f"at {base.per_gpu:.2f} requests/s and GPU" + (
                "" if ours else ": DistServe misses ten times the SLO"
            )
            tighter = theirs / ours if theirs and ours else None
            yield _factor(app, "SLO tighter than vLLM's", app.tighter, tighter, basis, note)
        curves.extend(points(app, ways, scale))
        if app is CHAT_66B:
            yield from ablation(app, ways, scale, log)
        if app is CHAT_175B:
            yield from engines(ways, scale, log)


def ablation(app: Application, ways: dict[str, Served], scale: Scale, log: Log) -> Iterator[Comparison]:
    """Figure 11: searching vLLM's parallelism gains nothing, and free placement gains more than pairs."""
    searched, high = plus_plus(app, scale), high_per_gpu(app, scale, log)
    base, pair = ways["vllm"].per_gpu, ways["distserve"].per_gpu
    note = f"{searched:.2f} and {base:.2f} requests/s and GPU"
    yield _row("Fig. 11", f"{app.name}, rate of vLLM++ over vLLM", 1.0, searched / base, "x", text="1x", note=note)
    note = f"{high:.2f} and {pair:.2f} requests/s and GPU"
    what = f"{app.name}, rate of DistServe-High over DistServe-Low"
    yield _row("Fig. 11", what, None, high / pair, "x", text="above 1x", kind="direction", note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slower:
    """Another engine on the same hardware: every step ``factor`` times as long."""

    inner: StepCost
    factor: float

    @property
    def name(self) -> str:
        return f"{self.inner.name}, {self.factor:.2f} times as long"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        return self.inner.bind(model, stage, cluster, slow * self.factor)


def engines(ways: dict[str, Served], scale: Scale, log: Log) -> Iterator[Comparison]:
    """What stands behind OPT-175B's factor: the batches' size, and one engine for both systems."""
    split, base = ways["distserve"], ways["vllm"]
    app = split.application
    large = on_pair(app, app.unit, RELEASED_TOKENS).find(scale)
    slower = replace(base, problem=replace(base.problem, cost=Slower(inner=base.problem.cost, factor=VLLM_SLOWER)))
    both = replace(CHAT_66B, roofline=True)
    rate = "rate of distserve"
    compared = {
        f"{app.name}, {rate}, batches up to {RELEASED_TOKENS} tokens, over L_m": (large, split),
        f"{app.name}, {rate} over vLLM with steps {VLLM_SLOWER:.2f} times as long": (split, slower.find(scale)),
        f"{both.name}, {rate} over vLLM, both on the roofline": (
            on_pair(both, both.unit).find(scale), vllm(both).find(scale)
        ),
    }  # fmt: skip
    for what, (one, other) in compared.items():
        ratio = one.per_gpu / other.per_gpu if other.per_gpu else None
        note = f"{one.per_gpu:.2f} and {other.per_gpu:.2f} requests/s and GPU"
        log.say(f"engines: {what}: {note}")
        yield _row("engines", what, None, ratio, "x", basis="roofline", text="-", note=note)


def tightest(way: Served, rate_per_gpu: float, scale: Scale) -> float | None:
    """Smallest factor on both bounds, up to ten, that the target share still meets at a rate; None if there is none."""
    columns = way.columns(rate_per_gpu, scale)
    slo = way.application.slo
    shares = attainment_curve(columns, slo, fine := tuple(np.geomspace(0.02, 10, 400).tolist()))
    return next((factor for factor, share in zip(fine, shares, strict=True) if (share or 0.0) >= slo.attainment), None)


def points(app: Application, ways: dict[str, Served], scale: Scale) -> Iterator[dict[str, Any]]:
    """Attainment against the rate per GPU; and against the SLO scale, at the rate that vLLM just serves."""
    top = 1.3 * max(way.per_gpu for way in ways.values())
    base = ways["vllm"].per_gpu or ways["distserve"].per_gpu / 2
    for name, way in ways.items():
        where = {"application": app.name, "system": name}
        for rate in np.linspace(top / scale.points, top, scale.points).tolist():
            yield {**where, "axis": "rate", "x": rate, "attainment": way.share(rate, scale)}
        shares = attainment_curve(way.columns(base, scale), app.slo, SCALES)
        for factor, share in zip(SCALES, shares, strict=True):
            yield {**where, "axis": "scale", "x": factor, "attainment": share}


# ---------------------------------------------------------------- rows and files


def _shape(unit: Unit) -> str:
    return "/".join(f"({shape.tp},{shape.pp})" for shape in unit.parts.values())


def _factor(
    app: Application, what: str, printed: tuple[float, float] | None, ours: float | None, basis: Any, note: str
) -> Comparison:
    published, text = None, "-"
    if printed is not None:
        published = sqrt(printed[0] * printed[1])
        text = f"{printed[0]:g}x" if printed[0] == printed[1] else f"{printed[0]:g}-{printed[1]:g}x"
    return _row(app.where if printed else "ours", f"{app.name}, {what}", published, ours, "x", basis=basis, text=text,
                note=note)  # fmt: skip


def _row(where: str, what: str, published: float | None, ours: float | None, unit: str, *, kind: Any = "ratio",
         basis: Any = "measured profile", text: str = "", note: str = "") -> Comparison:  # fmt: skip
    return Comparison(
        where=where, what=what, unit=unit, kind=kind, basis=basis, published=published, ours=ours, text=text, note=note
    )


PARTS = ("all", "arithmetic", "table2", "table3", "rates", "md1")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for study_distserve.md and its tables and plots"
    )
    parser.add_argument("--part", choices=PARTS, default="all", help="only this part (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer requests and coarser searches")
    given = parser.parse_args(arguments)
    scale, log = QUICK if given.quick else FULL, Log()
    curves: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], Iterator[Comparison]]] = {
        "arithmetic": arithmetic,
        "table2": lambda: table_2(scale, log),
        "table3": lambda: table_3(scale, log),
        "rates": lambda: figures(scale, log, curves),
    }
    chosen = list(parts) if given.part == "all" else [part for part in parts if part == given.part]
    rows = [row for part in chosen for row in parts[part]()]
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part in ("all", "md1"):
        save(md1_curves(), given.out, "study_distserve_md1")
    if curves:
        save(rate_and_scale_curves(pd.DataFrame(curves)), given.out, "study_distserve_rates")
    if rows:
        write(given.out, "study_distserve", "DistServe: published and simulated", INTRO, rows)
