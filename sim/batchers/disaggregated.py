"""DistServe's two schedulers in one: batches of whole prompts, batches of decodes, never both."""

from __future__ import annotations

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in, welcome
from sim.cost import saturating_chunk
from sim.policy import Batch, Limits, ReplicaView, RequestView
from sim.types import ConfigError

WAITING_SHARE = 0.05
"""Of a decode instance's blocks, in the released code."""


class Disaggregated:
    """Prompts first come first served, stopping at the first that does not fit; else all decodes (DistServe, 4.3).

    A batch of prompts holds at most ``max_prompts``, ``prompt_tokens`` and ``max_num_batched_tokens``; a longer prompt
    runs alone. ``prompt_tokens`` None is the paper's L_m, the shortest prompt that saturates the GPUs: by the price of
    the instance's steps, as ``saturating_chunk`` finds it. KV that waits to be fetched keeps its blocks, so a full
    decode instance stops the prefill behind it. Decodes: when blocks run out the latest is swapped out, and returns
    before those who arrived join; they do not wait for blocks that they hold themselves (ours). A prefill instance sees
    no decodes and a decode instance no prompts; where both meet (after a fault) prompts go first.
    """

    def __init__(self, max_prompts: int = 128, prompt_tokens: int | None = None) -> None:
        for name, value in (("max_prompts", max_prompts), ("prompt_tokens", prompt_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"system.{name} is {value}; it must be a whole number >= 1")
        self.max_prompts = max_prompts
        self.prompt_tokens = prompt_tokens

    def fill(self, batch: Batch) -> None:
        if not batch.swapped and self._admit_prompts(batch):
            return
        make_room(batch, "swap")
        if not batch.preempted or not batch.num_running:
            swap_in(batch, 0)
            welcome(batch)
            make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """KV is fetched while that of requests which do not decode yet takes less than 5 % of the pool."""
        waiting = sum(-(-one.input_tokens // replica.block_size) for one in replica.landing)
        return waiting < WAITING_SHARE * replica.total_blocks

    def _admit_prompts(self, batch: Batch) -> int:
        if self.prompt_tokens is None:
            self.prompt_tokens = saturating_chunk(batch.seconds)
        budget = min(self.prompt_tokens, batch.limits.max_num_batched_tokens or self.prompt_tokens)
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
