"""KV blocks in use and requests waiting, over time, by replica role."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.plots.style import PHASE_COLOURS, Drawing, percent, styled
from experiments.runs.rundir import Run

POINTS = 400
PANELS = {"kv_use": "KV blocks in use (%)", "waiting": "requests waiting"}


def occupancy(runs: Mapping[str, Run]) -> Drawing:
    """A column per run: KV use above, queue below; lines are means over a role's replicas, bands their range."""
    table = occupancy_table(runs)
    with styled():
        figure = Figure(figsize=(max(4.2 * len(runs), 6), 5.2), layout="constrained")
        grid = figure.subplots(len(PANELS), len(runs), sharex="col", sharey="row", squeeze=False)
        for column, name in zip(grid.T, runs, strict=True):
            for axes, panel in zip(column, PANELS, strict=True):
                _draw(axes, table[table["run"] == name], panel)
            column[0].set_title(name)
            column[-1].set_xlabel("simulated time (s)")
        for axes, (panel, label) in zip(grid[:, 0], PANELS.items(), strict=True):
            axes.set_ylabel(label)
            if panel == "kv_use":
                percent(axes)
            else:
                axes.set_ylim(bottom=0)
        handles = {
            label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles))
    return Drawing(figure, table)


def occupancy_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Columns run, role, time_s, and mean, least and most of kv_use (a share) and waiting over the role's replicas."""
    parts = []
    for name, run in runs.items():
        if run.memory.empty:
            continue
        times = np.linspace(0.0, float(run.memory["time_s"].max()), POINTS)
        for role, members in run.replicas.groupby("role", sort=False):
            samples = [_sampled(run.memory[run.memory["replica"] == replica], times) for replica in members["replica"]]
            columns: dict[str, object] = {"run": name, "role": role, "time_s": times}
            for place, panel in enumerate(PANELS):
                values = np.array([sample[place] for sample in samples])
                columns |= {panel: values.mean(0), f"{panel}_least": values.min(0), f"{panel}_most": values.max(0)}
            parts.append(pd.DataFrame(columns))
    names = [f"{panel}{end}" for panel in PANELS for end in ("", "_least", "_most")]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run", "role", "time_s", *names])


def _sampled(rows: pd.DataFrame, times: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KV use and queue as they stand at each time; empty before the first row."""
    place = np.searchsorted(rows["time_s"].to_numpy(dtype=float), times, side="right")
    use = (rows["used_blocks"] / rows["total_blocks"]).to_numpy(dtype=float)
    waiting = rows["waiting"].to_numpy(dtype=float)
    return np.concatenate([[0.0], use])[place], np.concatenate([[0.0], waiting])[place]


def _draw(axes: Axes, table: pd.DataFrame, panel: str) -> None:
    for role, rows in table.groupby("role", sort=False):
        colour = PHASE_COLOURS[str(role)]
        axes.plot(rows["time_s"], rows[panel], color=colour, label=f"{role} replicas", linewidth=1.4)
        axes.fill_between(
            rows["time_s"], rows[f"{panel}_least"], rows[f"{panel}_most"], color=colour, alpha=0.25, linewidth=0
        )
