"""Prompts in batches just large enough to keep the arithmetic busy; decodes in batches of their own."""

from __future__ import annotations

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in, welcome
from sim.policy import Batch, Limits, RequestView
from sim.types import Work


class Saturating:
    """Whole prompts, first come first served, together only while that saves time; else all decodes.

    ThunderServe (MLSys 2025): prefill gains little from batching. The next prompt joins a batch if that takes at most
    ``1 - least_gain`` (ours) of what the two take one after the other, by the replica's own step times. Admission
    keeps ``watermark`` of the blocks free; when decodes run out of blocks the latest is swapped out (ours: a group that
    decodes is no good at prompts), and returns before anybody new is let in. Where phases meet (after a change of
    role or a fault) prompts go first. Never cuts a prompt, never skips the head of the queue.
    """

    def __init__(self, least_gain: float = 0.1, watermark: float = 0.01) -> None:
        self.least_gain = least_gain
        self.watermark = watermark

    def fill(self, batch: Batch) -> None:
        keep = int(self.watermark * batch.total_blocks)
        if not batch.swapped:
            if self._admit_prompts(batch, keep):
                return
            welcome(batch)
        make_room(batch, "swap")
        if not batch.preempted:
            swap_in(batch, keep)
        if not batch.num_running:  # KV that came holds the blocks they wait for
            welcome(batch)
            make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

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
