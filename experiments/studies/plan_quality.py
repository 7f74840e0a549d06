"""Is ThunderServe's planner right? Its predictions against full simulations, its plan against a longer random search.

``python -m experiments.studies.plan_quality --out FOLDER`` (about ten minutes). Two questions: do plans that the
planner predicts to be better simulate better (rank correlation over random plans), and how near does the plan that it
chooses come to the best that a random search with ten times as many evaluations finds (goodput of the simulated plans)?
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.style import GUIDE_COLOUR, RUN_COLOURS, Drawing, save, styled
from experiments.runs.progress import Log
from sim import SYSTEMS, Cluster, Plan, Problem, Request, Slo, Workload, simulate
from sim.cost import Roofline
from sim.goodput import attained, bisected_rate, bracketing, sustained, trial_requests
from sim.metrics import Columns
from sim.model import model
from sim.planners.thunderserve import TabuSearch
from sim.planners.thunderserve.groups import Grouping, neighbour
from sim.planners.thunderserve.world import World
from traces import TraceSource

SYSTEM = SYSTEMS["thunderserve"]()
PLANS = 30
ATTAINMENT = 0.9
TOLERANCE = 0.02
LONGER = 10
"""Times as many evaluations as the tabu search had."""
SLO = Slo(ttft_s=1.5, tpot_s=0.12, e2e_s=25.0)
LENGTHS_SEED = 11

FOUR_KINDS = (("A6000", 4), ("A5000", 4), ("A40", 4), ("RTX-3090-Ti", 4))
EIGHTS: dict[str, tuple[tuple[tuple[str, int], ...], float]] = {
    "4 A40 + 4 RTX-3090-Ti, 40 Gbps": ((("A40", 4), ("RTX-3090-Ti", 4)), 40.0),
    "2 A100-80G + 2 A6000 + 4 A5000, 10 Gbps": ((("A100-80G-PCIe", 2), ("A6000", 2), ("A5000", 4)), 10.0),
    "2 x 4 A6000, 5 Gbps": ((("A6000", 4), ("A6000", 4)), 5.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan, or one cluster: what was expected and what was simulated."""

    part: str
    what: str
    expected: float
    simulated: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.expected / self.simulated if self.simulated else float("nan")


def lengths(count: int) -> list[tuple[int, int]]:
    """Prompts around 600 tokens, answers around 100."""
    rng = np.random.default_rng(LENGTHS_SEED)
    inputs = np.clip(rng.lognormal(6.3, 0.7, count), 16, 1700).astype(int)
    outputs = np.clip(rng.lognormal(4.5, 0.8, count), 2, 300).astype(int)
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def problem(machines: Sequence[tuple[str, int]], gbps: float, name: str, rate_per_s: float) -> Problem:
    return Problem(
        cluster=Cluster.of(
            [{"gpu": gpu, "count": count} for gpu, count in machines],
            links={"inter_node": {"gbps": gbps, "latency_us": 50}},
        ),
        model=model(name),
        cost=Roofline(),
        workload=Workload(rate_per_s=rate_per_s, lengths=tuple(lengths(1000))),
        slo=SLO,
        limits=SYSTEM.limits,
    )


def simulated(where: Problem, plan: Plan, rate_per_s: float, count: int) -> float:
    """Share of the requests of one Poisson stream within the SLO."""
    return attained(replayed(where, plan, rate_per_s, count), where.slo)


def replayed(where: Problem, plan: Plan, rate_per_s: float, count: int) -> Columns:
    gaps = np.random.default_rng(5).exponential(size=count)
    requests = [
        Request(id=number, arrival_s=float(arrival), input_tokens=tokens, output_tokens=answer)
        for number, (arrival, (tokens, answer)) in enumerate(
            zip(np.cumsum(gaps) / rate_per_s, lengths(count), strict=True)
        )
    ]
    return simulate(where, SYSTEM, TraceSource(requests), plan=plan).columns


def walk(world: World, seed: int) -> Iterator[Grouping]:
    """Feasible groupings by random moves, begun anew now and then."""
    rng = np.random.default_rng(seed)
    starts = world.start()
    while True:
        grouping = starts[int(rng.integers(len(starts)))]
        for _ in range(30):
            step = neighbour(grouping, rng)
            if step is not None and world.feasible(step.grouping):
                grouping = step.grouping
                yield grouping


# ---------------------------------------------------------------- do predictions order plans as simulations do


def predictions(log: Log, count: int) -> list[Row]:
    """Random plans of four kinds of GPU: every fourth grouping of a walk, none twice."""
    where = problem(FOUR_KINDS, 10.0, "llama-30b", 3.0)
    world = World(where, TabuSearch().transfer)
    rows: list[Row] = []
    seen: set[Grouping] = set()
    for number, grouping in enumerate(walk(world, seed=1)):
        if number % 4 or grouping in seen:
            continue
        seen.add(grouping)
        candidate = world.candidate(grouping, world.evaluate(grouping))
        value = simulated(where, candidate.plan, where.workload.rate_per_s, 1500)
        what = f"{len(candidate.plan.replicas)} replicas"
        rows.append(
            Row(part="attainment", what=what, expected=candidate.attainment, simulated=value, note=candidate.bottleneck)
        )
        log.say(f"plan {len(rows)} of {count}: predicted {candidate.attainment:.3f}, simulated {value:.3f}")
        if len(rows) == count:
            return rows
    return rows


