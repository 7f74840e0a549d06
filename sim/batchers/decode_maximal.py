"""SARATHI: one prompt chunk per batch, and as many decodes as there are other slots."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Literal

from sim.batchers.common import longest, refuse_groups
from sim.batchers.reserving import refuse_longer, refuse_unreserved, slots
from sim.policy import Batch, Limits, RequestView
from sim.types import ConfigError, Work

Composition = Literal["decode-maximal", "orca-best", "baseline"]
COMPOSITIONS: tuple[Composition, ...] = ("decode-maximal", "orca-best", "baseline")
MAX_LOSS = 0.2
"""Share of prefill throughput that chunks of 256 cost the authors (arXiv 2308.16369, figure 13: at most 20 %)."""
ROUNDING = 1e-9


def smallest_efficient_chunk(
    seconds: Callable[[Work], float], prompt_tokens: int, max_loss: float = MAX_LOSS, tile: int = 128
) -> int:
    """The smallest multiple of ``tile`` tokens that computes a prompt at ``1 - max_loss`` of the best throughput.

    ``seconds`` prices an iteration. Decodes that ride along are left out.
    """
    sizes = range(tile, prompt_tokens + tile, tile)
    times_s = {size: _prompt_seconds(seconds, prompt_tokens, size) for size in sizes}
    longest_s = min(times_s.values()) / max(1 - max_loss, ROUNDING)
    return next(size for size in sizes if times_s[size] <= longest_s * (1 + ROUNDING))


def _prompt_seconds(seconds: Callable[[Work], float], prompt_tokens: int, chunk: int) -> float:
    starts = range(0, prompt_tokens, chunk)
    return sum(seconds(Work(((min(chunk, prompt_tokens - start), start),), 0, 0)) for start in starts)


class DecodeMaximal:
    """One chunk and up to B - 1 decodes; only decodes, up to B, when no prompt is left (SARATHI, arXiv 2308.16369).

    B, the slots of a micro-batch: contexts of ``max_model_len`` that the KV cache holds, over ``micro_batches``
    (the pipeline stages). A chunk has ``chunk_size`` - (B - 1) tokens, so that a full batch is a multiple of the
    tile; ``None`` picks ``smallest_efficient_chunk``. ``composition`` orca-best: a chunk is a whole prompt;
    baseline: up to B whole prompts, or decodes, never both.
    """

    def __init__(
        self,
        chunk_size: int | None = 256,
        tile: int = 128,
        composition: Composition = "decode-maximal",
        micro_batches: int = 1,
    ) -> None:
        self.chunk_size = chunk_size
        self.tile = tile
        self.composition = composition
        self.micro_batches = micro_batches

    def fill(self, batch: Batch) -> None:
        size = max(1, self._slots(batch.total_blocks, batch.limits) // self.micro_batches)
        prompts = self._prompts(batch, size)
        room = 0 if prompts and self.composition == "baseline" else size - prompts
        if batch.num_decodes and room:
            batch.decode(leave_out=batch.decoding[room:] if batch.num_decodes > room else ())

    def _prompts(self, batch: Batch, size: int) -> int:
        """Chunks in this batch: the next of an admitted prompt, or the first of the queue's head."""
        most = self._chunk_tokens(batch, size) if self.composition == "decode-maximal" else longest(batch.limits)
        for request in batch.prefilling:
            batch.prefill(request, min(request.remaining_tokens, most))
            return 1
        free = self._slots(batch.total_blocks, batch.limits) - batch.num_running
        wanted = min(free, size if self.composition == "baseline" else 1)
        admitted = 0
        for request in islice(batch.waiting, max(0, wanted)):
            tokens = min(batch.tokens_wanted(request), most)
            if not batch.admit(request, tokens, reserve_tokens=longest(batch.limits)):
                break
            admitted += 1
        return admitted

    def _slots(self, total_blocks: int, limits: Limits) -> int:
        return min(slots(total_blocks, limits), limits.max_num_seqs)

    def _chunk_tokens(self, batch: Batch, size: int) -> int:
        if self.chunk_size is None:
            self.chunk_size = smallest_efficient_chunk(batch.seconds, longest(batch.limits), tile=self.tile)
        tokens = self.chunk_size - (size - 1)
        if tokens < 1:
            raise ConfigError(
                f"system.chunk_size is {self.chunk_size}, but {size - 1} decodes ride with a chunk; "
                f"raise it, or lower system.engine.max_num_seqs"
            )
        return tokens

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_longer(total_tokens, limits) or refuse_unreserved(total_blocks, limits)
