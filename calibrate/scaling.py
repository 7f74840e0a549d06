"""Kernel tables of a GPU that nobody measured, from those of another one and both specification sheets.

Every kernel keeps its efficiency: a GEMM is scaled by the ratio of its roofline times (the longer of arithmetic and
traffic) on the two, decode attention by bandwidth, prompt attention by FLOP/s; of attention, the shortest time of a
table is a launch, which stays. A prediction, and to be labelled as one; good for GPUs of one generation.
"""

from __future__ import annotations

from dataclasses import replace

from sim.cluster import Gpu
from sim.cost import AttentionTable, GemmTable, Grid, Kernels, Profile, Table

VALUE_BYTES = 2
"""The tables are of 16-bit values."""


def scaled(profile: Profile, source: Gpu, target: Gpu) -> Profile:
    """``profile``'s kernels of ``source`` as they would be on ``target``; entries of models are left out."""
    kernels = tuple(_kernels(part, source, target) for part in profile.kernels if source.name in part.gpus)
    note = f"{profile.provenance.method}; scaled from {source.name} to {target.name} by specification: predicted"
    provenance = replace(profile.provenance, tool="calibrate.scaling", method=note)
    return Profile(name=f"{profile.name}-as-{target.name.lower()}", provenance=provenance, kernels=kernels)


def _kernels(kernels: Kernels, source: Gpu, target: Gpu) -> Kernels:
    bandwidth = source.bandwidth_bytes_per_s / target.bandwidth_bytes_per_s
    arithmetic = source.flops_for("bfloat16") / target.flops_for("bfloat16")
    return replace(
        kernels,
        gpus=(target.name,),
        gemm=_gemm(kernels.gemm, source, target),
        attention=tuple(_attention(table, bandwidth, arithmetic) for table in kernels.attention),
        held_out={},
    )


def _gemm(table: GemmTable, source: Gpu, target: Gpu) -> GemmTable:
    seconds = tuple(
        tuple(
            tuple(
                value * _roofline_s(tokens, n, k, target) / _roofline_s(tokens, n, k, source)
                for tokens, value in zip(table.tokens, row, strict=True)
            )
            for k, row in zip(table.k, plane, strict=True)
        )
        for n, plane in zip(table.n, table.seconds, strict=True)
    )
    return replace(table, seconds=seconds)


def _roofline_s(tokens: int, n: int, k: int, gpu: Gpu) -> float:
    traffic_bytes = VALUE_BYTES * (n * k + tokens * (n + k))
    return max(2 * tokens * n * k / gpu.flops_for("bfloat16"), traffic_bytes / gpu.bandwidth_bytes_per_s)


def _attention(table: AttentionTable, bandwidth: float, arithmetic: float) -> AttentionTable:
    return replace(table, prefill=_times(table.prefill, arithmetic), decode=_rows_times(table.decode, bandwidth))


def _times(table: Table, factor: float) -> Table:
    return replace(table, seconds=_beyond_launch(table.seconds, table.seconds[0], factor))


def _rows_times(grid: Grid, factor: float) -> Grid:
    launch_s = grid.seconds[0][0]
    return replace(grid, seconds=tuple(_beyond_launch(row, launch_s, factor) for row in grid.seconds))


def _beyond_launch(seconds: tuple[float, ...], launch_s: float, factor: float) -> tuple[float, ...]:
    return tuple(launch_s + max(0.0, value - launch_s) * factor for value in seconds)
