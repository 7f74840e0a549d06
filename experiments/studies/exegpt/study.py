"""ExeGPT's figures beside ours: ``python -m experiments.studies.exegpt --out docs/studies/exegpt [--quick]``.

Oh et al., ExeGPT: Constraint-Aware Resource Scheduling for LLM Inference (ASPLOS 2024; arXiv 2404.07947).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import ceil, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.style import RUN_COLOURS, Drawing, save, styled
from experiments.runs.progress import Log
from experiments.studies.exegpt.world import (
    BATCHES,
    GPT_39B,
    GPT_101B,
    GPT_175B,
    OPT,
    TASKS,
    Point,
    Server,
    Truncated,
    baseline,
    best_within,
    bounds_s,
    followed,
    kept,
    planned,
)  # fmt: skip
from experiments.studies.published import Comparison, row, write
from sim import SYSTEMS
from sim.planners.exegpt import ExeGPT, Kind, Schedule
from sim.planners.exegpt.lengths import latency_s
from sim.planners.exegpt.schedule import KINDS, Space

INTRO = """
ExeGPT (ASPLOS 2024) searches, for a bound on the latency of the 99th-percentile output length, the schedule with the
highest throughput. RRA: a phase of B_E prompts, then N_D iterations of decodes, on all GPUs. WAA: a prefill and a
decode pool, KV by way of the host. No code or profile is public: step times are our roofline's at its defaults, on
A40s on PCIe, 100 Gbps between machines (ours). Lengths are normal, cut at 0 and at the printed maxima, all requests
there from the start. GPT-3 39B and 101B are shapes of ours with the printed number of parameters. Latencies are
without queueing, of answers as long as the 99th percentile (at most 5 % shorter). The bounds lie at 10, 30 and 70 %
of FasterTransformer's latencies over its batch sizes with the widest TP, as in the paper. Baselines are one instance
on all GPUs, of the best of a few shapes and batch sizes under each bound: FasterTransformer (requests leave with their
own last token, which the original did not do), and vLLM's iteration-level scheduler, the paper's ORCA. ExeGPT is
planned with other requests than are served, and then run in the engine. Where its latency there is above the bound, it
is planned again for a tighter one, so that all that is compared keeps the bound in the engine; notes have the plan's
own figures.

A pipeline with few prompts a pass does worse in the engine than planned: the latency model has prompts of mean length,
as the paper's has, but stages wait for the longest. With prompts of one length RRA serves what was planned (the row
says how much). Points are not monotone along the number of GPUs with TP, where groups and single GPUs mix in one
pipeline, and hardly ever elsewhere.

Ours beyond the paper: the decode batch follows Little's law. The paper's rule takes the requests in flight for like
those that arrive, but long ones stay longer, so it plans for fewer than there are; its own WAA rows in Table 6 fit
Little's law (34 in flight) and not the rule (128). WAA decodes in one micro-batch a stage, and N_D is searched up to
the 99th percentile only: beyond both there is nothing to gain in either figure. WAA-M jumps where a GPU changes pools,
so that branch and bound may miss its best.

Missed: at Table 6's 11.5 s WAA is still the better one here, RRA only without a bound. The highest gain is 8.5 on GPT-3
101B, not 15.2 on 175B under the tightest bound, while the mean gains of large models are above the printed ones.
Iteration-level scheduling, in an engine with the same step times, serves more than ExeGPT under 6 of 32 bounds.

![Throughput under latency bounds](study_exegpt_bounds.png)

Regenerate with `python -m experiments.studies.exegpt --out docs/studies/exegpt`.
"""
TABLE_6 = ((3.1, "WAA", 22.41), (5.9, "WAA", 23.76), (11.5, "RRA", 25.23), (inf, "RRA", 26.15))
"""Bound, schedule and requests/s: OPT-13B, task S, four A40s."""
SYSTEM_NAMES = ("FasterTransformer", "vLLM (ORCA)", "ExeGPT RRA", "ExeGPT WAA")
APART: tuple[Kind, ...] = ("waa-c", "waa-m")
OURS: dict[str, tuple[Kind, ...]] = {"ExeGPT RRA": ("rra",), "ExeGPT WAA": APART}


class Size(NamedTuple):
    """Which servers under which tasks, and the baselines' batch sizes."""

    runs: tuple[tuple[Server, tuple[str, ...]], ...]
    batches: tuple[int, ...]


FULL = Size(((OPT, tuple(TASKS)), (GPT_39B, ("S",)), (GPT_101B, ("S",)), (GPT_175B, ("S",))), BATCHES)
QUICK = Size(((OPT, ("S",)),), (1, 8, 32, 128, 512))


