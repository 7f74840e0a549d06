"""What a step runs by its tokens (GEMMs, norms, rope, activation, cache write, experts) and by its sequences (head)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calibrate import kernels
from calibrate.bench.device import DTYPES, Target
from calibrate.bench.family import Family, Part, Point, Runs
from calibrate.bench.shapes import BLOCK_TOKENS, Limits, Shard, blocks, linear_in
from calibrate.execute.model.layout import assemble
from sim.model import Gemm

ROPE_BASE, NORM_EPS = 10_000.0, 1e-6
CHECKS = 4
TABLE_BLOCKS = 64
"""Blocks of each sequence in the inputs of a step."""
POWERS = tuple(4**power for power in range(10))
LAUNCHES = (1, 16, 256)
DENSITIES_PCT = (5, 10, 25, 50, 100)

Kernel = Callable[[Tensor], Tensor]


def linear_family(shard: Shard, target: Target, limits: Limits) -> Family:
    """The operators of ``ProfileEntry.linear``, by tokens: one layer's, and the embedding."""
    gemms = shard.spec.gemms(shard.tp)
    parts = [gemm_part(f"gemm.{gemm.name}", gemm.n, gemm.k, shard, target) for gemm in gemms if gemm.count == 1]
    parts += [*_pointwise(shard, target), _scatter(shard, target), _embedding(shard, target)]
    if experts := [gemm for gemm in gemms if gemm.count > 1]:
        parts.append(_experts(experts, shard, target))
    axis = tuple(count for count in POWERS if count < limits.tokens)
    return _family("linear", shard, {"tokens": (*axis, limits.tokens)}, parts, refined=("tokens",))


def head_family(shard: Shard, target: Target, limits: Limits) -> Family:
    """The operators of ``ProfileEntry.head``, by sequences: logits, greedy sampler, inputs and tokens of the step."""
    logits = gemm_part("head", shard.vocabulary, shard.spec.hidden_size, shard, target, axis="sequences")
    parts = (logits, _sampler(shard, target), _step_io(shard, target))
    return _family("head", shard, {"sequences": (1, 8, limits.sequences)}, parts, refined=("sequences",))


def launch_family(shard: Shard, target: Target) -> Family:
    """The processor's time for a step of so many small kernels: eager, and as one CUDA graph."""
    names = ("launch_eager", "launch_graph") if target.cuda else ("launch_eager",)
    parts = [Part(operator=name, prepare=_launches(name, target), need_bytes=lambda _: 2**20) for name in names]
    return _family("launch", shard, {"launches": LAUNCHES}, parts)


