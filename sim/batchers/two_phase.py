"""TetriInfer: prompts in ordered groups and chunks of one size; decodes admitted by what they are predicted to need."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in
from sim.policy import Batch, Limits, ReplicaView, RequestView
from sim.types import ConfigError

Order = Literal["fcfs", "sjf", "ljf"]
Admission = Literal["greedy", "reserve-static", "reserve-dynamic", "commit"]
ORDERS: Mapping[Order, Callable[[RequestView], int]] = {
    "fcfs": lambda request: 0,
    "sjf": lambda request: request.input_tokens,
    "ljf": lambda request: -request.input_tokens,
}
ADMISSIONS: tuple[Admission, ...] = ("greedy", "reserve-static", "reserve-dynamic", "commit")


class TwoPhase:
    """Chunks while there are prompts, then decodes; never both in one batch (TetriInfer, arXiv 2401.11181).

    Prompts: the ``group`` oldest are put in ``order`` and computed to the last before the next ones are looked at; a
    batch is ``chunk_tokens`` of them end to end, so a chunk may end one prompt and begin the next. Decodes: first
    come first served, while ``admission`` finds room. greedy: for the next token; reserve-static: for the predicted
    output; reserve-dynamic: the same, counting the blocks that the running request predicted to end first will free
    (and room for the next token now); commit (ours): the predicted output, beside what running ones are predicted to
    take yet, which holds for KV that wants to come, too. These are gates: blocks are taken one by one, and when none is
    left the latest is swapped out.
    """

    def __init__(
        self,
        chunk_tokens: int = 512,
        group: int = 16,
        order: Order = "sjf",
        admission: Admission = "reserve-dynamic",
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(f"system.order is {order!r}; it must be one of {', '.join(ORDERS)}")
        if admission not in ADMISSIONS:
            raise ConfigError(f"system.admission is {admission!r}; it must be one of {', '.join(ADMISSIONS)}")
        for name, value in (("chunk_tokens", chunk_tokens), ("group", group)):
            if value < 1:
                raise ConfigError(f"system.{name} is {value}; it must be a whole number >= 1")
        self.chunk_tokens = chunk_tokens
        self.group = group
        self.order = order
        self.admission = admission
        self._scheduled: deque[int] = deque()

    def fill(self, batch: Batch) -> None:
        if not self._chunk(batch):
            self._decodes(batch)

    # ------------------------------------------------------------ prompts

    def _chunk(self, batch: Batch) -> int:
        """One chunk of prompts under way, then of scheduled ones; its tokens."""
        used = 0
        for request in batch.prefilling:
            tokens = min(request.remaining_tokens, self.chunk_tokens - used)
            if tokens and batch.prefill(request, tokens):
                used += tokens
        while used < self.chunk_tokens and (head := self._next(batch)) is not None:
            tokens = min(batch.tokens_wanted(head), self.chunk_tokens - used)
            full = batch.num_running >= batch.limits.max_num_seqs
            if full or not batch.admit(head, tokens, reserve_tokens=head.remaining_tokens):
                break
            self._scheduled.popleft()
            used += tokens
        return used

    def _next(self, batch: Batch) -> RequestView | None:
        """The scheduled queue's head; an empty one takes the oldest of the raw queue."""
        while True:
            if not self._scheduled:
                oldest = [request for request, _ in zip(batch.waiting, range(self.group), strict=False)]
                self._scheduled.extend(request.id for request in sorted(oldest, key=ORDERS[self.order]))
                if not oldest:
                    return None
            for request in batch.waiting:
                if request.id == self._scheduled[0]:
                    return request
            self._scheduled.popleft()  # a fault took it away

    # ------------------------------------------------------------ decodes

    def _decodes(self, batch: Batch) -> None:
        make_room(batch, "swap")
        if not batch.preempted:
            swap_in(batch, 0)
        for request in batch.arrived:
            alone = not batch.num_running
            if not alone and (batch.preempted or batch.swapped or not self._admits(batch, request)):
                break
            batch.welcome(request)
            if alone:  # whatever the gate says, or nobody would ever run
                make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

    def _admits(self, batch: Batch, request: RequestView) -> bool:
        if batch.num_running >= batch.limits.max_num_seqs:
            return False
        size = batch.limits.block_size
        free = batch.free_blocks - batch.blocks_to_grow
        if _growth(request, 1, size) > free or self.admission == "greedy":
            return _growth(request, 1, size) <= free
        if self.admission == "reserve-dynamic":
            free += _freed_next(batch)
        elif self.admission == "commit":
            free -= sum(_growth(other, other.predicted_output_tokens + 1, size) for other in batch.decoding)
        return _growth(request, request.predicted_output_tokens + 1, size) <= free

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """KV takes its blocks when it comes; what was committed is not for it."""
        if self.admission != "commit":
            return True
        held = (request, *replica.running, *replica.landing)
        size = replica.block_size
        return blocks + sum(_growth(one, one.predicted_output_tokens + 1, size) for one in held) <= replica.free_blocks

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)


def _growth(request: RequestView, output_tokens: int, block_size: int) -> int:
    """Blocks beyond those of its KV now, when it has so many output tokens."""
    stored = request.input_tokens + request.emitted_tokens - 1
    return max(0, -(-(request.input_tokens + output_tokens) // block_size) + stored // -block_size)


def _freed_next(batch: Batch) -> int:
    """Blocks of the running request with the fewest tokens to come, as predicted (overdue ones have less than none)."""
    first = min(batch.decoding, key=lambda other: other.predicted_output_tokens - other.emitted_tokens, default=None)
    if first is None:
        return 0
    return -(-(first.input_tokens + first.emitted_tokens - 1) // batch.limits.block_size)
