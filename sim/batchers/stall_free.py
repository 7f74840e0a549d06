"""Sarathi-Serve: decodes never wait, prompt chunks share what is left of a token budget; its ablations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, welcome
from sim.policy import Batch, Limits, RequestView
from sim.types import ConfigError, Work

Composition = Literal["stall-free", "chunked-only", "hybrid-only"]
COMPOSITIONS: tuple[Composition, ...] = ("stall-free", "chunked-only", "hybrid-only")
TILE_TOKENS = 128
DEFAULT_BUDGET_TOKENS = 512
"""The paper's budget under strict targets."""
MOST_BUDGET_TOKENS = 1 << 16
CONTEXT_TOKENS = 4096
"""Context of the decodes by which the paper sets its targets (table 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSchedule:
    """Budgets that fall as a prompt proceeds, since later chunks attend to more: evenly from high to low.

    Source: sarathi-serve, ``enable_dynamic_chunking_schedule``: a stage is ``max_tokens / stages`` tokens of the
    prompt; sizes are rounded to 32. Tokens past ``max_tokens`` belong to the last stage.
    """

    high_tokens: int
    low_tokens: int
    stages: int
    max_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.low_tokens <= self.high_tokens or self.low_tokens % 32 or self.high_tokens % 32:
            raise ConfigError(
                f"system.dynamic_chunks: high_tokens {self.high_tokens} and low_tokens {self.low_tokens} must be "
                "multiples of 32, the high one not below the low one"
            )
        if self.stages < 1 or self.max_tokens < self.stages:
            raise ConfigError(
                f"system.dynamic_chunks: stages is {self.stages}, max_tokens {self.max_tokens}; "
                "there must be at least one stage, of at least one token"
            )

    def budget(self, done_tokens: int) -> int:
        """For the chunk that follows ``done_tokens`` of the prompt."""
        stage = min(self.stages - 1, done_tokens // -(-self.max_tokens // self.stages))
        if not stage:
            return self.high_tokens
        exact = self.high_tokens - stage * (self.high_tokens - self.low_tokens) / (self.stages - 1)
        return 32 * round(exact / 32)


def token_budget_for(
    seconds: Callable[[Work], float],
    tbt_s: float,
    max_decodes: int,
    context_tokens: int = CONTEXT_TOKENS,
    tile: int = TILE_TOKENS,
) -> int:
    """Most tokens, in multiples of ``tile``, whose iteration takes at most ``tbt_s`` (section 4.3).

    The iteration has ``max_decodes`` decodes and one chunk, all behind ``context_tokens``; ``seconds`` prices it.
    At most 65,536. Raises ``ConfigError`` if there is no time for any chunk beside the decodes.
    """

    def takes_s(tiles: int) -> float:
        chunk = (tiles * tile - max_decodes, context_tokens)
        return seconds(Work((chunk,), max_decodes, max_decodes * (context_tokens + 1)))

    low, high = max_decodes // tile + 1, MOST_BUDGET_TOKENS // tile
    if takes_s(low) > tbt_s:
        raise ConfigError(
            f"system.tbt_s is {tbt_s}; {max_decodes} decodes behind {context_tokens} tokens and a chunk of "
            f"{low * tile - max_decodes} take {takes_s(low):.4g} s: raise it, or lower system.engine.max_num_seqs"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes_s(middle) <= tbt_s else (low, middle - 1)
    return low * tile


class StallFree:
    """Decodes always, prompt chunks in what is left of a token budget (Sarathi-Serve, OSDI 2024, algorithm 3).

    Decodes are never dropped for lack of budget; a prompt is admitted when blocks for all of it are free above the
    watermark, and keeps them while its chunks are computed. The budget is ``token_budget``, else the largest that keeps
    ``tbt_s``, else max_num_batched_tokens, else 512; ``schedule`` sets it by the prompt's progress.
    ``composition`` (table 4): chunked-only alternates batches of chunks and of decodes, hybrid-only never cuts prompts.
    """

    def __init__(
        self,
        token_budget: int | None = None,
        watermark: float = 0.01,
        composition: Composition = "stall-free",
        tbt_s: float | None = None,
        schedule: ChunkSchedule | None = None,
    ) -> None:
        self.token_budget = token_budget
        self.watermark = watermark
        self.composition = composition
        self.tbt_s = tbt_s
        self.schedule = schedule
        self._decodes_are_due = False

    def fill(self, batch: Batch) -> None:
        welcome(batch)
        if self.composition == "chunked-only":
            self._take_turns(batch)
            return
        make_room(batch)
        decodes = batch.num_decodes
        if decodes:
            batch.decode()
        self._prompts(batch, decodes)

    def _take_turns(self, batch: Batch) -> None:
        """Chunks, then decodes, while there are both."""
        tried = not (self._decodes_are_due and batch.num_decodes)
        if tried and self._prompts(batch, 0):
            self._decodes_are_due = True
            if batch.num_decodes:
                batch.repeat_at_most(1)
            return
        make_room(batch)
        if batch.num_decodes:
            batch.decode()
            self._decodes_are_due = False
            if not tried:
                batch.repeat_at_most(1)
        elif batch.preempted:
            self._prompts(batch, 0)

    def _prompts(self, batch: Batch, used: int) -> int:
        """Chunks of admitted prompts, then of the queue, beside ``used`` tokens; their tokens."""
        budget, before = self._budget(batch), used
        for request in batch.prefilling:
            tokens = self._chunk(request, request.remaining_tokens, budget, used)
            if tokens and batch.prefill(request, tokens):
                used += tokens
        keep = int(self.watermark * batch.total_blocks)
        for request in batch.waiting:
            tokens = self._chunk(request, batch.tokens_wanted(request), budget, used)
            if not tokens or batch.num_running >= batch.limits.max_num_seqs:
                break
            if not batch.admit(request, tokens, reserve_tokens=request.remaining_tokens, keep_free_blocks=keep):
                break
            used += tokens
        if self.schedule and used > before:
            batch.repeat_at_most(1)
        return used - before

    def _chunk(self, request: RequestView, wanted: int, budget: int, used: int) -> int:
        if self.schedule:
            budget = self.schedule.budget(max(0, request.input_tokens - wanted))
        return max(0, min(wanted, budget - used))

    def _budget(self, batch: Batch) -> int:
        if self.composition == "hybrid-only":
            return sys.maxsize
        limits = batch.limits
        if self.token_budget is None and self.tbt_s is not None:
            room = batch.total_blocks * limits.block_size // CONTEXT_TOKENS
            self.token_budget = token_budget_for(batch.seconds, self.tbt_s, min(limits.max_num_seqs, room))
        return self.token_budget or limits.max_num_batched_tokens or DEFAULT_BUDGET_TOKENS

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        keep = int(self.watermark * total_blocks)
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, keep, limits)
