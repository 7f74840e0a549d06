"""What comes to a node of a path: all tokens, and the first whole prompts beside them."""

from __future__ import annotations

from sim.batchers.common import make_room, prompt_limit, refuse_groups, refuse_if_full
from sim.policy import Batch, Limits, RequestView


class Passing:
    """Every token that has come, and up to ``max_prompts`` whole prompts, first come first served.

    As Helix's nodes (ASPLOS 2025; its artifact's batches). Prompts of a batch stay within ``max_num_batched_tokens``,
    save one alone. Who is admitted last starts over when blocks run out; in such a batch nobody is admitted, nor
    where it would leave fewer than ``watermark`` of the blocks free.
    """

    def __init__(self, max_prompts: int = 3, watermark: float = 0.01) -> None:
        self.max_prompts = max_prompts
        self.watermark = watermark

    def fill(self, batch: Batch) -> None:
        make_room(batch)
        if batch.num_decodes:
            batch.decode()
        if not batch.preempted:
            self._admit(batch, int(self.watermark * batch.total_blocks))

    def _admit(self, batch: Batch, keep: int) -> None:
        admitted, budget = 0, prompt_limit(batch.limits)
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            full = admitted >= self.max_prompts or batch.num_running >= batch.limits.max_num_seqs
            if full or (admitted and tokens > budget) or not batch.admit(request, tokens, keep_free_blocks=keep):
                break
            admitted, budget = admitted + 1, budget - tokens

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        keep = int(self.watermark * total_blocks)
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, keep, limits)
