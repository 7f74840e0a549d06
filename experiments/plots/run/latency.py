"""Latency distributions: TTFT, TPOT and E2E of every run, over its completed requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.style import Drawing, guide, legend_columns, log_ticks, percent, run_styles, styled
from experiments.runs.rundir import Run
from experiments.runs.vllm_bench import Bench
from sim.types import Slo

METRICS = {
    "ttft_s": ("Time to first token", "TTFT (s)"),
    "tpot_s": ("Time per output token", "TPOT (s)"),
    "e2e_s": ("End to end", "E2E latency (s)"),
}
SHARES = np.linspace(0, 1, 201)


def latency_cdfs(runs: Mapping[str, Run | Bench], slo: Slo) -> Drawing:
    """One panel per metric, one line per run, the SLO's bound dotted."""
    table = cdf_table(runs)
    with styled():
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
            draw_cdf(axes, table, runs, metric, getattr(slo, metric))
        figure.axes[0].set_ylabel("completed requests (%)")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=legend_columns(len(runs))
        )
    return Drawing(figure, table)


def cdf_table(runs: Mapping[str, Run | Bench]) -> pd.DataFrame:
    """Columns run, metric, share, seconds: the value that this share of the requests does not exceed."""
    parts = []
    for name, run in runs.items():
        for metric in METRICS:
            values = run.requests.loc[run.requests["outcome"] == "completed", metric].dropna()
            if len(values):
                seconds = np.quantile(values.to_numpy(dtype=float), SHARES)
                parts.append(pd.DataFrame({"run": name, "metric": metric, "share": SHARES, "seconds": seconds}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run", "metric", "share", "seconds"])


def draw_cdf(axes: Axes, table: pd.DataFrame, names: Iterable[str], metric: str, bound_s: float | None) -> None:
    """One panel from the table of ``cdf_table``; a run without completed requests keeps its place in the legend."""
    rows = table[table["metric"] == metric]
    for name, style in run_styles(names).items():
        line = rows[rows["run"] == name]
        axes.plot(line["seconds"], line["share"], **style)
    title, label = METRICS[metric]
    axes.set_title(title)
    axes.set_xlabel(label)
    positive = rows.loc[rows["seconds"] > 0, "seconds"]
    if len(positive):
        axes.set_xscale("log")
        axes.set_xlim(positive.min() * 0.8, max(positive.max(), bound_s or 0) * 1.25)
        log_ticks(axes)
    percent(axes)
    if bound_s is not None:
        guide(axes, x=bound_s, text=f"SLO {bound_s:g} s")
