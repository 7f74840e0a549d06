"""A whole calibration: which operators, in which order, kept in which journal, and the profile that comes of it.

torch is loaded when ``calibrate`` runs, not before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from calibrate import measure_fit
from calibrate.bench.family import Family, Key
from calibrate.bench.journal import Journal
from calibrate.bench.runner import Measure, Measured, Progress, coarse_looks, run
from calibrate.bench.shapes import Limits, Shard
from calibrate.beside import Beside
from calibrate.profile.samples import Samples
from sim.cluster import gpu as find_gpu
from sim.cost import Device, Profile, Provenance
from sim.model import ModelSpec, model
from sim.types import ConfigError, SimulationError

if TYPE_CHECKING:
    from calibrate.bench.device import Target

CUDA_LIMITS = Limits(tokens=8192, sequences=256, context_tokens=32768)
CPU_LIMITS = Limits(tokens=512, sequences=64, context_tokens=2048)
KEPT_REPEATS = 9
"""Repeats of a point that the profile keeps, spread over all of them in order of size; the journal has all."""
COARSE_SHARE = 0.5
"""Of the budget, at most, for the coarse grids."""
LEAST_POINT_S, MOST_POINT_S = 0.01, 1.0


class InaccurateError(SimulationError):
    """A fit misses what it did not see by more than was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to calibrate.

    ``limits``: None: those of the device. ``gpu``: its catalogue name; None: looked up. ``threads``: of the CPU;
    None: torch's choice.
    """

    model: str
    tp: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ()
    device: str = "auto"
    minutes: float = 10.0
    max_error: float = 0.15
    limits: Limits | None = None
    gpu: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("minutes", "max_error"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} must be a number > 0")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads: {self.threads} must be 1 or more")
        if self.gpu is not None:
            find_gpu(self.gpu)
        if not self.tp or len(set(self.tp)) < len(self.tp):
            raise ConfigError(f"--tp: {list(self.tp)} must be different degrees, such as 1,2")

    def specs(self) -> tuple[ModelSpec, ...]:
        """The model in each dtype: as named, or its own."""
        return tuple(model(self.model, dtype=dtype) for dtype in self.dtypes or (None,))


class Outcome(NamedTuple):
    """A profile and its raw samples; ``skipped``: points that did not fit into memory, with the reason."""

    profile: Profile
    samples: tuple[Samples, ...]
    skipped: tuple[str, ...]


def calibrate(
    settings: Settings,
    out: Path,
    *,
    restart: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    measure: Measure | None = None,
) -> Outcome:
    """Measure and fit. The journal beside ``out`` keeps every point until ``finish`` removes it.

    ``measure``: in place of the device's timer (tests). ``ConfigError`` for what cannot be measured here.
    """
    require_torch()
    from calibrate.bench.device import describe, target
    from calibrate.bench.timer import measurer

    shards = [Shard(spec=spec, tp=tp) for spec in settings.specs() for tp in settings.tp]
    here = target(settings.device, settings.threads)
    device = describe(here, settings.gpu)
    limits = _limits(settings, shards[0].spec, cuda=here.cuda)
    budget_s = settings.minutes * 60
    book = journal(settings, out, device, limits, restart)
    with _families(shards, here, limits) as families:
        share_s = budget_s * COARSE_SHARE / sum(map(coarse_looks, families))
        point_s = min(MOST_POINT_S, max(LEAST_POINT_S, share_s))
        measured = run(families, measure or measurer(here, point_s), book, budget_s, progress)
        return _outcome(settings, out.stem, device, shards, families, measured, cuda=here.cuda)


def finish(out: Path) -> None:
    """Remove the journal, once the profile is written."""
    journal_path(out).unlink(missing_ok=True)


def check(profile: Profile, max_error: float) -> None:
    """``InaccurateError`` names the operators whose mean held-out error is above ``max_error``."""
    errors = {(entry.tp, name): held.mape for entry in profile.entries for name, held in entry.held_out.items()}
    bad = [f"{name} (tp {tp}) {error:.1%}" for (tp, name), error in errors.items() if error > max_error]
    if bad:
        raise InaccurateError(
            f"held-out error above --max-error {max_error:.0%}: {', '.join(bad)}; give more --minutes on a quiet "
            "machine (the points measured are kept), or --force to write the profile as it is"
        )


def journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def journal(settings: Settings, out: Path, device: Device, limits: Limits, restart: bool) -> Journal:
    """The journal of these settings; what would give other measurements is in its header, the budget is not."""
    header = {
        "model": " ".join(f"{spec.name} {_digest(repr(spec))}" for spec in settings.specs()),
        "tp": ",".join(map(str, settings.tp)),
        "dtype": ",".join(spec.dtype for spec in settings.specs()),
        "device": f"{device.gpu}: {device.description}",
        "torch": str(device.torch),
        "limits": f"{limits.tokens} tokens, {limits.sequences} sequences, {limits.context_tokens} context",
    }
    return Journal(journal_path(out), header, restart=restart)


def require_torch() -> None:
    if find_spec("torch") is None:
        raise ConfigError("calibrate: torch is not installed; pip install 'phasewise[calibrate]'")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_limits(device: str) -> Limits:
    """Of a device as ``--device`` names it."""
    from calibrate.bench.device import target

    return CUDA_LIMITS if target(device).cuda else CPU_LIMITS


def _limits(settings: Settings, spec: ModelSpec, *, cuda: bool) -> Limits:
    limits = settings.limits or (CUDA_LIMITS if cuda else CPU_LIMITS)
    longest = min(spec.max_position_embeddings, spec.sliding_window or spec.max_position_embeddings)
    return replace(limits, context_tokens=min(limits.context_tokens, longest), tokens=min(limits.tokens, longest))


@contextmanager
def _families(shards: Sequence[Shard], here: Target, limits: Limits) -> Iterator[list[Family]]:
    """All operators, those that steps are made of first; the processes of collectives live as long as this."""
    from calibrate.bench import attention, cache, collectives, layer, step

    families: list[Family] = []
    groups = {tp: collectives.Group(tp, cuda=here.cuda) for tp in {shard.tp for shard in shards}}
    for shard in shards:
        families += [layer.linear_family(shard, here, limits), layer.head_family(shard, here, limits)]
        families += attention.attention_families(shard, here, limits)
        if step.refused(shard) is None:
            families.append(step.step_family(shard, here, limits))
        if collectives.can_group(here, shard.tp):
            families.append(collectives.collective_family(shard, here, groups[shard.tp]))
        families += [cache.kv_family(shard, here, limits), layer.gemv_family(shard, here)]
    for shard in shards[:1]:
        families += [layer.launch_family(shard, here), cache.copy_family(shard, here)]
    try:
        yield families
    finally:
        for group in groups.values():
            group.close()


def _outcome(
    settings: Settings,
    name: str,
    device: Device,
    shards: Sequence[Shard],
    families: Sequence[Family],
    measured: Measured,
    *,
    cuda: bool,
) -> Outcome:
    samples = measure_fit.as_samples(measured, _traffic(families, measured), shards)
    built = [measure_fit.entry(shard, device.gpu, samples, cuda=cuda) for shard in shards]
    skipped = tuple(
        f"{at.operator} (tp {at.tp}) at {dict(at.point)}: {found.skipped}"
        for at, found in measured.by_key.items()
        if found.skipped
    )
    device = replace(device, flops=_peak_flops(samples), bandwidth_bytes_per_s=_peak_bandwidth(samples))
    notes = [_beside(shard, beside) for shard, (_, beside) in zip(shards, built, strict=True)]
    profile = Profile(
        name=name,
        provenance=_provenance(settings, device, samples, [*notes, f"{len(skipped)} points skipped for memory"]),
        entries=tuple(entry for entry, _ in built),
        device=device,
        tables=dict(measure_fit.tables(samples)),
    )
    return Outcome(profile, tuple(_thinned(part) for part in samples), skipped)


def _traffic(families: Sequence[Family], measured: Measured) -> dict[Key, tuple[float | None, float | None]]:
    parts = {(part.operator, family.tp, family.dtype): part for family in families for part in family.parts}
    return {at: (parts[at[:3]].flops(dict(at.point)), parts[at[:3]].bytes(dict(at.point))) for at in measured.by_key}


def _peak_flops(samples: Sequence[Samples]) -> dict[str, float]:
    """FLOP/s of the best GEMM in each dtype."""
    peaks: dict[str, float] = {}
    for part in samples:
        if part.flops and part.operator.startswith(("gemm.", "head")):
            best = max(count / seconds for count, seconds in zip(part.flops, part.medians_s, strict=True))
            peaks[part.dtype] = max(peaks.get(part.dtype, 0.0), float(f"{best:.4g}"))
    return peaks


def _peak_bandwidth(samples: Sequence[Samples]) -> float | None:
    """Bytes per second, read and written, of the largest copy within the device."""
    for part in samples:
        if part.operator == "copy_d2d" and part.bytes:
            return float(f"{part.bytes[-1] / part.medians_s[-1]:.4g}")
    return None


def _beside(shard: Shard, beside: Beside | None) -> str:
    """What the tables hold beside the operators of a shard."""
    from calibrate.bench.step import refused

    at = f"{shard.spec.dtype} tp {shard.tp}"
    if beside is None:
        return f"{at}: operators alone ({refused(shard) or 'too few whole steps fit into memory'})"
    return f"{at}: whole steps took {beside.ratio:.2f} of their operators (median); the tables have {beside} on top"


def _provenance(settings: Settings, device: Device, samples: Sequence[Samples], notes: Sequence[str]) -> Provenance:
    timer = "CUDA events around graphs of the kernel" if device.cuda else "the processor's clock around the call"
    noise = median(measure_fit.noise(part) for part in samples)
    return Provenance(
        source=f"phasewise calibrate on {device.description}",
        licence="own measurement",
        date=datetime.now(UTC).date().isoformat(),
        tool=f"phasewise calibrate, torch {device.torch}",
        engine="the kernels and the decoder of calibrate (torch), a layer or a few, random weights and values",
        method=(
            f"medians of repeats by {timer}, rotating buffers, budget {settings.minutes:g} min; monotone tables "
            "through the points of a grid; held_out: at points measured within its cells, mixed steps of another chunk "
            f"and whole steps of other shapes, that no table contains; noise of the middle operator {noise:.1%}; "
            + "; ".join(notes)
        ),
    )


def _thinned(part: Samples) -> Samples:
    """With no more repeats a point than a profile keeps."""
    return replace(part, seconds=tuple(_spread(sorted(repeats)) for repeats in part.seconds))


def _spread(repeats: Sequence[float]) -> tuple[float, ...]:
    """Evenly spread quantiles, which leave the median where it was (an even number may move it by a rank)."""
    count = min(len(repeats), KEPT_REPEATS)
    if count == len(repeats):
        return tuple(repeats)
    return tuple(repeats[round(place * (len(repeats) - 1) / (count - 1))] for place in range(count))
