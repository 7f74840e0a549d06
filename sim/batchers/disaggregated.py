"""DistServe's two schedulers in one: batches of whole prompts, batches of decodes, never both."""

from __future__ import annotations

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in, welcome
from sim.policy import Batch, Limits, ReplicaView, RequestView

DEFAULT_PROMPT_TOKENS = 8192
"""Tokens of a prefill batch in DistServe's scripts."""
WAITING_SHARE = 0.05
"""Of a decode instance's blocks, in the released code."""


class Disaggregated:
    """Prompts first come first served, stopping at the first that does not fit; else all decodes (DistServe, 4.3).

    A batch of prompts holds at most ``max_prompts`` and ``max_num_batched_tokens``; a longer prompt runs alone. KV that
    waits to be fetched keeps its blocks, so a full decode instance stops the prefill behind it. Decodes: who was
    swapped out returns before anybody arrived is let in; when blocks run out the latest is swapped out. A prefill
    instance sees no decodes and a decode instance no prompts; where both meet (after a fault) prompts go first.
    """

    def __init__(self, max_prompts: int = 128) -> None:
        self.max_prompts = max_prompts

    def fill(self, batch: Batch) -> None:
        if not batch.swapped and self._admit_prompts(batch):
            return
        if not batch.swapped:
            welcome(batch)
        make_room(batch, "swap")
        if not batch.preempted:
            swap_in(batch, 0)
        if not batch.num_running:  # who arrived holds the blocks that the swapped ones lack
            welcome(batch)
            make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """KV is fetched while that of requests which do not decode yet takes less than 5 % of the pool."""
        waiting = sum(-(-one.input_tokens // replica.block_size) for one in replica.landing)
        return waiting < WAITING_SHARE * replica.total_blocks

    def _admit_prompts(self, batch: Batch) -> int:
        budget = batch.limits.max_num_batched_tokens or DEFAULT_PROMPT_TOKENS
        prompts = tokens = 0
        for request in batch.waiting:
            wanted = batch.tokens_wanted(request)
            fits = not prompts or (prompts < self.max_prompts and tokens + wanted <= budget)
            if not fits or not batch.admit(request, wanted, keep_free_blocks=batch.blocks_to_grow):
                break
            prompts += 1
            tokens += wanted
        return prompts

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)
