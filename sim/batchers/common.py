"""What several schedulers do alike: make room, let arrived and swapped requests in, admit whole prompts, refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sim.policy import Batch, Limits, RequestView

DEFAULT_LONGEST_TOKENS = 2048
"""Context of OPT and GPT-3, for which schedulers with reservations were published."""


def longest(limits: Limits) -> int:
    """Tokens a request may have where a whole context is reserved for it."""
    return limits.max_model_len or DEFAULT_LONGEST_TOKENS


# ------------------------------------------------------------ preemption


def latest_admitted(batch: Batch) -> RequestView | None:
    return batch.last_running()


def by_arrival(request: RequestView) -> tuple[float, int]:
    return (request.arrival_s, request.id)


def latest_arrived(batch: Batch) -> RequestView | None:
    return max((*batch.prefilling, *batch.decoding), key=by_arrival, default=None)


def urgency(request: RequestView) -> tuple[int, float, int]:
    """Lower is served first, higher is preempted first."""
    return (request.priority, request.arrival_s, request.id)


def least_urgent(batch: Batch) -> RequestView | None:
    return max((*batch.prefilling, *batch.decoding), key=urgency, default=None)


def make_room(
    batch: Batch,
    how: Literal["recompute", "swap"] = "recompute",
    choose: Callable[[Batch], RequestView | None] = latest_admitted,
) -> None:
    """Preempt until every remaining decode can append a token; a group of samples can only be swapped."""
    while batch.blocks_to_grow > batch.free_blocks:
        victim = choose(batch)
        if victim is None:
            return
        swapped = not victim.remaining_tokens and (how == "swap" or victim.samples > 1)
        batch.preempt(victim, "swap" if swapped else "recompute")


def swap_in(batch: Batch, keep_blocks: int) -> None:
    """Bring swapped requests back, first come first served, while seats and blocks above ``keep_blocks`` allow."""
    for request in sorted(batch.swapped, key=by_arrival):
        if batch.num_running and batch.num_running + request.samples > batch.limits.max_num_seqs:
            break
        grow = batch.blocks_to_grow  # theirs: vLLM gives the running ones their blocks before it swaps in
        if not batch.swap_in(request, keep_free_blocks=grow + keep_blocks if batch.num_running else 0):
            break


# ------------------------------------------------------------ admission


def welcome(batch: Batch) -> None:
    """Whoever arrived with its KV decodes from now on, while ``max_num_seqs`` allows."""
    for request in batch.arrived or ():
        if batch.num_running + request.samples > batch.limits.max_num_seqs:
            break
        batch.welcome(request)


def prompt_limit(limits: Limits) -> int:
    """Tokens of whole prompts in one batch (vLLM before V1)."""
    return limits.max_num_batched_tokens or max(2048, limits.max_model_len or 0)


def admit_prompts(batch: Batch, used_tokens: int, keep_blocks: int) -> int:
    """Admit whole prompts, first come first served and skipping none, beside ``used_tokens``; their tokens."""
    limits = batch.limits
    total = prompt_limit(limits)
    budget = total - used_tokens
    for request in batch.waiting:
        tokens = batch.tokens_wanted(request)
        recomputed = request.remaining_tokens > request.input_tokens  # and may be longer than the limit: alone, then
        alone = recomputed and budget == total
        full = batch.num_running + request.samples > limits.max_num_seqs
        if full or (tokens > budget and not alone) or not batch.admit(request, tokens, keep_free_blocks=keep_blocks):
            break
        budget -= tokens
    return total - used_tokens - budget


# ------------------------------------------------------------ refusal


def refuse_if_full(
    total_tokens: int, total_blocks: int, keep_blocks: int, limits: Limits, request: RequestView | None = None
) -> str | None:
    """A request that does not fit even alone, with ``keep_blocks`` kept free, would wait forever.

    Given the request, the blocks of all its samples count.
    """
    size = limits.block_size
    need = -(-total_tokens // size) if request is None else request.blocks_for(total_tokens, size)
    if need + keep_blocks > total_blocks:
        return f"{total_tokens} tokens need {need} KV blocks and {keep_blocks} are kept free; there are {total_blocks}"
    return None


def refuse_groups(request: RequestView) -> str | None:
    """For schedulers that recompute only, or reserve: a group's samples share blocks and can but be swapped."""
    if request.samples > 1:
        return f"{request.samples} samples: this scheduler has one a request; vllm serves groups in modes paper and v0"
    return None
