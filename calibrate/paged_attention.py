"""Decode attention that reads paged KV where it lies, in Triton: gathering it first would move every byte three times.

Flash decoding (Dao et al., 2023, pytorch.org/blog/flash-decoding): the tokens of a sequence are split over programs, so
that few sequences keep all of a GPU busy, and a second kernel puts the parts together. Needs triton; ``kernels`` asks
before it imports this. ``TRITON_INTERPRET=1`` runs it on the CPU.
"""

# mypy: ignore-errors
# ruff: noqa: N803
from __future__ import annotations

from functools import cache
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_TOKENS = 32
"""Read at once; two more tiles are on their way meanwhile."""
PROGRAMS_PER_PROCESSOR = 4
MOST_SPLITS = 64
LEAST_ROWS = 16
"""Of a matrix product in Triton; the query heads of a key-value head are padded to as many."""


def decode(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
    """As ``kernels.decode_attention``; a query's heads lie side by side.

    The number of programs depends on shapes alone, not on the contexts.
    """
    sequences, heads, size = query.shape
    block_size, groups = keys.shape[1:3]
    per_group, splits = heads // groups, _splits(sequences * groups, _processors(query.device))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    parts = torch.empty(splits, sequences, heads, size, dtype=torch.float32, device=query.device)
    sums = torch.empty(2, splits, sequences, heads, dtype=torch.float32, device=query.device)
    wide = triton.next_power_of_2(size)
    _attend[(sequences, groups, splits)](
        query, keys, values, tables, contexts, parts, sums,
        size**-0.5 * log2(2.718281828459045), query.stride(0), tables.stride(0), sequences,
        BLOCK=block_size, HEADS=per_group, GROUPS=groups, SIZE=size, WIDE=wide,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(per_group)), TILE=TILE_TOKENS, SPLITS=splits,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _join[(sequences, heads)](
        parts, sums, out, sequences * heads, HEADS=heads, SIZE=size, WIDE=wide,
        SPLITS=splits, PADDED=triton.next_power_of_2(splits), num_warps=1 if splits <= 8 else 4,
    )  # fmt: skip
    return out


def _splits(rows: int, processors: int) -> int:
    """Programs per sequence and key-value head, a power of two, so that every processor has a few."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // rows)
    return int(min(MOST_SPLITS, triton.next_power_of_2(max(1, wanted))))


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


@triton.jit
def _attend(
    query, keys, values, tables, contexts, parts, sums, scale, query_stride, table_stride, sequences,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One part of a sequence's tokens for the query heads of one key-value head; sums without their divisor."""
    sequence, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence).to(tl.int32)
    each = tl.cdiv(tl.cdiv(context, SPLITS), TILE) * TILE
    first = split * each
    last = tl.minimum(first + each, context)
    rows, dims, columns = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    known = (rows < HEADS)[:, None] & (dims < SIZE)[None, :]
    at = sequence.to(tl.int64) * query_stride + (group * HEADS + rows)[:, None] * SIZE + dims[None, :]
    q = tl.load(query + at, mask=known, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(first, last, TILE):
        tokens = start + columns
        there = tokens < last
        block = tl.load(tables + sequence.to(tl.int64) * table_stride + tokens // BLOCK, mask=there, other=0)
        slot = (block.to(tl.int64) * BLOCK + tokens % BLOCK) * (GROUPS * SIZE) + group * SIZE
        place, inside = slot[:, None] + dims[None, :], there[:, None] & (dims < SIZE)[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        shares, shrink = tl.exp2(scores - above[:, None]), tl.exp2(largest - above)
        v = tl.load(values + place, mask=inside, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(shares, 1)
        largest = above
    own = (split * sequences + sequence).to(tl.int64) * (GROUPS * HEADS) + group * HEADS + rows
    tl.store(parts + own[:, None] * SIZE + dims[None, :], mixed, mask=known)
    tl.store(sums + own, largest, mask=rows < HEADS)
    tl.store(sums + own + SPLITS * sequences * (GROUPS * HEADS), total, mask=rows < HEADS)


@triton.jit
def _join(
    parts, sums, out, rows,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The parts of one query head, each by its share; a part without tokens has none."""
    own = tl.program_id(0) * HEADS + tl.program_id(1)
    splits, dims = tl.arange(0, PADDED), tl.arange(0, WIDE)
    there = splits < SPLITS
    place = splits.to(tl.int64) * rows + own
    largest = tl.load(sums + place, mask=there, other=float("-inf"))
    total = tl.load(sums + place + SPLITS * rows, mask=there, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    mixed = tl.load(
        parts + place[:, None] * SIZE + dims[None, :], mask=there[:, None] & (dims < SIZE)[None, :], other=0.0
    )
    found = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + own.to(tl.int64) * SIZE + dims, found.to(out.dtype.element_ty), mask=dims < SIZE)
