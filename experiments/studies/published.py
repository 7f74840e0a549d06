"""What the studies share: a published figure beside ours, written as CSV, Markdown and a plot.

A study is a list of ``Comparison``; ``write`` puts it under a name into a folder. Nothing is tuned to
fit: what differs stays in the table, with the reason where we know it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from experiments.plots.style import GUIDE_COLOUR, RUN_COLOURS, Drawing, log_ticks, save, styled
from experiments.runs.progress import Log
from traces.write import replacing

Kind = Literal["exact", "ratio", "direction", "aim"]
Basis = Literal["arithmetic", "measured profile", "roofline", "splitwise-sim's model"]
MARKS: dict[Basis, str] = {"arithmetic": "s", "measured profile": "o", "roofline": "^", "splitwise-sim's model": "D"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One published figure and ours. ``published`` is a number where one was printed; ``text``: what was printed."""

    where: str
    """Table or figure of the paper."""
    what: str
    unit: str
    kind: Kind
    basis: Basis
    """Where our step times come from."""
    published: float | None
    ours: float | None
    text: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        if not self.published or self.ours is None or not isfinite(self.ours):
            return None
        return self.ours / self.published


def row(
    where: str, what: str, published: float | None, ours: float | None, unit: str, basis: Basis = "roofline",
    *, kind: Kind = "ratio", text: str = "", note: str = "",
) -> Comparison:  # fmt: skip
    """A ``Comparison`` in the order in which one says it."""
    return Comparison(
        where=where, what=what, unit=unit, kind=kind, basis=basis, published=published, ours=ours, text=text, note=note
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study as a command. ``sizes``: option, (what ``rows`` gets for it, help); "" is the one without an option."""

    name: str
    title: str
    intro: str
    sizes: Mapping[str, tuple[Any, str]]
    rows: Callable[[Any, Log, Path | None], Iterable[Comparison]]
    """Given the size, the log, and the file of ``--cache``."""
    cached: bool = False

    def main(self, arguments: Sequence[str] | None = None) -> None:
        given = self._parser().parse_args(arguments)
        rows = list(self.rows(given.size, Log(), given.cache if self.cached else None))
        write(given.out, self.name, self.title, self.intro, rows)

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=self.title)
        files = f"folder for {self.name}.md, .csv, .png and .svg"
        parser.add_argument("--out", type=Path, required=True, help=files)
        parser.set_defaults(size=self.sizes[""][0])
        group = parser.add_mutually_exclusive_group()
        for option, (size, text) in self.sizes.items():
            if option:
                group.add_argument(f"--{option}", action="store_const", const=size, dest="size", help=text)
        if self.cached:
            text = "file that keeps what was found, so that an interrupted study goes on; delete it after changes"
            parser.add_argument("--cache", type=Path, default=None, help=text)
        return parser


def table(rows: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame([{**asdict(row), "ratio": row.ratio} for row in rows])


def write(folder: Path, name: str, title: str, intro: str, rows: Sequence[Comparison]) -> list[Path]:
    """``name``.md, .csv, .png and .svg, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = save(_drawn(title, rows), folder, name)
    page = folder / f"{name}.md"
    with replacing(page) as partial:
        partial.write_text(markdown(name, title, intro, rows), encoding="utf-8")
    return [page, *paths]


def markdown(name: str, title: str, intro: str, rows: Sequence[Comparison]) -> str:
    """The page: what was run, the table, the plot."""
    lines = [f"# {title}", "", intro.strip(), "", f"![ours over published]({name}.png)", ""]
    lines += [
        "| Where | What | Published | Ours | Ours / published | Step times | Note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = row.text or _number(row.published, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = [row.where, row.what, published, _number(row.ours, row.unit), ratio, row.basis, row.note]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "none found"
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{text}{unit}" if unit == "x" else f"{text} {unit}".strip()


def _drawn(title: str, rows: Sequence[Comparison]) -> Drawing:
    """Ours over published, one line each, on a logarithmic axis; rows without a ratio above 0 are left out."""
    shown = [row for row in rows if row.ratio is not None and row.ratio > 0]
    with styled():
        figure = Figure(figsize=(10, 1.6 + 0.27 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(1 / 1.15, 1.15, color="#f0f0f0", zorder=0, label="within 15 %")
        axes.axvline(1, color=GUIDE_COLOUR, linewidth=1)
        for colour, (basis, mark) in zip(RUN_COLOURS, MARKS.items(), strict=False):
            points = [(row.ratio, place) for place, row in enumerate(shown) if row.basis == basis]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, marker=mark, color=colour, s=36, label=basis, zorder=3)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45), max(high, 2.2))
        log_ticks(axes)
        axes.set_yticks(range(len(shown)), [f"{row.where}: {row.what}" for row in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("ours / published")
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold")
        figure.legend(loc="outside lower right", ncols=4, fontsize=8)
    return Drawing(figure, table(rows))
