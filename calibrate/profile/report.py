"""What a profile knows and how well: its errors, its prices by shape, its rates, and its prices over another's.

All tables are data frames, one row a thing; ``experiments.plots.calibration`` draws them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from calibrate.profile.samples import Samples
from sim.cluster import gpu as find_gpu
from sim.cluster import gpus
from sim.cost import Grid, Kernels, Polynomial, Profile, ProfileEntry, Table, seconds
from sim.model import model as find_model
from sim.model import models
from sim.types import ConfigError, Stage, Work

COUNTS = tuple(2**power for power in range(15))
CONTEXTS = (0, 512, 2048, 8192)
TABLES = ("linear", "head", "collective")
GRIDS = ("attention_prefill", "attention_decode", "attention_mixed")
STEPS = ("step: one prompt", "step: decodes")
"""The sum of all operators that a profile has, and its engine's overhead if it has that."""
ANY_MODEL = "llama-3.1-8b"
"""What kernel tables are shown as, which make up any model."""


class Price(NamedTuple):
    """All layers' seconds of an operator at one shape: a number of tokens or sequences, each with this context.

    ``holds``: operators that its profile does not tell apart from it; of a step, those that it has, beside the layers.
    """

    model: str
    tp: int
    gpu: str
    operator: str
    holds: str
    number: int
    context: int
    seconds: float


# ---------------------------------------------------------------- errors


def errors(profile: Profile, samples: Sequence[Samples]) -> pd.DataFrame:
    """A row per operator: how many points, their noise, and the error on points that the fit did not see (shares)."""
    measured = {(part.operator, part.tp): part for part in samples}
    rows: list[dict[str, Any]] = []
    for part in profile.parts:
        name, tp = ("any dense", None) if isinstance(part, Kernels) else (part.model, part.tp)
        for operator in part.held_out or ("all",):
            held = part.held_out.get(operator)
            raw = measured.pop((operator, tp or 0), None)
            rows.append(
                {
                    "model": name,
                    "tp": tp,
                    "gpus": ", ".join(part.gpus),
                    "operator": operator,
                    "points": raw and len(raw.seconds),
                    "noise": raw and median(raw.noise),
                    "mape": held and held.mape,
                    "largest": held and held.largest,
                    "held_out": held and held.points,
                }
            )
    return pd.DataFrame([*rows, *(_raw_errors(part) for part in measured.values())])


def _raw_errors(part: Samples) -> dict[str, Any]:
    """Of an operator that no step is made of: by its samples alone."""
    pairs = [(guess, truth) for guess, truth in zip(part.predicted_s or (), part.medians_s, strict=False) if guess]
    shares = [abs(guess - truth) / truth for guess, truth in pairs]
    return {
        "model": None,
        "tp": part.tp,
        "gpus": None,
        "operator": part.operator,
        "points": len(part.seconds),
        "noise": median(part.noise),
        "mape": sum(shares) / len(shares) if shares else None,
        "largest": max(shares) if shares else None,
        "held_out": len(shares) or None,
    }


def predictions(samples: Sequence[Samples]) -> pd.DataFrame:
    """Measured and predicted seconds of every point that a fit could leave out."""
    rows = [
        (part.operator, part.tp, truth, guess)
        for part in samples
        for truth, guess in zip(part.medians_s, part.predicted_s or (), strict=False)
        if guess is not None
    ]
    return pd.DataFrame(rows, columns=["operator", "tp", "measured_s", "predicted_s"])


# ---------------------------------------------------------------- rates


def rates(samples: Sequence[Samples]) -> pd.DataFrame:
    """FLOP/s and bytes/s that every point achieved, where its arithmetic and traffic are known."""
    rows = [
        (part.operator, part.dtype, part.tp, flops / size, flops / spent, size / spent)
        for part in samples
        if part.flops and part.bytes
        for flops, size, spent in zip(part.flops, part.bytes, part.medians_s, strict=True)
        if flops > 0 and size > 0
    ]
    columns = ["operator", "dtype", "tp", "flops_per_byte", "flops_per_s", "bytes_per_s"]
    return pd.DataFrame(rows, columns=columns)


class Peaks(NamedTuple):
    """A device's roof. ``source``: measured there, or its data sheet."""

    flops_per_s: float
    bytes_per_s: float
    source: str


def peaks(profile: Profile, dtype: str) -> Peaks | None:
    """The device's best measured rates, else the catalogue's; None if neither is known."""
    device = profile.device
    if device is not None and device.bandwidth_bytes_per_s is not None and dtype in device.flops:
        return Peaks(device.flops[dtype], device.bandwidth_bytes_per_s, "measured")
    name = device.gpu if device is not None else profile.parts[0].gpus[0]
    if name.lower() not in {entry.name.lower() for entry in gpus()}:
        return None
    entry = find_gpu(name)
    return Peaks(entry.flops_for(dtype), entry.bandwidth_bytes_per_s, "data sheet")


# ---------------------------------------------------------------- prices


def prices(profile: Profile, of: Sequence[tuple[str, int]] = ()) -> pd.DataFrame:
    """All layers' seconds of every operator by shape, within the measured range.

    ``of``: further (model, TP degree) pairs, which kernel tables are put together for.
    """
    rows: list[Price] = []
    for part in profile.parts:
        if isinstance(part, Polynomial):
            rows += _closed(part)
        elif isinstance(part, ProfileEntry):
            rows += _operators(part)
        else:
            for entry in _built(part, of):
                rows += _operators(entry)
    return pd.DataFrame(rows, columns=Price._fields)


