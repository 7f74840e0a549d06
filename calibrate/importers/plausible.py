"""Whether imported times can be in the unit that their format has: those a thousand times off the roofline cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sim.cluster import Cluster
from sim.cost import Fitted, Kernels, Overhead, Profile, Roofline, StageCost, seconds
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.types import ConfigError, Stage, Work

BOUNDS = (0.1, 100.0)
"""Of the roofline's time. The shipped profiles take 0.7 to 6 times as long; a wrong unit is a factor of 1,000."""
STEPS = {"a decode of 1 sequence": Work((), 1, 128), "a prompt of 1,024 tokens": Work(((1024, 0),), 0, 0)}
ANY_MODEL = "llama-3.1-8b"
"""What kernel tables, which make up any model, are tried with."""


def check_units(profile: Profile, path: Path) -> Profile:
    """The profile; ``ConfigError`` if a step of one of its parts is too far from its GPU's roofline."""
    for part in profile.parts:
        name, tp = (ANY_MODEL, 1) if isinstance(part, Kernels) else (part.model, part.tp)
        spec = replace(find_model(name), dtype=part.dtypes[0])
        for gpu in part.gpus:
            measured, guess = _bound(profile, gpu, tp, spec)
            for what, work in STEPS.items():
                ours, roofline = seconds(measured, work), seconds(guess, work)
                if not BOUNDS[0] <= ours / roofline <= BOUNDS[1]:
                    raise ConfigError(
                        f"{path}: {what} of {name} takes {ours:.3g} s on {tp} {gpu}, {roofline:.3g} s by the roofline; "
                        "are the times in the unit that the format has (s, ms, us)?"
                    )
    return profile


def _bound(profile: Profile, gpu: str, tp: int, spec: ModelSpec) -> tuple[StageCost, StageCost]:
    cluster = Cluster.of([{"gpu": gpu, "count": tp}])
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    fitted = Fitted(profiles=(profile,), overhead=Overhead()).bind(spec, stage, cluster)
    return fitted, Roofline(overhead_s=0.0).bind(spec, stage, cluster)
