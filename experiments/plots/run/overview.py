"""The one figure for a slide: latency, SLO attainment, cost and what the split run's GPUs do."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from experiments.plots.ranking import ranking
from experiments.plots.run.attainment import attainment_table, draw_attainment
from experiments.plots.run.latency import cdf_table, draw_cdf
from experiments.plots.run.timeline import busiest_window, draw_timeline, legend_handles, timeline_table
from experiments.plots.style import Drawing, run_styles, styled
from experiments.runs.rundir import Run
from sim.types import Slo

SLIDE_INCHES = (13.33, 7.5)
MOST_RUNS = 6


def overview(runs: Mapping[str, Run], slo: Slo, title: str) -> Drawing:
    """CDFs and attainment above, bars and the timeline of the run that moves most KV below; the table is the bars'.

    More than ``MOST_RUNS`` get a row each, in place of lines that nobody can tell apart.
    """
    if len(runs) > MOST_RUNS:
        return ranking(runs, slo, title)
    bars = bar_table(runs)
    latencies = cdf_table(runs)
    shown = max(runs.values(), key=lambda run: run.summary["bytes_moved"])
    with styled():
        figure = Figure(figsize=SLIDE_INCHES, layout="constrained")
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        grid = GridSpec(2, 12, figure=figure, height_ratios=(1, 1))
        upper = [figure.add_subplot(grid[0, start : start + 4]) for start in (0, 4, 8)]
        draw_cdf(upper[0], latencies, runs, "ttft_s", slo.ttft_s)
        draw_cdf(upper[1], latencies, runs, "tpot_s", slo.tpot_s)
        draw_attainment(upper[2], attainment_table(runs, slo), slo)
        upper[0].set_ylabel("completed requests (%)")
        draw_bars(figure.add_subplot(grid[1, :2]), bars, "goodput_per_s", "Goodput", "requests/s within SLO", ".2f")
        draw_bars(
            figure.add_subplot(grid[1, 2:4]), bars, "usd_per_million_tokens", "Cost", "$ per 1M output tokens", ".2f"
        )
        _draw_lanes(figure.add_subplot(grid[1, 4:]), shown)
        figure.legend(*upper[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(runs))
    return Drawing(figure, bars)


def bar_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Columns run, goodput_per_s, attainment, usd_per_million_tokens, output_tokens_per_s."""
    rows = [
        {
            "run": name,
            "goodput_per_s": run.summary["slo"]["goodput_per_s"],
            "attainment": run.summary["slo"]["attainment"],
            "usd_per_million_tokens": run.summary["usd_per_million_tokens"],
            "output_tokens_per_s": run.summary["output_tokens_per_s"],
        }
        for name, run in runs.items()
    ]
    return pd.DataFrame(rows)


def draw_bars(axes: Axes, table: pd.DataFrame, column: str, title: str, label: str, form: str) -> None:
    """One bar per run with its value on top; an unknown value has no bar."""
    styles = run_styles(table["run"])
    for place, (name, value) in enumerate(zip(table["run"], table[column], strict=True)):
        known = pd.notna(value)
        axes.bar(place, value if known else 0, color=styles[name]["color"], width=0.65)
        axes.annotate(
            format(value, form) if known else "unknown", (place, value if known else 0), xytext=(0, 2),
            textcoords="offset points", ha="center", va="bottom", fontsize=9,
        )  # fmt: skip
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xticks([])
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")


def _draw_lanes(axes: Axes, run: Run) -> None:
    window = busiest_window(run)
    table = timeline_table(run, window)
    draw_timeline(axes, run, table, window)
    axes.set_title(f"GPU timeline: {run.name}")
    axes.set_ylabel("")
    handles = legend_handles(table)
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(handles), borderaxespad=0)
