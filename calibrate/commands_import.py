"""``phasewise calibrate import FORMAT PATH --out FILE``: other projects' public measurements as a profile."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.cost import Profile

FORMATS = {
    "aiconfigurator": "a system's folder of NVIDIA aiconfigurator's data, e.g. h100_sxm",
    "csv": "your own step times: batch,seq_len,phase,latency_ms (prefill and decode), with --gpu and --model",
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
    gpu: Annotated[str | None, typer.Option(help="csv: the GPU that the times are of")] = None,
    model: Annotated[str | None, typer.Option(help="csv: the model, or the path of its config.json")] = None,
    tp: Annotated[int | None, typer.Option(help="csv: tensor parallelism (1)")] = None,
    dtype: Annotated[str | None, typer.Option(help="csv: of the weights, if not the model's own")] = None,
) -> None:
    """Turn another project's measurements, or your own step times, into a profile."""
    from calibrate.profile.file import write_profile
    from sim.types import ConfigError

    stated = {"gpu": gpu, "model": model, "tp": tp, "dtype": dtype}
    given = {name: value for name, value in stated.items() if value is not None}
    if format_ == "csv":
        _import_own(path, out, given)
        return
    if given:
        raise ConfigError(f"--{next(iter(given))}: {format_} says it itself; leave it out")
    profile = imported(format_, path, network)
    write_profile(profile, out)
    models = sorted({getattr(part, "model", "any dense model") for part in profile.parts})
    gpus = sorted({gpu for part in profile.parts for gpu in part.gpus})
    print(f"{out}: {profile.name}: {', '.join(models)} on {', '.join(gpus)}")


def _import_own(path: Path, out: Path, stated: Mapping[str, Any]) -> None:
    from calibrate.importers.plausible import check_units
    from calibrate.importers.steps import import_csv
    from calibrate.profile.file import write_profile

    found = import_csv(path, **{"gpu": None, "model": None, **stated})
    write_profile(check_units(found.profile, path), out, samples=found.samples)
    (form,) = found.profile.polynomials
    print(f"{out}: {found.profile.name}: {form.model} on {', '.join(form.gpus)}, tp {form.tp}")
    for phase in ("prefill", "decode"):
        held = form.held_out.get(phase)
        told = "one point: no error can be told"
        if held is not None:
            told = f"each point by the others: off by {held.mape:.1%} on average, {held.largest:.1%} at most"
        print(f"{phase}: {told}")
    print(f"figures: phasewise calibrate report {out} --out DIR")


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
