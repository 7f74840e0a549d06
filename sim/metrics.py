"""From timestamps to figures: latency, SLO attainment, goodput, cost. Pure functions, nothing accumulated.

Start with ``summarise``. Latency distributions are over completed requests; SLO attainment is over all of them,
so that rejected, failed and unfinished requests count as misses. Energy and utilisation are in ``usage``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.policy import Problem
from sim.record import Result
from sim.types import Slo
from sim.usage import energy, mfu, per, replica_figures

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "prefill_s", "transfer_s", "decode_s")
BOUNDS = ("ttft", "tpot", "e2e")
LEADING_NUMBER = re.compile(r"^\d+ ")
"""A request's own count in a reason ("9000 tokens exceed ..."), left out so that equal reasons add up."""
MOST_REASONS = 10

Columns = Mapping[str, NDArray[Any]]
"""Request columns as in ``Result.columns``: one array each, all of one length."""


def distribution(values: ArrayLike) -> dict[str, float | int | None]:
    """Mean, population standard deviation, percentiles (linear interpolation), extremes and count; NaN is left out.

    Everything but ``count`` is ``None`` where there is no value.
    """
    array = np.asarray(values, dtype=float)
    array = array[~np.isnan(array)]
    if not array.size:
        return {**dict.fromkeys(("mean", "std", *PERCENTILES, "min", "max")), "count": 0}
    quantiles = np.percentile(array, list(PERCENTILES.values()))
    return {
        "mean": float(array.mean()),
        "std": float(array.std()),
        **{name: float(value) for name, value in zip(PERCENTILES, quantiles, strict=True)},
        "min": float(array.min()),
        "max": float(array.max()),
        "count": int(array.size),
    }


def scaled(slo: Slo, factor: float) -> Slo:
    """The same targets, every latency bound multiplied by ``factor``, those of classes too."""
    return replace(
        slo,
        ttft_s=None if slo.ttft_s is None else slo.ttft_s * factor,
        tpot_s=None if slo.tpot_s is None else slo.tpot_s * factor,
        e2e_s=None if slo.e2e_s is None else slo.e2e_s * factor,
        classes={name: scaled(own, factor) for name, own in slo.classes.items()},
    )


def met(columns: Columns, slo: Slo) -> dict[str, NDArray[np.bool_]]:
    """Per bound that the SLO sets, and jointly (``all``), whether each request completed within its own.

    A request of one output token has no TPOT and meets that bound by definition, as does one whose class has no bound.
    """
    completed = columns["outcome"] == "completed"
    marks = {}
    for bound in BOUNDS:
        limit = _limit(columns, slo, f"{bound}_s")
        if limit is not None:
            values = columns[f"{bound}_s"]
            marks[bound] = completed & ((values <= limit) | (np.isnan(values) & (columns["output_tokens"] == 1)))
    return {**marks, "all": np.logical_and.reduce([completed, *marks.values()])}


def _limit(columns: Columns, slo: Slo, bound: str) -> float | NDArray[np.float64] | None:
    """One bound: for all requests, or of each where classes have their own; ``None`` if nobody has it."""
    general: float | None = getattr(slo, bound)
    own: dict[str, float | None] = {name: getattr(part, bound) for name, part in slo.classes.items()}
    if not own:
        return general
    if general is None and not any(own.values()):
        return None
    limits = np.full(len(columns["outcome"]), general or np.inf, dtype=float)
    for name, limit in own.items():
        limits[columns["klass"] == name] = limit or np.inf
    return limits


def attainment(columns: Columns, slo: Slo, scale: float = 1.0) -> dict[str, float | None]:
    """Share of requests that meet the SLO with its bounds times ``scale``: jointly, and per bound.

    A bound that is not set is ``None``; so is everything where there are no requests.
    """
    marks = met(columns, scaled(slo, scale))
    shares = {name: float(mark.mean()) if mark.size else None for name, mark in marks.items()}
    return {"attainment": shares["all"], **{f"{bound}_attainment": shares.get(bound) for bound in BOUNDS}}


def attainment_curve(columns: Columns, slo: Slo, scales: Sequence[float]) -> list[float | None]:
    """Joint attainment at each SLO scale."""
    return [attainment(columns, slo, scale)["attainment"] for scale in scales]


def summarise(
    result: Result,
    slo: Slo | None = None,
    *,
    usd_per_hour: float | None = None,
    problem: Problem | None = None,
    spot: bool = False,
    itl: bool = False,
) -> dict[str, Any]:
    """All figures of a run as one JSON-ready object; ``None`` means undefined or unknown.

    ``usd_per_hour`` is the price of the whole cluster, idle GPUs included. Throughputs are over the makespan
    (first arrival to last completion) and count completed requests. Energy, MFU and the price of the GPUs that were
    used need the ``problem``; ``spot`` says which of its prices counts. ``itl``
    adds the distribution of every gap between tokens, which costs time linear in the tokens.
    """
    columns = result.columns
    done = columns["outcome"] == "completed"
    tokens = int(columns["output_tokens"][done].sum())
    summary: dict[str, Any] = {
        "system": result.system,
        "mirrors": result.mirrors,
        **_counts(columns),
        "makespan_s": result.makespan_s,
        **{name: distribution(columns[name][done]) for name in LATENCIES},
        "normalised_latency_s": distribution(columns["e2e_s"][done] / columns["output_tokens"][done]),
        "input_tokens": int(columns["input_tokens"][done].sum()),
        "output_tokens": tokens,
        "requests_per_s": per(int(done.sum()), result.makespan_s),
        "output_tokens_per_s": per(tokens, result.makespan_s),
        "slo": slo_figures(columns, slo or Slo(), result.makespan_s),
        "classes": class_figures(columns, slo or Slo(), result.makespan_s),
        **cost(tokens, result.makespan_s, usd_per_hour),
        "used_usd_per_million_tokens": used_usd_per_million_tokens(result, tokens, problem, spot=spot),
        "preemptions": int(columns["preemptions"].sum()),
        "cached_tokens": int(columns["cached_tokens"].sum()),
        "bytes_moved": int(columns["bytes_moved"].sum()),
        **energy(result, problem),
        "mfu": mfu(result, problem),
        **_provenance(result),
        "replicas": replica_figures(result, problem),
        "simulated_requests_per_s": per(len(done), result.wall_s),
        "simpy_events": result.events,
        "wall_s": result.wall_s,
    }
    if itl:
        summary["itl_s"] = distribution(result.itl_s())
    return summary


