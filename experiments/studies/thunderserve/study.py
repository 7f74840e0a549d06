"""ThunderServe's figures beside ours.

``python -m experiments.studies.thunderserve --out docs/studies/thunderserve [--part P] [--quick]``.

ThunderServe: High-performance and Cost-efficient LLM Serving in Cloud Environments (MLSys 2025, arXiv 2502.09334).
Parts: a cloud against in-house, b with and without splitting at 40 and 5 Gbps, c GPUs lost in mid-run, d workload
shift, e ablation.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.style import GUIDE_COLOUR, Drawing, guide, percent, run_styles, save, styled
from experiments.runs.progress import Log
from experiments.studies.published import Comparison, row, write
from experiments.studies.thunderserve.world import (
    FULL,
    LENGTHS,
    QUICK,
    Served,
    Size,
    at,
    best,
    cloud,
    colocated,
    distserve,
    hexgen2,
    in_house,
    problem,
    thunderserve,
    two_kinds,
)
from sim import SYSTEMS, Plan
from sim.metrics import met
from sim.planners.thunderserve import TabuSearch
from sim.types import ClusterEvent, InfeasibleError

INTRO = """
ThunderServe (MLSys 2025) plans one model over mixed cloud GPUs: groups and phases by tabu search, routing by an LP, KV
sent in 4 bits. Its full text was not available to us, so only figures of its abstract and of public summaries stand
here as published. What they leave open is our assumption: 32 GPUs (8 each of A6000, A5000, A40 and RTX 3090 Ti)
on seven machines with 40 Gbps ports, prices scaled to the printed $13.54/h; 8 A100-80G in-house; LLaMA-30B with its
context limit lifted; Azure's coding and conversation traces as lognormals of their means and medians, Poisson arrivals;
an SLO on TTFT and on the time to the last token of 20 times what the mean request takes alone on two A100, kept by
90 % of the requests. All step times are the roofline's. So factors are to be compared by direction and size only.

Throughput is the highest rate within the SLO. A plan is made for one rate and again for the rate it was found to serve;
of a search's first five candidates the best in the engine counts. vLLM takes the best of TP 2, TP 4 and as narrow as
memory allows; DistServe the best of 1, 2 or 3 prefill instances of four with TP 2. A deadline is the tightest SLO scale
that 90 % keep at half the rate of the slowest system. HexGen and HexGen-2, on the cloud GPUs too, are listed beside and
not in the means: the figures of the abstract are over all that it compares with.

Part a comes out the other way round: eight A100 serve more than the 32 cloud GPUs, and with tighter deadlines. Those 32
have 1.6 times the peak FLOP/s and memory bandwidth of the eight, so the printed mean of 1.7 times asks for more per
peak FLOP/s from GPUs without NVLink than from A100; our roofline gives every type the same efficiency, charges tensor
parallelism over PCIe, and gives the in-house systems their best layout. Which of these the paper does otherwise we
cannot tell.

Some of what is left open was settled after first results, which the factors of parts b and c depend on: that the SLO
bounds TTFT and the last token and not TPOT (which charges the whole KV transfer to short answers), at scale 20 (at 10
splitting gained nothing over vLLM V1); ports of 40 Gbps in the cloud (at 10, quick trials served 1.9 coding and 5.6
conversation requests/s); the best of five candidates, and longer searches in part b (with short ones 5 Gbps came out
ahead of 40); half the load in part c.

In part b splitting gains at both links and more at 40 Gbps, as printed. Our baseline is a vLLM of the best
layout; what served 1,610 tokens/s, and with which model and traffic, is not known to us, so only ratios of 1,610, 2,196
and 3,292 tokens/s are compared.

In part c a machine is lost on which few replicas lie, so that those which are left suffice at half the load, whether
or not anything is replanned. The rescheduler's rules for a shift of traffic (from the second window on, and beyond
chance) were settled after a first run, in which it took the short answers that complete first for a shift. In part e
(0.8 of the rate that the plan serves with 4 bits) it is compression that most is lost without, not orchestration: the
other way round than printed.

Regenerate with `python -m experiments.studies.thunderserve --out docs/studies/thunderserve`.

