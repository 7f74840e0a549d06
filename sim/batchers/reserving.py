"""Schedulers before paging: KV is reserved contiguously, for a request's whole life, when it is admitted."""

from __future__ import annotations

from typing import Literal

from sim.batchers.common import longest, make_room, refuse_groups
from sim.policy import Batch, Limits, RequestView

Reserve = Literal["max", "pow2", "oracle"]
RESERVES: tuple[Reserve, ...] = ("max", "pow2", "oracle")


def reserved_tokens(reserve: Reserve, input_tokens: int, output_tokens: int, longest_tokens: int) -> int:
    """Tokens of KV that are reserved for a request (vLLM, SOSP 2023, section 6.1): ``longest_tokens``; or its prompt
    and its output, the latter rounded up to a power of two (``pow2``) or as it is (``oracle``)."""
    if reserve == "max":
        return longest_tokens
    output = 1 << (output_tokens - 1).bit_length() if reserve == "pow2" else output_tokens
    return min(longest_tokens, input_tokens + output)


class IterationLevel:
    """Requests join and leave at any iteration; whole prompts run beside decodes (Orca, OSDI 2022).

    First come first served, at most ``max_num_seqs`` at once, no limit on tokens. ``reserve``: see ``reserved_tokens``;
    pow2 and oracle go by the *predicted* output, so they are what they say under the predictor ``TrueLength`` only.
    The region comes from a buddy allocator: a power of two of blocks; that such an allocator may also fail to find free
    blocks side by side is left out. Who outgrows a region predicted too short takes single blocks, and the latest
    admitted is recomputed when there are none.
    """

    def __init__(self, reserve: Reserve = "max") -> None:
        self.reserve = reserve

    def fill(self, batch: Batch) -> None:
        make_room(batch)
        if batch.num_decodes:
            batch.decode()
        if batch.preempted:
            return
        for request in batch.waiting:
            if batch.num_running >= batch.limits.max_num_seqs:
                break
            region = self.region_blocks(request, batch.limits) * batch.limits.block_size
            if not batch.admit(request, batch.tokens_wanted(request), reserve_tokens=region):
                break

    def region_blocks(self, request: RequestView, limits: Limits) -> int:
        tokens = reserved_tokens(self.reserve, request.input_tokens, request.predicted_output_tokens, longest(limits))
        blocks = -(-tokens // limits.block_size)
        return 1 << (blocks - 1).bit_length()

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        region = self.region_blocks(request, limits)
        if region > total_blocks:
            return f"a region of {region} blocks is reserved for it; there are {total_blocks}"
        return refuse_groups(request) or refuse_longer(total_tokens, limits)


class RequestLevel:
    """A batch is admitted when the one before has ended with its longest request (FasterTransformer).

    Source: the baseline of vLLM, SOSP 2023, section 6.1: the earliest ``max_num_seqs`` requests whose whole contexts
    (``max_model_len``) fit run together, prompts first. A request is returned with its own last token, and costs
    nothing from then on: padding and late returns of the original are left out. Under PP one batch is in flight.
    """

    def fill(self, batch: Batch) -> None:
        if batch.num_decodes:
            batch.decode()
        if batch.num_running:
            return
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            full = batch.num_running >= batch.limits.max_num_seqs
            if full or not batch.admit(request, tokens, reserve_tokens=longest(batch.limits)):
                break

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_longer(total_tokens, limits) or refuse_unreserved(total_blocks, limits)


def slots(total_blocks: int, limits: Limits) -> int:
    """Whole contexts that the KV cache has room for."""
    return total_blocks // -(-longest(limits) // limits.block_size)


def refuse_longer(total_tokens: int, limits: Limits) -> str | None:
    """``total_tokens`` is without the last token, which is never stored."""
    if total_tokens >= longest(limits):
        return f"{total_tokens + 1} tokens exceed the context of {longest(limits)} that is reserved at most"
    return None


def refuse_unreserved(total_blocks: int, limits: Limits) -> str | None:
    if slots(total_blocks, limits) < 1:
        return f"a context of {longest(limits)} tokens exceeds the {total_blocks * limits.block_size} of the KV cache"
    return None
