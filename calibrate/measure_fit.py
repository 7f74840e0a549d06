"""From raw measurements to what a profile holds: samples, entries per tensor-parallel degree, and tables by name.

Tables are monotone and linear between measured points. The held-out error of an operator is that at points which were
measured for it and which the fit does not see: middles of cells of its grid, and for mixed steps another chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from calibrate import fit
from calibrate.bench.family import Key, Measurement
from calibrate.bench.runner import Measured
from calibrate.fit import Floats
from calibrate.samples import Samples
from sim.cost import Grid, HeldOut, ProfileEntry, Table
from sim.model import ModelSpec
from sim.types import ConfigError

LAYER_TIMES = {
    "norm": 2,
    "residual": 2,
    "rope": 1,
    "qk_norm": 1,
    "activation": 1,
    "kv_scatter": 1,
    "experts": 1,
}
"""How often a layer runs an operator; every ``gemm.*`` once. The embedding runs once a step."""
HEAD = ("head", "sampler", "step_io")
ATTENTION = ("attention_prefill", "attention_decode", "attention_mixed")
FITTED_BY = {"attention_decode_skewed": ("attention_decode",), "attention_mixed": ATTENTION}
"""Operators whose samples say what another one should take; others are predicted from their own."""
TABLES = (
    "kv_scatter",
    "kv_gather",
    "kv_quantise",
    "kv_dequantise",
    "gemv_density",
    "copy_d2d",
    "copy_h2d",
    "copy_d2h",
    "copy_peer",
    "all_reduce",
    "send_recv",
    "launch_eager",
    "launch_graph",
)
"""Operators that a profile also has as tables of their own, by name."""

Values = Mapping[tuple[int, ...], float]
"""Median seconds by the values on all axes."""
Keyed = Mapping[str, Samples]
"""The samples of one dtype and tensor-parallel degree, by operator."""


def as_samples(measured: Measured, traffic: Mapping[Key, tuple[float | None, float | None]]) -> tuple[Samples, ...]:
    """Columns of what was measured, by operator; skipped points are left out. ``traffic``: (FLOPs, bytes) of a run."""
    grouped: dict[tuple[str, int, str], list[Key]] = {}
    for key, measurement in measured.by_key.items():
        if not measurement.skipped:
            grouped.setdefault(key[:3], []).append(key)
    fits: dict[tuple[str, int, str], Samples] = {}
    for name, keys in grouped.items():
        if seen := [key for key in keys if key not in measured.held]:
            fits[name] = _samples(seen, measured.by_key, traffic)
    parts = (_with_held(keys, measured, traffic, fits) for keys in grouped.values())
    return tuple(part for part in parts if part is not None)


def entry(spec: ModelSpec, gpu: str, tp: int, samples: Sequence[Samples], *, cuda: bool) -> ProfileEntry:
    """The model's operators at one tensor-parallel degree, from the samples of its dtype and that degree."""
    mine = {part.operator: part for part in samples if part.tp == tp and part.dtype == spec.dtype}
    missing = [name for name in (*HEAD, *ATTENTION, "embedding") if name not in mine]
    if missing:
        raise ConfigError(f"calibrate: no point of {missing[0]} fits into memory; give a larger --tp or a free device")
    tokens, linear_s = _columns(_summed(_linear_parts(spec, mine)))
    sequences, head_s = _columns(_summed([(mine[name], 1) for name in HEAD]))
    prefill, decode = _grid(mine["attention_prefill"]), _grid(mine["attention_decode"])
    return ProfileEntry(
        gpus=(gpu,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=tp,
        dtypes=(spec.dtype,),
        linear=_table(tokens, linear_s),
        head=_table(sequences, head_s),
        collective=_collective(spec, mine["all_reduce"]) if "all_reduce" in mine else None,
        attention_prefill=prefill,
        attention_decode=decode,
        attention_mixed=_mixed_grid(mine),
        overhead_s=_first_s(mine["launch_graph"]) if cuda and "launch_graph" in mine else 0.0,
        included=frozenset({"embedding"}),
        held_out={name: error for name, error in _errors(spec, mine).items() if error is not None},
    )


def tables(samples: Sequence[Samples]) -> dict[str, Table]:
    """The operators of ``TABLES``; those of further dtypes and degrees have them in the name (``kv_gather.tp2``)."""
    found: dict[str, Table] = {}
    for part in samples:
        if part.operator not in TABLES:
            continue
        name = part.operator
        for suffix in (f".tp{part.tp}", f".{part.dtype}"):
            name = name + suffix if name in found else name
        found[name] = _table(*_columns({at: seconds for (at,), seconds in _values(part).items()}))
    return found


def held_out(part: Samples) -> HeldOut | None:
    """Error of the predictions; None without any."""
    pairs = [(p, m) for p, m in zip(part.predicted_s or (), part.medians_s, strict=False) if p is not None]
    return fit.held_out(fit.errors(*np.transpose(pairs))) if pairs else None


def noise(part: Samples) -> float:
    """Of the middle point: half the interquartile range of its repeats, as a share of their median."""
    return median(part.noise)


# ---------------------------------------------------------------- samples


def _samples(
    keys: Sequence[Key],
    measured: Mapping[Key, Measurement],
    traffic: Mapping[Key, tuple[float | None, float | None]],
) -> Samples:
    keys = sorted(keys, key=lambda key: key.point)
    first = keys[0]
    flops, size_bytes = (_column([traffic[key][side] for key in keys]) for side in (0, 1))
    return Samples(
        operator=first.operator,
        dtype=first.dtype,
        tp=first.tp,
        axes={name: tuple(key.point[place][1] for key in keys) for place, (name, _) in enumerate(first.point)},
        seconds=tuple(measured[key].seconds for key in keys),
        noise=tuple(round(measured[key].noise, 4) for key in keys),
        flops=flops,
        bytes=size_bytes,
    )


def _column(values: Sequence[float | None]) -> tuple[float, ...] | None:
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None


def _with_held(
    keys: Sequence[Key],
    measured: Measured,
    traffic: Mapping[Key, tuple[float | None, float | None]],
    fits: Mapping[tuple[str, int, str], Samples],
) -> Samples | None:
    """All samples of an operator with the column of predictions, but for held-out points that no fit reaches."""
    mine = {name: fitted for (name, *rest), fitted in fits.items() if tuple(rest) == keys[0][1:3]}
    guesses = {key: _prediction(key, mine) for key in keys if key in measured.held}
    kept = sorted((key for key in keys if guesses.get(key, 0.0) is not None), key=lambda key: key.point)
    found = tuple(guesses.get(key) for key in kept)
    rounded = tuple(None if value is None else float(f"{value:.4g}") for value in found)
    if not kept:
        return None
    return replace(_samples(kept, measured.by_key, traffic), predicted_s=rounded)


def _prediction(key: Key, mine: Keyed) -> float | None:
    """What the fit of an operator, or of those that stand for it, says at a point; None if memory cut it short."""
    at = tuple(value for _, value in key.point)
    if not set(FITTED_BY.get(key.operator, (key.operator,))) <= set(mine):
        return None
    if key.operator == "attention_decode_skewed":
        return _interpolated(_grid(mine["attention_decode"]), *at)
    if key.operator == "attention_mixed":
        chunk_s, grid = _values(mine["attention_prefill"]).get((at[0], 0)), _mixed_grid(mine)
        return None if chunk_s is None or grid is None else chunk_s + _interpolated(grid, *at[1:])
    if len(at) == 2:
        return _interpolated(_grid(mine[key.operator]), *at)
    counts, seconds = _columns({x: y for (x,), y in _values(mine[key.operator]).items()})
    return float(np.interp(at[0], counts, seconds))


def _values(part: Samples, *, held: bool = False) -> Values:
    """Of the points that the fit is made of, or of those that it does not see."""
    predicted = part.predicted_s or (None,) * len(part.seconds)
    rows = zip(zip(*part.axes.values(), strict=True), part.medians_s, predicted, strict=True)
    return {point: seconds for point, seconds, guess in rows if (guess is not None) == held}


def _interpolated(grid: Grid, count: int, context: int) -> float:
    """What a grid says at a point inside it."""
    rows = [float(np.interp(context, grid.contexts, row)) for row in grid.seconds]
    return float(np.interp(count, grid.counts, rows))


# ---------------------------------------------------------------- entries


def _linear_parts(spec: ModelSpec, mine: Keyed) -> list[tuple[Samples, int]]:
    """What a step runs by its tokens, and how often: all layers but attention, and the embedding."""
    times = {name: 1 if name.startswith("gemm.") else LAYER_TIMES.get(name, 0) for name in mine}
    return [*((mine[name], spec.num_layers * count) for name, count in times.items() if count), (mine["embedding"], 1)]


def _summed(parts: Sequence[tuple[Samples, int]], *, held: bool = False) -> dict[int, float]:
    """Seconds of all parts together, at the counts that all were measured at."""
    values = [(_values(part, held=held), times) for part, times in parts]
    shared = set.intersection(*(set(by_point) for by_point, _ in values))
    return {at: sum(times * by_point[at,] for by_point, times in values) for (at,) in shared}


def _errors(spec: ModelSpec, mine: Keyed) -> dict[str, HeldOut | None]:
    """Held-out errors of an entry's operators."""
    sums = {"linear": _linear_parts(spec, mine), "head": [(mine[name], 1) for name in HEAD]}
    found = {name: _sum_error(parts) for name, parts in sums.items()}
    return found | {name: held_out(mine[name]) for name in ATTENTION}


def _sum_error(parts: Sequence[tuple[Samples, int]]) -> HeldOut | None:
    counts, seconds = _columns(_summed(parts))
    unseen = _summed(parts, held=True)
    if not unseen:
        return None
    return fit.held_out(fit.errors(np.interp(list(unseen), counts, seconds), list(unseen.values())))


def _columns(by_count: Mapping[int, float]) -> tuple[Floats, Floats]:
    if len(by_count) < 2:
        raise ConfigError("calibrate: fewer than two points fit into memory; give a smaller --max-tokens, or more --tp")
    counts = np.array(sorted(by_count), float)
    return counts, fit.rising(np.array([by_count[int(count)] for count in counts]))


def _table(counts: Floats, seconds: Floats) -> Table:
    return Table(counts=tuple(int(x) for x in counts), seconds=tuple(float(f"{y:.4g}") for y in seconds))


def _grid(part: Samples) -> Grid:
    """Per layer."""
    return _filled(_values(part))


def _filled(values: Values) -> Grid:
    """A row that memory cut short goes on along its last slope; rows of one context are dropped."""
    contexts = sorted({context for _, context in values})
    rows: dict[int, tuple[float, ...]] = {}
    for count in sorted({count for count, _ in values}):
        known = [(context, values[count, context]) for context in contexts if (count, context) in values]
        if len(known) > 1:
            rows[count] = tuple(float(f"{_along(known, context):.4g}") for context in contexts)
    return Grid(counts=tuple(rows), contexts=tuple(contexts), seconds=tuple(rows.values()), per="layer")


def _along(known: Sequence[tuple[int, float]], context: int) -> float:
    """Linear between measured contexts, and beyond the last one at its slope."""
    x, y = np.transpose(known)
    beyond = max(0.0, context - x[-1]) * max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
    return float(np.interp(context, x, y) + beyond)


def _collective(spec: ModelSpec, part: Samples) -> Table:
    """A layer's two all-reduces, by the tokens whose hidden states fill the message."""
    token_bytes = spec.hidden_size * spec.activation_bytes_per_value
    by_tokens = {max(1, size // token_bytes): 2 * seconds for (size,), seconds in sorted(_values(part).items())}
    table = _table(*_columns(by_tokens))
    return Table(counts=table.counts, seconds=table.seconds, per="layer")


def _first_s(part: Samples) -> float:
    """Of the smallest point."""
    return min(_values(part).items())[1]


# ---------------------------------------------------------------- decodes beside chunks


def _mixed_grid(mine: Keyed) -> Grid | None:
    """What decodes add to a step with a chunk: the median over chunks, and no less than they cost alone.

    None where memory left fewer than two counts and contexts: they then cost what they cost alone.
    """
    chunks, alone = _values(mine["attention_prefill"]), _values(mine["attention_decode"])
    added: dict[tuple[int, ...], list[float]] = {}
    for (tokens, *shape), seconds in _values(mine["attention_mixed"]).items():
        if (tokens, 0) in chunks and tuple(shape) in alone:
            added.setdefault(tuple(shape), []).append(seconds - chunks[tokens, 0])
    values = {shape: max(median(found), alone[shape]) for shape, found in added.items()}
    corners = {count for count, _ in values}, {context for _, context in values}
    return _filled(values) if len(values) == 4 and all(len(side) == 2 for side in corners) else None
