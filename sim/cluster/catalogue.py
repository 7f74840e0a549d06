"""GPU types and their catalogue, and the checks that the rest of the package's inputs share."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from sim.outside import clip
from sim.types import ConfigError

NEXT_DTYPE = {"float32": None, "float16": None, "bfloat16": "float16", "int8": "float16", "float8": "bfloat16"}
"""What the matrix units compute in where a dtype is not in hardware. bfloat16 on V100 and T4 takes the
float16 rate (engines serve such a model as float16 there); float8 and int8 weights are widened first."""


def did_you_mean(value: object, known: Collection[str]) -> str:
    """``'x' is unknown; did you mean 'y'?``: names that begin with it, else the nearest, else all."""
    names = {name.lower(): name for name in known}
    text = str(value).lower()
    near = [name for name in names if text and name.startswith(text)]
    near = near or difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    mend = " or ".join(repr(names[name]) for name in near)
    return f"{clip(repr(value), 80)} is unknown; " + (
        f"did you mean {mend}?" if near else f"known: {', '.join(sorted(known))}"
    )


def number(place: str, value: object, *, above_zero: bool = False) -> float:
    """``value`` if it is a finite number >= 0 (or > 0), else a ``ConfigError`` that names the place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ConfigError(f"{place}: {value!r} must be a finite number")
    if value < 0 or (above_zero and value == 0):
        raise ConfigError(f"{place}: {value!r} must be {'> 0' if above_zero else '>= 0'}")
    return float(value)


def count(place: str, value: object) -> int:
    """``value`` if it is a whole number >= 1, else a ``ConfigError`` that names the place."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{place}: {value!r} must be a whole number >= 1")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU type. Bandwidths are those of one direction; ``flops`` maps a dtype to its dense peak."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float] = field(hash=False)
    pcie_bytes_per_s: float
    nvlink_bytes_per_s: float | None = None
    tdp_w: float | None = None
    idle_w: float | None = None
    usd_per_hour: float | None = None
    usd_per_hour_spot: float | None = None
    spec_source: str | None = None
    idle_source: str | None = None
    price_source: str | None = None

    def __post_init__(self) -> None:
        place = f"GPU {self.name}"
        count(f"{place}: memory_bytes", self.memory_bytes)
        for name in ("bandwidth_bytes_per_s", "pcie_bytes_per_s"):
            number(f"{place}: {name}", getattr(self, name), above_zero=True)
        for name in ("nvlink_bytes_per_s", "tdp_w", "idle_w", "usd_per_hour", "usd_per_hour_spot"):
            if getattr(self, name) is not None:
                number(f"{place}: {name}", getattr(self, name), above_zero=not name.startswith("usd"))
        for dtype, rate in self.flops.items():
            if dtype not in NEXT_DTYPE:
                raise ConfigError(f"{place}: flops: {did_you_mean(dtype, NEXT_DTYPE)}")
            number(f"{place}: flops: {dtype}", rate, above_zero=True)
        if not {"float16", "float32"} <= set(self.flops):
            raise ConfigError(f"{place}: flops: {sorted(self.flops)} must include float16 and float32")

    def flops_for(self, dtype: str) -> float:
        """Dense peak FLOP/s in a dtype, or in what stands in for it in hardware (``NEXT_DTYPE``)."""
        while dtype not in self.flops:
            wider = NEXT_DTYPE.get(dtype)
            if wider is None:
                raise ConfigError(f"dtype: {did_you_mean(dtype, NEXT_DTYPE)}")
            dtype = wider
        return self.flops[dtype]


def _read(name: str, row: Mapping[str, Any]) -> Gpu:
    """A row of the catalogue, in base units."""
    row = dict(row)
    nvlink = row.pop("nvlink_gb_per_s", None)
    return Gpu(
        name=name,
        memory_bytes=row.pop("memory_mib") * 2**20,
        bandwidth_bytes_per_s=row.pop("bandwidth_gb_per_s") * 1e9,
        flops={dtype: tera * 1e12 for dtype, tera in row.pop("tflops").items()},
        pcie_bytes_per_s=row.pop("pcie_gb_per_s") * 1e9,
        nvlink_bytes_per_s=None if nvlink is None else nvlink * 1e9,
        **row,
    )


@cache
def _catalogue() -> dict[str, Gpu]:
    with Path(__file__).with_name("gpus.toml").open("rb") as file:
        return {name.lower(): _read(name, row) for name, row in tomllib.load(file).items()}


def gpus() -> tuple[Gpu, ...]:
    """Every GPU type of the catalogue, in the file's order."""
    return tuple(_catalogue().values())


def gpu(name: str) -> Gpu:
    """A GPU type by name, in upper or lower case; ``ConfigError`` names the nearest one."""
    if str(name).lower() not in _catalogue():
        raise ConfigError(f"gpu: {did_you_mean(name, [entry.name for entry in gpus()])}")
    return _catalogue()[name.lower()]
