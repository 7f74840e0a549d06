"""Many systems at once, a row each: latencies against the SLO, what keeps it, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.style import GUIDE_COLOUR, RUN_COLOURS, Drawing, guide, log_ticks, styled
from experiments.runs.rundir import Run
from sim.types import Slo

COLUMNS = {
    "ttft_p50_s": ("ttft_s", "p50"), "ttft_p99_s": ("ttft_s", "p99"), "tpot_p50_s": ("tpot_s", "p50"),
    "tpot_p99_s": ("tpot_s", "p99"), "attainment": ("slo", "attainment"), "goodput_per_s": ("slo", "goodput_per_s"),
    "usd_per_million_tokens": ("usd_per_million_tokens",),
    "used_usd_per_million_tokens": ("used_usd_per_million_tokens",),
}  # fmt: skip
WIDTHS = (3, 3, 2, 2, 3)
ROW_INCHES, WIDTH_INCHES = 0.36, 13.33


def ranking(runs: Mapping[str, Run], slo: Slo, title: str) -> Drawing:
    """The one with the highest goodput on top; the table has the order of the figure."""
    table = ranking_table(runs)
    with styled():
        figure = Figure(figsize=(WIDTH_INCHES, 2 + ROW_INCHES * len(table)), layout="constrained")
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        panels = figure.subplots(1, len(WIDTHS), sharey=True, width_ratios=WIDTHS)
        _draw_spread(panels[0], table, "ttft", "Time to first token", slo.ttft_s)
        _draw_spread(panels[1], table, "tpot", "Time per output token", slo.tpot_s)
        _draw_bars(panels[2], 100 * table["attainment"].astype(float), "Within the SLO", "requests (%)", "{:.1f}")
        guide(panels[2], x=100 * slo.attainment)
        _draw_bars(panels[3], table["goodput_per_s"], "Goodput", "requests/s", "{:.2f}")
        _draw_costs(panels[4], table)
        panels[0].set_yticks(range(len(table)), table["run"])
        panels[0].set_ylim(len(table) + 0.9, -0.6)  # from the top; below the last there is room for the guides' labels
        for axes in panels:
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=True, axis="y")
    return Drawing(figure, table)


def ranking_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Columns run and those of ``COLUMNS``; empty where unknown."""
    rows = []
    for name, run in runs.items():
        row: dict[str, Any] = {"run": name}
        for column, keys in COLUMNS.items():
            value: Any = run.summary
            for key in keys:
                value = value.get(key)
            row[column] = value
        rows.append(row)
    return pd.DataFrame(rows).sort_values("goodput_per_s", ascending=False, kind="stable", ignore_index=True)


def _draw_spread(axes: Axes, table: pd.DataFrame, latency: str, title: str, bound_s: float | None) -> None:
    """From the median (dot) to the 99th percentile (bar's end)."""
    p50, p99 = table[f"{latency}_p50_s"].astype(float), table[f"{latency}_p99_s"].astype(float)
    places = range(len(table))
    axes.hlines(places, p50, p99, color=RUN_COLOURS[0], linewidth=3)
    axes.plot(p50, places, "o", color=RUN_COLOURS[0])
    axes.plot(p99, places, "|", color=RUN_COLOURS[0], markersize=10, markeredgewidth=2)
    axes.set_xscale("log")
    log_ticks(axes)
    axes.set_title(title)
    axes.set_xlabel("s, median (dot) to p99")
    if bound_s is not None:
        guide(axes, x=bound_s, text=f"SLO {bound_s:g} s")


def _draw_bars(axes: Axes, values: pd.Series[float], title: str, label: str, form: str) -> None:
    axes.barh(range(len(values)), values.fillna(0), color=RUN_COLOURS[0], height=0.6)
    for place, value in enumerate(values):
        text = form.format(value) if pd.notna(value) else "unknown"
        axes.annotate(
            text, (value if pd.notna(value) else 0, place), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.margins(x=0.28)
    axes.grid(visible=False, axis="x")


def _draw_costs(axes: Axes, table: pd.DataFrame) -> None:
    whole, used = (table[name].astype(float) for name in ("usd_per_million_tokens", "used_usd_per_million_tokens"))
    places = range(len(table))
    axes.hlines(places, used, whole, color=GUIDE_COLOUR, linewidth=1)
    axes.plot(whole, places, "o", color=RUN_COLOURS[1], label="whole cluster")
    axes.plot(used, places, "D", color=RUN_COLOURS[4], markersize=5, label="GPUs used")
    axes.set_title("Cost")
    axes.set_xlabel("$ per 1M output tokens")
    axes.set_xscale("log")
    log_ticks(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18 if len(table) < 9 else -0.12), ncols=2)
