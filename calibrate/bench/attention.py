"""Attention of one layer over paged KV: prompt chunks after a context, decodes, skewed decodes, and both together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from calibrate import kernels
from calibrate.bench.device import DTYPES, Target
from calibrate.bench.family import Family, Part, Point, Runs
from calibrate.bench.shapes import BLOCK_TOKENS, Limits, Shard, blocks
from calibrate.execute.model.layout import similar_lengths

LEAST_CHUNK_TOKENS = 16
CHECKS = 6
"""Points within each grid that the fit does not see."""
SETS = 4
"""Block tables that runs take in turn, each elsewhere in the cache."""
SKEW = (5, 1, 1, 1)
"""Halves of the mean context that sequences have in turn: one of four has 2.5 times the mean, the others half of it."""


def attention_families(shard: Shard, target: Target, limits: Limits) -> list[Family]:
    """The operators ``attention_*`` of a ``ProfileEntry``, and decodes with skewed contexts as a check.

    A chunk after one token runs the kernel of later chunks, a first chunk the quicker one of whole prompts.
    """
    chunk = tuple(sorted({LEAST_CHUNK_TOKENS, min(256, limits.tokens), limits.tokens}))
    after = (0, 1, limits.context_tokens // 4, limits.context_tokens)
    seqs = (1, 8, limits.sequences)
    context = (LEAST_CHUNK_TOKENS, limits.context_tokens // 4, limits.context_tokens)
    beside = {"sequences": seqs[1:], "context": context[:2]}
    part = {name: kind(shard, target).part(f"attention_{name}") for name, kind in KINDS.items()}
    named = partial(_family, shard)
    return [
        named(part["prefill"], {"tokens": chunk, "context": after}, checks=CHECKS),
        named(part["decode"], {"sequences": seqs, "context": context}, checks=CHECKS),
        named(
            part["decode_skewed"], {"sequences": (), "context": ()}, {"sequences": seqs[1:], "context": context[1:2]}
        ),
        named(part["mixed"], {"tokens": chunk[:-1], **beside}, {"tokens": chunk[-1:], **beside}),
    ]


def _family(
    shard: Shard,
    part: Part,
    axes: Mapping[str, tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]] | None = None,
    *,
    checks: int = 0,
) -> Family:
    """Refined where it has checks; otherwise looked at twice."""
    return Family(
        name=part.operator,
        tp=shard.tp,
        dtype=shard.spec.dtype,
        axes=axes,
        parts=(part,),
        refined=tuple(axes) if checks else (),
        looks=1 if checks else 2,
        checks=checks,
        held=held,
    )


class _Attention:
    """Runs of attention kernels at a point; subclasses say which."""

    def __init__(self, shard: Shard, target: Target) -> None:
        self.shard = shard
        self.target = target
        self.dtype = DTYPES[shard.spec.dtype]
        self.token_bytes = shard.kv_token_values * shard.value_bytes
        self.pair_flops = shard.spec.attention_flops_per_pair / shard.tp

    def part(self, operator: str) -> Part:
        return Part(
            operator=operator, prepare=self.prepare, need_bytes=self.need_bytes, flops=self.flops, bytes=self.bytes
        )

    def prepare(self, point: Point) -> Runs:
        raise NotImplementedError

    def kv_tokens(self, point: Point) -> int:
        """Tokens whose KV one run reads."""
        raise NotImplementedError

    def flops(self, point: Point) -> float:
        raise NotImplementedError

    def bytes(self, point: Point) -> float:
        return float(self.kv_tokens(point) * self.token_bytes)

    def need_bytes(self, point: Point) -> int:
        """The cache, gathered copies of what a run reads, and query and output."""
        tokens = point.get("tokens", 0) + point.get("sequences", 0)
        rows = tokens * self.shard.heads * self.shard.head_dim * self.shard.value_bytes
        return self._cache_tokens(point) * self.token_bytes + 3 * int(self.bytes(point)) + 8 * rows

    def _cache_tokens(self, point: Point) -> int:
        return max(self.kv_tokens(point), 2 * self.target.cache_bytes // self.token_bytes) + BLOCK_TOKENS

    def _cache(self, point: Point) -> tuple[Tensor, Tensor]:
        shape = (blocks(self._cache_tokens(point)), BLOCK_TOKENS, self.shard.kv_heads, self.shard.head_dim)
        (keys,), (values,) = (self.target.random(self.dtype, *shape) for _ in range(2))
        return keys, values

    def _query(self, tokens: int) -> Tensor:
        return self.target.random(self.dtype, tokens, self.shard.heads, self.shard.head_dim)[0]

    def _tables(self, total: int, rows: int, width: int) -> list[Tensor]:
        """Block tables ``[rows, width]`` of random blocks; the cache holds at least one such table."""
        device = self.target.torch_device
        drawn = [torch.randperm(total, device=device) for _ in range(SETS)]
        return [order[torch.arange(rows * width, device=device) % total].view(rows, width) for order in drawn]


def _chunk_pairs(tokens: int, context: int) -> float:
    return tokens * context + tokens * (tokens + 1) / 2


class _Chunk(_Attention):
    def kv_tokens(self, point: Point) -> int:
        return point["tokens"] + point["context"]

    def flops(self, point: Point) -> float:
        return (
            _chunk_pairs(point["tokens"], point["context"]) * self.shard.spec.attention_flops_per_pair / self.shard.tp
        )

    def prepare(self, point: Point) -> Runs:
        keys, values = self._cache(point)
        run = self.chunk(point["tokens"], point["context"], keys, values)
        return Runs(run, SETS)

    def chunk(self, tokens: int, context: int, keys: Tensor, values: Tensor) -> Callable[[int], Tensor]:
        """A first chunk reads the keys that it just made, a later one the cache, as the engine does."""
        query, total = self._query(tokens), tokens + context
        if not context:
            own = [self.target.random(self.dtype, tokens, self.shard.kv_heads, self.shard.head_dim)[0] for _ in "kv"]
            return lambda _: kernels.chunk_attention(query, *own)
        tables = [table[0] for table in self._tables(len(keys), 1, blocks(total))]
        return lambda i: kernels.paged_chunk_attention(query, keys, values, tables[i], total)


class _Decode(_Attention):
    def kv_tokens(self, point: Point) -> int:
        return point["sequences"] * point["context"]

    def flops(self, point: Point) -> float:
        return self.kv_tokens(point) * self.pair_flops

    def contexts(self, point: Point) -> list[int]:
        return [point["context"]] * point["sequences"]

    def prepare(self, point: Point) -> Runs:
        keys, values = self._cache(point)
        return Runs(self.decodes(self.contexts(point), keys, values), SETS)

    def decodes(self, contexts: list[int], keys: Tensor, values: Tensor) -> Callable[[int], Tensor]:
        """Sequences whose lengths lie within a factor of two in blocks share a call, as in the engine."""
        ordered = np.sort(np.array(contexts, dtype=np.int64))
        calls = []
        for start, end, width in similar_lengths(ordered, BLOCK_TOKENS):
            lengths = torch.from_numpy(ordered[start:end]).to(self.target.torch_device)
            calls.append((self._query(end - start), self._tables(len(keys), end - start, width), lengths))

        def run(i: int) -> Tensor:
            parts = [
                kernels.decode_attention(query, keys, values, tables[i], lengths) for query, tables, lengths in calls
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return run


class _Skewed(_Decode):
    def contexts(self, point: Point) -> list[int]:
        return [point["context"] * SKEW[number % len(SKEW)] // 2 for number in range(point["sequences"])]


class _Mixed(_Chunk, _Decode):
    """A first chunk, and decodes beside it."""

    def kv_tokens(self, point: Point) -> int:
        return point["tokens"] + point["sequences"] * point["context"]

    def flops(self, point: Point) -> float:
        pairs = _chunk_pairs(point["tokens"], 0) + point["sequences"] * point["context"]
        return pairs * self.pair_flops

    def prepare(self, point: Point) -> Runs:
        keys, values = self._cache(point)
        chunk = self.chunk(point["tokens"], 0, keys, values)
        decodes = self.decodes(self.contexts(point), keys, values)
        return Runs(lambda i: (chunk(i), decodes(i)), SETS)


KINDS: dict[str, type[_Attention]] = {
    "prefill": _Chunk,
    "decode": _Decode,
    "decode_skewed": _Skewed,
    "mixed": _Mixed,
}
