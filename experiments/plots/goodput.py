"""SLO attainment against the arrival rate, with each system's goodput marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.rates import MARKERS
from experiments.plots.style import Drawing, guide, percent, run_styles, styled

LABELS = {
    "joint": "requests within every bound of the SLO (%)",
    "separate": "requests within the bound that is met least (%)",
}


def goodput_curves(means: pd.DataFrame, rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """``means`` as made by ``sweep.means`` of the rows of ``goodput.curve``, ``rows`` the table of goodputs."""
    table = means[means["metric"] == "judged"].reset_index(drop=True)
    target, criterion, seeds = rows[0]["target"], rows[0]["criterion"], rows[0]["seeds"]
    with styled():
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, style) in enumerate(run_styles(row["system"] for row in rows).items()):
            line = table[table["system"] == name].sort_values("rate_per_s")
            axes.plot(line["rate_per_s"], line["mean"], marker=MARKERS[number % len(MARKERS)], markersize=5, **style)
            band = line.dropna(subset=["low", "high"])
            low, high = band["low"].clip(lower=0.0), band["high"].clip(upper=1.0)
            axes.fill_between(band["rate_per_s"], low, high, color=style["color"], alpha=0.15, linewidth=0)
            rate = rows[number]["rate_per_s"]
            if rate is not None:
                axes.plot([rate, rate], [0, target], color=style["color"], linewidth=1, linestyle=(0, (1, 2)))
        percent(axes)
        axes.set_xlim(left=0)
        guide(axes, y=target)
        axes.set_xlabel("arrival rate (requests/s)")
        axes.set_ylabel(LABELS[criterion])
        what = f"mean of {seeds} seeds, band: 95 % confidence" if seeds > 1 else "one seed"
        figure.suptitle(f"target {target:.0%}; dotted: goodput; {what}", fontsize=10, x=0.01, ha="left")
        figure.legend(loc="outside lower center", ncols=min(4, len(rows)))
    return Drawing(figure, table)
