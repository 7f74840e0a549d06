"""One stage at work: the sequences it holds, and steps over them with greedy sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibrate import kernels
from calibrate.bench.device import keep_freed_memory
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.cache import BlockTables, PagedKv, cache_bytes
from calibrate.execute.model.decoder import Batch, Decoder
from calibrate.execute.model.graphs import DecodeGraphs
from calibrate.execute.model.layout import assemble
from calibrate.execute.model.shard import Ranks
from calibrate.execute.model.weights import Weights, check_memory, drawn, loaded, num_bytes
from sim.types import SimulationError


class Item(NamedTuple):
    """Tokens of one sequence to be computed, the first of them at ``position``; ``wants``: and the one that follows."""

    sequence: int
    position: int
    tokens: tuple[int, ...]
    wants: bool

    @property
    def end(self) -> int:
        return self.position + len(self.tokens)


class Stage:
    """Layers ``first <= layer < end`` of a model (or a rank's part of them) with their KV cache, on one device.

    One thread runs steps; KV may come and go, and sequences be released, in others meanwhile.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        first: int = 0,
        end: int | None = None,
        blocks: int,
        block_size: int = 16,
        device: str = "cpu",
        seed: int = 0,
        folder: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """``arch``: of the whole model. ``folder``: of safetensors; None: weights drawn from ``seed``.

        ``ConfigError`` if memory is missing, or the ranks cannot share the model.
        """
        ranks = ranks or Ranks()
        own = ranks.shard.architecture(arch)
        end = arch.num_layers if end is None else end
        if device == "cpu":
            keep_freed_memory()
        else:
            kernels.without_plans()
            torch.cuda.set_device(torch.device(device).index or 0)  # streams and graphs are of the current one
        needed = num_bytes(arch, first, end, ranks.shard) + cache_bytes(own, end - first, blocks, block_size)
        check_memory(f"{arch.name}: layers {first} to {end} and {blocks} KV blocks", needed, device)
        weights: Weights
        if folder is None:
            weights = drawn(arch, first, end, seed=seed, device=device, shard=ranks.shard)
        else:
            weights = loaded(arch, first, end, folder=folder, device=device, shard=ranks.shard)
        self.first, self.end = first, end
        self.decoder = Decoder(own, weights, device, ranks)
        self.cache = PagedKv(own, end - first, blocks, block_size, device)
        self.tables = BlockTables(blocks, block_size)
        self._lock = Lock()  # of the tables
        self._swapped: dict[int, tuple[Tensor, ...]] = {}
        self.graphs = DecodeGraphs(self.decoder, self.cache) if self.decoder.capturable else None
        if device != "cpu":
            self.warm_up()

    @property
    def samples(self) -> bool:
        """Whether this stage has the head."""
        return self.decoder.weights.head is not None

    def run(self, items: Sequence[Item], hidden: Tensor | None = None) -> tuple[dict[int, int], Tensor | None]:
        """(next token of each sequence that wants one, None), or ({}, hidden states for the next stage).

        A sequence continues at its item's position: what it had from there on is forgotten.
        """
        ordered = in_rows(items)
        with self._lock:
            self._make_room(ordered)
            batch = self.batch(ordered)
        out = self.forward(batch, hidden)
        if not self.samples:
            return {}, out
        chosen = self.decoder.ranks.argmax(out, self.decoder.arch.vocab_size).tolist()
        return dict(zip((item.sequence for item in ordered if item.wants), chosen, strict=True)), None

    def warm_up(self, tokens: int = 256) -> None:
        """Run every kind of row once, on nobody's block, so that no kernel is loaded and no graph captured later."""
        size, device = self.cache.block_size, self.decoder.device
        table = np.zeros(-(-2 * tokens // size), dtype=np.int64)
        ones, ids = np.ones(1, dtype=np.int64), np.zeros(2 * tokens + 1, dtype=np.int64)
        batch = assemble(
            [(0, tokens, table), (tokens, tokens, table)], ones, table[None, :1], ids, [2 * tokens],
            block_size=size, device=device,
        )  # fmt: skip
        arch, hidden = self.decoder.arch, None
        if self.decoder.weights.embedding is None:
            hidden = torch.zeros(len(ids), arch.hidden_size, dtype=arch.torch_dtype, device=device)
        out = self.decoder(batch, self.cache, hidden)
        if self.samples:
            self.decoder.ranks.argmax(out, arch.vocab_size).cpu()
        if self.graphs is not None:
            self.graphs.warm_up()

    def _make_room(self, items: Sequence[Item]) -> None:
        for item in items:
            length = self.tables.length(item.sequence)
            if item.position > length:
                raise SimulationError(f"{item} skips tokens: the sequence has {length} of them here")
            self.tables.resize(item.sequence, item.position)
        for item in items:
            self.tables.resize(item.sequence, item.end)

    def forward(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """One pass over the layers, by a CUDA graph where there is one."""
        if self.graphs is not None and self.graphs.suits(batch):
            return self.graphs.run(batch, hidden)
        return self.decoder(batch, self.cache, hidden)

    def batch(self, ordered: Sequence[Item]) -> Batch:
        """The tensors of items in row order, their blocks given."""
        chunks = [item for item in ordered if not is_decode(item)]
        decodes = ordered[len(chunks) :]
        contexts = np.array([item.end for item in decodes], dtype=np.int64)
        width = -(-int(contexts.max()) // self.cache.block_size) if len(contexts) else 0
        ends = np.cumsum([len(item.tokens) for item in ordered])
        return assemble(
            [(item.position, len(item.tokens), self.tables.table(item.sequence)) for item in chunks],
            contexts,
            self.tables.tables([item.sequence for item in decodes], width),
            np.array([token for item in ordered for token in item.tokens], dtype=np.int64),
            [int(end) - 1 for item, end in zip(ordered, ends, strict=True) if item.wants],
            block_size=self.cache.block_size,
            device=self.decoder.device,
        )

    def release(self, sequences: Sequence[int]) -> None:
        """Free the KV of sequences that are done or go elsewhere."""
        with self._lock:
            for sequence in sequences:
                self.tables.release(sequence)

    # ------------------------------------------------------------ KV comes and goes

    def take_out(
        self, sequence: int, first: int, end: int, *, heads: slice | None = None, bits: int = 16, on: str = "cpu"
    ) -> tuple[Tensor, ...]:
        """KV of layers ``first`` to ``end`` of a sequence, of some of the heads that are here (None: all).

        One tensor, or (nibbles, scales) of 4 bits, on the device ``on``.
        """
        with self._lock:
            table, tokens = self.tables.table(sequence), self.tables.length(sequence)
        with own_stream(self.decoder.device):
            kv = self.cache.read(table, tokens)[first - self.first : end - self.first]
            if heads is not None:
                kv = kv.view(*kv.shape[:3], -1, self.decoder.arch.head_dim)[..., heads, :].flatten(-2)
            parts = kernels.quantise_4bit(kv.flatten(0, 2), group_of(kv.shape[-1])) if bits == 4 else (kv.contiguous(),)
            return tuple(part.to(on) for part in parts)

    def room_for(self, tokens: int, first: int, end: int, *, heads: int, bits: int = 16) -> tuple[Tensor, ...]:
        """Unfilled tensors for what ``take_out`` gives of so many tokens and heads elsewhere."""
        arch, rows = self.decoder.arch, (end - first) * 2 * tokens
        width, device = heads * arch.head_dim, self.decoder.device
        if bits != 4:
            return (torch.empty(end - first, 2, tokens, width, dtype=arch.torch_dtype, device=device),)
        nibbles = torch.empty(rows, width // 2, dtype=torch.uint8, device=device)
        return nibbles, torch.empty(rows, width // group_of(width), 2, dtype=torch.float16, device=device)

    def put_in(
        self, sequence: int, tokens: int, first: int, end: int, parts: Sequence[Tensor], *, first_head: int = 0
    ) -> None:
        """What another stage took out of its layers ``first`` to ``end``; the heads go to those from ``first_head``."""
        arch, device = self.decoder.arch, self.decoder.device
        with self._lock:
            self.tables.resize(sequence, tokens)
            table = self.tables.table(sequence)
        with own_stream(device):
            kv, *scales = (part.to(device) for part in parts)
            if scales:
                kv = kernels.dequantise_4bit(kv, scales[0], arch.torch_dtype)
            self.cache.write(table, kv.view(end - first, 2, tokens, -1), first - self.first, first_head)

    def swap_out(self, sequences: Sequence[int]) -> None:
        """Keep the KV of sequences in the host's memory, and free their blocks."""
        for sequence in sequences:
            self._swapped[sequence] = self.take_out(sequence, self.first, self.end)
            self.release([sequence])

    def swap_in(self, sequences: Sequence[int]) -> None:
        """Bring back what was swapped out."""
        for sequence in sequences:
            parts = self._swapped.pop(sequence)
            self.put_in(sequence, parts[0].shape[2], self.first, self.end, parts)


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """On CUDA, work in here does not wait behind a step's, and is done at the end. It touches no block of a step."""
    if not device.startswith("cuda"):
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def is_decode(item: Item) -> bool:
    return item.position > 0 and len(item.tokens) == 1


def in_rows(items: Sequence[Item]) -> list[Item]:
    """Items in the order of a batch's rows, the same on every stage: chunks, then decodes from short to long."""
    return sorted(items, key=lambda item: (1, item.end, item.sequence) if is_decode(item) else (0, 0, item.sequence))


def group_of(width: int) -> int:
    """The largest group of 4-bit values, 64 or a part of it, that divides a token's keys."""
    return int(np.gcd(kernels.QUANTISED_GROUP, width))


def generate(stage: Stage, prompt: Sequence[int], count: int, *, sequence: int = 0) -> list[int]:
    """Greedy tokens after a prompt, alone and whole: what every schedule must reproduce."""
    stage.release([sequence])
    tokens = list(prompt)
    start = 0
    while len(tokens) < len(prompt) + count:
        found, _ = stage.run([Item(sequence, start, tuple(tokens[start:]), True)])
        start = len(tokens)
        tokens.append(found[sequence])
    stage.release([sequence])
    return tokens[len(prompt) :]
