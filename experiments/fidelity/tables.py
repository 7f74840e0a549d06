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
    return Study(
        title="Splitwise's steps, ten random 80:20 splits",
        rows=(),
        bars=tuple(_bar(SPLITWISE, profile, name, 0.03, 0.02) for name in ("prefill", "decode")),
        notes=("mean over the six pairs of model, GPU and TP degree; steps by one prompt, decodes by batch",),
    )


def helix(measured: Path) -> Study:
    """Held-out error of Helix's layers."""
    profile = import_helix(measured / "helix/simulator/model_manager")
    return Study(
        title="Helix's per-layer times, ten random 80:20 splits",
        rows=(),
        bars=tuple(_bar(HELIX, profile, name, 0.05, 0.03) for name in ("prefill", "decode")),
        notes=("mean over fourteen pairs of model and machine; the file rounds to whole ms",),
    )


def _bar(study: str, profile: Profile, name: str, must: float, aim: float) -> Bar:
    held = [entry.held_out[name] for entry in profile.entries]
    value = float(np.average([part.mape for part in held], weights=[part.points for part in held]))
    return Bar(
        study=study, name=f"{name}, MAPE", value=value, must=must, aim=aim, points=sum(part.points for part in held)
    )