def ratios(profile: Profile, other: Profile) -> pd.DataFrame:
    """``profile``'s seconds over ``other``'s, at the shapes of one model and TP degree that both cover.

    Operators and steps are compared where both hold the same, on the GPU types that both have, else on all.
    ``ConfigError`` if nothing is shared.
    """
    parts = [part for each in (profile, other) for part in each.parts]
    pairs = [(part.model, part.tp) for part in parts if not isinstance(part, Kernels)]
    ours, theirs = (prices(each, pairs) for each in (profile, other))
    keys = ["model", "tp", "operator", "holds", "number", "context"]
    both = ours.merge(theirs, on=keys, suffixes=("", "_other"))
    both = both[(both.seconds > 0) & (both.seconds_other > 0)]
    if (same := both.gpu == both.gpu_other).any():
        both = both[same]
    if both.empty:
        names = f"{profile.name} and {other.name}"
        raise ConfigError(f"{names} share no model, TP degree and operator; compare profiles that do")
    return both.assign(ratio=both.seconds / both.seconds_other)


def ratio_summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per model, TP degree, pair of GPUs and operator."""
    grouped = table.groupby(["model", "tp", "gpu", "gpu_other", "operator"], sort=False).ratio
    return grouped.agg(["count", "median", "min", "max"]).rename(columns={"count": "shapes"}).reset_index()


def _built(kernels: Kernels, of: Sequence[tuple[str, int]]) -> Iterator[ProfileEntry]:
    """The entries that kernel tables give of ``ANY_MODEL`` and of the pairs that the catalogue knows."""
    known = {entry.name.lower() for entry in models()}
    wanted = [(name, tp) for name, tp in dict.fromkeys([(ANY_MODEL, 1), *of]) if name.lower() in known]
    for name, tp in wanted:
        for gpu in kernels.gpus:
            entry = kernels.entry(find_model(name), tp, find_gpu(gpu))
            if entry is not None:
                yield entry


def _operators(entry: ProfileEntry) -> Iterator[Price]:
    layers = {"layer": entry.num_layers, "model": 1}
    total: dict[tuple[str, int, int], float] = {}
    for name in (*TABLES, *GRIDS):
        table = getattr(entry, name)
        if table is None:
            continue
        scale = 1 if name == "head" else layers[table.per]
        for count, context, value in _points(table):
            yield _price(entry, name, count, context, value * scale)
            total[name, count, context] = value * scale
    yield from _steps(entry, total)


def _points(table: Table | Grid) -> Iterator[tuple[int, int, float]]:
    """(count, context, seconds) at the shapes within a table; the context of a table without one is 0."""
    counts = [count for count in COUNTS if table.counts[0] <= count <= table.counts[-1]]
    if isinstance(table, Table):
        yield from ((count, 0, float(np.interp(count, table.counts, table.seconds))) for count in counts)
        return
    for context in (context for context in CONTEXTS if table.contexts[0] <= context <= table.contexts[-1]):
        column = [np.interp(context, table.contexts, row) for row in table.seconds]
        yield from ((count, context, float(np.interp(count, table.counts, column))) for count in counts)


def _steps(entry: ProfileEntry, of: dict[tuple[str, int, int], float]) -> Iterator[Price]:
    """The sums of an entry's operators, where all of them cover the shape."""
    has = [name for name in TABLES if getattr(entry, name) is not None]
    for step, attention in zip(STEPS, GRIDS, strict=False):
        for count, context in [key[1:] for key in of if key[0] == attention]:
            prompt = attention == "attention_prefill"
            if prompt and context:
                continue
            keys = [(name, 1 if name == "head" and prompt else count, 0) for name in has]
            if all(key in of for key in keys):
                known = sum(of[key] for key in keys) + of[attention, count, context] + (entry.overhead_s or 0.0)
                yield _price(entry, step, count, context, known)


def _closed(form: Polynomial) -> Iterator[Price]:
    gpus_ = tuple(f"gpu{number}" for number in range(form.tp))
    stage = Stage(name="all", gpus=gpus_, first_layer=0, end_layer=form.num_layers)
    cost = form.bind(stage)
    for count in COUNTS:
        yield _price(form, STEPS[0], count, 0, seconds(cost, Work(((count, 0),), 0, 0)))
        for context in CONTEXTS[1:]:
            yield _price(form, STEPS[1], count, context, seconds(cost, Work((), count, count * context)))


def _price(part: ProfileEntry | Polynomial, operator: str, count: int, context: int, value: float) -> Price:
    return Price(part.model, part.tp, part.gpus[0], operator, _holds(part, operator), count, context, value)


def _holds(part: ProfileEntry | Polynomial, operator: str) -> str:
    """Embedding is too little to matter; a step's overhead is the engine's."""
    if isinstance(part, Polynomial):
        return "collective, head"
    held = {name for name in ("collective", "head") if getattr(part, name) is not None or name in part.included}
    if operator not in STEPS:
        held = set(part.included) - {"embedding"}
    elif part.tp == 1:
        held.add("collective")
    return ", ".join(sorted(held))
