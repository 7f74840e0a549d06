"""What the hardware did in a run: energy, model FLOPs utilisation, pipeline bubbles. Pure functions of a ``Result``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.model import ModelSpec
from sim.policy import Problem
from sim.record import ON_THE_WAY, ReplicaRow, Result
from sim.types import to_ps, to_s


def per(amount: float, of: float) -> float | None:
    """A ratio; ``None`` where it has no sense."""
    return amount / of if of > 0 else None


class Window(NamedTuple):
    """The makespan: first arrival to last completion."""

    start_s: float
    end_s: float

    @classmethod
    def of(cls, result: Result) -> Window:
        start_s = float(min(result.columns["arrival_s"], default=0.0))
        return cls(start_s, start_s + result.makespan_s)

    def inside(self, start_s: float, end_s: float | None) -> float:
        """Seconds of a span that lie in the window; ``None``: it has no end."""
        return max(0.0, (self.end_s if end_s is None else min(end_s, self.end_s)) - max(start_s, self.start_s))


def energy(result: Result, problem: Problem | None) -> dict[str, float | None]:
    """Joules of the whole cluster over the makespan, idle GPUs included, and per output token of completed requests.

    A model, not a measurement: a GPU draws its idle power all the time, and its TDP while its stage computes, so
    power is linear in the busy share. Decodes, bound by memory, draw less than the TDP: read it as an upper estimate.
    Hosts, fans and networks are left out. ``None`` where a GPU's power is unknown.
    """
    joules = None
    if problem is not None:
        gpus = problem.cluster.gpu_ids
        idle = [_joules(problem, (gpu_id,), result.makespan_s, 0.0) for gpu_id in gpus]
        busy = [part for row in result.rows.replicas for part in _stage_joules(result, problem, row, idle=False)]
        joules = _total([*idle, *busy])
    done = result.columns["outcome"] == "completed"
    tokens = int(result.columns["output_tokens"][done].sum())
    return {"joules": joules, "joules_per_token": joules / tokens if joules is not None and tokens else None}


def _stage_joules(result: Result, problem: Problem, row: ReplicaRow, *, idle: bool = True) -> list[float | None]:
    """Of each stage's GPUs while the replica is up, with or without their idle power."""
    up_s = Window.of(result).inside(row.up_s, row.down_s)
    gpus, joules, first = row.gpus.split(), [], 0
    for tp, busy_s in zip(row.stage_tp, row.stage_busy_s, strict=True):
        joules.append(_joules(problem, gpus[first : first + tp], up_s if idle else 0.0, min(busy_s, up_s)))
        first += tp
    return joules


def _joules(problem: Problem, gpu_ids: Sequence[str], idle_s: float, busy_s: float) -> float | None:
    """Idle power for ``idle_s``, and the rest up to the TDP for ``busy_s``."""
    total = 0.0
    for gpu in map(problem.cluster.gpu, gpu_ids):
        if gpu.tdp_w is None or gpu.idle_w is None:
            return None
        total += gpu.idle_w * idle_s + (gpu.tdp_w - gpu.idle_w) * busy_s
    return total


