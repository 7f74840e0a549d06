"""What a profile measures, as tables: by a count, by count and context, and the entry that binds them to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Literal

from sim.cost.graphs import Graphs
from sim.types import ConfigError

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
SHARED_LAUNCH = 0.9
"""Of the shortest chunk's attention: what every further chunk of a step saves where all chunks are one kernel. In
aiconfigurator's tables 256 prompts of 16 tokens take 8 (H100), 28 (A100, RTX PRO 6000) or 32 times (L40S) as long as
one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """Measured operators of one model on one GPU type at one tensor-parallel degree.

    ``gpus``: the catalogue names it may be used on; no other is taken, however near its name. ``linear``: what
    depends on the tokens of a step. ``head``: what depends on its sequences, whole, charged to the last
    stage whatever its ``per``. ``attention_mixed``: what decodes add to a step that has chunks as well; absent, they
    cost what they cost alone. ``included``: operators that ``linear`` contains already. An operator that is
    neither given nor included is priced by the roofline. ``predicted``: scaled from another GPU type's, not measured.
    ``shared_launch``: share of the shortest chunk's attention that every further chunk of a step saves: as in vLLM,
    whose chunks are one kernel, unless said otherwise; 0 for an engine that launches each chunk on its own.
    ``graphs``: the CUDA graphs that the engine runs its steps in; None: every step runs as it is.
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
    predicted: bool = False
    shared_launch: float = SHARED_LAUNCH
    graphs: Graphs | None = None
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
        if not 0 <= self.shared_launch <= 1:
            raise ConfigError(f"{self.model}: shared_launch is {self.shared_launch}; it must be a share, 0 to 1")


def _check_axis(name: str, axis: tuple[int, ...], *, least: int) -> None:
    if len(axis) < least or axis[0] < 0 or any(b <= a for a, b in pairwise(axis)):
        raise ConfigError(f"{name} {list(axis)}: needs at least {least} whole numbers >= 0, each larger than the last")


def _check_row(row: tuple[float, ...], length: int) -> None:
    if len(row) != length:
        raise ConfigError(f"seconds has {len(row)} values; it needs {length}")
    if not all(isfinite(value) and value >= 0 for value in row):
        raise ConfigError(f"seconds {list(row)}: every value must be a number >= 0")