def rank_correlation(rows: Sequence[Row]) -> float:
    """Spearman's: of the ranks, ties at their mean."""
    ranks = pd.DataFrame([(row.expected, row.simulated) for row in rows]).rank().to_numpy()
    return float(np.corrcoef(ranks.T)[0, 1])


# ---------------------------------------------------------------- is the chosen plan among the best


def goodputs(log: Log, steps: int, best_of: int) -> list[Row]:
    """On each cluster, planned for the highest rate at which a short search still predicts enough within the SLO."""
    rows = []
    for name, (machines, gbps) in EIGHTS.items():
        where = hardest(problem(machines, gbps, "llama-13b", 1.0))
        search = TabuSearch(n_steps=steps).search(where)
        chosen = goodput(where, search.best.plan)
        world = World(where, TabuSearch().transfer)
        tried: dict[Grouping, Any] = {}
        for number, grouping in enumerate(walk(world, seed=2)):
            if number >= LONGER * len(search.log):
                break
            if grouping not in tried:
                tried[grouping] = world.evaluate(grouping)
        top = sorted(tried, key=lambda grouping: tried[grouping].rank, reverse=True)[:best_of]
        best = max(goodput(where, world.candidate(grouping, tried[grouping]).plan) for grouping in top)
        note = f"{len(search.log)} evaluations against {LONGER * len(search.log)} ({len(tried)} distinct)"
        rows.append(Row(part="goodput", what=name, expected=chosen, simulated=best, note=note))
        log.say(f"{name}: chosen {chosen:.2f} requests/s, best of the random search {best:.2f}")
    return rows


def hardest(where: Problem) -> Problem:
    """From half of what both phases could compute, an eighth more at a time."""
    short = TabuSearch(n_steps=10)
    rate = 0.5 * short.search(where).best.headroom
    while True:
        harder = replace(where, workload=replace(where.workload, rate_per_s=rate))
        if short.search(harder).best.attainment < ATTAINMENT:
            return where
        where, rate = harder, rate * 1.125


def goodput(where: Problem, plan: Plan) -> float:
    """Highest rate at which the plan, its shares kept, attains the SLO in a simulation."""
    rate, answer = where.workload.rate_per_s, where.workload.mean_output_tokens

    def passes(tried: float) -> bool:
        columns = replayed(where, plan, tried, trial_requests(where.slo, answer, tried))
        return sustained(columns, where.slo) >= ATTAINMENT

    return bisected_rate(passes, bracketing(rate, 8 * rate, TOLERANCE))


# ---------------------------------------------------------------- what is written


def drawn(rows: Sequence[Row]) -> Drawing:
    plans = [row for row in rows if row.part == "attainment"]
    clusters = [row for row in rows if row.part == "goodput"]
    with styled():
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=GUIDE_COLOUR, linewidth=1)
        left.scatter([row.expected for row in plans], [row.simulated for row in plans], color=RUN_COLOURS[0], s=30)
        left.set_xlabel("predicted share of requests within the SLO")
        left.set_ylabel("simulated share")
        left.set_title(f"{len(plans)} random plans, rank correlation {rank_correlation(plans):.2f}")
        places = np.arange(len(clusters))
        right.barh(places - 0.2, [row.expected for row in clusters], 0.36, color=RUN_COLOURS[0], label="chosen plan")
        right.barh(
            places + 0.2,
            [row.simulated for row in clusters],
            0.36,
            color=RUN_COLOURS[1],
            label=f"best of a random search {LONGER} times as long",
        )
        right.set_yticks(places, [row.what.replace(", ", "\n") for row in clusters], fontsize=8)
        right.set_ylim(len(clusters) - 0.5, -0.5)
        right.set_xlabel(f"simulated goodput (requests/s, {ATTAINMENT:.0%} within the SLO)")
        right.set_title("LLaMA-13B on 8 GPUs")
        figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    table = pd.DataFrame(
        [(row.part, row.what, row.expected, row.simulated, row.ratio, row.note) for row in rows],
        columns=["part", "what", "expected", "simulated", "ratio", "note"],
    )
    return Drawing(figure, table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_plan_quality.csv, .png and .svg")
    parser.add_argument("--plans", type=int, default=PLANS, help=f"random plans to simulate (default {PLANS})")
    parser.add_argument("--steps", type=int, default=100, help="steps of the tabu search (default 100)")
    parser.add_argument("--best-of", type=int, default=3, help="plans of the random search to simulate (default 3)")
    options = parser.parse_args(arguments)
    log = Log()
    rows = predictions(log, options.plans) + goodputs(log, options.steps, options.best_of)
    options.out.mkdir(parents=True, exist_ok=True)
    save(drawn(rows), options.out, "study_plan_quality")
    print(f"rank correlation over {options.plans} plans: {rank_correlation(rows[: options.plans]):.3f}")
    for row in rows[options.plans :]:
        print(f"{row.what}: chosen plan {row.expected:.2f} requests/s, {row.ratio:.1%} of the best found; {row.note}")


if __name__ == "__main__":
    main()
