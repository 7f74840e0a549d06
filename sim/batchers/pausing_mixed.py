"""Splitwise's mixed machine: prompts first, decodes pause for them, but not for ever."""

from __future__ import annotations

from collections.abc import Sequence

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, welcome
from sim.policy import Batch, Limits, RequestView


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
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)
