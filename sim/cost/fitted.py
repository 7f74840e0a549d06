"""Step times from a profile of measured operators; what a profile leaves out is priced by a roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, isfinite
from typing import Literal

from sim.cluster import Cluster
from sim.cost.pieces import Curve, Row, Surface, chained, surface
from sim.cost.roofline import Rates, Roofline, kv_read_ps, pair_ps
from sim.cost.step import Composed, Fixed, Operators
from sim.model import ModelSpec
from sim.types import PS_PER_S, ConfigError, Stage

Per = Literal["layer", "model"]
"""What a table's seconds are for: one layer, or all layers of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Measured seconds by a count: tokens, or sequences. Held below the first count."""

    counts: tuple[int, ...]
    seconds: tuple[float, ...]
    per: Per = "model"

    def __post_init__(self) -> None:
        _check_axis("counts", self.counts, least=2)
        _check_row(self.seconds, len(self.counts))
        if any(b < a for a, b in pairwise(self.seconds)):
            raise ConfigError("seconds fall while counts rise; fit a monotone table")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Measured seconds by a count (chunk tokens, or decoding sequences) and a context (before the chunk, or mean).

    Linear between the counts and contexts given, held below the first of each; where a row falls, or gains
    less with the context than the row of a smaller count, it is levelled (prices must rise in both).
    """

    counts: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    per: Per = "model"

    def __post_init__(self) -> None:
        _check_axis("counts", self.counts, least=2)
        _check_axis("contexts", self.contexts, least=2)
        if len(self.seconds) != len(self.counts):
            raise ConfigError(f"seconds has {len(self.seconds)} rows; it needs one per count, {len(self.counts)}")
        for row in self.seconds:
            _check_row(row, len(self.contexts))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Error on measurements that the fit did not see, in shares of the measured time."""

    mape: float
    largest: float
    points: int


INCLUDABLE = ("collective", "embedding", "head", "overhead")
"""Operators that a profile's ``linear`` may contain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """Measured operators of one model on one GPU type at one tensor-parallel degree.

    ``gpus``: the catalogue names it may be used on; no other is taken, however near its name. ``linear``: what
    depends on the tokens of a step. ``head``: what depends on its sequences, whole, charged to the last
    stage whatever its ``per``. ``attention_mixed``: what decodes add to a step that has chunks as well; absent, they
    cost what they cost alone. ``included``: operators that ``linear`` contains already. An operator that is
    neither given nor included is priced by the roofline.
    """

    gpus: tuple[str, ...]
    model: str
    num_layers: int
    tp: int
    dtypes: tuple[str, ...]
    linear: Table
    head: Table | None = None
    collective: Table | None = None
    attention_prefill: Grid | None = None
    attention_decode: Grid | None = None
    attention_mixed: Grid | None = None
    overhead_s: float | None = None
    included: frozenset[str] = frozenset()
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = self.included - set(INCLUDABLE)
        if unknown:
            raise ConfigError(f"{self.model}: included names {min(unknown)!r}; known: {', '.join(INCLUDABLE)}")
        for name in self.included:
            if getattr(self, "overhead_s" if name == "overhead" else name, None) is not None:
                raise ConfigError(f"{self.model}: {name} is given and included in linear; drop one of the two")
        if self.tp < 1 or self.num_layers < 1 or not self.gpus or not self.dtypes:
            raise ConfigError(f"{self.model}: gpus and dtypes must not be empty, tp and num_layers must be >= 1")
        if self.overhead_s is not None and not (isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise ConfigError(f"{self.model}: overhead_s is {self.overhead_s}; it must be a number >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where measurements come from: citation, licence, date, tool that made the profile, engine measured, method."""

    source: str
    licence: str
    date: str
    tool: str
    engine: str
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured operators and where they come from."""

    name: str
    provenance: Provenance
    entries: tuple[ProfileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Uses the first entry that matches a stage's GPU type, model, tensor-parallel degree and dtype exactly.

    A stage without one, and every operator that an entry lacks, takes the fallback. Beyond the measured range an
    operator grows by its last slope or the fallback's, whichever is more, and its lines say ``extrapolated``.
    """

    profiles: Sequence[Profile]
    fallback: Roofline = Roofline()
    name: str = "fitted"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> Composed:
        entry = self.entry(model, stage, cluster)
        if entry is None:
            return self.fallback.bind(model, stage, cluster, slow)
        if entry.num_layers != model.num_layers:
            raise ConfigError(
                f"profile entry {entry.model}: num_layers is {entry.num_layers}, the model has {model.num_layers}"
            )
        guess = self.fallback.operators(model, stage, cluster, slow)
        rates = self.fallback.rates(model, stage, cluster, slow)
        return Composed(_measured(entry, guess, _Scale(model, stage, rates, slow)), measured=True)

    def entry(self, model: ModelSpec, stage: Stage, cluster: Cluster) -> ProfileEntry | None:
        """The entry that a stage would use, or None (always for weight-only quantized models, or another KV dtype)."""
        if model.weight_bytes_per_param is not None or model.kv_dtype is not None:
            return None
        names = {cluster.gpu(gpu_id).name.lower() for gpu_id in stage.gpus}
        for entry in (entry for profile in self.profiles for entry in profile.entries):
            if entry.model.lower() != model.name.lower() or entry.tp != stage.tp or model.dtype not in entry.dtypes:
                continue
            if any(names == {gpu.lower()} for gpu in entry.gpus):
                return entry
        return None