![Attainment after the loss of a machine](study_thunderserve_loss.png)
"""
START_PER_S = 2.0
"""Where searches of rates begin."""
LOST_AT_S, UNTIL_S, BIN_S = 60.0, 300.0, 10.0
LOSS_LOAD = 0.5
"""Of the rate that the plan serves: what is left must be able to catch up."""
PLANNING_S = {None: 0.0, "lightweight": 2.0, "full": 30.0}
"""About what our planner takes on one core, so that runs are alike everywhere."""


# ---------------------------------------------------------------- a: cloud against in-house


@cache
def on_cloud(workload: str, size: Size) -> Served:
    return best(problem(cloud(), workload), [thunderserve(size)], START_PER_S, size)


def cloud_part(size: Size, log: Log) -> Iterator[Comparison]:
    """Rates and deadlines of five systems under both workloads, and the means of ThunderServe's advantage."""
    rates: list[float] = []
    deadlines: list[float] = []
    for workload in LENGTHS:
        house, where = problem(in_house(), workload), problem(cloud(), workload)
        served = {
            "ThunderServe, cloud": on_cloud(workload, size),
            "HexGen, cloud": best(where, [SYSTEMS["hexgen"]()], START_PER_S, size),
            "HexGen-2, cloud": best(where, [hexgen2(size)], START_PER_S, size),
            "DistServe, in-house": best(house, distserve(), START_PER_S, size),
            "vLLM, in-house": best(house, colocated("v1"), START_PER_S, size),
        }
        rate = min(one.rate_per_s for one in served.values() if one.rate_per_s) / 2
        scales = {name: one.deadline_scale(rate, size) for name, one in served.items()}
        for name, one in served.items():
            log.say(f"a: {workload}, {name}: {one.rate_per_s:.2f} requests/s, deadline {scales[name]:.1f}")
            yield row("abstract", f"{workload}, {name}, rate within the SLO", None, one.rate_per_s, "1/s", text="-")
            yield row("abstract", f"{workload}, {name}, deadline at {rate:.2f}/s", None, scales[name], "x", text="-")
        ours = "ThunderServe, cloud"
        others = [name for name in served if name.endswith("in-house")]
        rates += [served[ours].rate_per_s / served[name].rate_per_s for name in others if served[name].rate_per_s]
        deadlines += [scales[name] / scales[ours] for name in others]
    yield row("abstract", "throughput over vLLM and DistServe, mean", 1.7, float(np.mean(rates)), "x")
    yield row("abstract", "throughput over vLLM and DistServe, at most", 2.1, max(rates), "x")
    yield row("abstract", "deadline of vLLM and DistServe over its own, mean", 1.5, float(np.mean(deadlines)), "x")
    yield row("abstract", "deadline of vLLM and DistServe over its own, at most", 2.5, max(deadlines), "x")
    flops = [sum(one.gpu(gpu).flops_for("float16") for gpu in one.gpu_ids) for one in (cloud(), in_house())]
    yield row(
        "abstract", "peak FLOP/s of the cloud over in-house", None, flops[0] / flops[1], "x", "arithmetic", text="-"
    )
    replicas = len(on_cloud("coding", size).plan.replicas)
    yield row("summaries", "replicas on 32 cloud GPUs, most that memory allows", 12, most_replicas(), "",
              "arithmetic", kind="exact", note=f"the plan for coding has {replicas}")  # fmt: skip


def most_replicas() -> int:
    """Copies of the model by memory: two GPUs of 48 GB or four of 24 GB each."""
    sizes = Counter(round(cloud().gpu(gpu).memory_bytes / 2**30 / 8) * 8 for gpu in cloud().gpu_ids)
    return sizes[48] // 2 + sizes[24] // 4


# ---------------------------------------------------------------- b: with and without splitting


