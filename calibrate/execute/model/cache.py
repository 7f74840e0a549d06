"""The real paged KV cache of one process, and which blocks each sequence has.

Block 0 belongs to nobody: rows that only fill up a batch write there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calibrate.execute.model.architecture import Architecture
from sim.types import SimulationError


class PagedKv:
    """Keys and values ``[blocks + 1, block_size, kv heads, head size]`` of each layer."""

    def __init__(self, arch: Architecture, num_layers: int, blocks: int, block_size: int, device: str) -> None:
        shape = (blocks + 1, block_size, arch.num_kv_heads, arch.head_dim)
        self.blocks = blocks
        self.block_size = block_size
        self.layers = [
            tuple(torch.zeros(shape, dtype=arch.torch_dtype, device=device) for _ in range(2))
            for _ in range(num_layers)
        ]

    def read(self, table: np.ndarray, tokens: int) -> Tensor:
        """The first ``tokens`` of the blocks of a table, ``[layers, 2, tokens, kv heads * head size]``."""
        index = torch.from_numpy(table).to(self.layers[0][0].device)
        pairs = [torch.stack([cache[index].flatten(0, 1)[:tokens] for cache in layer]) for layer in self.layers]
        return torch.stack(pairs).flatten(-2)

    def write(self, table: np.ndarray, kv: Tensor, first_layer: int = 0, first_head: int = 0) -> None:
        """Put what ``read`` gave into the blocks of a table, for the layers and heads from those on."""
        tokens, heads = kv.shape[2], kv.shape[3] // self.layers[0][0].shape[-1]
        slots = torch.from_numpy(slots_of(table, np.arange(tokens), self.block_size)).to(kv.device)
        for layer, new in zip(self.layers[first_layer:], kv, strict=False):
            for cache, values in zip(layer, new, strict=True):
                own = cache.flatten(0, 1)[:, first_head : first_head + heads]
                own.index_copy_(0, slots, values.view(tokens, heads, -1))


def cache_bytes(arch: Architecture, num_layers: int, blocks: int, block_size: int) -> int:
    return 2 * num_layers * (blocks + 1) * block_size * arch.kv_width * arch.torch_dtype.itemsize


def slots_of(table: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Slots of a sequence's tokens at these positions."""
    slots: np.ndarray = table[positions // block_size] * block_size + positions % block_size
    return slots


class BlockTables:
    """Who has which blocks. A sequence has a row; its first ``-(-length // block_size)`` entries are in use."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = list(range(blocks, 0, -1))
        self._rows: dict[int, int] = {}
        self._spare_rows: list[int] = []
        self._tables = np.zeros((8, 8), dtype=np.int64)
        self._lengths: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._rows)

    def length(self, sequence: int) -> int:
        """Tokens whose KV the sequence has here; 0 if it is unknown."""
        return self._lengths.get(sequence, 0)

    def resize(self, sequence: int, tokens: int) -> None:
        """Give a sequence (new or known) blocks for so many tokens, or take back what is beyond them.

        Raises ``SimulationError`` when no block is free: whoever schedules has lost count.
        """
        row = self._row(sequence)
        have = -(-self.length(sequence) // self.block_size)
        want = -(-tokens // self.block_size)
        if want - have > len(self._free):
            raise SimulationError(
                f"sequence {sequence} wants {want - have} KV blocks for {tokens} tokens; {len(self._free)} are free"
            )
        if want > self._tables.shape[1]:
            self._tables = np.pad(self._tables, ((0, 0), (0, max(want, 2 * have) - self._tables.shape[1])))
        for number in range(have, want):
            self._tables[row, number] = self._free.pop()
        for number in range(want, have):
            self._free.append(int(self._tables[row, number]))
        self._lengths[sequence] = tokens

    def release(self, sequence: int) -> None:
        """Forget a sequence, if it is known."""
        if sequence in self._rows:
            self.resize(sequence, 0)
            self._spare_rows.append(self._rows.pop(sequence))
            del self._lengths[sequence]

    def table(self, sequence: int) -> np.ndarray:
        """Blocks of one sequence, in order."""
        row: np.ndarray = self._tables[self._rows[sequence]]
        blocks = -(-self._lengths[sequence] // self.block_size)
        return row[:blocks]

    def tables(self, sequences: list[int], width: int) -> np.ndarray:
        """Blocks ``[sequences, width]``; what lies beyond a sequence's own is any block."""
        return self._tables[[self._rows[sequence] for sequence in sequences], :width]

    def _row(self, sequence: int) -> int:
        if sequence not in self._rows:
            if not self._spare_rows:
                rows = len(self._rows)
                if rows == len(self._tables):
                    self._tables = np.pad(self._tables, ((0, rows), (0, 0)))
                self._spare_rows.append(rows)
            self._rows[sequence] = self._spare_rows.pop()
        return self._rows[sequence]
