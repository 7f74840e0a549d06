"""``phasewise calibrate import FORMAT PATH --out FILE``: other projects' public measurements as a profile."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sim.cost import Profile

FORMATS = {
    "aiconfigurator": "a system's folder of NVIDIA aiconfigurator's data, e.g. h100_sxm",
    "distserve": "DistServe's fit file, e.g. profiler-a100-80g.distserve.json",
    "helix": "Helix's folder simulator/model_manager",
    "llmservingsim": "a GPU's folder of LLMServingSim's profiles, e.g. RTX4090",
    "splitwise-sim": "Splitwise's perf_model.csv",
    "vidur": "a device's folder of Vidur's data/profiling/compute, e.g. a100",
}
"""Each with what PATH is."""
HELP = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())


def register(app: typer.Typer) -> None:
    app.command(name="import")(import_)


def import_(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help=", ".join(FORMATS))],
    path: Annotated[Path, typer.Argument(metavar="PATH", help=HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the profile to write (JSON)")],
    network: Annotated[Path | None, typer.Option(metavar="DIR", help="vidur: folder that holds all_reduce.csv")] = None,
) -> None:
    """Turn another project's measurements into a profile."""
    from calibrate.profile.file import write_profile

    profile = imported(format_, path, network)
    write_profile(profile, out)
    models = sorted({getattr(part, "model", "any dense model") for part in profile.parts})
    gpus = sorted({gpu for part in profile.parts for gpu in part.gpus})
    print(f"{out}: {profile.name}: {', '.join(models)} on {', '.join(gpus)}")


def imported(format_: str, path: Path, network: Path | None = None) -> Profile:
    """The profile of the files at ``path``; ``ConfigError`` names the file, what is amiss with it, and the mend."""
    from calibrate.importers.plausible import check_units
    from sim.cluster import did_you_mean
    from sim.types import ConfigError

    if format_ not in FORMATS:
        raise ConfigError(f"FORMAT: {did_you_mean(format_, list(FORMATS))}")
    if network is not None and format_ != "vidur":
        raise ConfigError(f"--network: {format_} has no such files; leave it out")
    if not path.exists():
        raise ConfigError(f"{path}: is not there; give {FORMATS[format_]}")
    name = "splitwise" if format_ == "splitwise-sim" else format_
    importer = getattr(import_module(f"calibrate.importers.{name}"), f"import_{name}")
    return check_units(importer(path, network) if network is not None else importer(path), path)
