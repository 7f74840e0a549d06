"""A real server's requests against their predictions, one point each."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.calibration import BAND
from experiments.plots.run.latency import METRICS
from experiments.plots.style import GUIDE_COLOUR, RUN_COLOURS, Drawing, log_ticks, styled


def request_scatter(name: str, table: pd.DataFrame) -> Drawing:
    """A panel per latency (columns of ``validation.measured.Comparison.requests``), with a band of 10 %."""
    with styled():
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        for axes, (title, label) in zip(figure.subplots(1, len(METRICS)), METRICS.values(), strict=True):
            latency = label.split()[0]
            _panel(axes, table[f"{latency} measured (s)"], table[f"{latency} predicted (s)"])
            axes.set_title(title)
            axes.set_xlabel(f"measured {latency} (s)")
            axes.set_ylabel(f"predicted {latency} (s)")
        figure.suptitle(name, x=0.01, ha="left", fontweight="bold")
    return Drawing(figure, table)


def _panel(axes: Axes, measured: pd.Series[float], predicted: pd.Series[float]) -> None:
    known = (measured > 0) & (predicted > 0)
    if not known.any():
        axes.text(0.5, 0.5, "no request has both", transform=axes.transAxes, ha="center")
        return
    both = np.concatenate([measured[known], predicted[known]])
    line = np.array([both.min() / 1.2, both.max() * 1.2])
    axes.plot(line, line, color=GUIDE_COLOUR, linewidth=1, zorder=1)
    axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#dddddd", zorder=0, label="within 10 %")
    axes.scatter(measured[known], predicted[known], s=14, color=RUN_COLOURS[0], alpha=0.6, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    for which in ("x", "y"):
        log_ticks(axes, which)
    axes.legend(loc="upper left", fontsize=8)
