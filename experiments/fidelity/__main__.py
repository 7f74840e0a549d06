"""``python -m experiments.fidelity --data DIR --out DIR``: every study, one table.

``--docs FILE`` also writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from experiments.fidelity import report
from experiments.fidelity.cases import (
    crossed,
    decode_steps,
    kv_bound,
    left_out,
    links,
    memory,
    placements,
    served,
    tables,
)
from experiments.fidelity.table import Study
from sim.types import ConfigError

STUDIES: dict[str, Callable[[Path], Study]] = {
    "llmservingsim": kv_bound.study,
    "gpullm": decode_steps.study,
    "vllm-ppd": placements.study,
    "aiconfigurator": served.study,
    "splitwise": tables.splitwise,
    "helix": tables.helix,
    "models": crossed.models,
    "gpus": crossed.gpus,
    "steps": left_out.steps,
    "older": left_out.older,
    "links": links.study,
    "memory": memory.study,
}


def main(
    data: Annotated[Path, typer.Option(help="the folder of public data (it has measured/ in it)")],
    out: Annotated[Path, typer.Option(help="folder for tables and plots")],
    docs: Annotated[Path | None, typer.Option(help="write the page here as well")] = None,
) -> None:
    """Compare predictions with real runs; print the bars, save everything."""
    try:
        if not (data / "measured").is_dir():
            raise ConfigError(f"{data}: has no folder measured; give the folder of public data")
        studies = []
        for name, study in STUDIES.items():
            typer.echo(f"{name} ...", err=True)
            studies.append(study(data / "measured"))
    except (ConfigError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(report.bars_frame(studies).to_string(index=False))
    for path in report.save(studies, out):
        typer.echo(f"wrote {path}", err=True)
    if docs is not None:
        docs.write_text(report.markdown(studies), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
