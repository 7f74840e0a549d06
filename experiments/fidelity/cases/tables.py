"""Published step tables: how well their profiles foretell rows that the fit did not see (Splitwise, Helix)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrate.importers.helix import import_helix
from calibrate.importers.splitwise import import_splitwise
from experiments.fidelity.table import Bar, Study
from sim.cost import Profile

SPLITWISE, HELIX = "splitwise", "helix"


def splitwise(measured: Path) -> Study:
    """Held-out error of Splitwise's steps; ``measured``: the folder of real runs."""
    profile = import_splitwise(measured / "splitwise/perf_model.csv")
    title = "Splitwise's steps, ten random 80:20 splits"
    note = "mean over the six pairs of model, GPU and TP degree; steps by one prompt, decodes by batch"
    return _study(SPLITWISE, title, note, profile, must=0.03, aim=0.02)


def helix(measured: Path) -> Study:
    """Held-out error of Helix's layers."""
    profile = import_helix(measured / "helix/simulator/model_manager")
    title = "Helix's per-layer times, ten random 80:20 splits"
    note = "mean over fourteen pairs of model and machine; the file rounds to whole ms"
    return _study(HELIX, title, note, profile, must=0.05, aim=0.03)


def _study(name: str, title: str, note: str, profile: Profile, must: float, aim: float) -> Study:
    bars = tuple(_bar(name, profile, part, must, aim) for part in ("prefill", "decode"))
    return Study(title=title, rows=(), bars=bars, notes=(note,))


def _bar(study: str, profile: Profile, name: str, must: float, aim: float) -> Bar:
    held = [entry.held_out[name] for entry in profile.entries]
    value = float(np.average([part.mape for part in held], weights=[part.points for part in held]))
    return Bar(
        study=study, name=f"{name}, MAPE", value=value, must=must, aim=aim, points=sum(part.points for part in held)
    )
