"""What moves KV: gathered from blocks, packed to 4 bits and back, and copies between memories. One layer, one GPU."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from calibrate import kernels
from calibrate.bench.device import DTYPES, Target
from calibrate.bench.family import Family, Part, Point, Runs
from calibrate.bench.shapes import BLOCK_TOKENS, Limits, Shard, blocks, linear_in

COPY_BYTES = (2**12, 2**20, 2**26)
SETS = 4


def kv_family(shard: Shard, target: Target, limits: Limits) -> Family:
    """Gather, quantise and dequantise keys and values of so many tokens."""
    token_bytes = shard.kv_token_values * shard.value_bytes
    kinds: dict[str, tuple[Callable[[Point], Runs], float]] = {
        "kv_gather": (lambda point: _gather(shard, target, point["tokens"]), 2.0),
        "kv_quantise": (lambda point: _quantise(shard, target, point["tokens"]), 1.25),
        "kv_dequantise": (lambda point: _dequantise(shard, target, point["tokens"]), 1.25),
    }
    parts = tuple(
        Part(
            operator=name,
            prepare=prepare,
            need_bytes=lambda point: point["tokens"] * shard.kv_token_values * 24 + 6 * target.cache_bytes,
            bytes=linear_in("tokens", token_bytes * passes),
        )
        for name, (prepare, passes) in kinds.items()
    )
    axes = {"tokens": tuple(sorted({BLOCK_TOKENS, min(256, limits.tokens), limits.tokens}))}
    return Family(name="kv", tp=shard.tp, dtype=shard.spec.dtype, axes=axes, parts=parts, refined=("tokens",), checks=2)


def copy_family(shard: Shard, target: Target) -> Family:
    """Copies by bytes: within the device, and with CUDA from and to pinned host memory and to the next device."""
    here, host = target.torch_device, torch.device("cpu")
    routes = {"copy_d2d": (here, here)}
    if target.cuda:
        routes |= {"copy_h2d": (host, here), "copy_d2h": (here, host)}
        count = torch.cuda.device_count()
        if count > 1:
            routes["copy_peer"] = (here, torch.device("cuda", ((here.index or 0) + 1) % count))
    parts = tuple(_copy(name, *route, target) for name, route in routes.items())
    axes = {"bytes": COPY_BYTES}
    return Family(
        name="copy", tp=shard.tp, dtype=shard.spec.dtype, axes=axes, parts=parts, refined=("bytes",), checks=2
    )


def _copy(operator: str, source: torch.device, sink: torch.device, target: Target) -> Part:
    def buffer(device: torch.device, size: int) -> Tensor:
        pinned = target.cuda and device.type == "cpu"
        return torch.randint(0, 255, (size,), dtype=torch.uint8, device=device, pin_memory=pinned)

    def prepare(point: Point) -> Runs:
        sets = min(8, target.sets(2 * point["bytes"]))
        pairs = [(buffer(source, point["bytes"]), buffer(sink, point["bytes"])) for _ in range(sets)]
        return Runs(lambda i: pairs[i][1].copy_(pairs[i][0], non_blocking=True), sets, capturable=source == sink)

    return Part(
        operator=operator,
        prepare=prepare,
        need_bytes=lambda point: 16 * point["bytes"],
        bytes=linear_in("bytes", 2 if source == sink else 1),
    )


def _gather(shard: Shard, target: Target, tokens: int) -> Runs:
    token_bytes = shard.kv_token_values * shard.value_bytes
    total = blocks(max(tokens, 2 * target.cache_bytes // token_bytes))
    shape = (total, BLOCK_TOKENS, shard.kv_heads, shard.head_dim)
    (keys,), (values,) = (target.random(DTYPES[shard.spec.dtype], *shape) for _ in range(2))
    tables = [torch.randperm(total, device=target.torch_device)[None, : blocks(tokens)] for _ in range(SETS)]
    return Runs(lambda i: (kernels.gather_kv(keys, tables[i]), kernels.gather_kv(values, tables[i])), SETS)


def _quantise(shard: Shard, target: Target, tokens: int) -> Runs:
    inputs = target.random(DTYPES[shard.spec.dtype], 2 * tokens, shard.kv_token_values // 2, sets=SETS)
    return Runs(lambda i: kernels.quantise_4bit(inputs[i], _group(shard)), SETS)


def _dequantise(shard: Shard, target: Target, tokens: int) -> Runs:
    dtype = DTYPES[shard.spec.dtype]
    inputs = target.random(dtype, 2 * tokens, shard.kv_token_values // 2, sets=SETS)
    packed = [kernels.quantise_4bit(x, _group(shard)) for x in inputs]
    return Runs(lambda i: kernels.dequantise_4bit(*packed[i], dtype), SETS)


def _group(shard: Shard) -> int:
    """As the engine groups values: 64, or the part of it that divides a token's keys."""
    return gcd(kernels.QUANTISED_GROUP, shard.kv_token_values // 2)
