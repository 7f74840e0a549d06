"""From raw measurements to what a profile holds: samples, entries per tensor-parallel degree, and tables by name.

The held-out error of an operator is that at points which were measured for it and which the fit does not see: middles
of cells of its grid, for mixed steps another chunk, and for whole steps more layers and other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from calibrate import fit
from calibrate.bench.family import Key, Measurement
from calibrate.bench.runner import Measured
from calibrate.bench.shapes import BLOCK_TOKENS, Shard
from calibrate.beside import STEP, Beside, fitted, step_s
from calibrate.compose import (
    ATTENTION,
    HEAD,
    Keyed,
    Parts,
    columns,
    composed,
    grid,
    interpolated,
    linear_parts,
    mixed_grid,
    rounded,
    summed,
    table,
    values,
)
from calibrate.profile.samples import Samples
from sim.cost import Graphs, HeldOut, ProfileEntry, Table
from sim.model import ModelSpec

FITTED_BY = {
    "attention_decode_skewed": ("attention_decode",),
    "attention_mixed": ATTENTION,
    STEP: (STEP, "embedding", *HEAD, *ATTENTION),
}
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

GRAPHS = Graphs(sizes=tuple(1 << power for power in range(9)), block_tokens=BLOCK_TOKENS)
"""Of our engine (``calibrate.execute.model.graphs``): decode steps of up to 256 sequences, padded to powers of two.
Their groups of similar contexts are measured as they are; a graph holds one group, padded to its longest."""

Traffic = Mapping[Key, tuple[float | None, float | None]]
"""(FLOPs, bytes) of one run."""


def as_samples(measured: Measured, traffic: Traffic, shards: Sequence[Shard]) -> tuple[Samples, ...]:
    """Columns of what was measured, by operator; skipped points are left out."""
    by_name = {(shard.tp, shard.spec.dtype): shard for shard in shards}
    grouped: dict[tuple[str, int, str], list[Key]] = {}
    for key, measurement in measured.by_key.items():
        if not measurement.skipped:
            grouped.setdefault(key[:3], []).append(key)
    fits: dict[tuple[str, int, str], Samples] = {}
    for name, keys in grouped.items():
        if seen := [key for key in keys if key not in measured.held]:
            fits[name] = _samples(seen, measured.by_key, traffic)
    parts = (_with_held(keys, measured, traffic, fits, by_name[name[1:]]) for name, keys in grouped.items())
    return tuple(part for part in parts if part is not None)


def entry(shard: Shard, gpu: str, samples: Sequence[Samples], *, cuda: bool) -> tuple[ProfileEntry, Beside | None]:
    """A shard's operators with what is beside them in whole steps, and that; None where no step was measured."""
    mine = {part.operator: part for part in samples if (part.tp, part.dtype) == (shard.tp, shard.spec.dtype)}
    found = composed(shard.spec, gpu, shard.tp, mine)
    beside = fitted(shard, mine)
    whole = replace(
        found if beside is None else beside.added(found),
        overhead_s=_first_s(mine["launch_graph"]) if cuda and "launch_graph" in mine else 0.0,
        graphs=GRAPHS if cuda and shard.tp == 1 else None,  # stages of several GPUs decode without
        held_out={name: error for name, error in _errors(shard.spec, mine).items() if error is not None},
    )
    return whole, beside


def tables(samples: Sequence[Samples]) -> dict[str, Table]:
    """The operators of ``TABLES``; those of further dtypes and degrees have them in the name (``kv_gather.tp2``)."""
    found: dict[str, Table] = {}
    for part in samples:
        if part.operator not in TABLES:
            continue
        name = part.operator
        for suffix in (f".tp{part.tp}", f".{part.dtype}"):
            name = name + suffix if name in found else name
        found[name] = table({at: seconds for (at,), seconds in values(part).items()})
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
    traffic: Traffic,
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
    traffic: Traffic,
    fits: Mapping[tuple[str, int, str], Samples],
    shard: Shard,
) -> Samples | None:
    """All samples of an operator with the column of predictions, but for held-out points that no fit reaches."""
    mine = {name: fitted for (name, *rest), fitted in fits.items() if tuple(rest) == keys[0][1:3]}
    guesses = {key: _prediction(key, mine, shard) for key in keys if key in measured.held}
    kept = sorted((key for key in keys if guesses.get(key, 0.0) is not None), key=lambda key: key.point)
    found = tuple(None if (guess := guesses.get(key)) is None else rounded(guess) for key in kept)
    if not kept:
        return None
    return replace(_samples(kept, measured.by_key, traffic), predicted_s=found)


def _prediction(key: Key, mine: Keyed, shard: Shard) -> float | None:
    """What the fit of an operator, or of those that stand for it, says at a point; None if memory cut it short."""
    at = tuple(value for _, value in key.point)
    if not set(FITTED_BY.get(key.operator, (key.operator,))) <= set(mine):
        return None
    if key.operator == "attention_decode_skewed":
        return interpolated(grid(mine["attention_decode"]), *at)
    if key.operator == "attention_mixed":
        chunk_s, decodes = values(mine["attention_prefill"]).get((at[0], 0)), mixed_grid(mine)
        return None if chunk_s is None or decodes is None else chunk_s + interpolated(decodes, *at[1:])
    if key.operator == STEP:
        beside = fitted(shard, mine)
        return None if beside is None else step_s(shard, mine, beside, dict(key.point))
    if len(at) == 2:
        return interpolated(grid(mine[key.operator]), *at)
    counts, seconds = columns({x: y for (x,), y in values(mine[key.operator]).items()})
    return float(np.interp(at[0], counts, seconds))


# ---------------------------------------------------------------- entries


def _errors(spec: ModelSpec, mine: Keyed) -> dict[str, HeldOut | None]:
    """Held-out errors of an entry's operators."""
    sums = {"linear": linear_parts(spec, mine), "head": [(mine[name], times) for name, times in HEAD.items()]}
    found = {name: _sum_error(parts) for name, parts in sums.items()}
    return found | {name: held_out(mine[name]) for name in (*ATTENTION, STEP) if name in mine}


def _sum_error(parts: Parts) -> HeldOut | None:
    counts, seconds = columns(summed(parts))
    unseen = summed(parts, held=True)
    if not unseen:
        return None
    return fit.held_out(fit.errors(np.interp(list(unseen), counts, seconds), list(unseen.values())))


def _first_s(part: Samples) -> float:
    """Of the smallest point."""
    return min(values(part).items())[1]
