"""Latency, attainment and goodput against the arrival rate, with confidence bands over seeds; reads a sweep's means."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.style import Drawing, guide, legend_columns, log_ticks, percent, run_styles, styled

PANELS = {
    "ttft_p50_s": ("Median TTFT", "TTFT p50 (s)"),
    "ttft_p99_s": ("Tail TTFT", "TTFT p99 (s)"),
    "attainment": ("SLO attainment", "requests within SLO (%)"),
    "tpot_p50_s": ("Median TPOT", "TPOT p50 (s)"),
    "tpot_p99_s": ("Tail TPOT", "TPOT p99 (s)"),
    "good_requests_per_s": ("Goodput", "requests/s that arrive and meet the SLO"),
}
"""Metric -> title and axis label, in reading order of a 2 x 3 grid."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LOG_SPREAD = 20.0
"""Latencies that differ by more than this factor get a logarithmic axis."""


def rate_curves(means: pd.DataFrame, target: float) -> Drawing:
    """One line per system; ``means`` as made by ``sweep.means``, ``target`` the attainment asked for."""
    table = means[means["metric"].isin(PANELS)].reset_index(drop=True)
    systems = list(dict.fromkeys(means["system"]))
    with styled():
        figure = Figure(figsize=(12, 7), layout="constrained")
        for axes, metric in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
            _draw(axes, table[table["metric"] == metric], systems, metric)
        for axes in figure.axes[3:]:
            axes.set_xlabel("arrival rate (requests/s)")
        attainment, goodput = figure.axes[2], figure.axes[5]
        percent(attainment)
        guide(attainment, y=target)
        attainment.set_title(f"SLO attainment (target {target:.0%})")
        rates = sorted(table["rate_per_s"].unique())
        goodput.plot(rates, rates, color="#888888", linewidth=1, linestyle=(0, (2, 2)), label="all that arrives")
        handles, labels = goodput.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=legend_columns(len(labels)))
        figure.suptitle(_heading(table), fontsize=10, x=0.01, ha="left")
    return Drawing(figure, table)


def _heading(table: pd.DataFrame) -> str:
    runs = int(table["runs"].max()) if len(table) else 0
    return f"mean of {runs} seeds, band: 95 % confidence" if runs > 1 else "one seed"


def _draw(axes: Axes, table: pd.DataFrame, systems: Iterable[str], metric: str) -> None:
    title, label = PANELS[metric]
    wide = _is_wide(metric, table["mean"])
    for number, (name, style) in enumerate(run_styles(systems).items()):
        line = table[table["system"] == name].sort_values("rate_per_s")
        axes.plot(line["rate_per_s"], line["mean"], marker=MARKERS[number % len(MARKERS)], markersize=4.5, **style)
        band = line.dropna(subset=["low", "high"])
        floor = table["mean"].min() / 1000 if wide else 0.0  # a logarithmic axis has no zero
        low, high = band["low"].clip(lower=floor), band["high"].clip(upper=1.0 if metric == "attainment" else None)
        axes.fill_between(band["rate_per_s"], low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.set_title(title)
    axes.set_ylabel(label)
    if wide:
        axes.set_yscale("log")
        axes.set_ylim(table["mean"].min() / 1.6, table["mean"].max() * 1.6)
        log_ticks(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def _is_wide(metric: str, values: pd.Series[float]) -> bool:
    """Latencies over several orders of magnitude."""
    return metric.startswith(("ttft", "tpot")) and bool(values.min() > 0 and values.max() / values.min() > LOG_SPREAD)
