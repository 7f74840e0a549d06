"""Figures of a validation: predicted against real, request by request and step by step, and both distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.run.latency import METRICS
from experiments.plots.style import GUIDE_COLOUR, RUN_COLOURS, Drawing, log_ticks, percent, styled

BAND = 0.10
MS = 1e3
KINDS = {"decode": "o", "prefill": "^", "mixed": "s"}


def predicted_against_real(table: pd.DataFrame, title: str) -> Drawing:
    """A dot per request and metric; a bar from the least to the most of the real runs, the dot at their median.

    ``table``: of ``experiments.validation.validation_report.request_table``.
    """
    with styled():
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        for axes, (metric, (name, label)) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
            rows = table[[f"real_{metric}", f"predicted_{metric}", *_runs(table, metric)]].dropna()
            real, predicted = rows[f"real_{metric}"], rows[f"predicted_{metric}"]
            runs = rows[_runs(table, metric)]
            bars = np.array([real - runs.min(axis=1), runs.max(axis=1) - real])
            axes.errorbar(real, predicted, xerr=bars, fmt="none", ecolor="#bbbbbb", elinewidth=0.7, zorder=1)
            axes.scatter(real, predicted, s=14, color=RUN_COLOURS[0], alpha=0.7, linewidths=0, zorder=2)
            _band(axes, pd.concat([real, predicted]).to_numpy())
            axes.set(title=name, xlabel=f"real {label}", ylabel=f"predicted {label}")
        figure.axes[0].legend(loc="upper left", fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return Drawing(figure, table)


def latency_distributions(table: pd.DataFrame, title: str) -> Drawing:
    """Cumulative shares: the prediction's line, and a thin one of each real run."""
    with styled():
        figure = Figure(figsize=(12, 4.0), layout="constrained")
        panels = figure.subplots(1, len(METRICS), sharey=True)
        parts = []
        for axes, (metric, (name, label)) in zip(panels, METRICS.items(), strict=True):
            for column in [*_runs(table, metric), f"predicted_{metric}"]:
                seconds = np.sort(table[column].dropna().to_numpy())
                share = np.arange(1, len(seconds) + 1) / max(1, len(seconds))
                who = column.removesuffix(f"_{metric}")
                axes.step(seconds, share, where="post", **_line(who))
                parts.append(pd.DataFrame({"metric": metric, "who": who, "seconds": seconds, "share": share}))
            axes.set(title=name, xlabel=label, xscale="log")
            log_ticks(axes)
            percent(axes)
        panels[0].set_ylabel("requests (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside upper right", ncols=2)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return Drawing(figure, pd.concat(parts, ignore_index=True))


def step_times(table: pd.DataFrame, title: str) -> Drawing:
    """Every executed step beside what the latency model says of it (``validation_report.step_table``)."""
    kinds = np.select([table["prefill_tokens"] == 0, table["decode_seqs"] == 0], ["decode", "prefill"], default="mixed")
    with styled():
        figure = Figure(figsize=(6.5, 5.2), layout="constrained")
        axes = figure.subplots()
        for place, (kind, marker) in enumerate(KINDS.items()):
            rows = table[kinds == kind]
            if len(rows):
                axes.scatter(rows["measured_s"] * MS, rows["predicted_s"] * MS, s=14, marker=marker, alpha=0.5,
                             color=RUN_COLOURS[place], linewidths=0, label=f"{kind} ({len(rows):,})")  # fmt: skip
        _band(axes, table[["measured_s", "predicted_s"]].to_numpy() * MS)
        axes.set(xlabel="measured step (ms)", ylabel="the same step predicted (ms)", title=f"{title}: step times")
        axes.legend(loc="upper left", fontsize=8)
    return Drawing(figure, table)


def _runs(table: pd.DataFrame, metric: str) -> list[str]:
    return [name for name in table.columns if name.startswith("run") and name.endswith(f"_{metric}")]


def _line(who: str) -> dict[str, Any]:
    if who == "predicted":
        return {"color": RUN_COLOURS[1], "linewidth": 1.8, "linestyle": (0, (5, 1.5)), "label": "predicted"}
    return {"color": RUN_COLOURS[0], "linewidth": 0.9, "alpha": 0.8, "label": "real"}


def _band(axes: Axes, values: Any) -> None:
    """Equal logarithmic axes, the diagonal, and 10 % around it."""
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return
    line = np.array([values.min() / 1.3, values.max() * 1.3])
    axes.plot(line, line, color=GUIDE_COLOUR, linewidth=1, zorder=0)
    axes.fill_between(line, line * (1 - BAND), line * (1 + BAND), color="#dddddd", zorder=-1, label="within 10 %")
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    for which in ("x", "y"):
        log_ticks(axes, which)
