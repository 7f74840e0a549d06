"""A share by system and rate, as a table whose cells are shaded."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.style import Drawing, styled

DARK = 0.6
"""Cells with a larger share have dark letters: the palette is light there."""


def heat(table: pd.DataFrame, title: str, label: str) -> Drawing:
    """Rows by columns (system by rate in requests/s, say), values shares; an empty cell is named "no plan"."""
    with styled():
        figure = Figure(figsize=(2.5 + 0.75 * len(table.columns), 1.3 + 0.34 * len(table)), layout="constrained")
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots()
        axes.imshow(table.to_numpy(float), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, values in enumerate(table.to_numpy(float)):
            for j, value in enumerate(values):
                known = value == value
                text = f"{value:.0%}" if known else "no plan"
                colour = "white" if known and value < DARK else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=9 if known else 7, color=colour)
        axes.set_xticks(range(len(table.columns)), [_shown(rate) for rate in table.columns])
        axes.set_yticks(range(len(table)), list(table.index))
        axes.set_xlabel(label)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return Drawing(figure, table.reset_index())


def shares(rows: pd.DataFrame, first: str, second: str, title: str) -> Drawing:
    """The mean attainment by two fields of a sweep's runs, over all else."""
    values = rows.assign(**{name: rows[name].map(_shown) for name in (first, second)})
    order = {name: list(dict.fromkeys(values.sort_index()[name])) for name in (first, second)}
    table = values.pivot_table(index=first, columns=second, values="attainment", aggfunc="mean", dropna=False)
    return heat(table.reindex(index=order[first], columns=order[second]), title, f"{second} (rows: {first})")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