# ---------------------------------------------------------------- table 6, by hand and by our planner


def arithmetic() -> Iterator[Comparison]:
    """Latencies that follow from the printed batches, phases and rates."""
    for batch, phase, rate, printed in ((52, 13, 25.23, 10.23), (49, 7, 26.15, 16.87)):
        what = f"RRA, B_E {batch}, N_D {phase}, {rate}/s: latency of 63 tokens"
        yield row("Table 6", what, printed, latency_s(63, phase, batch / rate), "s", "arithmetic", kind="exact")
    flight = 22.41 * 32 * 3.01 / 63
    yield row(
        "Table 6", "WAA, B_E 4, 22.41/s, 3.01 s: sequences that decode, by Little's law", None, flight, "",
        "arithmetic", kind="direction", text="4 x 32 = 128 by the paper's rule",
    )  # fmt: skip


def switch(log: Log) -> Iterator[Comparison]:
    """Which schedule is best as the bound relaxes."""
    for bound_s, kind, rate in TABLE_6:
        found = kept(OPT, TASKS["S"], bound_s, ("rra", *APART))
        what = f"opt-13b, S, {_bound(bound_s)}: throughput ({kind} in the paper)"
        log.say(f"{what}: {found and found[0]}")
        schedule, served = found or (None, None)
        note = "no schedule keeps it" if schedule is None else str(schedule)
        yield row("Table 6", what, rate, served and served.rate_per_s, "1/s", note=note)


def _bound(bound_s: float) -> str:
    return "no bound" if bound_s == inf else f"within {bound_s:.3g} s"


# ---------------------------------------------------------------- throughput within bounds


class Cell(NamedTuple):
    """One server, task and bound: what each system serves there (None: nothing keeps it)."""

    server: str
    task: str
    place: int
    bound_s: float
    points: Mapping[str, Point | None]
    plans: Mapping[str, Schedule]

    @property
    def best(self) -> Point | None:
        """ExeGPT's own choice: the kind that it plans the more for."""
        return self.points["ExeGPT"]

    def gain(self, over: str) -> float | None:
        other = self.points[over]
        return None if self.best is None or other is None else self.best.rate_per_s / other.rate_per_s


def cells(size: Size, log: Log) -> Iterator[Cell]:
    for server, names in size.runs:
        for task in (TASKS[name] for name in names):
            curves = {
                label: list(baseline(server, task, name, size.batches))
                for label, name in zip(SYSTEM_NAMES, ("fastertransformer", "vllm"), strict=False)
            }
            for place, bound_s in enumerate(bounds_s(curves["FasterTransformer"])):
                points = {label: best_within(curve, bound_s) for label, curve in curves.items()}
                found = {label: kept(server, task, bound_s, kinds) for label, kinds in OURS.items()}
                plans = {label: one[0] for label, one in found.items() if one is not None}
                points |= {label: one and one[1] for label, one in found.items()}
                chosen = max(plans, key=lambda label: plans[label].perf.throughput_per_s, default=SYSTEM_NAMES[2])
                log.say(f"{server.name}, {task.name}, {_bound(bound_s)}: {plans.get(chosen)}")
                yield Cell(server.name, task.name, place, bound_s, points | {"ExeGPT": points[chosen]}, plans)


def within_bounds(found: Sequence[Cell]) -> Iterator[Comparison]:
    for cell in found:
        where = "Fig. 8" if cell.server in (GPT_101B.name, GPT_175B.name) else "Fig. 6"
        for over in SYSTEM_NAMES[:2]:
            what = f"{cell.server}, {cell.task}, {_bound(cell.bound_s)}: throughput over {over}"
            best, other = cell.best, cell.points[over]
            note = f"{best.rate_per_s:.3g} and {other.rate_per_s:.3g} requests/s" if best and other else ""
            if best is not None:
                note += f"; {best.setting}"
            yield row(where, what, None, cell.gain(over), "x", kind="direction", text="bars only", note=note)


