"""Prompts in batches just large enough to keep the arithmetic busy; decodes in batches of their own."""

from __future__ import annotations

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in, welcome
from sim.policy import Batch, Limits, ReplicaView, RequestView
from sim.types import Work


class Saturating:
    """Whole prompts, first come first served, together only while that saves time; else all decodes.

    ThunderServe (MLSys 2025): prefill gains little from batching. The next prompt joins a batch if that takes at most
    ``1 - least_gain`` (ours) of what the two take one after the other, by the replica's own step times. Admission
    keeps ``watermark`` of the blocks free. Ours, as no text says how decodes share memory: KV is let in while nobody is
    swapped out and there is room beside it for ``growth_share`` of what all here, and it, are predicted to grow (while
    some grow others leave). When decodes run out of blocks all the same the latest is swapped out (a group that decodes
    is no good at prompts), and returns before further KV is let in; KV that is here decodes meanwhile, since it
    holds its blocks anyway. Where phases meet (after
    a change of role or a fault) prompts go first. Never cuts a prompt, never skips the head of the queue.
    """

    def __init__(self, least_gain: float = 0.1, watermark: float = 0.01, growth_share: float = 0.1) -> None:
        self.least_gain = least_gain
        self.watermark = watermark
        self.growth_share = growth_share

    def fill(self, batch: Batch) -> None:
        keep = int(self.watermark * batch.total_blocks)
        if not batch.swapped and self._admit_prompts(batch, keep):
            return
        make_room(batch, "swap")
        if not batch.preempted or not batch.num_running:
            swap_in(batch, keep)
            welcome(batch)
            make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """Nobody overtakes those who were swapped out, and whoever comes finds room to grow.

        While all advance, what is free shrinks by what is still to grow: the answer changes for the better only when
        somebody leaves, which is when it is asked for.
        """
        if replica.num_swapped:
            return False
        size, free = replica.block_size, replica.free_blocks - blocks
        growth = _to_grow(request, request.input_tokens, size)
        growth += sum([_to_grow(one, one.input_tokens, size) for one in replica.landing])
        growth += sum([_to_grow(one, one.input_tokens + one.emitted_tokens, size) for one in replica.running])
        return self.growth_share * growth + int(self.watermark * replica.total_blocks) <= free

    def _admit_prompts(self, batch: Batch, keep: int) -> bool:
        chunks: tuple[tuple[int, int], ...] = ()
        batch_s = 0.0
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            chunk = (tokens, request.remaining_tokens - tokens)
            together_s = batch.seconds(Work((*chunks, chunk), 0, 0))
            if chunks:
                alone_s = batch.seconds(Work((chunk,), 0, 0))
                if together_s > (1 - self.least_gain) * (batch_s + alone_s):
                    break
            full = batch.num_running >= batch.limits.max_num_seqs
            if full or not batch.admit(request, tokens, keep_free_blocks=keep):
                break
            chunks, batch_s = (*chunks, chunk), together_s
        return bool(chunks)

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        keep = int(self.watermark * total_blocks)
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, keep, limits, request)


def _to_grow(request: RequestView, tokens: int, block_size: int) -> int:
    """Blocks that a request which holds so many tokens is predicted to take yet."""
    return max(0, -(-(request.input_tokens + request.predicted_output_tokens) // block_size) - -(-tokens // block_size))
