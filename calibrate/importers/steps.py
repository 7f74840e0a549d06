"""A user's own step times: a CSV of batch, sequence length, phase and time becomes a profile of one GPU and model.

A step's time is fitted as in DistServe's form (``sim.cost.polynomial``): prompts by tokens and squared tokens, decodes
by context and sequences, all terms >= 0, by least squares of relative errors. With fewer than ``FEWEST`` points of a
phase the roofline's terms are scaled to them instead. What each point would have been told by the others is kept.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, isfinite, log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from calibrate.profile.samples import Samples
from sim.cluster import Cluster
from sim.cluster import gpu as find_gpu
from sim.cost import DecodeTerms, HeldOut, Polynomial, Profile, PromptTerms, Provenance, Roofline, StageCost, seconds
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.outside import read_text
from sim.types import ConfigError, Stage, Work

NAMES = {
    "batch": ("batch", "batch_size", "num_seqs", "sequences", "bs"),
    "length": ("seq_len", "context", "context_len", "sequence_length", "input_len", "isl", "tokens", "length"),
    "phase": ("phase", "stage", "kind"),
}
PHASES = {"prefill": "prefill", "prompt": "prefill", "context": "prefill", "decode": "decode", "generation": "decode",
          "generate": "decode"}  # fmt: skip
TIME = re.compile(r"(?:latency|time|duration|step|median|mean|avg)?_?(s|sec|seconds|ms|us|ns)$")
UNITS_S = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
FEWEST = 4
GRID = [(batch, length) for batch in (1, 4, 16, 64) for length in (16, 128, 1024, 4096)]
EXAMPLE = "batch,seq_len,phase,latency_ms"
UNLIMITED = 10**9


class Point(NamedTuple):
    batch: int
    length: int
    seconds: float


def import_csv(
    path: str | Path, *, gpu: str | None, model: str | None, tp: int = 1, dtype: str | None = None
) -> Imported:
    """The profile and its samples. ``ConfigError`` names the file, the line, the column, and the mend."""
    path = Path(path)
    if gpu is None or model is None:
        raise ConfigError(f"{path}: the times are of one GPU and model; name them with --gpu and --model (and --tp)")
    if tp < 1:
        raise ConfigError(f"--tp {tp}: must be a whole number >= 1")
    points, spec = _read(path), find_model(model, dtype)
    kind = find_gpu(gpu)
    for phase in ("prefill", "decode"):
        if not points[phase]:
            raise ConfigError(f"{path}: it has no row of phase {phase}; a step of each is needed")
    guess = _roofline(kind.name, spec, tp)
    terms, samples, held, methods = {}, [], {}, []
    for phase, rows in points.items():
        fit = _fitted(phase, guess)
        terms[phase] = fit(rows)
        told = [_time(phase, fit(rows[:place] + rows[place + 1 :]), row) if len(rows) > 1 else None
                for place, row in enumerate(rows)]  # fmt: skip
        samples.append(_samples(phase, rows, told, spec, tp))
        errors = [abs(value / row.seconds - 1) for value, row in zip(told, rows, strict=True) if value is not None]
        if errors:
            held[phase] = HeldOut(mape=float(np.mean(errors)), largest=max(errors), points=len(errors))
        methods.append(f"{phase}: {len(rows)} points, " + ("fitted" if len(rows) >= FEWEST else "roofline scaled"))
    form = _form(kind.name, spec, tp, terms, held)
    profile = Profile(name=path.stem, provenance=_provenance(path, "; ".join(methods)), polynomials=(form,))
    return Imported(profile, tuple(samples))


class Imported(NamedTuple):
    profile: Profile
    samples: tuple[Samples, ...]


# ---------------------------------------------------------------- read


def _read(path: Path) -> dict[str, list[Point]]:
    lines = [line for line in read_text(path, "step times").splitlines() if line.strip() and not line.startswith("#")]
    head = lines[0] if lines else ""
    separator = max(",;\t", key=head.count)
    rows = list(csv.reader(lines, delimiter=separator))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    columns = {field: _column(path, header, field, names) for field, names in NAMES.items()}
    place, unit_s = _time_column(path, header)
    unused = [name for at, name in enumerate(header) if at not in (*columns.values(), place)]
    if unused:
        raise ConfigError(f"{path}: column {unused[0]!r} is not known and would be ignored; drop it, or rename it")
    found: dict[str, list[Point]] = {"prefill": [], "decode": []}
    for line, cells in enumerate(rows[1:], start=2):
        if len(cells) != len(header):
            raise ConfigError(
                f"{path}:{line}: the line has {len(cells)} cells; expected {len(header)}, as in the header"
            )
        phase = PHASES.get(cells[columns["phase"]].strip().lower())
        if phase is None:
            raise ConfigError(f"{path}:{line}: phase is {cells[columns['phase']]!r}; expected prefill or decode")
        batch, length = (_number(path, line, header, cells, columns[name], whole=True) for name in ("batch", "length"))
        time_s = _number(path, line, header, cells, place) * unit_s
        found[phase].append(Point(int(batch), int(length), time_s))
    return found


def _column(path: Path, header: Sequence[str], field: str, names: Sequence[str]) -> int:
    place = next((header.index(name) for name in names if name in header), None)
    if place is None:
        raise ConfigError(f"{path}:1: no column {' or '.join(names[:3])}; the header must be like {EXAMPLE}")
    return place


def _time_column(path: Path, header: Sequence[str]) -> tuple[int, float]:
    """Its place, and seconds in its unit, which its name must say."""
    for place, name in enumerate(header):
        match = TIME.search(name)
        if match is not None and name not in (*NAMES["batch"], *NAMES["length"]):
            return place, UNITS_S[match[1]]
    raise ConfigError(f"{path}:1: no column of times with its unit; name it latency_ms, latency_us or latency_s")


def _number(
    path: Path, line: int, header: Sequence[str], cells: Sequence[str], place: int, *, whole: bool = False
) -> float:
    try:
        value = float(cells[place])
    except ValueError:
        value = -1.0
    if not isfinite(value) or value <= 0 or (whole and (not value.is_integer() or value > UNLIMITED)):
        what = "a whole number >= 1" if whole else "a number > 0"
        raise ConfigError(f"{path}:{line}: {header[place]} is {cells[place]!r}; expected {what}")
    return value


# ---------------------------------------------------------------- fit

Terms = tuple[float, float, float]
Fit = Callable[[Sequence[Point]], Terms]


def _features(phase: str, point: Point) -> Terms:
    """What a step's three terms are multiplied with."""
    tokens = point.batch * point.length
    return (1.0, tokens, tokens * point.length) if phase == "prefill" else (1.0, tokens, point.batch)