def means(found: Sequence[Cell]) -> Iterator[Comparison]:
    """Over FasterTransformer; of the scenarios that both serve."""
    small = [cell for cell in found if cell.server in (OPT.name, GPT_39B.name, GPT_101B.name)]
    large = [cell for cell in found if cell.server in (GPT_101B.name, GPT_175B.name)]
    groups: tuple[tuple[str, str, float, Sequence[Cell], Callable[[Sequence[float]], float]], ...] = (
        ("Abstract", "all scenarios, mean gain over FasterTransformer", 2.9, found, _mean),
        ("Abstract", "all scenarios, highest gain", 15.2, found, max),
        ("Fig. 6", "11B to 101B, mean gain", 2.0, small, _mean),
        ("Fig. 6", "11B to 101B, highest gain", 5.4, small, max),
        ("Fig. 8", "101B and larger, mean gain", 3.2, large, _mean),
        ("Fig. 8", "101B and larger, no bound, mean gain", 2.2, [c for c in large if c.bound_s == inf], _mean),
    )
    for where, what, printed, group, figure in groups:
        gains = [gain for cell in group if (gain := cell.gain("FasterTransformer")) is not None]
        if gains:
            yield row(where, what, printed, figure(gains), "x", note=f"{len(gains)} scenarios")


def foreseen(found: Sequence[Cell]) -> Iterator[Comparison]:
    """What the engine serves of what was planned."""
    for label in OURS:
        shares = [
            100 * point.rate_per_s / cell.plans[label].perf.throughput_per_s
            for cell in found
            if (point := cell.points[label]) is not None
        ]
        if shares:
            yield row(
                "-", f"{label}: throughput in the engine, of what is planned", None, _mean(shares), "%",
                kind="direction", text="not printed", note=f"{min(shares):.0f} to {max(shares):.0f} % in {len(shares)}",
            )  # fmt: skip


def with_equal_prompts() -> Iterator[Comparison]:
    """The same of RRA without a bound, if no prompt is longer than another."""
    for server in (OPT, GPT_175B):
        task = TASKS["S"]._replace(input=Truncated(256, 1e-3, 512))
        found = kept(server, task, inf, ("rra",))
        if found is not None:
            share = 100 * found[1].rate_per_s / found[0].perf.throughput_per_s
            yield row(
                "-", f"ExeGPT RRA, {server.name}, prompts of 256: throughput in the engine, of what is planned", None,
                share, "%", kind="direction", text="not printed", note=str(found[0]),
            )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def equal_throughput(server: Server, batches: Sequence[int]) -> Iterator[Comparison]:
    """The abstract's 7.8 s against 47 s, task unknown: latency where FasterTransformer has nearly all it can serve."""
    for name in ("S", "T"):
        points = list(baseline(server, TASKS[name], "fastertransformer", batches))
        enough = 0.95 * max(points).rate_per_s
        theirs = min((one for one in points if one.rate_per_s >= enough), key=lambda one: one.latency_s)
        low, high, ours = 0.0, theirs.latency_s * 2, None
        while high - low > 0.01 * high:  # the lowest bound at which we plan for as much
            middle = (low + high) / 2
            schedule = planned(server, TASKS[name], middle, ("rra", *APART))
            if schedule is not None and schedule.perf.throughput_per_s >= theirs.rate_per_s:
                high, ours = middle, schedule
            else:
                low = middle
        if ours is not None:
            point = followed(server, TASKS[name], ours)
            yield row(
                "Abstract", f"{server.name}, {name}: latency at equal throughput, theirs over ExeGPT's", 6.0,
                theirs.latency_s / point.latency_s, "x",
                note=f"{theirs.latency_s:.3g} s at {theirs.rate_per_s:.3g}/s, {point.latency_s:.3g} s at "
                f"{point.rate_per_s:.3g}/s; {ours}",
            )  # fmt: skip


# ---------------------------------------------------------------- the search


def searches(servers: Sequence[Server]) -> Iterator[Comparison]:
    """Evaluations and seconds of branch and bound, and whether it finds what looking at everything finds."""
    for server, kind in product(servers, KINDS):
        place = server.problem(TASKS["S"], SYSTEMS["exegpt"]().limits)
        for bound_s in (8.0, 20.0):
            kinds: tuple[Kind, ...] = (kind,)
            quick, whole = (ExeGPT(kinds=kinds, bound_s=bound_s, whole=all_).search(place) for all_ in (False, True))
            if quick.best is None or whole.best is None:
                continue
            share = quick.best.perf.throughput_per_s / whole.best.perf.throughput_per_s
            note = f"{quick.wall_s:.2g} s and {whole.wall_s:.3g} s; throughput {share:.1%} of the best"
            text = "3 s to 2 min, over 5 h" if kind == "rra" else "1 to 5 min, over 5 h"
            yield row(
                "Sec. 7.7", f"{server.name}, S, {kind.upper()}, {_bound(bound_s)}: evaluations, exhaustive over ours",
                None, whole.evaluations / quick.evaluations, "x", kind="direction", text=text, note=note,
            )  # fmt: skip


