"""Where a run's step times come from: for each kind of stage the profile, its source and its held-out errors."""

from __future__ import annotations

from typing import Any

from sim.cost import Fitted
from sim.policy import Problem
from sim.record import Result
from sim.types import Stage


def step_times(problem: Problem, result: Result) -> list[dict[str, Any]]:
    """A row a kind of stage (``gpu``, ``tp``) that was up.

    ``basis``: measured, predicted (a relative's kernels, scaled by specification) or roofline. ``held_out``: by
    operator the mean and the largest error where the fit did not see the times, and at how many points.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for replica in result.rows.replicas:
        names, place = replica.gpus.split(), 0
        for tp in replica.stage_tp:
            gpus, place = tuple(names[place : place + tp]), place + tp
            kind = " + ".join(dict.fromkeys(problem.cluster.gpu(gpu).name for gpu in gpus))
            if (kind, tp) not in rows:
                stage = Stage(name=replica.replica, gpus=gpus, first_layer=0, end_layer=problem.model.num_layers)
                rows[kind, tp] = {"gpu": kind, "tp": tp, **_origin(problem, stage)}
    return list(rows.values())


def _origin(problem: Problem, stage: Stage) -> dict[str, Any]:
    found = problem.cost.origin(problem.model, stage, problem.cluster) if isinstance(problem.cost, Fitted) else None
    if found is None:
        source = "data sheet and typical efficiencies"
        return {"basis": "roofline", "profile": None, "engine": None, "source": source, "held_out": {}}
    profile, part = found
    return {
        "basis": "predicted" if getattr(part, "predicted", False) else "measured",
        "profile": profile.name,
        "engine": profile.provenance.engine,
        "source": profile.provenance.source,
        "held_out": {
            operator: {"mape": error.mape, "largest": error.largest, "points": error.points}
            for operator, error in part.held_out.items()
        },
    }
