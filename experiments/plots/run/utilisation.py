"""What share of the makespan each replica computes, by phase."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.run.timeline import lane_name
from experiments.plots.style import PHASE_COLOURS, Drawing, styled
from experiments.runs.rundir import Run

BAR_HEIGHT = 0.66


def utilisation(runs: Mapping[str, Run]) -> Drawing:
    """A bar per replica and run: the mean busy share of its stages, split by what the batches held."""
    table = utilisation_table(runs)
    most = max((len(run.replicas) for run in runs.values()), default=1)
    with styled():
        figure = Figure(figsize=(max(4.2 * len(runs), 6), 1.7 + 0.42 * most), layout="constrained")
        for axes, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
            _draw(axes, table[table["run"] == name], run)
            axes.set_title(name)
        figure.axes[0].set_ylabel("replica")
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles))
    return Drawing(figure, table)


def utilisation_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Columns run, replica, row (its place), phase, share of the makespan.

    The engine notes how long a stage was busy, not with what: that time is split as the durations of the batches are,
    which with a pipeline overlap.
    """
    rows = []
    for name, run in runs.items():
        makespan_s = float(run.summary["makespan_s"])
        spent = _seconds_by_phase(run)
        for place, (replica, stages) in enumerate(run.replicas[["replica", "stage_busy_s"]].to_numpy().tolist()):
            by_phase = spent.get(replica, {})
            total_s = sum(by_phase.values())
            busy = float(np.mean(stages)) / makespan_s if makespan_s > 0 else 0.0
            for phase in PHASE_COLOURS:
                share = busy * by_phase.get(phase, 0.0) / total_s if total_s else 0.0
                rows.append((name, replica, place, phase, share))
    return pd.DataFrame(rows, columns=["run", "replica", "row", "phase", "share"])


def _seconds_by_phase(run: Run) -> dict[str, dict[str, float]]:
    steps = run.steps
    prompts, decodes = steps["prefill_tokens"] > 0, steps["decode_seqs"] > 0
    phase = np.select([prompts & decodes, prompts], ["mixed", "prefill"], "decode")
    seconds = (steps["end_s"] - steps["start_s"]).groupby([steps["replica"], phase]).sum()
    found: dict[str, dict[str, float]] = {}
    for replica, kind, value in seconds.rename("s").reset_index().to_numpy().tolist():
        found.setdefault(replica, {})[kind] = value
    return found


def _draw(axes: Axes, table: pd.DataFrame, run: Run) -> None:
    left = np.zeros(len(run.replicas))
    for phase, colour in PHASE_COLOURS.items():
        share = table[table["phase"] == phase]["share"].to_numpy(dtype=float)
        if share.any():
            axes.barh(range(len(share)), share * 100, left=left, height=BAR_HEIGHT, color=colour, label=phase)
        left = left + share * 100
    for place, total in enumerate(left):
        axes.annotate(
            f"{total:.0f}", (total, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    names = [lane_name(row) for row in run.replicas.itertuples()]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("share of the makespan (%)")
