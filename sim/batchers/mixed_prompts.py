"""vLLM as first published: prompts join the running decodes, groups of samples are swapped."""

from __future__ import annotations

from typing import Literal

from sim.batchers.common import admit_prompts, latest_arrived, make_room, refuse_if_full, swap_in, welcome
from sim.batchers.prefill_first import refuse_long_prompt
from sim.policy import Batch, Limits, RequestView


class MixedPrompts:
    """Whole prompts and decodes in one batch (vLLM of mid-2023, as its SOSP paper measured it, section 4.5).

    Decodes come first. When blocks run out the latest to arrive is preempted: recomputed in front of the queue, or
    swapped (``preemption``; a group of samples always). Nobody is admitted in a step that preempts, nor while
    anybody is swapped out; prompts and decodes together stay within ``max_num_batched_tokens``. Admission and
    swapping in keep ``watermark`` of the blocks free, growth does not. The host has room for all that is swapped.
    """

    def __init__(self, preemption: Literal["recompute", "swap"] = "recompute", watermark: float = 0.01) -> None:
        self.preemption = preemption
        self.watermark = watermark

    def fill(self, batch: Batch) -> None:
        keep = int(self.watermark * batch.total_blocks)
        welcome(batch)
        make_room(batch, self.preemption, latest_arrived)
        if not batch.preempted:
            swap_in(batch, keep)
        decodes = batch.num_decodes
        if decodes:
            batch.decode()
        if not batch.preempted and not batch.swapped:
            admit_prompts(batch, decodes, keep)

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_long_prompt(request, limits) or refuse_if_full(
            total_tokens, total_blocks, int(self.watermark * total_blocks), limits, request
        )