def split_part(size: Size, log: Log) -> Iterator[Comparison]:
    """Gain over colocated vLLM by link and by bits of the KV on the way; conversation."""
    size = size._replace(steps=4 * size.steps, rounds=2)  # eight GPUs are quickly searched
    where = {gbps: problem(two_kinds(gbps), "conversation") for gbps in (40.0, 5.0)}
    plain = {mode: best(where[40.0], colocated(mode), 1.0, size).rate_per_s for mode in ("v0", "v1")}
    for mode, rate in plain.items():
        yield row(
            "summaries", f"4 A40 + 4 3090 Ti, vLLM {mode.upper()}, rate within the SLO", None, rate, "1/s", text="-"
        )
        log.say(f"b: vLLM {mode}: {rate:.2f} requests/s")
    for gbps, printed in ((40.0, 2.04), (5.0, 1.36)):
        for bits in (16, 8, 4):
            rate = best(where[gbps], [thunderserve(size, bits=bits)], plain["v1"], size).rate_per_s
            log.say(f"b: {gbps:g} Gbps, {bits} bits: {rate:.2f} requests/s, {rate / plain['v1']:.2f} of vLLM V1")
            for mode in plain if bits == 4 else ("v1",):
                published = printed if bits == 4 else None
                what = f"gain by splitting, {gbps:g} Gbps, {bits} bits, over vLLM {mode.upper()}"
                yield row("summaries", what, published, rate / plain[mode], "x", text="" if published else "-")


# ---------------------------------------------------------------- c: GPUs lost in mid-run


def loss_part(size: Size, log: Log, curves: list[pd.DataFrame]) -> Iterator[Comparison]:
    """A machine of four GPUs goes; nothing, phases alone, or everything is planned anew."""
    served = on_cloud("conversation", size)
    rate = LOSS_LOAD * served.rate_per_s
    node = least_missed(served.plan)
    event = ClusterEvent(at_s=LOST_AT_S, kind="node_lost", target=node)
    after = {}
    for how, planning_s in PLANNING_S.items():
        system = thunderserve(size, reschedule=how, planning_s=planning_s)
        run = replace(served, system=system).columns(rate, size, [event], count=round(rate * UNTIL_S))
        curve = over_time(run["arrival_s"], met(run, served.problem.slo)["all"])
        curves.append(curve.assign(reschedule=how or "none"))
        after[how] = float(met(run, served.problem.slo)["all"][run["arrival_s"] > LOST_AT_S].mean())
        log.say(f"c: {how or 'none'}: {after[how]:.1%} within the SLO after the loss")
        what = f"{how or 'no'} rescheduling, within the SLO after the loss"
        yield row("summaries", what, None, 100 * after[how], "%", text="-")
    times = [replan_s(served.plan, rate, size, node, flips_only=flips) for flips in (True, False)]
    known = [value for value in times if value is not None]
    ratio = known[1] / known[0] if len(known) == 2 else None
    note = "wall clock, noisy, without loading weights: " + " / ".join(f"{value:.1f} s" for value in reversed(known))
    yield row("summaries", "full over lightweight rescheduling, time", 157 / 13, ratio, "x", text="157 s / 13 s",
              note=note if ratio else "no two replicas are left")  # fmt: skip


def least_missed(plan: Plan) -> str:
    """The machine of four GPUs on which fewest replicas have any."""
    machines = [node for node in cloud().nodes if node.count == 4]
    return min(machines, key=lambda node: sum(bool(set(node.gpu_ids) & set(one.gpus)) for one in plan.replicas)).name


def replan_s(plan: Plan, rate_per_s: float, size: Size, node: str, *, flips_only: bool) -> float | None:
    """None if too little is left for two phases."""
    where = at(problem(cloud(), "conversation"), rate_per_s)
    lost = [gpu for gpu in cloud().gpu_ids if gpu.startswith(f"{node}.")]
    started_s = time.perf_counter()
    try:
        TabuSearch(n_steps=size.steps).replan(where, plan, lost=lost, flips_only=flips_only)
    except InfeasibleError:
        return None
    return time.perf_counter() - started_s


def over_time(arrival_s: np.ndarray, good: np.ndarray) -> pd.DataFrame:
    """Share of the requests within the SLO, by time of arrival."""
    places = np.floor(arrival_s / BIN_S) * BIN_S
    return pd.DataFrame({"arrival_s": places, "attainment": good}).groupby("arrival_s", as_index=False).mean()


