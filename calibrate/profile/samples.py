"""Raw measurements as a profile file keeps them: columns of one operator, in one dtype at one tensor-parallel degree.

``calibrate.measure_fit`` turns them into the tables that the simulator reads; the simulator never reads these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import median
from typing import Any

from sim.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Measured points of one operator. Every column has one value per point.

    ``axes``: what was varied, by name (tokens, sequences, context, bytes ...). ``seconds``: the repeats of each point,
    one run of the operator each (one layer, one GPU). ``noise``: half the interquartile range over the median.
    ``flops``, ``bytes``: arithmetic and least memory traffic of one run. ``predicted_s``: by the fit at a point that it
    did not see (held out); None at those that it is made of.
    """

    operator: str
    dtype: str
    tp: int
    axes: Mapping[str, tuple[int, ...]]
    seconds: tuple[tuple[float, ...], ...]
    noise: tuple[float, ...]
    flops: tuple[float, ...] | None = None
    bytes: tuple[float, ...] | None = None
    predicted_s: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        place, points = f"samples {self.operator} (tp {self.tp})", len(self.seconds)
        columns = {**{f"axes.{name}": axis for name, axis in self.axes.items()}, "noise": self.noise}
        columns |= {name: column for name in ("flops", "bytes", "predicted_s") if (column := getattr(self, name))}
        for name, column in columns.items():
            if len(column) != points:
                raise ConfigError(f"{place}: {name} has {len(column)} values, seconds has {points}; give one per point")
        for repeats in self.seconds:
            if not repeats or not all(isfinite(value) and value > 0 for value in repeats):
                raise ConfigError(f"{place}: seconds {list(repeats)}: every point needs repeats, all numbers > 0")

    @property
    def medians_s(self) -> tuple[float, ...]:
        return tuple(median(repeats) for repeats in self.seconds)

    def points(self) -> Iterator[dict[str, int]]:
        """Where each point lies: the value on every axis."""
        for values in zip(*self.axes.values(), strict=True):
            yield dict(zip(self.axes, values, strict=True))


def samples_data(samples: tuple[Samples, ...]) -> list[dict[str, Any]]:
    """As the file has them."""
    return [asdict(part) for part in samples]