def _total(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def useful_flops(
    columns: Mapping[str, NDArray[Any]], model: ModelSpec
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FLOPs that each request needs to prefill, and to decode; 0 unless it completed.

    What a preemption makes the engine compute again does not count, nor does a cached prefix.
    """
    done = (columns["outcome"] == "completed").astype(float)
    prompt = columns["input_tokens"].astype(float)
    cached = np.minimum(columns["cached_tokens"], prompt - 1)
    more = columns["output_tokens"].astype(float) - 1
    return (
        done * _flops(model, prompt - cached, cached, np.ones_like(prompt)),
        done * _flops(model, more, prompt, more),
    )


def _flops(
    model: ModelSpec, new: NDArray[np.float64], context: NDArray[np.float64], sampled: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``new`` tokens behind ``context`` ones, of which ``sampled`` go through the head."""
    dense = model.first_dense_layers
    linear = sum(
        layers * 2.0 * sum(gemm.n * gemm.k * gemm.active for gemm in model.gemms(dense=is_dense))
        for layers, is_dense in ((dense, True), (model.num_layers - dense, False))
    )
    window = np.inf if model.sliding_window is None else float(model.sliding_window)
    growing = np.clip(window - context, 0.0, new)
    pairs = growing * context + growing * (growing + 1) / 2
    if model.sliding_window is not None:
        pairs += (new - growing) * window
    attention = model.attention_flops_per_pair * model.num_layers
    return linear * new + attention * pairs + model.head_flops_per_token * sampled


def mfu(result: Result, problem: Problem | None) -> float | None:
    """Model FLOPs utilisation: useful FLOPs over what all GPUs of the cluster could do in the makespan.

    The peak is the dense one in the model's dtype (the definition of PaLM, arXiv 2204.02311, appendix B).
    """
    if problem is None:
        return None
    done = sum(float(flops.sum()) for flops in useful_flops(result.columns, problem.model))
    return per(done, _peak(problem, problem.cluster.gpu_ids) * result.makespan_s)


def _peak(problem: Problem, gpu_ids: Sequence[str]) -> float:
    return sum(problem.cluster.gpu(gpu_id).flops_for(problem.model.dtype) for gpu_id in gpu_ids)


def replica_figures(result: Result, problem: Problem | None) -> list[dict[str, Any]]:
    """What each replica did, over the part of the makespan in which it was up.

    ``busy_share`` is that of its busiest stage, over the whole makespan; for ``mfu`` and ``bubble_share`` see
    ``mfu_by_replica`` and ``bubble_share``. A replica that was lost and came back has an entry for each time.
    """
    window = Window.of(result)
    use = {} if problem is None else mfu_by_replica(result, problem)
    figures = []
    for row in result.rows.replicas:
        up_s = window.inside(row.up_s, row.down_s)
        figures.append(
            {"replica": row.replica, "role": row.role, "gpu": row.gpu, "tp": row.tp, "pp": row.pp, "up_s": up_s,
             "busy_share": per(row.busy_s, result.makespan_s),
             "stage_busy_shares": [per(busy_s, result.makespan_s) for busy_s in row.stage_busy_s],
             "bubble_share": bubble_share(result, row),
             "mfu": use.get(row.replica),
             "joules": None if problem is None else _total(_stage_joules(result, problem, row))}
        )  # fmt: skip
    return figures


def mfu_by_replica(result: Result, problem: Problem) -> dict[str, float | None]:
    """Model FLOPs utilisation of each replica (by name) while it was up.

    A request counts for the replicas of its last route: its prompt for the one that prefills, the rest for the one
    that decodes. ``None`` for all where requests pass several nodes, of whose parts the rows do not tell.
    """
    window = Window.of(result)
    able: dict[str, float] = defaultdict(float)
    for row in result.rows.replicas:
        able[row.replica] += _peak(problem, row.gpus.split()) * window.inside(row.up_s, row.down_s)
    done: dict[str, float] = defaultdict(float)
    for phase, flops in zip(
        ("prefill_stage", "decode_stage"), useful_flops(result.columns, problem.model), strict=True
    ):
        names, place = np.unique(result.columns[phase].astype(str), return_inverse=True)
        for name, total in zip(names.tolist(), np.bincount(place, flops).tolist(), strict=True):
            done[name] += total
    passed = any(ON_THE_WAY in name for name in done)
    return {name: None if passed else per(done[name], flops) for name, flops in able.items()}


def bubble_share(result: Result, row: ReplicaRow) -> float | None:
    """The share of a pipeline's stage time that is idle while the replica has a batch on its way.

    ``None`` without a pipeline, and where nothing ran. Stages count alike: if one of two always waits, half is bubbles.
    """
    if row.pp == 1:
        return None
    up_ps, down_ps = to_ps(row.up_s), np.inf if row.down_s is None else to_ps(row.down_s)
    spans = [
        (start_ps, end_ps)
        for name, start_ps, end_ps, *_ in result.rows.step_fields
        if name == row.replica and up_ps <= start_ps and end_ps <= down_ps
    ]
    active_s = to_s(_covered(spans))
    return 1 - sum(row.stage_busy_s) / (row.pp * active_s) if active_s else None


def _covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union."""
    covered, until = 0, 0
    for start, end in sorted(spans):
        if end > until:
            covered += end - max(start, until)
            until = end
    return covered