VARIABLES = ("B_E", "N_D", "GPUs with TP")


def monotone(server: Server) -> Iterator[Comparison]:
    """Points whose figures do not fall by more than 5 % from those before them, along any variable (RRA)."""
    place = server.problem(TASKS["S"], SYSTEMS["exegpt"]().limits)
    spaces = list(ExeGPT(kinds=("rra",)).spaces(place))
    for number, (figure, printed) in enumerate((("throughput", 97.0), ("latency", 96.0))):
        kept: list[bool] = []
        falls: dict[str, list[bool]] = {name: [] for name in VARIABLES}
        for table in (_tables(space)[number] for space in spaces):
            good, known = np.ones(table.shape, dtype=bool), np.isfinite(table)
            for axis, name in enumerate(VARIABLES):
                before, after = (np.delete(table, at, axis=axis) for at in (-1, 0))
                falling = after < 0.95 * before
                falls[name] += falling[np.isfinite(after)].tolist()
                good &= ~np.insert(falling, 0, False, axis=axis)
            kept += good[known].tolist()
        what = f"{server.name}, S, RRA: points with monotone {figure}, to 5 %"
        note = "steps that fall: " + ", ".join(f"{name} {np.mean(found):.1%}" for name, found in falls.items())
        yield row("Table 5", what, printed, 100 * float(np.mean(kept)), "%", note=note)


def _tables(space: Space) -> tuple[np.ndarray, np.ndarray]:
    figures = np.empty((2, *space.sides))
    for point in np.ndindex(*space.sides):
        figures[(slice(None), *point)] = space.price(point)
    return figures[0], figures[1]


# ---------------------------------------------------------------- the figure


def drawn(found: Sequence[Cell]) -> Drawing:
    """Throughput of each system under each bound, a panel for each server and task (the paper's figures 6 and 8)."""
    panels = list(dict.fromkeys((cell.server, cell.task) for cell in found))
    columns = min(4, len(panels))
    with styled():
        figure = Figure(
            figsize=(max(7.0, 3.1 * columns), 2.7 * ceil(len(panels) / columns) + 0.6), layout="constrained"
        )
        axes = figure.subplots(ceil(len(panels) / columns), columns, squeeze=False).flatten()
        for ax, (server, task) in zip(axes, panels, strict=False):
            own = [cell for cell in found if (cell.server, cell.task) == (server, task)]
            for number, label in enumerate(SYSTEM_NAMES):
                rates = [0.0 if (point := cell.points[label]) is None else point.rate_per_s for cell in own]
                at = np.arange(len(own)) + (number - 1.5) * 0.2
                ax.bar(at, rates, 0.2, color=RUN_COLOURS[number], label=label)
            ax.set_xticks(range(len(own)), ["none" if c.bound_s == inf else f"{c.bound_s:.3g}" for c in own])
            ax.set_title(f"{server}, {task}")
            ax.grid(visible=False, axis="x")
            ax.set_xlabel("latency bound (s)")
            ax.set_ylabel("requests/s")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SYSTEM_NAMES))
    return Drawing(figure, pd.DataFrame([row for cell in found for row in _rows(cell)]))


def _rows(cell: Cell) -> Iterator[dict[str, object]]:
    for label in SYSTEM_NAMES:
        point = cell.points[label]
        shown = {"requests_per_s": None, "latency_s": None, "setting": ""} if point is None else dict(
            zip(("requests_per_s", "latency_s", "setting"), point, strict=True)
        )  # fmt: skip
        yield {"server": cell.server, "task": cell.task, "bound_s": cell.bound_s, "system": label, **shown}


def study(size: Size, log: Log) -> tuple[list[Comparison], list[Cell]]:
    found = list(cells(size, log))
    servers = [server for server, _ in size.runs]
    rows = [*arithmetic(), *switch(log), *means(found), *foreseen(found)]
    if GPT_175B in servers:
        rows += with_equal_prompts()
    if GPT_39B in servers:
        rows += [*equal_throughput(GPT_39B, size.batches), *monotone(GPT_39B)]
    return [*rows, *searches([OPT]), *within_bounds(found)], found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_exegpt.md, its tables and plots")
    parser.add_argument("--quick", action="store_true", help="OPT-13B and one task only (under a minute)")
    given = parser.parse_args(arguments)
    rows, found = study(QUICK if given.quick else FULL, Log())
    given.out.mkdir(parents=True, exist_ok=True)
    save(drawn(found), given.out, "study_exegpt_bounds")
    write(given.out, "study_exegpt", "ExeGPT: published and simulated", INTRO, rows)