def loss_curves(table: pd.DataFrame) -> Drawing:
    with styled():
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for name, style in run_styles(table["reschedule"].unique()).items():
            line = table[table["reschedule"] == name]
            axes.plot(line["arrival_s"] + BIN_S / 2, line["attainment"], **style)
        axes.axvspan(LOST_AT_S, LOST_AT_S + 1, color=GUIDE_COLOUR)
        guide(axes, y=0.9, text="target")
        percent(axes)
        axes.set_xlabel(f"time of arrival (s); at {LOST_AT_S:g} s four of 32 GPUs are lost")
        axes.set_ylabel("requests within the SLO (%)")
        figure.legend(loc="outside lower center", ncols=3, title="rescheduling")
    return Drawing(figure, table)


# ---------------------------------------------------------------- d: workload shift


def shift_part(size: Size, log: Log) -> Iterator[Comparison]:
    """Phases for each workload on the same GPUs: groups and GPUs in prefill."""
    shares = {}
    for workload in LENGTHS:
        served = on_cloud(workload, size)
        counts = Counter(one.role for one in served.plan.replicas)
        gpus = {role: sum(len(one.gpus) for one in served.plan.replicas if one.role == role) for role in counts}
        shares[workload] = gpus["prefill"] / sum(gpus.values())
        ratio = f"{counts['prefill']}:{counts['decode']} replicas, {gpus['prefill']}:{gpus['decode']} GPUs"
        log.say(f"d: {workload}: prefill:decode {ratio}")
        yield row("summaries", f"{workload}, share of the GPUs in prefill", None, 100 * shares[workload], "%", text="-",
                  note=f"prefill:decode {ratio}, planned for {served.rate_per_s:.1f} requests/s")  # fmt: skip
    printed, ours = (5 / 8) / (3 / 8), shares["coding"] / shares["conversation"]
    yield row("summaries", "share in prefill, coding over conversation", printed, ours, "x", kind="direction",
              text="5:3 and 3:5 of eight replicas")  # fmt: skip


# ---------------------------------------------------------------- e: ablation


def ablation_part(size: Size, log: Log) -> Iterator[Comparison]:
    """Mean time of a request on one plan: KV as it is, and every pair alike as well; conversation."""
    served = on_cloud("conversation", size)
    rate = 0.8 * served.rate_per_s
    plan = served.plan
    pairs = [
        (a.name, b.name) for a in plan.replicas for b in plan.replicas if (a.role, b.role) == ("prefill", "decode")
    ]
    alike = replace(plan, shares=dict.fromkeys(pairs, 1 / len(pairs)))
    plain = thunderserve(size, bits=16)
    variants = {
        "all of it": served,
        "without KV compression": replace(served, system=plain),
        "and without orchestration": replace(served, system=plain, plan=alike),
    }
    mean_s = {}
    for name, variant in variants.items():
        columns = variant.columns(rate, size)
        mean_s[name] = float(columns["e2e_s"][columns["outcome"] == "completed"].mean())
        log.say(f"e: {name}: {mean_s[name]:.2f} s a request")
    whole, uncompressed, unrouted = mean_s.values()
    yield row("summaries", "time of a request without KV compression", 1.3, uncompressed / whole, "x")
    yield row("summaries", "without orchestration as well, over that", 4.0, unrouted / uncompressed, "x")


# ---------------------------------------------------------------- all of it

PARTS = ("a", "b", "c", "d", "e")


def rows_of(parts: Sequence[str], size: Size, log: Log, curves: list[pd.DataFrame]) -> list[Comparison]:
    makers: dict[str, Callable[[], Iterator[Comparison]]] = {
        "a": lambda: cloud_part(size, log),
        "b": lambda: split_part(size, log),
        "c": lambda: loss_part(size, log, curves),
        "d": lambda: shift_part(size, log),
        "e": lambda: ablation_part(size, log),
    }
    return [one for part in parts for one in makers[part]()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for study_thunderserve.md, its tables and plots"
    )
    parser.add_argument("--part", choices=PARTS, default=None, help="only this part (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer requests, shorter searches (under a minute)")
    given = parser.parse_args(arguments)
    curves: list[pd.DataFrame] = []
    rows = rows_of(PARTS if given.part is None else given.part, QUICK if given.quick else FULL, Log(), curves)
    given.out.mkdir(parents=True, exist_ok=True)
    if curves:
        save(loss_curves(pd.concat(curves)), given.out, "study_thunderserve_loss")
    write(given.out, "study_thunderserve", "ThunderServe: published and simulated", INTRO, rows)
