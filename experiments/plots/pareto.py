"""What can be had at once: pace per user and throughput per GPU, cost and goodput; reads a sweep's means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from experiments.plots.rates import MARKERS
from experiments.plots.style import Drawing, legend_columns, run_styles, styled

SIDES = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Of its point, where a system's labels stand: to the right or left, above or below."""


class Panel(NamedTuple):
    """Two metrics of a sweep and the sign of the better direction of each."""

    title: str
    x: str
    y: str
    x_label: str
    y_label: str
    x_better: int
    y_better: int


PANELS = (
    Panel(
        title="Pace against throughput",
        x="tokens_per_s_per_user",
        y="tokens_per_s_per_gpu",
        x_label="tokens/s per user (1 / median TPOT)",
        y_label="output tokens/s per GPU",
        x_better=1,
        y_better=1,
    ),
    Panel(
        title="Cost against goodput",
        x="good_requests_per_s",
        y="usd_per_million_tokens",
        x_label="goodput (requests/s that arrive and meet the SLO)",
        y_label="$ per 1M output tokens",
        x_better=1,
        y_better=-1,
    ),
)


def pareto(means: pd.DataFrame) -> Drawing:
    """A point per system and rate, joined in order of the rate; filled where no other point is better in both."""
    table = pareto_table(means)
    systems = list(dict.fromkeys(means["system"]))
    with styled():
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            _draw(axes, table[table["panel"] == panel.title], systems, panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=legend_columns(len(labels)))
        text = "numbers: lowest and highest arrival rate (requests/s); filled: no other point is better in both"
        figure.suptitle(text, fontsize=10, x=0.01, ha="left")
    return Drawing(figure, table)


def pareto_table(means: pd.DataFrame) -> pd.DataFrame:
    """Columns panel, system, rate_per_s, x, y, on_frontier; points without one of the two values are left out."""
    wide = means.pivot_table(index=["system", "rate_per_s"], columns="metric", values="mean", sort=False).reset_index()
    parts = []
    for panel in PANELS:
        points = wide.reindex(columns=["system", "rate_per_s", panel.x, panel.y]).dropna()
        points.columns = pd.Index(["system", "rate_per_s", "x", "y"])
        best = frontier(panel.x_better * points["x"], panel.y_better * points["y"])
        parts.append(points.assign(on_frontier=best, panel=panel.title))
    return pd.concat(parts, ignore_index=True)[["panel", "system", "rate_per_s", "x", "y", "on_frontier"]]


def frontier(x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other one beats: as good in both and better in one; more is better."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    as_good = (a[:, None] >= a) & (b[:, None] >= b)
    better = (a[:, None] > a) | (b[:, None] > b)
    return np.asarray(~(as_good & better).any(axis=0), dtype=bool)


def _draw(axes: Axes, table: pd.DataFrame, systems: list[str], panel: Panel) -> None:
    for number, (name, style) in enumerate(run_styles(systems).items()):
        points = table[table["system"] == name].sort_values("rate_per_s")
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(points["x"], points["y"], marker=marker, markersize=7, markerfacecolor="white", **style)
        best = points[points["on_frontier"]]
        axes.plot(best["x"], best["y"], marker=marker, markersize=7, linestyle="none", color=style["color"])
        right, up = SIDES[number % len(SIDES)]
        for rate, x, y in points[["rate_per_s", "x", "y"]].iloc[[0, -1][: len(points)]].to_numpy().tolist():
            axes.annotate(
                f"{rate:g}", (x, y), xytext=(7 * right, 7 * up), textcoords="offset points", fontsize=9,
                ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top", color=style["color"],
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.margins(x=0.08, y=0.1)
