"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches padded to a few fixed shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate import kernels
from calibrate.execute.model.cache import PagedKv
from calibrate.execute.model.decoder import Batch, Decoder, DecodeRows

MAX_SEQUENCES = 256
"""Larger decode batches run eagerly: their kernels take longer than their launches."""


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


class DecodeGraphs:
    """A graph for each bucket of sequences and blocks, captured at first use.

    Where attention reads KV in place, a graph for each bucket of sequences serves all contexts. All share one pool of
    memory, since one runs at a time.
    """

    def __init__(self, decoder: Decoder, cache: PagedKv) -> None:
        self._decoder = decoder
        self._cache = cache
        self._any_width = kernels.reads_in_place(decoder.weights.layers[0].qkv)
        self._pool: Any = None
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Batch, Tensor | None, Tensor]] = {}

    def suits(self, batch: Batch) -> bool:
        """Only decodes, all of which want a token, and tables that a graph can hold."""
        if batch.chunks or not 0 < len(batch.tokens) <= MAX_SEQUENCES or len(batch.wanted) != len(batch.tokens):
            return False
        return not self._any_width or _width(batch) <= self._cache.blocks

    def warm_up(self) -> None:
        """Capture all graphs there can be, if they are few: a capture during a run takes longer than many steps."""
        if self._any_width:
            for power in reversed(range(MAX_SEQUENCES.bit_length())):  # the others fit into its memory
                self._graph(1 << power, self._cache.blocks)

    def run(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """As ``decoder(batch, cache, hidden)``; the result is overwritten by the next run."""
        seqs = len(batch.tokens)
        width = self._cache.blocks if self._any_width else bucket(_width(batch))
        graph, static, static_hidden, out = self._graph(bucket(seqs), width)
        _fill(static, batch, seqs)
        if hidden is not None and static_hidden is not None:
            static_hidden[:seqs].copy_(hidden)
        graph.replay()
        return out[:seqs]

    def _graph(self, seqs: int, width: int) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor | None, Tensor]:
        if (seqs, width) not in self._captured:
            self._captured[seqs, width] = self._capture(seqs, width)
        return self._captured[seqs, width]

    def _capture(self, seqs: int, width: int) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor | None, Tensor]:
        arch, weights, device = self._decoder.arch, self._decoder.weights, self._decoder.device
        static = _padding(seqs, width, device)
        inputs = None
        if weights.embedding is None:
            inputs = torch.zeros(seqs, arch.hidden_size, dtype=arch.torch_dtype, device=device)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and loaded, and choose their plans, outside the capture
            for _ in range(2):
                self._decoder(static, self._cache, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # KV moves in other threads
            out = self._decoder(static, self._cache, inputs)
        self._pool = graph.pool()
        return graph, static, inputs, out


def _width(batch: Batch) -> int:
    return max(group.tables.shape[1] for group in batch.decodes)


def _padding(seqs: int, width: int, device: str) -> Batch:
    """A batch of rows that write to block 0, which is nobody's."""
    zeros = torch.zeros(seqs, dtype=torch.int64, device=device)
    tables = torch.zeros(seqs, width, dtype=torch.int64, device=device)
    group = DecodeRows(0, seqs, tables, torch.ones_like(zeros))
    rows = torch.from_numpy(np.arange(seqs)).to(device)
    return Batch(zeros, zeros.clone(), zeros.clone(), (), (group,), rows)


def _fill(static: Batch, batch: Batch, seqs: int) -> None:
    """Put a batch into the graph's own tensors, and rows of nobody behind it."""
    whole = static.decodes[0]
    for target, source in (
        (static.tokens, batch.tokens),
        (static.positions, batch.positions),
        (static.slots, batch.slots),
    ):
        target[:seqs].copy_(source)
        target[seqs:].zero_()
    whole.contexts[seqs:].fill_(1)
    for group in batch.decodes:
        whole.contexts[group.start : group.end].copy_(group.contexts)
        whole.tables[group.start : group.end, : group.tables.shape[1]].copy_(group.tables)
