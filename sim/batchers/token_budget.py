"""vLLM V1: one token budget for everything, running requests first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from sim.batchers.common import (
    latest_admitted,
    least_urgent,
    make_room,
    refuse_groups,
    refuse_if_full,
    urgency,
    welcome,
)
from sim.policy import Batch, Limits, RequestView


class TokenBudget:
    """One token budget for everything, running requests first (vLLM V1).

    Source: vLLM ``v1/core/sched/scheduler.py``, commit 00024d31. A request wants whatever it has not
    computed; there are no phases. Blocks are taken chunk by chunk; the latest admitted is recomputed when they run
    out, and a step that preempts admits nobody. ``reserve_full_prompt``: a prompt is admitted only while blocks for all
    of it are free, though it takes them chunk by chunk (``scheduler_reserve_full_isl``, on by default in vLLM 0.19).
    ``policy`` priority: requests wait in order of (priority, arrival), lower first, and the highest is preempted.
    """

    def __init__(
        self,
        chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        reserve_full_prompt: bool = False,
        policy: Literal["fcfs", "priority"] = "fcfs",
    ) -> None:
        self.chunked_prefill = chunked_prefill
        self.threshold = long_prefill_token_threshold
        self.reserve_full_prompt = reserve_full_prompt
        self.policy = policy
        self._victim = least_urgent if policy == "priority" else latest_admitted

    def fill(self, batch: Batch) -> None:
        budget = batch.limits.max_num_batched_tokens or 2048
        welcome(batch)
        make_room(batch, choose=self._victim)
        decodes = batch.num_decodes
        if decodes:
            most = budget - self._ahead(batch, budget)
            late = batch.decoding[most:] if decodes > most else ()
            budget -= decodes - len(late)
            batch.decode(leave_out=late)
        if batch.prefilling:
            budget = self._continue_prompts(batch, budget)
        if not batch.preempted:
            self._admit(batch, budget)

    def _ahead(self, batch: Batch, budget: int) -> int:
        """Tokens of prompts that run before some of the decodes, in the order of admission, and take theirs first."""
        tokens = 0
        for request, decodes in batch.ahead():
            tokens += max(0, min(self._capped(request.remaining_tokens), budget - decodes - tokens))
        return tokens

    def _continue_prompts(self, batch: Batch, budget: int) -> int:
        """The next chunk of every admitted prompt; a victim's tokens go back to the budget, which is returned."""
        given: dict[RequestView, int] = {}
        gone: set[RequestView] = set()
        for request in batch.prefilling:
            tokens = min(self._capped(request.remaining_tokens), budget)
            if not tokens or request in gone:
                continue
            while request not in gone and not batch.prefill(request, tokens):
                victim = self._victim(batch)
                assert victim is not None
                budget += given.pop(victim, 0) if victim.remaining_tokens else 1
                batch.preempt(victim)
                gone.add(victim)
            if request not in gone:
                given[request] = tokens
                budget -= tokens
        return budget

    def _admit(self, batch: Batch, budget: int) -> None:
        size = batch.limits.block_size
        for request in self._queue(batch):
            wanted = batch.tokens_wanted(request)
            tokens = min(self._capped(wanted), budget)
            full = not budget or batch.num_running >= batch.limits.max_num_seqs
            if full or (self._capped(wanted) > budget and not self.chunked_prefill):
                break
            later = -(-wanted // size) - -(-tokens // size) if self.reserve_full_prompt else 0
            if not batch.admit(request, tokens, keep_free_blocks=later):
                break
            budget -= tokens

    def _queue(self, batch: Batch) -> Iterable[RequestView]:
        return sorted(batch.waiting, key=urgency) if self.policy == "priority" else batch.waiting

    def _capped(self, tokens: int) -> int:
        return min(tokens, self.threshold) if self.threshold else tokens

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        budget = limits.max_num_batched_tokens or 2048
        if not self.chunked_prefill and self._capped(total_tokens) > budget:
            return (
                f"{total_tokens} tokens (all may have to be recomputed at once) exceed max_num_batched_tokens {budget}"
            )
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)