def gemv_family(shard: Shard, target: Target) -> Family:
    """One token through the share of the MLP's first matrix that it needs: rows gathered, then multiplied."""
    dtype = DTYPES[shard.spec.dtype]
    n, k = shard.mlp_width, shard.spec.hidden_size

    def prepare(point: Point) -> Runs:
        count = max(1, n * point["density_pct"] // 100)
        sets = target.sets(n * k * shard.value_bytes)
        weights, (x,) = target.random(dtype, n, k, sets=sets), target.random(dtype, 1, k)
        chosen = torch.randperm(n, device=target.torch_device)[:count].sort().values
        return Runs(lambda i: functional.linear(x, weights[i].index_select(0, chosen)), sets)

    part = Part(
        operator="gemv_density",
        prepare=prepare,
        need_bytes=lambda _: 2 * n * k * shard.value_bytes + 3 * target.cache_bytes,
        flops=linear_in("density_pct", 2 * n * k / 100),
        bytes=linear_in("density_pct", n * k * shard.value_bytes / 100),
    )
    return _family("gemv_density", shard, {"density_pct": DENSITIES_PCT}, [part])


def gemm_part(operator: str, n: int, k: int, shard: Shard, target: Target, axis: str = "tokens") -> Part:
    """``[tokens, k]`` times a weight ``[n, k]``."""
    dtype, size = DTYPES[shard.spec.dtype], shard.value_bytes

    def prepare(point: Point) -> Runs:
        rows = point[axis]
        sets = target.sets(n * k * size)
        weights, inputs = target.random(dtype, n, k, sets=sets), target.random(dtype, rows, k, sets=2)
        out = torch.empty(rows, n, dtype=dtype, device=target.torch_device)
        return Runs(lambda i: torch.mm(inputs[i % 2], weights[i].t(), out=out), sets, outputs=(out,))

    return Part(
        operator=operator,
        prepare=prepare,
        need_bytes=lambda point: size * (n * k + point[axis] * (n + 2 * k)) + 3 * target.cache_bytes,
        flops=linear_in(axis, 2 * n * k),
        bytes=linear_in(axis, size * (n + k), size * n * k),
    )


def _pointwise(shard: Shard, target: Target) -> list[Part]:
    """Norms, residual sums, rope and activation: they read and write activations only."""
    spec, device, dtype = shard.spec, target.torch_device, DTYPES[shard.spec.dtype]
    hidden, wide = spec.hidden_size, shard.mlp_width * (2 if spec.gated_mlp else 1)
    rotated = (shard.heads + shard.kv_heads) * shard.head_dim
    ones = torch.ones(hidden, dtype=dtype, device=device)
    head_ones = torch.ones(shard.head_dim, dtype=dtype, device=device)
    activation = kernels.swiglu if spec.gated_mlp else functional.gelu

    def rotation(tokens: int) -> Kernel:
        angles = kernels.rope_angles(torch.arange(tokens, device=device), _frequencies(shard, device), dtype)
        return lambda x: kernels.rope(x.view(tokens, -1, shard.head_dim), angles)

    def head_norm(tokens: int) -> Kernel:
        return lambda x: kernels.rms_norm(x.view(tokens, -1, shard.head_dim), head_ones, NORM_EPS)

    parts = [
        _small("norm", hidden, 2, lambda _: lambda x: kernels.rms_norm(x, ones, NORM_EPS), shard, target, times=2),
        _small("residual", hidden, 3, lambda _: lambda x: x + x, shard, target, times=2),
        _small("rope", rotated, 2, rotation, shard, target),
    ]
    if shard.normed_heads:
        parts.append(_small("qk_norm", rotated, 2, head_norm, shard, target))
    if spec.num_experts is None:
        passes = 1.5 if spec.gated_mlp else 2
        parts.append(_small("activation", wide, passes, lambda _: activation, shard, target))
    return parts


def _small(
    operator: str,
    width: int,
    passes: float,
    kernel_for: Callable[[int], Kernel],
    shard: Shard,
    target: Target,
    times: int = 1,
) -> Part:
    """A kernel over ``[tokens, width]`` that reads and writes so many of them in all."""
    dtype, size = DTYPES[shard.spec.dtype], shard.value_bytes

    def prepare(point: Point) -> Runs:
        sets = target.sets(point["tokens"] * width * size)
        inputs, kernel = target.random(dtype, point["tokens"], width, sets=sets), kernel_for(point["tokens"])
        return Runs(lambda i: kernel(inputs[i]), sets)

    return Part(
        operator=operator,
        prepare=prepare,
        need_bytes=lambda point: point["tokens"] * width * (size * 2 + 8) + 3 * target.cache_bytes,
        bytes=linear_in("tokens", width * size * passes),
        times=times,
    )


def _frequencies(shard: Shard, device: torch.device) -> Tensor:
    return ROPE_BASE ** (-torch.arange(0, shard.head_dim, 2, device=device) / shard.head_dim)


def _scatter(shard: Shard, target: Target) -> Part:
    """Keys and values of the step's tokens, written to slots all over the cache."""
    dtype, device = DTYPES[shard.spec.dtype], target.torch_device

    def prepare(point: Point) -> Runs:
        tokens = point["tokens"]
        slots_each = max(tokens, 2 * target.cache_bytes // (shard.kv_token_values * shard.value_bytes))
        shape = (blocks(slots_each), BLOCK_TOKENS, shard.kv_heads, shard.head_dim)
        caches = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
        new = target.random(dtype, tokens, shard.kv_heads, shard.head_dim, sets=2)
        slots = [torch.randperm(shape[0] * BLOCK_TOKENS, device=device)[:tokens] for _ in range(4)]

        def run(i: int) -> None:
            for cache, values in zip(caches, new, strict=True):
                kernels.scatter_kv(cache, slots[i], values)

        return Runs(run, sets=4)

    token_bytes = shard.kv_token_values * shard.value_bytes
    return Part(
        operator="kv_scatter",
        prepare=prepare,
        need_bytes=lambda point: 2 * point["tokens"] * token_bytes + 6 * target.cache_bytes,
        bytes=linear_in("tokens", 2 * token_bytes),
    )


def _embedding(shard: Shard, target: Target) -> Part:
    """Rows of the table, and the angles of the step's positions; once a step."""
    spec, device = shard.spec, target.torch_device
    row_bytes = spec.hidden_size * shard.value_bytes

    def prepare(point: Point) -> Runs:
        rows = min(spec.vocab_size, max(point["tokens"], 2 * target.cache_bytes // row_bytes))
        (table,) = target.random(DTYPES[spec.dtype], rows, spec.hidden_size)
        ids = [torch.randint(rows, (point["tokens"],), device=device) for _ in range(8)]
        frequencies = _frequencies(shard, device)

        def run(i: int) -> tuple[Tensor, ...]:
            return functional.embedding(ids[i], table), *kernels.rope_angles(ids[i], frequencies, table.dtype)

        return Runs(run, sets=8)

    return Part(
        operator="embedding",
        prepare=prepare,
        need_bytes=lambda point: 2 * point["tokens"] * row_bytes + 3 * target.cache_bytes,
        bytes=linear_in("tokens", 2 * row_bytes),
        times=0,
    )


def _experts(gemms: list[Gemm], shard: Shard, target: Target) -> Part:
    """Routing of a layer's tokens and their experts, each token's chosen at random."""
    spec, size, dtype = shard.spec, shard.value_bytes, DTYPES[shard.spec.dtype]
    count, active = gemms[0].count, gemms[0].active
    weights_bytes = sum(gemm.count * gemm.n * gemm.k for gemm in gemms) * size
    token_flops = sum(2 * gemm.n * gemm.k * gemm.active for gemm in gemms)

    def prepare(point: Point) -> Runs:
        tokens, sets = point["tokens"], target.sets(weights_bytes)
        up, down = ([target.random(dtype, gemm.count, gemm.n, gemm.k)[0] for _ in range(sets)] for gemm in gemms)
        (x,) = target.random(dtype, tokens, spec.hidden_size)
        logits = [torch.randn(tokens, count, dtype=dtype, device=target.torch_device) for _ in range(8)]

        def run(i: int) -> Tensor:
            weights, experts = kernels.route(logits[i % 8], active, normalise=True)
            return kernels.expert_mlp(x, weights, experts, up[i % sets], down[i % sets])

        return Runs(run, sets=8 * sets, capturable=kernels.grouped_gemms(x))

    return Part(
        operator="experts",
        prepare=prepare,
        need_bytes=lambda point: (
            weights_bytes + 8 * point["tokens"] * active * spec.hidden_size * size + 5 * target.cache_bytes
        ),
        flops=linear_in("tokens", token_flops),
        bytes=lambda point: weights_bytes * (1 - (1 - active / count) ** point["tokens"]),
    )


def _sampler(shard: Shard, target: Target) -> Part:
    """Logits to float32, and the largest of each row."""

    def prepare(point: Point) -> Runs:
        rows, width = point["sequences"], shard.spec.vocab_size
        sets = target.sets(rows * width * shard.value_bytes)
        logits = target.random(DTYPES[shard.spec.dtype], rows, width, sets=sets)
        return Runs(lambda i: logits[i].float().argmax(dim=-1), sets)

    row_bytes = shard.spec.vocab_size * (shard.value_bytes + 8)
    return Part(
        operator="sampler",
        prepare=prepare,
        need_bytes=lambda point: point["sequences"] * row_bytes + 3 * target.cache_bytes,
        bytes=linear_in("sequences", row_bytes),
    )


def _step_io(shard: Shard, target: Target) -> Part:
    """What the processor does for a step: its inputs from block tables to the device, its tokens back."""
    device = str(target.torch_device)

    def prepare(point: Point) -> Runs:
        count = point["sequences"]
        contexts = np.full(count, TABLE_BLOCKS * BLOCK_TOKENS, dtype=np.int64)
        tables = np.arange(count * TABLE_BLOCKS, dtype=np.int64).reshape(count, TABLE_BLOCKS)
        tokens, rows = np.zeros(count, dtype=np.int64), list(range(count))

        def run(_: int) -> list[int]:
            batch = assemble([], contexts, tables, tokens, rows, block_size=BLOCK_TOKENS, device=device)
            return list(batch.tokens.tolist())

        return Runs(run, host=True)

    return Part(operator="step_io", prepare=prepare, need_bytes=lambda _: 2**24)


def _launches(name: str, target: Target) -> Callable[[Point], Runs]:
    def prepare(point: Point) -> Runs:
        x = torch.zeros(16, device=target.torch_device)

        def run(_: int) -> None:
            for _ in range(point["launches"]):
                x.add_(1.0)

        if name == "launch_eager":
            return Runs(run, host=True)
        run(0)  # a kernel's first launch loads it, which a capture should not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(0)
        return Runs(lambda _: _replayed(graph), host=True)

    return prepare


def _replayed(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
    torch.cuda.synchronize()


def _family(
    name: str, shard: Shard, axes: dict[str, tuple[int, ...]], parts: Sequence[Part], refined: tuple[str, ...] = ()
) -> Family:
    """Those that are refined have points that the fit does not see."""
    return Family(
        name=name,
        tp=shard.tp,
        dtype=shard.spec.dtype,
        axes=axes,
        parts=tuple(parts),
        refined=refined,
        checks=CHECKS if refined else 0,
    )
