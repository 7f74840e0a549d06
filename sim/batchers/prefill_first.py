"""vLLM 0.2 to 0.5: prompts and decodes never share a batch."""

from __future__ import annotations

from typing import Literal

from sim.batchers.common import admit_prompts, make_room, prompt_limit, refuse_if_full, swap_in, welcome
from sim.policy import Batch, Limits, RequestView


class PrefillFirst:
    """Whole prompts first, in batches of their own; decodes wait (vLLM 0.2 to 0.5, "V0").

    Source: vLLM ``core/scheduler.py`` before V1; SOSP 2023, section 4.5. Admission keeps ``watermark`` of the
    blocks free, growth does not. Never mixes phases; never skips the head of the queue. Groups of samples are swapped.
    """

    def __init__(self, preemption: Literal["recompute", "swap"] = "recompute", watermark: float = 0.01) -> None:
        self.preemption = preemption
        self.watermark = watermark

    def fill(self, batch: Batch) -> None:
        keep = int(self.watermark * batch.total_blocks)
        welcome(batch)
        if not batch.swapped and admit_prompts(batch, 0, keep):
            return
        make_room(batch, self.preemption)
        if not batch.preempted:
            swap_in(batch, keep)
        if batch.num_decodes:
            batch.decode()

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_long_prompt(request, limits) or refuse_if_full(
            total_tokens, total_blocks, int(self.watermark * total_blocks), limits, request
        )


def refuse_long_prompt(request: RequestView, limits: Limits) -> str | None:
    """Prompts are computed whole, groups run whole."""
    if request.input_tokens > prompt_limit(limits):
        return f"a prompt of {request.input_tokens} tokens exceeds max_num_batched_tokens {prompt_limit(limits)}"
    if request.samples > limits.max_num_seqs:
        return f"{request.samples} samples exceed max_num_seqs {limits.max_num_seqs}"
    return None
