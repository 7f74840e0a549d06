"""DistServe's study: attainment by rate and by SLO scale, and the M/D/1 curves of two ways to use two GPUs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.rates import MARKERS
from experiments.plots.style import Drawing, guide, log_ticks, percent, run_styles, styled
from sim.planners.md1 import crossover_load, inter_op_ttft_s, intra_op_ttft_s, ttft_s

SPEEDUPS = (1.2, 1.5, 1.8)


def rate_and_scale_curves(table: pd.DataFrame) -> Drawing:
    """Columns application, system, axis (rate or scale), x, attainment; a column of panels per application."""
    applications = list(dict.fromkeys(table["application"]))
    styles = run_styles(dict.fromkeys(table["system"]))
    with styled():
        figure = Figure(figsize=(3.1 * len(applications), 6), layout="constrained")
        grid = figure.subplots(2, len(applications), sharey=True, squeeze=False)
        for place, application in enumerate(applications):
            for axes, axis in zip(grid[:, place], ("rate", "scale"), strict=True):
                part = table[(table["application"] == application) & (table["axis"] == axis)]
                for number, (name, style) in enumerate(styles.items()):
                    line = part[part["system"] == name]
                    marker = MARKERS[number] if axis == "rate" else None
                    axes.plot(line["x"], line["attainment"], marker=marker, markersize=4, **style)
                percent(axes)
                guide(axes, y=0.9)
            grid[0, place].set_title(application)
            grid[0, place].set_xlim(left=0)
            grid[0, place].set_xlabel("requests/s per GPU")
            grid[1, place].set_xscale("log")
            log_ticks(grid[1, place])
            grid[1, place].set_xlabel("SLO scale, at vLLM's goodput")
        for axes in grid[:, 0]:
            axes.set_ylabel("requests within SLO (%)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return Drawing(figure, table)


def md1_curves() -> Drawing:
    """Mean TTFT over the prompt time against the load; where pipeline and tensor parallelism cross is dotted."""
    loads = np.linspace(0.02, 1.9, 95)
    ways = {"one GPU": [ttft_s(1, load) for load in loads], "2 stages": [inter_op_ttft_s(1, load) for load in loads]}
    ways |= {f"TP 2, {k:g}x as fast": [intra_op_ttft_s(1, load, k) for load in loads] for k in SPEEDUPS}
    rows = [(name, load, value) for name, line in ways.items() for load, value in zip(loads, line, strict=True)]
    table = pd.DataFrame(rows, columns=["way", "load", "ttft_over_prompt_time"]).replace(np.inf, np.nan)
    with styled():
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, style in run_styles(ways).items():
            line = table[table["way"] == name]
            axes.plot(line["load"], line["ttft_over_prompt_time"], **style)
        for speedup in SPEEDUPS:
            load = crossover_load(speedup)
            guide(axes, x=load, text=f"{load:.3f}")
        axes.set_xlim(0, 1.9)
        axes.set_ylim(0, 4)
        axes.set_xlabel("load (arrival rate x one GPU's prompt time)")
        axes.set_ylabel("mean TTFT / one GPU's prompt time")
        axes.set_title("Prefill of equal prompts as an M/D/1 queue")
        figure.legend(loc="outside right center")
    return Drawing(figure, table)
