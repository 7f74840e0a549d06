"""Figures of latency profiles: predicted against measured, rates and roofline, fitted times, times over another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrate.profile.report import Peaks
from experiments.plots.style import DASHES, GUIDE_COLOUR, RUN_COLOURS, Drawing, guide, log_ticks, styled

BAND = 0.10
MARKERS = "os^Dv<>P*X"
MOST_LINES = 12
WIDE = 10.0
"""Ratios that spread further are drawn on a logarithmic axis."""
US, MS = 1e6, 1e3


def predicted_against_measured(name: str, table: pd.DataFrame) -> Drawing:
    """Every point that the fit did not see (``calibrate.profile.report.predictions``), with a band of 10 %."""
    operators = list(dict.fromkeys(table["operator"]))
    with styled():
        figure = Figure(figsize=(7.5, 5.5), layout="constrained")
        axes = figure.subplots()
        low, high = table[["measured_s", "predicted_s"]].to_numpy().min(), table["measured_s"].max()
        line = np.array([low / 1.5, high * 1.5]) * US
        axes.plot(line, line, color=GUIDE_COLOUR, linewidth=1, zorder=1)
        axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#dddddd", zorder=0, label="within 10 %")
        for place, operator in enumerate(operators):
            rows = table[table["operator"] == operator]
            axes.scatter(rows["measured_s"] * US, rows["predicted_s"] * US, s=22, label=operator, **_dots(place))
        axes.set(xscale="log", yscale="log", xlabel="measured (us, median of repeats)", ylabel="predicted unseen (us)")
        axes.set(xlim=line, ylim=line)
        axes.set_title(f"{name}: points left out of the fit")
        for which in ("x", "y"):
            log_ticks(axes, which)
        _legend(axes)
    return Drawing(figure, table)


def achieved_rates(name: str, table: pd.DataFrame, peaks: Peaks | None) -> Drawing:
    """FLOP/s (above) and bytes/s (below) by arithmetic intensity (``calibrate.profile.report.rates``), and the roof."""
    with styled():
        figure = Figure(figsize=(7.5, 8), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        for place, operator in enumerate(dict.fromkeys(table["operator"])):
            rows = table[table["operator"] == operator]
            x = rows["flops_per_byte"]
            upper.scatter(x, rows["flops_per_s"] / 1e9, s=20, label=operator, **_dots(place))
            lower.scatter(x, rows["bytes_per_s"] / 1e9, s=20, **_dots(place))
        if peaks is not None:
            x = np.geomspace(table["flops_per_byte"].min(), table["flops_per_byte"].max(), 200)
            roof = np.minimum(x * peaks.bytes_per_s, peaks.flops_per_s)
            upper.plot(x, roof / 1e9, color="black", linewidth=1.2, label=f"roof ({peaks.source})")
            lower.plot(x, roof / x / 1e9, color="black", linewidth=1.2)
        upper.set(xscale="log", yscale="log", ylabel="GFLOP/s")
        lower.set(yscale="log", ylabel="memory traffic (GB/s)", xlabel="arithmetic intensity (FLOP per byte)")
        upper.set_title(f"{name}: rates that each operator reaches")
        for axes in (upper, lower):
            log_ticks(axes, "y")
        log_ticks(lower)
        _legend(upper)
    return Drawing(figure, table)


def fitted_prices(name: str, table: pd.DataFrame) -> Drawing:
    """What the profile says (``calibrate.profile.report.prices``): a panel per operator, a line per model, TP and GPU.

    Grids show their least and their largest context. No more than twelve lines a panel are drawn; the table has all.
    """
    operators = list(dict.fromkeys(table["operator"]))
    with styled():
        figure = Figure(figsize=(12, 3.4 * -(-len(operators) // 2)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(-(-len(operators) // 2), 2, squeeze=False)).ravel()
        for axes, operator in zip(panels, operators, strict=False):
            lines = list(_lines(table[table["operator"] == operator]))
            for place, (label, rows) in enumerate(lines[:MOST_LINES]):
                axes.plot(rows["number"], rows["seconds"] * MS, label=label, marker=".", **_line(place))
            more = "" if len(lines) <= MOST_LINES else f" ({MOST_LINES} of {len(lines)} lines)"
            axes.set(xscale="log", yscale="log", xlabel=_counted(operator), ylabel="all layers (ms)")
            axes.set_title(operator + more)
            log_ticks(axes)
            log_ticks(axes, "y")
            _legend(axes)
        for axes in panels[len(operators) :]:
            axes.set_visible(False)
        figure.suptitle(f"{name}: fitted times", x=0.01, ha="left", fontweight="bold")
    return Drawing(figure, table)


def prices_over(name: str, other: str, table: pd.DataFrame) -> Drawing:
    """One profile's times over another's (``calibrate.profile.report.ratios``): a panel per model, a line per operator.

    A line is the median over contexts, its band from the least to the most.
    """
    groups = list(table.groupby(["model", "tp", "gpu", "gpu_other"], sort=False))
    with styled():
        height = -(-len(groups) // 2)
        figure = Figure(figsize=(12, 1.0 + 3.4 * height), layout="constrained")
        panels = np.atleast_1d(figure.subplots(height, 2, squeeze=False)).ravel()
        for axes, ((model, tp, gpu, gpu_other), rows) in zip(panels, groups, strict=False):
            for place, (operator, part) in enumerate(rows.groupby("operator", sort=False)):
                spread = part.groupby("number")["ratio"].agg(["median", "min", "max"])
                style = _line(place)
                axes.plot(spread.index, spread["median"], label=operator, marker=".", **style)
                axes.fill_between(
                    spread.index, spread["min"], spread["max"], color=style["color"], alpha=0.12, linewidth=0
                )
            guide(axes, y=1.0)
            wide = rows["ratio"].max() / rows["ratio"].min() > WIDE
            axes.set(xscale="log", yscale="log" if wide else "linear")
            axes.set(xlabel="tokens, or sequences", ylabel="ratio of times")
            axes.set_title(f"{model} TP{tp}, {gpu} over {gpu_other}", fontsize=10)
            log_ticks(axes)
            if wide:
                log_ticks(axes, "y")
            _legend(axes)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        figure.suptitle(f"{name} over {other}", x=0.01, ha="left", fontweight="bold")
    return Drawing(figure, table)


def _lines(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    ends = sorted({rows["context"].min(), rows["context"].max()})
    kept = rows[rows["context"].isin(ends)]
    for (model, tp, gpu, context), part in kept.groupby(["model", "tp", "gpu", "context"], sort=False):
        yield f"{model} TP{tp} {gpu}" + (f", context {context:,}" if len(ends) > 1 else ""), part


def _counted(operator: str) -> str:
    sequences = operator in ("head", "attention_decode", "attention_mixed", "step: decodes")
    return "sequences" if sequences else "tokens"


def _dots(place: int) -> dict[str, Any]:
    return {
        "color": RUN_COLOURS[place % len(RUN_COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "alpha": 0.75,
        "linewidths": 0,
    }


def _line(place: int) -> dict[str, Any]:
    return {
        "color": RUN_COLOURS[place % len(RUN_COLOURS)],
        "linestyle": DASHES[place // len(RUN_COLOURS) % len(DASHES)],
        "linewidth": 1.3,
    }


def _legend(axes: Axes) -> None:
    """Beside the axes, so that it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, handlelength=2)
