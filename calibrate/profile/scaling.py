"""Kernel tables of a GPU that nobody measured, from those of another one and both specification sheets.

Every kernel keeps its efficiency: a GEMM is scaled by the ratio of its roofline times (the longer of arithmetic and
traffic) on the two, decode attention by bandwidth, prompt attention by FLOP/s; of attention, the shortest time of a
table is a launch, which stays. Where one of the two runs FlashAttention 3 and the other one 2, prompts gain or lose
what lies between them. A prediction, and labelled as one; ``experiments.fidelity.cases.crossed`` says how good.
"""

from __future__ import annotations

from dataclasses import replace

from sim.cluster import Gpu
from sim.cost import AttentionTable, GemmTable, Grid, Kernels, Profile, Table
from sim.cost.kernels import gemm_floor_s

FLASH3 = ("H100", "H200", "B200")
"""GPUs on which vLLM's attention uses the matrix units' asynchronous form: FlashAttention 3, or later."""
FLASH3_GAIN = 1.3
"""Share of peak that its prompts reach over FlashAttention 2's (0.75 and 0.57 of H100 and A100 in long ones): fitted on
the H100's from the L40S's, Llama-3.1-8B."""
BESIDE_CHUNKS = 0.35
"""``Kernels.beside_chunks`` of FlashAttention 2: 0.3 to 0.45 in LLMServingSim's tables (16 and more decodes on RTX 4090
and RTX PRO 6000, 4 and 8 query heads per KV head). FlashAttention 3 puts the query heads of a KV head into one tile:
0."""


def scaled(profile: Profile, source: Gpu, target: Gpu) -> Profile:
    """``profile``'s kernels of ``source`` as they would be on ``target``; entries of models are left out."""
    kernels = tuple(_kernels(part, source, target) for part in profile.kernels if source.name in part.gpus)
    note = f"{profile.provenance.method}; scaled from {source.name} to {target.name} by specification: predicted"
    provenance = replace(profile.provenance, tool="calibrate.profile.scaling", method=note)
    return Profile(name=f"{profile.name}-as-{target.name.lower()}", provenance=provenance, kernels=kernels)


def _kernels(kernels: Kernels, source: Gpu, target: Gpu) -> Kernels:
    bandwidth = source.bandwidth_bytes_per_s / target.bandwidth_bytes_per_s
    arithmetic = source.flops_for("bfloat16") / target.flops_for("bfloat16")
    arithmetic *= _flash_gain(source) / _flash_gain(target)
    return replace(
        kernels,
        gpus=(target.name,),
        gemm=_gemm(kernels.gemm, source, target, "bfloat16"),
        gemm8=None if kernels.gemm8 is None else _gemm(kernels.gemm8, source, target, "float8"),
        attention=tuple(_attention(table, bandwidth, arithmetic) for table in kernels.attention),
        beside_chunks=BESIDE_CHUNKS if _flash_gain(target) == 1 else 0.0,
        predicted=True,
        held_out={},
    )


def _flash_gain(gpu: Gpu) -> float:
    return FLASH3_GAIN if gpu.name.startswith(FLASH3) else 1.0


def _gemm(table: GemmTable, source: Gpu, target: Gpu, dtype: str) -> GemmTable:
    def least_s(n: int, k: int, tokens: int, gpu: Gpu) -> float:
        weight_bytes = n * k * (1 if dtype == "float8" else 2)
        return gemm_floor_s(n, k, tokens, weight_bytes, gpu.flops_for(dtype), gpu.bandwidth_bytes_per_s)

    seconds = tuple(
        tuple(
            tuple(
                value * least_s(n, k, tokens, target) / least_s(n, k, tokens, source)
                for tokens, value in zip(table.tokens, row, strict=True)
            )
            for k, row in zip(table.k, plane, strict=True)
        )
        for n, plane in zip(table.n, table.seconds, strict=True)
    )
    return replace(table, seconds=seconds)


def _attention(table: AttentionTable, bandwidth: float, arithmetic: float) -> AttentionTable:
    return replace(table, prefill=_times(table.prefill, arithmetic), decode=_rows_times(table.decode, bandwidth))


def _times(table: Table, factor: float) -> Table:
    return replace(table, seconds=_beyond_launch(table.seconds, table.seconds[0], factor))


def _rows_times(grid: Grid, factor: float) -> Grid:
    launch_s = grid.seconds[0][0]
    return replace(grid, seconds=tuple(_beyond_launch(row, launch_s, factor) for row in grid.seconds))


def _beyond_launch(seconds: tuple[float, ...], launch_s: float, factor: float) -> tuple[float, ...]:
    return tuple(launch_s + max(0.0, value - launch_s) * factor for value in seconds)
