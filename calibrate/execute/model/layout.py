"""From shapes and block tables to the tensors of a batch: prompt chunks first, then decodes from short to long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from calibrate.execute.model.cache import slots_of
from calibrate.execute.model.decoder import Batch, ChunkRows, DecodeRows


def assemble(
    chunks: Sequence[tuple[int, int, np.ndarray]],
    contexts: np.ndarray,
    tables: np.ndarray,
    tokens: np.ndarray,
    wanted: Sequence[int],
    *,
    block_size: int,
    device: str,
) -> Batch:
    """The batch of one step.

    ``chunks``: (first position, tokens, blocks) of each. ``contexts [S]``: tokens of each decoding sequence, the new
    one included, in rising order; ``tables [S, M]``: their blocks. ``tokens``: ids of all rows, in that order.
    """

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    positions, slots, rows, at = [], [], [], 0
    for first, count, table in chunks:
        where = np.arange(first, first + count)
        positions.append(where)
        slots.append(slots_of(table, where, block_size))
        rows.append(ChunkRows(at, at + count, put(table), first + count))
        at += count
    last = contexts - 1
    positions.append(last)
    slots.append(tables[np.arange(len(last)), last // block_size] * block_size + last % block_size)
    device_contexts = put(contexts)
    groups = [
        DecodeRows(at + start, at + end, put(tables[start:end, :width]), device_contexts[start:end])
        for start, end, width in similar_lengths(contexts, block_size)
    ]
    return Batch(
        put(tokens),
        put(np.concatenate(positions)),
        put(np.concatenate(slots)),
        tuple(rows),
        tuple(groups),
        put(np.asarray(wanted, dtype=np.int64)),
    )


def similar_lengths(contexts: np.ndarray, block_size: int) -> list[tuple[int, int, int]]:
    """(start, end, blocks) of runs of rising contexts that are padded together: within a factor of two in blocks."""
    blocks = -(-contexts // block_size)
    doublings = np.ceil(np.log2(blocks)) if len(blocks) else blocks
    cuts = [0, *(np.flatnonzero(np.diff(doublings)) + 1).tolist(), len(blocks)]
    return [(start, end, int(blocks[end - 1])) for start, end in pairwise(cuts) if end > start]
