"""The error table as text, CSV and Markdown, and predicted against measured as plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.fidelity.table import Bar, Row, Study
from experiments.plots.style import styled

BAND = 0.10
INTRODUCTION = """# How far predictions are from real runs

Written by `python -m experiments.fidelity --data DIR --out DIR`, where DIR is the folder of public data
(every source is named in the profiles). Real runs judge; what they are compared with is fitted on kernel tables. The
constants that no kernel table gives are in `experiments/fidelity/constants.py`, each fitted on at most half of the
cells of one study. `python -m experiments.fidelity.unseen RUN_DIR` does the same for any run that is in no study, from
its metadata alone (`meta.json` with `requests.jsonl`, the JSON of `vllm bench serve --save-detailed`, or a report of
guidellm). Errors are shares of what was measured. *Load* is the share of time that the busiest replica computes in the
simulation; above 1 it is the time needed to serve the requests over the time in which they arrive.
"""


def bars_frame(studies: Sequence[Study]) -> pd.DataFrame:
    """One row per bar: study, figure, value, must, aim, points, verdict."""
    return pd.DataFrame([_bar_cells(bar) for study in studies for bar in study.bars])


def rows_frame(studies: Sequence[Study]) -> pd.DataFrame:
    """One row per measured figure, its prediction and error beside it."""
    return pd.DataFrame([_row_cells(row) for study in studies for row in study.rows])


def _bar_cells(bar: Bar) -> dict[str, object]:
    verdict = "aim" if bar.aimed else "reached" if bar.reached else "missed"
    return {
        "study": bar.study,
        "figure": bar.name,
        "value": _share(bar.value),
        "must": ("at least " if bar.floor else "") + _share(bar.must),
        "aim": ("at least " if bar.floor else "") + _share(bar.aim),
        "points": bar.points,
        "verdict": verdict,
    }


def _row_cells(row: Row) -> dict[str, object]:
    return {
        "study": row.study,
        "case": row.case,
        "metric": row.metric,
        "unit": row.unit,
        "measured": round(row.measured, 4),
        "predicted": round(row.predicted, 4),
        "error_percent": round(row.error * 100, 2),
        "load": None if row.load is None else round(row.load, 2),
        "use": row.use,
    }


def _share(value: float) -> str:
    return f"{value * 100:.2f} %"


def markdown(studies: Sequence[Study]) -> str:
    """The page: the bars, then every study with its notes and its summary or rows."""
    parts = [INTRODUCTION, "## Bars\n", table(bars_frame(studies)), ""]
    for study in studies:
        parts += [f"## {study.title}\n", *(f"- {note}" for note in study.notes), ""]
        if study.summary:
            parts += [table(pd.DataFrame(study.summary)), ""]
        elif study.rows:
            parts += [table(rows_frame([study]).drop(columns="study")), ""]
    return "\n".join(parts)


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns)]
    lines += [["" if pd.isna(value) else str(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scatter(study: Study, metric: str) -> Figure:
    """Predicted against measured with a +-10 % band."""
    with styled():
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot()
        rows = [row for row in study.rows if row.metric == metric]
        low = min(min(row.measured, row.predicted) for row in rows) * 0.8
        high = max(max(row.measured, row.predicted) for row in rows) * 1.25
        axes.fill_between(
            [low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)], alpha=0.15
        )
        axes.plot([low, high], [low, high], linewidth=1)
        for use, marker in (("judged", "o"), ("fitted", "x")):
            shown = [row for row in rows if row.use == use]
            if shown:
                axes.scatter(
                    [row.measured for row in shown], [row.predicted for row in shown], marker=marker, label=use, s=18
                )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set_xlabel(f"measured {metric} ({rows[0].unit})")
        axes.set_ylabel(f"predicted {metric} ({rows[0].unit})")
        axes.set_title(fill(study.title, 60), fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.legend()
    return figure


def save(studies: Sequence[Study], out: Path) -> list[Path]:
    """Write bars.csv, rows.csv, fidelity.md and a PNG and SVG per study and metric; the paths written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in (("bars.csv", bars_frame(studies)), ("rows.csv", rows_frame(studies))):
        frame.to_csv(out / name, index=False)
        written.append(out / name)
    (out / "fidelity.md").write_text(markdown(studies), encoding="utf-8")
    written.append(out / "fidelity.md")
    for study in studies:
        for metric in sorted({row.metric for row in study.rows if row.metric in ("TTFT", "TPOT")}):
            for kind in ("png", "svg"):
                path = out / f"{study.rows[0].study}-{metric.lower()}.{kind}"
                scatter(study, metric).savefig(path)
                written.append(path)
    return written