def _time(phase: str, terms: Terms, point: Point) -> float:
    return sum(term * feature for term, feature in zip(terms, _features(phase, point), strict=True))


def _least_squares(phase: str, points: Sequence[Point]) -> Terms:
    times = np.array([point.seconds for point in points])
    matrix = np.array([_features(phase, point) for point in points]) / times[:, None]
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(points)))
    first, second, third = (float(value) for value in found / scale)
    return first, second, third


def _fitted(phase: str, guess: StageCost) -> Fit:
    """Terms of so many points: all three, or the roofline's scaled."""
    sizes = [Point(batch, length, seconds(guess, _work(phase, batch, length))) for batch, length in GRID]
    base = _least_squares(phase, sizes)

    def fit(points: Sequence[Point]) -> Terms:
        if len(points) >= FEWEST - 1 and len({_features(phase, point) for point in points}) >= 3:
            return _least_squares(phase, points)
        ratios = [log(point.seconds / _time(phase, base, point)) for point in points]
        factor = exp(sum(ratios) / len(ratios))
        return base[0] * factor, base[1] * factor, base[2] * factor

    return fit


def _work(phase: str, batch: int, length: int) -> Work:
    return Work(((length, 0),) * batch, 0, 0) if phase == "prefill" else Work((), batch, batch * length)


def _roofline(gpu: str, spec: ModelSpec, tp: int) -> StageCost:
    cluster = Cluster.of([{"gpu": gpu, "count": tp}])
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    return Roofline(overhead_s=0.0).bind(spec, stage, cluster)


# ---------------------------------------------------------------- write


def _form(gpu: str, spec: ModelSpec, tp: int, terms: Mapping[str, Terms], held: Mapping[str, HeldOut]) -> Polynomial:
    prompt, decode = ([float(f"{term:.9g}") for term in terms[phase]] for phase in ("prefill", "decode"))
    decodes = DecodeTerms(step_s=decode[0], context_s=decode[1], sequence_s=decode[2])
    return Polynomial(
        gpus=(gpu,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=tp,
        dtypes=(spec.dtype,),
        prompts=PromptTerms(step_s=prompt[0], token_s=prompt[1], square_s=prompt[2]),
        decodes=decodes,
        large=replace(decodes),
        large_from=UNLIMITED,
        held_out=held,
    )


def _samples(phase: str, rows: Sequence[Point], told: Sequence[float | None], spec: ModelSpec, tp: int) -> Samples:
    return Samples(
        operator=phase,
        dtype=spec.dtype,
        tp=tp,
        axes={"sequences": tuple(row.batch for row in rows), "context": tuple(row.length for row in rows)},
        seconds=tuple((row.seconds,) for row in rows),
        noise=(0.0,) * len(rows),
        predicted_s=tuple(told),
    )


def _provenance(path: Path, method: str) -> Provenance:
    settings: dict[str, Any] = {
        "source": f"the user's own step times: {path.name}",
        "licence": "the user's",
        "date": "unknown",
        "tool": "calibrate.importers.steps",
        "engine": "the user's; whole steps, its overhead included",
        "method": f"{method}; terms of DistServe's form by relative least squares; held_out: each point by the others",
    }
    return Provenance(**settings)
