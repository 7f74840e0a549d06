"""Batchers: what a replica's next iteration computes.

Every class fits ``sim.policy.Batcher`` and is a whole scheduler on one screen. None may read a request's true
output length, keep requests across calls, or assume that it is called once per iteration (see
``Batch.repeat_at_most``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sim.policy import Batch, Limits, RequestView


def make_room(batch: Batch, how: Literal["recompute", "swap"] = "recompute") -> None:
    """Preempt the latest admitted until every remaining decode can append a token."""
    while batch.blocks_to_grow > batch.free_blocks:
        victim = batch.last_running()
        if victim is None:
            return
        batch.preempt(victim, "recompute" if victim.remaining_tokens else how)


def welcome(batch: Batch) -> None:
    """Whoever arrived with its KV decodes from now on, while ``max_num_seqs`` allows."""
    arrived = batch.arrived
    if arrived:
        for request in arrived[: max(0, batch.limits.max_num_seqs - batch.num_running)]:
            batch.welcome(request)


def refuse_if_full(total_tokens: int, total_blocks: int, keep_blocks: int, limits: Limits) -> str | None:
    """A request that does not fit even alone, with ``keep_blocks`` kept free, would wait forever."""
    need = -(-total_tokens // limits.block_size)
    if need + keep_blocks > total_blocks:
        return f"{total_tokens} tokens need {need} KV blocks and {keep_blocks} are kept free; there are {total_blocks}"
    return None


class PrefillFirst:
    """Whole prompts first, in batches of their own; decodes wait (vLLM 0.2 to 0.5, "V0").

    Source: vLLM ``core/scheduler.py`` before V1; SOSP 2023, section 4.5. Admission keeps ``watermark`` of the
    blocks free, growth does not. Never mixes phases; never skips the head of the queue.
    """

    def __init__(self, preemption: Literal["recompute", "swap"] = "recompute", watermark: float = 0.01) -> None:
        self.preemption = preemption
        self.watermark = watermark

    def max_tokens(self, limits: Limits) -> int:
        return limits.max_num_batched_tokens or max(2048, limits.max_model_len or 0)

    def fill(self, batch: Batch) -> None:
        welcome(batch)
        if not batch.swapped and self._admit_prompts(batch):
            return
        make_room(batch, self.preemption)
        if not batch.preempted:
            self._swap_in(batch)
        if batch.num_decodes:
            batch.decode()

    def _admit_prompts(self, batch: Batch) -> int:
        """Tokens of the prompts that start now."""
        limits = batch.limits
        budget = total = self.max_tokens(limits)
        keep = int(self.watermark * batch.total_blocks)
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            alone = request.preemptions and budget == total  # a recompute may be longer than the limit
            if batch.num_running >= limits.max_num_seqs or (tokens > budget and not alone):
                break
            if not batch.admit(request, tokens, keep_free_blocks=keep):
                break
            budget -= tokens
        return total - budget

    def _swap_in(self, batch: Batch) -> None:
        keep = int(self.watermark * batch.total_blocks)
        for request in batch.swapped:
            if batch.num_running >= batch.limits.max_num_seqs:
                break
            if not batch.swap_in(request, keep_free_blocks=0 if not batch.num_running else keep):
                break

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        if request.input_tokens > self.max_tokens(limits):
            return f"a prompt of {request.input_tokens} tokens exceeds max_num_batched_tokens {self.max_tokens(limits)}"
        return refuse_if_full(total_tokens, total_blocks, int(self.watermark * total_blocks), limits)


class TokenBudget:
    """One token budget for everything, running requests first (vLLM V1).

    Source: vLLM ``v1/core/sched/scheduler.py``, commit 00024d31. A request wants whatever it has not
    computed; there are no phases. Blocks are taken chunk by chunk; the latest admitted is recomputed when they run
    out, and a step that preempts admits nobody. ``reserve_full_prompt``: a prompt is admitted only while blocks for all
    of it are free, though it takes them chunk by chunk (``scheduler_reserve_full_isl``, on by default in vLLM 0.19).
    """

    def __init__(
        self,
        chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        reserve_full_prompt: bool = False,
    ) -> None:
        self.chunked_prefill = chunked_prefill
        self.threshold = long_prefill_token_threshold
        self.reserve_full_prompt = reserve_full_prompt

    def fill(self, batch: Batch) -> None:
        limits = batch.limits
        budget = limits.max_num_batched_tokens or 2048
        welcome(batch)
        make_room(batch)
        decodes = batch.num_decodes
        if decodes:
            late = batch.decoding[budget:] if decodes > budget else ()
            budget -= decodes - len(late)
            batch.decode(leave_out=late)
        place = 0
        while place < len(unfinished := batch.prefilling):  # it shrinks from its tail when one is preempted
            tokens = min(self._capped(unfinished[place].remaining_tokens), budget)
            if tokens and not self._prefill(batch, unfinished[place], tokens):
                break
            budget -= tokens
            place += 1
        if batch.preempted:
            return
        for request in batch.waiting:
            wanted = batch.tokens_wanted(request)
            tokens = min(self._capped(wanted), budget)
            if not budget or batch.num_running >= limits.max_num_seqs or (wanted > budget and not self.chunked_prefill):
                break
            size = limits.block_size
            later = -(-wanted // size) - -(-tokens // size) if self.reserve_full_prompt else 0
            if not batch.admit(request, tokens, keep_free_blocks=later):
                break
            budget -= tokens

    def _capped(self, tokens: int) -> int:
        return min(tokens, self.threshold) if self.threshold else tokens

    def _prefill(self, batch: Batch, request: RequestView, tokens: int) -> bool:
        while not batch.prefill(request, tokens):
            victim = batch.last_running()
            assert victim is not None
            batch.preempt(victim)
            if victim is request:
                return False
        return True

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        budget = limits.max_num_batched_tokens or 2048
        if not self.chunked_prefill and total_tokens > budget:
            return (
                f"{total_tokens} tokens (all may have to be recomputed at once) exceed max_num_batched_tokens {budget}"
            )
        return refuse_if_full(total_tokens, total_blocks, 0, limits)


class StallFree:
    """Decodes always, prompt chunks in what is left of a token budget (Sarathi-Serve, OSDI 2024, algorithm 3).

    Decodes are never dropped for lack of budget; a prompt is admitted when blocks for all of it are free above the
    watermark, and keeps them while its chunks are computed.
    """

    def __init__(self, token_budget: int | None = None, watermark: float = 0.01) -> None:
        self.token_budget = token_budget
        self.watermark = watermark

    def fill(self, batch: Batch) -> None:
        welcome(batch)
        make_room(batch)
        most = self.token_budget or batch.limits.max_num_batched_tokens or 512
        budget = max(0, most - batch.num_decodes)
        if batch.num_decodes:
            batch.decode()
        for request in batch.prefilling:
            tokens = min(request.remaining_tokens, budget)
            if tokens and batch.prefill(request, tokens):
                budget -= tokens
        keep = int(self.watermark * batch.total_blocks)
        for request in batch.waiting:
            wanted = batch.tokens_wanted(request)
            tokens = min(wanted, budget)
            if not budget or batch.num_running >= batch.limits.max_num_seqs:
                break
            if not batch.admit(request, tokens, reserve_tokens=request.remaining_tokens, keep_free_blocks=keep):
                break
            budget -= tokens

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_if_full(total_tokens, total_blocks, int(self.watermark * total_blocks), limits)


class PausingMixed:
    """Whole prompts before decodes; decodes that do not fit pause, at most so often (Splitwise, section 4.2).

    Order of service: decodes paused ``max_pauses`` times, waiting prompts, paused decodes, the other decodes; while
    at most ``max_num_seqs`` requests and ``max_num_batched_tokens`` tokens (one longer prompt may run alone)
    and the blocks allow. Without prompts it is Splitwise's token machine, without decodes its prompt machine.
    """

    def __init__(self, max_pauses: int = 4) -> None:
        self.max_pauses = max_pauses
        self._pauses: dict[int, int] = {}

    def fill(self, batch: Batch) -> None:
        welcome(batch)
        make_room(batch)
        size, budget = batch.limits.max_num_seqs, batch.limits.max_num_batched_tokens or 2048
        if not any(True for _ in batch.waiting) and batch.num_decodes <= min(size, budget):
            self._decode(batch, ())
            return
        self._pauses = {request.id: self._pauses.get(request.id, 0) for request in batch.decoding}
        due = sum(1 for pauses in self._pauses.values() if pauses >= self.max_pauses)
        prompts, tokens = self._admit_prompts(batch, size - due, budget - due, alone=not due)
        room = max(due, min(size - prompts, budget - tokens))
        paused = set(batch.paused)
        order = sorted(
            batch.decoding,
            key=lambda request: (self._pauses.get(request.id, 0) < self.max_pauses, request not in paused),
        )
        self._decode(batch, order[room:])

    def _admit_prompts(self, batch: Batch, size: int, budget: int, alone: bool) -> tuple[int, int]:
        prompts = total = 0
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            fits = prompts < size and (total + tokens <= budget or (alone and prompts == 0))
            if not fits or not batch.admit(request, tokens, keep_free_blocks=batch.blocks_to_grow):
                break
            prompts += 1
            total += tokens
        return prompts, total

    def _decode(self, batch: Batch, left_out: Sequence[RequestView]) -> None:
        for request in left_out:
            self._pauses[request.id] = self._pauses.get(request.id, 0) + 1
        if left_out:
            batch.repeat_at_most(1)
        if batch.num_decodes:
            batch.decode(leave_out=left_out)

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_if_full(total_tokens, total_blocks, 0, limits)
