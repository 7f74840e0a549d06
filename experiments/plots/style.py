"""The look that all figures share, and how a figure is saved: PNG, SVG and the CSV behind it.

Colours are those of Okabe and Ito (2008), which readers with any colour vision can tell apart; lines also
differ in dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

RUN_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#000000", "#009E73", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
PHASE_COLOURS = {"prefill": "#E69F00", "decode": "#56B4E9", "mixed": "#009E73"}
TRANSFER_COLOUR = "#555555"
GUIDE_COLOUR = "#888888"

RC: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.hashsalt": "phasewise",
    "svg.fonttype": "none",
}


class Drawing(NamedTuple):
    """A figure and the numbers it shows."""

    figure: Figure
    table: pd.DataFrame


@contextmanager
def styled() -> Iterator[None]:
    """Every figure is drawn inside this block, so that a user's own settings stay as they are."""
    with mpl.rc_context(RC):
        yield


def save(drawing: Drawing, folder: Path, name: str) -> list[Path]:
    """Write ``name``.png, .svg and .csv into a folder that is there; equal drawings give equal files."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg", "csv")]
    with styled():
        drawing.figure.savefig(paths[0], metadata={"Software": None})
        drawing.figure.savefig(paths[1], metadata={"Date": None})
    drawing.table.to_csv(paths[2], index=False, lineterminator="\n")
    return paths


def run_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each run's line, by place."""
    return {
        name: {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "linestyle": DASHES[i % len(DASHES)], "label": name}
        for i, name in enumerate(names)
    }


def guide(axes: Axes, *, x: float | None = None, y: float | None = None, text: str = "") -> None:
    """A dotted reference line with a small label at its end; not where it lies outside the axes."""
    dots: dict[str, Any] = {"color": GUIDE_COLOUR, "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}
    small: dict[str, Any] = {"color": "#555555", "fontsize": 8, "annotation_clip": True, "in_layout": False}
    if x is not None:
        axes.axvline(x, **dots)
        axes.annotate(text, (x, 0), xycoords=axes.get_xaxis_transform(), xytext=(3, 4), textcoords="offset points",
                      rotation=90, va="bottom", ha="left", **small)  # fmt: skip
    if y is not None:
        axes.axhline(y, **dots)
        axes.annotate(text, (0, y), xycoords=axes.get_yaxis_transform(), xytext=(4, 3), textcoords="offset points",
                      va="bottom", ha="left", **small)  # fmt: skip


def log_ticks(axes: Axes, which: str = "x") -> None:
    """Plain numbers (0.1, 1, 10) on a logarithmic axis, and 2s and 5s between them if it is short."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    subs: tuple[float, ...] = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_columns(count: int, most: int = 7) -> int:
    """Of a legend above a wide figure, in rows of about the same length."""
    return -(-count // -(-count // most))


def percent(axes: Axes) -> None:
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value * 100:.0f}"))
