"""KV traffic between replicas over time, as a heat map: a row per sender and receiver."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.plots.style import Drawing, styled
from experiments.runs.rundir import Run

BINS = 120
MOST_PAIRS = 40
GB = 1e9


def link_use(run: Run) -> Drawing:
    """One run; rows are the pairs that moved KV, by name, no more than the 40 that moved most."""
    table = link_table(run)
    pairs = list(dict.fromkeys(table["pair"]))
    moved = table.groupby("pair")["bytes"].sum().reindex(pairs)
    shown = [pair for pair in pairs if pair in set(moved.nlargest(MOST_PAIRS).index)]
    with styled():
        figure = Figure(figsize=(12, 2.2 + 0.27 * max(len(shown), 1)), layout="constrained")
        axes = figure.subplots()
        title = f"KV traffic: {run.name}"
        axes.set_title(
            title if len(shown) == len(pairs) else f"{title} (the {len(shown)} busiest of {len(pairs)} pairs)"
        )
        axes.set_xlabel("simulated time (s)")
        axes.set_ylabel("sender > receiver")
        axes.grid(visible=False)
        if shown:
            grid = table.pivot_table(index="pair", columns="start_s", values="bytes_per_s", sort=False).loc[shown] / GB
            edges = np.append(np.sort(table["start_s"].unique()), table["end_s"].max())
            mesh = axes.pcolormesh(edges, np.arange(len(shown) + 1), grid.to_numpy(), cmap="cividis", vmin=0)
            axes.set_ylim(len(shown), 0)
            axes.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=8)
            figure.colorbar(mesh, ax=axes, label="KV (GB/s)", pad=0.01)
        else:
            axes.text(0.5, 0.5, "no KV was moved", transform=axes.transAxes, ha="center", va="center", color="#555555")
            axes.set(xticks=[], yticks=[])
    return Drawing(figure, table)


def link_table(run: Run, bins: int = BINS) -> pd.DataFrame:
    """Columns pair, start_s, end_s, bytes, bytes_per_s: what each pair moved in each of equal intervals.

    A transfer's bytes are spread evenly from its start to its end; what it shared, and when, is not recorded.
    """
    columns = ["pair", "start_s", "end_s", "bytes", "bytes_per_s"]
    links = run.links
    if links.empty:
        return pd.DataFrame(columns=columns)
    edges = np.linspace(0.0, float(links["end_s"].max()), bins + 1)
    parts = []
    for pair, rows in sorted(links.groupby(links["source"] + " > " + links["target"])):
        moved = np.diff(
            _sent_until(edges, *(rows[name].to_numpy(dtype=float) for name in ("start_s", "end_s", "bytes")))
        )
        rate = moved / np.diff(edges)
        parts.append(
            pd.DataFrame(dict(zip(columns, (pair, edges[:-1], edges[1:], moved, rate), strict=True)), columns=columns)
        )
    return pd.concat(parts, ignore_index=True)


def _sent_until(
    times: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64], size: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bytes that have left by each time."""
    total = np.zeros(len(times))
    for a, b, amount in zip(start, end, size, strict=True):
        total += amount * (np.clip((times - a) / (b - a), 0.0, 1.0) if b > a else times >= b)
    return total
