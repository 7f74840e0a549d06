"""What every replica does when: a lane each, prefill and decode in colour, KV transfers as lines between lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.plots.style import PHASE_COLOURS, TRANSFER_COLOUR, Drawing, styled
from experiments.runs.rundir import Run

Window = tuple[float, float]
WINDOW_S = 12.0
LANE_HEIGHT = 0.62
COLUMNS = (
    "kind", "replica", "target", "start_s", "end_s", "iterations", "prefill_tokens", "decode_seqs", "request", "bytes",
)  # fmt: skip


def gpu_timeline(run: Run, window_s: Window | None = None) -> Drawing:
    """One run between two times (seconds); by default the 12 seconds with the most prompt tokens."""
    window = window_s or busiest_window(run)
    table = timeline_table(run, window)
    with styled():
        figure = Figure(figsize=(12, 1.9 + 0.42 * len(run.replicas)), layout="constrained")
        axes = figure.subplots()
        draw_timeline(axes, run, table, window)
        axes.set_title(f"GPU timeline: {run.name}")
        handles = legend_handles(table)
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return Drawing(figure, table)


def busiest_window(run: Run, length_s: float = WINDOW_S) -> Window:
    """The window of this length in which most prompt tokens are computed."""
    steps = run.steps[run.steps["prefill_tokens"] > 0]
    if steps.empty:
        return (0.0, length_s)
    starts = np.sort(steps["start_s"].to_numpy(dtype=float))
    order = np.argsort(steps["start_s"].to_numpy(dtype=float), kind="stable")
    tokens = (steps["prefill_tokens"] * steps["iterations"]).to_numpy(dtype=float)[order]
    total = np.concatenate([[0.0], np.cumsum(tokens)])
    inside = total[np.searchsorted(starts, starts + length_s, side="right")] - total[:-1]
    start = float(starts[int(inside.argmax())])
    return (start, start + length_s)


def timeline_table(run: Run, window: Window) -> pd.DataFrame:
    """Columns kind (prefill, decode, mixed, transfer), replica, target, start_s, end_s, and the work or bytes."""
    steps = _inside(run.steps, window)
    prompts, decodes = steps["prefill_tokens"] > 0, steps["decode_seqs"] > 0
    kind = np.select([prompts & decodes, prompts], ["mixed", "prefill"], "decode")
    busy = steps.assign(kind=kind)
    moved = _inside(run.links, window).rename(columns={"source": "replica"}).assign(kind="transfer")
    parts = [part.reindex(columns=list(COLUMNS)).astype(object) for part in (busy, moved) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))


def draw_timeline(axes: Axes, run: Run, table: pd.DataFrame, window: Window) -> None:
    """One panel from the table of ``timeline_table``; the first replica is on top."""
    lanes = {str(name): place for place, name in enumerate(run.replicas["replica"])}
    for kind, colour in PHASE_COLOURS.items():
        for replica, rows in table[table["kind"] == kind].groupby("replica", sort=False):
            spans = [(float(a), float(b) - float(a)) for a, b in zip(rows["start_s"], rows["end_s"], strict=True)]
            place = (lanes[str(replica)] - LANE_HEIGHT / 2, LANE_HEIGHT)
            axes.broken_barh(spans, place, facecolors=colour, linewidth=0)
    axes.add_collection(_transfer_lines(table, lanes))
    axes.set_xlim(*window)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_yticks(list(lanes.values()), [lane_name(row) for row in run.replicas.itertuples()])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("simulated time (s)")
    axes.set_ylabel("replica")


def legend_handles(table: pd.DataFrame) -> list[Any]:
    """What the panel shows, and no more."""
    shown = set(table["kind"])
    handles: list[Any] = [Patch(color=colour, label=kind) for kind, colour in PHASE_COLOURS.items() if kind in shown]
    if "transfer" in shown:
        handles.append(Line2D([], [], color=TRANSFER_COLOUR, linewidth=1, label="KV transfer"))
    return handles


def _transfer_lines(table: pd.DataFrame, lanes: dict[str, int]) -> LineCollection:
    """From the sending lane's edge at the start to the receiving lane's edge at the end."""
    lines = []
    moves = table[table["kind"] == "transfer"]
    for source, target, start_s, end_s in moves[["replica", "target", "start_s", "end_s"]].to_numpy().tolist():
        if source in lanes and target in lanes:
            a, b = lanes[source], lanes[target]
            edge = LANE_HEIGHT / 2 * (1 if b > a else -1)
            lines.append([(start_s, a + edge), (end_s, b - edge)])
    return LineCollection(lines, colors=TRANSFER_COLOUR, linewidths=0.8, alpha=0.75, zorder=3)


def _inside(table: pd.DataFrame, window: Window) -> pd.DataFrame:
    return table[(table["end_s"] >= window[0]) & (table["start_s"] <= window[1])]


def lane_name(row: Any) -> str:
    """A row of the table of replicas, as a tick label."""
    pipeline = f" PP{row.pp}" if row.pp > 1 else ""
    return f"{row.replica}\n{row.gpu} TP{row.tp}{pipeline}"
