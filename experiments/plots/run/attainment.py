"""SLO attainment as every bound is tightened or relaxed by the same factor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.style import Drawing, guide, log_ticks, percent, run_styles, styled
from experiments.runs.rundir import Run
from sim.metrics import attainment_curve
from sim.types import Slo

SCALES = tuple(round(float(scale), 4) for scale in np.geomspace(0.125, 8, 61))


def attainment_by_scale(runs: Mapping[str, Run], slo: Slo) -> Drawing:
    """One line per run; the target share and the SLO itself (scale 1) dotted."""
    table = attainment_table(runs, slo)
    with styled():
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axes = figure.subplots()
        draw_attainment(axes, table, slo)
        axes.legend(loc="lower right")
    return Drawing(figure, table)


def attainment_table(runs: Mapping[str, Run], slo: Slo) -> pd.DataFrame:
    """Columns run, slo_scale, attainment (a share of all requests)."""
    parts = []
    for name, run in runs.items():
        columns = {column: run.requests[column].to_numpy() for column in run.requests.columns}
        shares = attainment_curve(columns, slo, SCALES)
        parts.append(pd.DataFrame({"run": name, "slo_scale": SCALES, "attainment": shares}))
    return pd.concat(parts, ignore_index=True)


def draw_attainment(axes: Axes, table: pd.DataFrame, slo: Slo) -> None:
    """One panel from the table of ``attainment_table``."""
    for name, style in run_styles(table["run"].unique()).items():
        line = table[table["run"] == name]
        axes.plot(line["slo_scale"], line["attainment"], **style)
    axes.set_xscale("log")
    axes.set_xlim(SCALES[0], SCALES[-1])
    log_ticks(axes)
    percent(axes)
    axes.set_title("SLO attainment")
    bounds = [f"{name.upper()} {value:g} s" for name in ("ttft", "tpot", "e2e") if (value := getattr(slo, f"{name}_s"))]
    axes.set_xlabel(f"SLO scale (1 = {', '.join(bounds) or 'completion'})")
    axes.set_ylabel("requests within SLO (%)")
    guide(axes, y=slo.attainment, text=f"target {slo.attainment:.0%}")
    guide(axes, x=1.0, text="")