class _Scale:
    """Turns an entry's seconds into a stage's picoseconds, and knows the roofline's slopes there."""

    def __init__(self, model: ModelSpec, stage: Stage, rates: Rates, slow: float) -> None:
        self.layers = {"layer": stage.num_layers * slow, "model": stage.num_layers / model.num_layers * slow}
        self.slow = slow
        self.first = stage.first_layer == 0
        self.last = stage.end_layer == model.num_layers
        self.pair_ps = pair_ps(model, stage, rates)
        self.context_ps = max(self.pair_ps, kv_read_ps(model, stage, rates))

    def curve(self, table: Table, factor: float, guess: Fixed) -> Fixed:
        values = [round(value * factor * PS_PER_S) for value in table.seconds]
        end = table.counts[-1]
        last = (values[-1] - values[-2]) / (end - table.counts[-2])
        analytic = (guess(2 * end)[0] - guess(end)[0]) / end
        return Curve(table.counts, tuple(values), ceil(max(last, analytic))).price

    def surface(self, grid: Grid, pair_ps: float, *, causal: bool) -> Surface:
        factor = self.layers[grid.per] * PS_PER_S
        rows = [[value * factor for value in row] for row in grid.seconds]
        return surface(grid.counts, grid.contexts, rows, pair_ps=pair_ps, causal=causal)


def _measured(entry: ProfileEntry, guess: Operators, scale: _Scale) -> Operators:
    """The roofline's operators, each replaced where the entry knows better."""
    fixed: dict[str, Fixed] = dict.fromkeys(entry.included - {"overhead"}, _free)
    fixed["linear"] = scale.curve(entry.linear, scale.layers[entry.linear.per], guess.linear)
    if entry.collective is not None:
        fixed["collective"] = scale.curve(entry.collective, scale.layers[entry.collective.per], guess.collective)
    if entry.head is not None:
        fixed["head"] = scale.curve(entry.head, scale.slow, guess.head) if scale.last else _free
    overhead_ps = 0 if "overhead" in entry.included else guess.overhead_ps
    if entry.overhead_s is not None:
        overhead_ps = round(entry.overhead_s * scale.slow * PS_PER_S) if scale.first else 0
    chunk, decode = guess.chunk, guess.decode
    if entry.attention_prefill is not None:
        chunk = _chunk_rows(scale.surface(entry.attention_prefill, scale.pair_ps, causal=True))
    if entry.attention_decode is not None:
        decode = _decode_rows(scale.surface(entry.attention_decode, scale.context_ps, causal=False))
    mixed = decode
    if entry.attention_mixed is not None:
        mixed = _decode_rows(scale.surface(entry.attention_mixed, scale.context_ps, causal=False))
    return replace(guess, **fixed, overhead_ps=overhead_ps, chunk=chunk, decode=decode, mixed=mixed)


def _free(_count: int) -> tuple[int, bool]:
    return 0, False


def _chunk_rows(table: Surface) -> Callable[[int], Row]:
    def row(tokens: int) -> Row:
        value, slopes = table.at(tokens)
        return chained(table.knots, round(value), [round(slope) for slope in slopes], 1, table.beyond(tokens))

    return row


def _decode_rows(table: Surface) -> Callable[[int], Row]:
    """Slopes are per token of mean context, so that a run of steps, each one token a sequence, adds whole ones."""

    def row(seqs: int) -> Row:
        value, slopes = table.at(seqs)
        knots = [knot * seqs for knot in table.knots]
        return chained(knots, round(value), [round(slope) for slope in slopes], seqs, table.beyond(seqs))

    return row


def _check_axis(name: str, axis: tuple[int, ...], *, least: int) -> None:
    if len(axis) < least or axis[0] < 0 or any(b <= a for a, b in pairwise(axis)):
        raise ConfigError(f"{name} {list(axis)}: needs at least {least} whole numbers >= 0, each larger than the last")


def _check_row(row: tuple[float, ...], length: int) -> None:
    if len(row) != length:
        raise ConfigError(f"seconds has {len(row)} values; it needs {length}")
    if not all(isfinite(value) and value >= 0 for value in row):
        raise ConfigError(f"seconds {list(row)}: every value must be a number >= 0")
