"""All figures of one or several runs into one folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.plots.run.attainment import attainment_by_scale
from experiments.plots.run.latency import latency_cdfs
from experiments.plots.run.links import link_use
from experiments.plots.run.occupancy import occupancy
from experiments.plots.run.overview import overview
from experiments.plots.run.timeline import Window, gpu_timeline
from experiments.plots.run.utilisation import utilisation
from experiments.plots.style import Drawing, save
from experiments.runs.rundir import Run
from sim.types import Slo


def save_all(
    runs: Mapping[str, Run], folder: Path, *, name: str, slo: Slo | None = None, window_s: Window | None = None
) -> list[Path]:
    """Write every figure (PNG, SVG, CSV) into a folder that is there; the SLO is the first run's unless given."""
    first = next(iter(runs.values()))
    slo = slo or slo_of(first)
    title = headline(name, first)
    return [path for stem, drawing in drawings(runs, slo, title, window_s) for path in save(drawing, folder, stem)]


def drawings(
    runs: Mapping[str, Run], slo: Slo, title: str, window_s: Window | None = None
) -> Iterator[tuple[str, Drawing]]:
    """(file name, drawing) of every figure, one at a time."""
    yield "overview", overview(runs, slo, title)
    yield "latency-cdf", latency_cdfs(runs, slo)
    yield "slo-attainment", attainment_by_scale(runs, slo)
    yield "kv-and-queue", occupancy(runs)
    yield "utilisation", utilisation(runs)
    for name, run in runs.items():
        stem = re.sub(r"[^a-z0-9.]+", "-", name.lower())
        yield f"timeline-{stem}", gpu_timeline(run, window_s)
        if len(run.links):
            yield f"links-{stem}", link_use(run)


def headline(name: str, run: Run) -> str:
    """What was run on what, for a figure's title."""
    gpus = " + ".join(f"{count} {gpu}" for gpu, count in run.summary["gpus"].items())
    return f"{name}: {run.summary['model']} on {gpus}, {run.summary['workload']['rate_per_s']:.3g} requests/s"


def slo_of(run: Run) -> Slo:
    """The targets a run's summary was made with."""
    classes = {name: _slo(part["slo"]) for name, part in run.summary.get("classes", {}).items()}
    return replace(_slo(run.summary["slo"]), classes=classes)


def _slo(figures: Mapping[str, Any]) -> Slo:
    return Slo(ttft_s=figures["ttft_s"], tpot_s=figures["tpot_s"], e2e_s=figures["e2e_s"], attainment=figures["target"])
