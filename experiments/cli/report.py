"""``phasewise report``: a result as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="what run, compare, sweep, goodput or plan wrote with --out")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="default: DIR/report.html")] = None,
) -> None:
    """Write one HTML file to pass on: headline, tables that sort, charts that zoom, where the figures come from.

    It needs no network and no phasewise to be read.
    """
    from experiments.reports.page import write_report

    print(write_report(folder, out or folder / "report.html"))
