"""What a step is composed of: one dtype's and degree's samples as the tables and grids that the simulator sums up.

Tables are monotone and linear between measured points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from calibrate import fit
from calibrate.fit import Floats
from calibrate.profile.samples import Samples
from sim.cost import Grid, ProfileEntry, Table
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
HEAD = {"head": 1.0, "sampler": 1.0, "step_io": 1.0}
"""How often a step runs what depends on its sequences."""
ATTENTION = ("attention_prefill", "attention_decode", "attention_mixed")

Values = Mapping[tuple[int, ...], float]
"""Median seconds by the values on all axes."""
Keyed = Mapping[str, Samples]
"""The samples of one dtype and tensor-parallel degree, by operator."""
Parts = Sequence[tuple[Samples, float]]
"""Operators that are run one after the other, and how often each."""


def composed(spec: ModelSpec, gpu: str, tp: int, mine: Keyed, head: Mapping[str, float] = HEAD) -> ProfileEntry:
    """The entry of a model (all its layers) that its operators' samples give; no overhead, no errors.

    ``head``: what runs by sequences. ``ConfigError`` if an operator has no point, or too few.
    """
    missing = [name for name in (*head, *ATTENTION, "embedding") if name not in mine]
    if missing:
        raise ConfigError(f"calibrate: no point of {missing[0]} fits into memory; give a larger --tp or a free device")
    return ProfileEntry(
        gpus=(gpu,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=tp,
        dtypes=(spec.dtype,),
        linear=table(summed(linear_parts(spec, mine))),
        head=table(summed([(mine[name], times) for name, times in head.items()])),
        collective=_collective(spec, mine["all_reduce"]) if "all_reduce" in mine else None,
        attention_prefill=grid(mine["attention_prefill"]),
        attention_decode=grid(mine["attention_decode"]),
        attention_mixed=mixed_grid(mine),
        included=frozenset({"embedding"}),
        shared_launch=0.0,  # the decoder launches every chunk on its own
    )


def linear_parts(spec: ModelSpec, mine: Keyed) -> Parts:
    """What a step runs by its tokens: all layers but attention, and the embedding."""
    times = {name: 1 if name.startswith("gemm.") else LAYER_TIMES.get(name, 0) for name in mine}
    return [*((mine[name], spec.num_layers * count) for name, count in times.items() if count), (mine["embedding"], 1)]


def values(part: Samples, *, held: bool = False) -> Values:
    """Of the points that the fit is made of, or of those that it does not see."""
    predicted = part.predicted_s or (None,) * len(part.seconds)
    rows = zip(zip(*part.axes.values(), strict=True), part.medians_s, predicted, strict=True)
    return {point: seconds for point, seconds, guess in rows if (guess is not None) == held}


def summed(parts: Parts, *, held: bool = False) -> dict[int, float]:
    """Seconds of all parts together, at the counts that all were measured at."""
    found = [(values(part, held=held), times) for part, times in parts]
    shared = set.intersection(*(set(by_point) for by_point, _ in found))
    return {at: sum(times * by_point[at,] for by_point, times in found) for (at,) in shared}


def columns(by_count: Mapping[int, float]) -> tuple[Floats, Floats]:
    """Counts and rising seconds."""
    if len(by_count) < 2:
        raise ConfigError("calibrate: fewer than two points fit into memory; give a smaller --max-tokens, or more --tp")
    counts = np.array(sorted(by_count), float)
    return counts, fit.rising(np.array([by_count[int(count)] for count in counts]))


def table(by_count: Mapping[int, float]) -> Table:
    counts, seconds = columns(by_count)
    return Table(counts=tuple(int(x) for x in counts), seconds=tuple(rounded(y) for y in seconds))


def grid(part: Samples) -> Grid:
    """Per layer."""
    return _filled(values(part))


def interpolated(grid: Grid, count: int, context: int) -> float:
    """What a grid says at a point inside it."""
    rows = [float(np.interp(context, grid.contexts, row)) for row in grid.seconds]
    return float(np.interp(count, grid.counts, rows))


def rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def mixed_grid(mine: Keyed) -> Grid | None:
    """What decodes add to a step with a chunk: the median over chunks, and no less than they cost alone.

    Fewer decodes than were measured beside a chunk cost what they cost alone.

    None where memory left fewer than two counts and contexts: they then cost what they cost alone.
    """
    chunks, alone = values(mine["attention_prefill"]), values(mine["attention_decode"])
    added: dict[tuple[int, ...], list[float]] = {}
    for (tokens, *shape), seconds in values(mine["attention_mixed"]).items():
        if (tokens, 0) in chunks and tuple(shape) in alone:
            added.setdefault(tuple(shape), []).append(seconds - chunks[tokens, 0])
    found = {shape: max(median(more), alone[shape]) for shape, more in added.items()}
    counts, contexts = ({shape[side] for shape in found} for side in (0, 1))
    if len(found) < 4 or len(found) < len(counts) * len(contexts):
        return None
    fewer = {(count, at): alone_s for (count, at), alone_s in alone.items() if count < min(counts) and at in contexts}
    return _filled(found | fewer)


def _filled(values: Values) -> Grid:
    """A row that memory cut short goes on along its last slope; rows of one context are dropped."""
    contexts = sorted({context for _, context in values})
    rows: dict[int, tuple[float, ...]] = {}
    for count in sorted({count for count, _ in values}):
        known = [(context, values[count, context]) for context in contexts if (count, context) in values]
        if len(known) > 1:
            rows[count] = tuple(rounded(_along(known, context)) for context in contexts)
    return Grid(counts=tuple(rows), contexts=tuple(contexts), seconds=tuple(rows.values()), per="layer")


def _along(known: Sequence[tuple[int, float]], context: int) -> float:
    """Linear between measured contexts, and beyond the last one at its slope."""
    x, y = np.transpose(known)
    beyond = max(0.0, context - x[-1]) * max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
    return float(np.interp(context, x, y) + beyond)


def _collective(spec: ModelSpec, part: Samples) -> Table:
    """A layer's two all-reduces, by the tokens whose hidden states fill the message."""
    token_bytes = spec.hidden_size * spec.activation_bytes_per_value
    by_tokens = {max(1, size // token_bytes): 2 * seconds for (size,), seconds in sorted(values(part).items())}
    found = table(by_tokens)
    return Table(counts=found.counts, seconds=found.seconds, per="layer")
