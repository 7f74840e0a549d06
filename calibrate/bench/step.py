"""Whole steps of the engine's own decoder: what they take more than their operators is what runs beside those.

A few layers, on random weights and random KV, for one GPU's shard: a first chunk (or none) and decodes whose contexts
spread evenly from half of their mean to half as much again, from tokens on the device to greedy tokens on the device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from calibrate import kernels
from calibrate.bench.device import Target
from calibrate.bench.family import Family, Part, Point, Runs
from calibrate.bench.shapes import BLOCK_TOKENS, Limits, Shard, blocks
from calibrate.beside import STEP
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.cache import PagedKv, cache_bytes
from calibrate.execute.model.decoder import Batch, Decoder
from calibrate.execute.model.layout import assemble
from calibrate.execute.model.weights import build, num_bytes
from sim.types import ConfigError

SEED = 11
POOL_VALUES = 1 << 20
"""Random values that weights and KV are tiled with."""


def step_family(shard: Shard, target: Target, limits: Limits) -> Family:
    """Steps by tokens of a first chunk, sequences, their mean context, and layers; held out: other values of each.

    Few and more layers follow one another, so that a slow while of the machine is not taken for what layers cost.
    ``ConfigError`` says why the engine's decoder cannot run this shard.
    """
    arch = _architecture(shard)
    most_tokens, most_seqs = limits.tokens // 2, min(limits.sequences, limits.tokens) // 2
    axes = {
        "tokens": (0, most_tokens // 4, most_tokens),
        "sequences": (1, 8, most_seqs),
        "context": (limits.context_tokens // 16, limits.context_tokens // 4),
        "layers": (1, 3),
    }
    held = {
        "tokens": (0, most_tokens // 2),
        "sequences": (4, most_seqs // 2),
        "context": (limits.context_tokens // 8,),
        "layers": (4,),
    }
    part = Part(operator=STEP, prepare=partial(_prepare, arch, target), need_bytes=partial(_need_bytes, arch, target))
    return Family(name=STEP, tp=shard.tp, dtype=shard.spec.dtype, axes=axes, parts=(part,), looks=2, held=held)


def refused(shard: Shard) -> str | None:
    """Why the engine's decoder cannot run this shard; None if it can."""
    try:
        _architecture(shard)
    except ConfigError as error:
        return str(error)
    return None


def _architecture(shard: Shard) -> Architecture:
    """What the decoder runs of a shard; ``ConfigError`` if that is other work than the shard's operators do."""
    arch = replace(Architecture.of(shard.spec, shard.tp), qk_norm=shard.normed_heads)
    if arch.num_heads != shard.heads:
        raise ConfigError(
            f"{arch.name}: tp {shard.tp}: {shard.heads} heads are padded to {arch.num_heads}, whole groups of "
            "key-value heads"
        )
    return arch


def even_contexts(sequences: int, mean: int) -> np.ndarray:
    """Contexts from half of ``mean`` to half as much again, in rising order; their mean is exact."""
    below = np.round(np.linspace(0.5, 0.0, sequences // 2, endpoint=False) * mean).astype(np.int64)
    steps = np.concatenate([-below, np.zeros(sequences % 2, dtype=np.int64), below[::-1]])
    contexts: np.ndarray = mean + steps
    return contexts


def _prepare(arch: Architecture, target: Target, point: Point) -> Runs:
    arch = replace(arch, num_layers=point["layers"])
    device = str(target.torch_device)
    (pool,) = target.random(arch.torch_dtype, POOL_VALUES)
    sets = _sets(arch, target)
    decoders = [_decoder(arch, pool, device) for _ in range(sets)]
    cache = PagedKv(arch, arch.num_layers, _kv_blocks(point), BLOCK_TOKENS, device)
    for tensor in (each for layer in cache.layers for each in layer):
        _tile(tensor.view(-1), pool)
    batch = _batch(arch, point, device)

    def run(number: int) -> tuple[Tensor, Tensor]:
        logits = decoders[number](batch, cache)
        return logits, logits.argmax(dim=-1)

    return Runs(run, sets, capturable=arch.num_experts is None or kernels.grouped_gemms(pool))


def _sets(arch: Architecture, target: Target) -> int:
    """So many that the weights of a run are not in the cache from the one before."""
    return target.sets(num_bytes(arch, 0, arch.num_layers))


def _decoder(arch: Architecture, pool: Tensor, device: str) -> Decoder:
    """Its weights are views of one buffer that holds the pool over and over."""
    flat = torch.empty(num_bytes(arch, 0, arch.num_layers) // pool.itemsize, dtype=pool.dtype, device=device)
    _tile(flat, pool)
    used = 0

    def make(_: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal used
        used += prod(shape)
        return flat[used - prod(shape) : used].view(shape)

    return Decoder(arch, build(arch, 0, arch.num_layers, make), device)


def _tile(flat: Tensor, pool: Tensor) -> None:
    for start in range(0, flat.numel(), pool.numel()):
        part = flat[start : start + pool.numel()]
        part.copy_(pool[: part.numel()])


def _batch(arch: Architecture, point: Point, device: str) -> Batch:
    """Blocks lie all over the cache; the chunk's token and every decode's are asked for."""
    rng = np.random.default_rng(SEED)
    free = 1 + rng.permutation(_kv_blocks(point))
    tokens, contexts = point["tokens"], even_contexts(point["sequences"], point["context"])
    chunks = [(0, tokens, free[: blocks(tokens)])] if tokens else []
    tables, at = np.zeros((len(contexts), blocks(int(contexts[-1]))), dtype=np.int64), blocks(tokens)
    for row, context in zip(tables, contexts.tolist(), strict=True):
        row[: blocks(context)] = free[at : at + blocks(context)]
        at += blocks(context)
    ids = rng.integers(0, arch.vocab_size, tokens + len(contexts))
    rows = [tokens - 1] * bool(tokens) + list(range(tokens, tokens + len(contexts)))
    return assemble(chunks, contexts, tables, ids, rows, block_size=BLOCK_TOKENS, device=device)


def _kv_blocks(point: Point) -> int:
    contexts = even_contexts(point["sequences"], point["context"]).tolist()
    return blocks(point["tokens"]) + sum(map(blocks, contexts))


def _need_bytes(arch: Architecture, target: Target, point: Point) -> int:
    """Weights, KV, its padded copies in one layer, and what rows of activations and logits take."""
    arch = replace(arch, num_layers=point["layers"])
    size, rows = arch.torch_dtype.itemsize, point["tokens"] + point["sequences"]
    kv = cache_bytes(arch, 1, _kv_blocks(point), BLOCK_TOKENS)
    experts = 1 if arch.experts_per_token is None else arch.experts_per_token
    width = 8 * arch.hidden_size + 4 * experts * (arch.hidden_size + arch.intermediate_size) + 4 * arch.kv_width
    logits = (point["sequences"] + 1) * arch.vocab_size * (size + 4)
    weights = _sets(arch, target) * num_bytes(arch, 0, arch.num_layers)
    return weights + (arch.num_layers + 3) * kv + rows * (width + 4 * arch.num_heads * arch.head_dim) * size + logits