def slo_figures(columns: Columns, slo: Slo, makespan_s: float) -> dict[str, Any]:
    """Targets, attainment, whether the target share is reached, and goodput: what meets every bound, per second.

    Where classes have targets of their own, each of them must reach its own share too.
    """
    good = met(columns, slo)["all"]
    shares = attainment(columns, slo)
    reached = [shares["attainment"] >= slo.attainment] if shares["attainment"] is not None else []
    for name, own in slo.classes.items():
        part = good[columns["klass"] == name]
        reached += [float(part.mean()) >= own.attainment] if part.size else []
    return {
        **{f"{bound}_s": getattr(slo, f"{bound}_s") for bound in BOUNDS},
        "target": slo.attainment,
        **shares,
        "reached": all(reached) if reached else None,
        "goodput_per_s": per(int(good.sum()), makespan_s),
        "goodput_tokens_per_s": per(int(columns["output_tokens"][good].sum()), makespan_s),
    }


def class_figures(columns: Columns, slo: Slo, makespan_s: float) -> dict[str, Any]:
    """Per class: counts, latencies of the requests that completed, and how its own SLO was met.

    A class that has an SLO and no request is there too: its name may be a mistake.
    """
    figures = {}
    for name in dict.fromkeys([*columns["klass"].tolist(), *slo.classes]):
        if name is None:
            continue
        part = {column: values[columns["klass"] == name] for column, values in columns.items()}
        done = part["outcome"] == "completed"
        figures[name] = {
            "requests": len(done),
            "completed": int(done.sum()),
            **{latency: distribution(part[latency][done]) for latency in ("ttft_s", "tpot_s", "e2e_s")},
            "slo": slo_figures(part, slo.classes.get(name, replace(slo, classes={})), makespan_s),
        }
    return figures


def cost(output_tokens: int, makespan_s: float, usd_per_hour: float | None) -> dict[str, float | None]:
    """Dollars per million output tokens of a cluster rented for the makespan."""
    known = usd_per_hour is not None and output_tokens > 0
    usd = usd_per_hour * makespan_s / 3600 if usd_per_hour is not None else 0.0
    return {
        "cluster_usd_per_hour": usd_per_hour,
        "usd_per_million_tokens": usd / output_tokens * 1e6 if known else None,
    }


def used_usd_per_million_tokens(
    result: Result, output_tokens: int, problem: Problem | None, *, spot: bool = False
) -> float | None:
    """The rent of GPUs while a replica is up on them, between first arrival and last completion; None if unknown."""
    if problem is None or not output_tokens:
        return None
    start_s = min(row.request.arrival_s for row in result.rows.requests)
    end_s, usd = start_s + result.makespan_s, 0.0
    for row in result.rows.replicas:
        down_s = end_s if row.down_s is None else min(row.down_s, end_s)
        up_h = max(0.0, down_s - max(row.up_s, start_s)) / 3600
        for name in row.gpus.split():
            gpu = problem.cluster.gpu(name)
            price = gpu.usd_per_hour_spot if spot else gpu.usd_per_hour
            if price is None:
                return None
            usd += price * up_h
    return usd / output_tokens * 1e6


# ---------------------------------------------------------------- several seeds


class Estimate(NamedTuple):
    """A mean over independent runs, and half the width of its confidence interval (``None`` for one run)."""

    mean: float
    half_width: float | None
    runs: int


def estimate(values: ArrayLike, level: float = 0.95) -> Estimate | None:
    """Mean with Student's t interval; NaN is left out, ``None`` if nothing is left."""
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    array = array[~np.isnan(array)]
    if not array.size:
        return None
    if array.size == 1:
        return Estimate(float(array[0]), None, 1)
    error = array.std(ddof=1) / np.sqrt(array.size)
    return Estimate(float(array.mean()), float(stdtrit(array.size - 1, 0.5 + level / 2) * error), int(array.size))


# ---------------------------------------------------------------- counts


def _counts(columns: Columns) -> dict[str, Any]:
    outcomes = Counter(columns["outcome"].tolist())
    reasons = Counter(LEADING_NUMBER.sub("", reason) for reason in columns["reason"].tolist() if reason).most_common()
    rest = sum(count for _, count in reasons[MOST_REASONS:])
    return {
        "requests": len(columns["outcome"]),
        **{outcome: outcomes[outcome] for outcome in ("completed", "rejected", "failed", "running")},
        "reasons": {**dict(reasons[:MOST_REASONS]), **({"other reasons": rest} if rest else {})},
    }


def _provenance(result: Result) -> dict[str, Any]:
    """How far the step times rest on measurements."""
    replicas = result.rows.replicas
    return {
        "measured": all(row.measured for row in replicas),
        "unmeasured_gpus": sorted({row.gpu for row in replicas if not row.measured}),
        "extrapolated_share": result.extrapolated_share,
        "remarks": [note.text for note in result.rows.notes if note.kind == "remark"],
    }
