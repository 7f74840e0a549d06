"""Transfers: in which parts, and how early, a prompt's KV goes to the replica that decodes.

``chunks`` must describe all of the KV; the engine decides when bytes really flow.
"""

from __future__ import annotations

import numpy as np

from sim.cost import Table, codec_seconds
from sim.policy import Transfer, View
from sim.types import Chunk, ConfigError, Move

WHOLE = (Chunk(1.0, 1.0),)
"""One part, ready at the end."""


class Whole:
    """All at once, when the prompt is done. ``sync_s`` passes after the last byte."""

    def __init__(self, pull: bool = False, sync_s: float = 0.0) -> None:
        self.pull = pull
        self.sync_s = sync_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return WHOLE

    def overhead_s(self, move: Move) -> float:
        return self.sync_s


class LayerByLayer:
    """Each layer's KV leaves when the layer is computed; only the last layer is sent after the prompt is done.

    The first L-1 layers go as one part from 1/L of the step on, so that X/L, or X less what could flow during the
    step, stays visible (X: time to send everything), plus ``sync_s``.
    """

    def __init__(self, sync_s: float = 0.0) -> None:
        self.pull = False
        self.sync_s = sync_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        layers = move.num_layers
        if layers == 1:
            return WHOLE
        return Chunk((layers - 1) / layers, 1 / layers), Chunk(1 / layers, 1.0)

    def overhead_s(self, move: Move) -> float:
        return self.sync_s


class ChunkByChunk:
    """KV of earlier chunks of ``chunk_tokens`` leaves from when the last one runs; the last one's after it."""

    pull = False

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        earlier = (move.tokens - 1) // self.chunk_tokens * self.chunk_tokens / move.tokens
        return (Chunk(earlier, 0.0), Chunk(1 - earlier, 1.0)) if earlier else WHOLE

    def overhead_s(self, move: Move) -> float:
        return 0.0


class ByLength:
    """Short prompts at once, prompts of ``threshold_tokens`` or more layer by layer."""

    def __init__(self, threshold_tokens: int, sync_s: float = 0.0) -> None:
        self.pull = False
        self.threshold_tokens = threshold_tokens
        self._short, self._long = Whole(sync_s=sync_s), LayerByLayer(sync_s)

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return self._of(move).chunks(move, view)

    def overhead_s(self, move: Move) -> float:
        return self._of(move).overhead_s(move)

    def _of(self, move: Move) -> Whole | LayerByLayer:
        return self._short if move.tokens < self.threshold_tokens else self._long


class Quantized:
    """Another transfer's KV in ``bits`` a value on the way; both ends hold 16 bits (ThunderServe, MLSys 2025).

    Every ``group`` values carry a 16-bit scale and a 16-bit zero, so that 4 bits in groups of 64 are 4.5. Parts leave
    when ``inner``'s do (None: all at once). The codec runs once at either end and takes what ``codec`` says by tokens
    (both ends together), or else reads and writes at ``codec_bytes_per_s`` (ours: half of what a 24 to 48 GB GPU of
    2021 reads). The engine lets it pass after the last byte, beside ``inner``'s own overhead: none of it is taken to be
    hidden behind the prompt. 16 bits: no codec.
    """

    def __init__(
        self,
        bits: int = 4,
        group: int = 64,
        codec: Table | None = None,
        codec_bytes_per_s: float = 4e11,
        inner: Transfer | None = None,
    ) -> None:
        if not 1 <= bits <= 16:
            raise ConfigError(f"system.bits is {bits}; KV is sent in 1 to 16 bits a value")
        if group < 1:
            raise ConfigError(f"system.group is {group}; it must be at least one value per scale")
        if not codec_bytes_per_s > 0:
            raise ConfigError(f"system.codec_bytes_per_s is {codec_bytes_per_s}; it must be > 0")
        self.inner = Whole() if inner is None else inner
        self.pull = self.inner.pull
        self.bits = bits
        self.share = 1.0 if bits == 16 else min(1.0, (bits + 32 / group) / 16)
        """Bytes sent, of those of 16 bits."""
        self.codec = codec
        self.codec_bytes_per_s = codec_bytes_per_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return tuple(Chunk(part.share * self.share, part.ready) for part in self.inner.chunks(move, view))

    def overhead_s(self, move: Move) -> float:
        return self.inner.overhead_s(move) + self.codec_s(move)

    def codec_s(self, move: Move) -> float:
        """Seconds of both ends together."""
        if self.bits == 16:
            return 0.0
        if self.codec is not None:
            return float(np.interp(move.tokens, self.codec.counts, self.codec.seconds))
        return 2 * codec_seconds(move.kv_bytes, self.share, self.codec_bytes_per_s, 1.0)


def in_bits(inner: Transfer, kv_bits: int, moves: bool = True) -> Transfer:
    """A transfer as a system's option ``kv_bits`` wants it. ``moves``: whether the layout has KV to send."""
    if isinstance(kv_bits, bool) or not isinstance(kv_bits, int) or not 1 <= kv_bits <= 16:
        raise ConfigError(f"system.kv_bits is {kv_bits!r}; KV is sent in 1 to 15 bits a value, or as it is (16)")
    if kv_bits == 16:
        return inner
    if not moves:
        raise ConfigError(
            f"system.kv_bits is {kv_bits}; only KV that moves is quantised: give prefill and decode pools"
        )
    return Quantized(kv_bits, inner=inner)
