"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches padded to a few fixed shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calibrate.execute.cache import PagedKv
from calibrate.execute.decoder import Batch, Decoder, DecodeRows

MAX_SEQUENCES = 256
"""Larger decode batches run eagerly: their kernels take longer than their launches."""


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


class DecodeGraphs:
    """Captures a graph at the first decode step of each (sequences, blocks) bucket, and replays it from then on."""

    def __init__(self, decoder: Decoder, cache: PagedKv) -> None:
        self._decoder = decoder
        self._cache = cache
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Batch, Tensor | None, Tensor]] = {}

    def suits(self, batch: Batch) -> bool:
        return not batch.chunks and 0 < len(batch.tokens) <= MAX_SEQUENCES and len(batch.wanted) == len(batch.tokens)

    def run(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """As ``decoder(batch, cache, hidden)``; the result is overwritten by the next run of the same bucket."""
        seqs = len(batch.tokens)
        width = max(group.tables.shape[1] for group in batch.decodes)
        key = (bucket(seqs), bucket(width))
        if key not in self._captured:
            self._captured[key] = self._capture(*key, hidden)
        graph, static, static_hidden, out = self._captured[key]
        _fill(static, batch, seqs)
        if hidden is not None and static_hidden is not None:
            static_hidden[:seqs].copy_(hidden)
        graph.replay()
        return out[:seqs]

    def _capture(
        self, seqs: int, width: int, hidden: Tensor | None
    ) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor | None, Tensor]:
        static = _padding(seqs, width, self._decoder.device)
        inputs = None if hidden is None else hidden.new_zeros(seqs, hidden.shape[1])
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels choose their plans outside the capture
            for _ in range(2):
                self._decoder(static, self._cache, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # KV may come and go in other threads
            out = self._decoder(static, self._cache, inputs)
        return graph, static, inputs, out


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
