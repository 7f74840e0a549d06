"""TetriInfer: prompts in ordered groups and chunks of one size; decodes admitted by what they are predicted to need."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, swap_in, welcome
from sim.cost import saturating_chunk
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
    batch is ``chunk_tokens`` of them end to end (None: as many as saturate the GPU by the latency model), so a chunk
    may end one prompt and begin the next. Decodes: KV is let in first come first served, and decodes at once, while
    ``admission`` finds room beside it. greedy: for the next token; reserve-static: for the predicted output;
    reserve-dynamic: the same, counting the blocks that the running request predicted to end first will free (and room
    for the next token now); commit (ours): the predicted output, beside what the others are predicted to take yet.
    These are gates: blocks are taken one by one, and when none is left the latest is swapped out.
    """

    def __init__(
        self,
        chunk_tokens: int | None = 512,
        group: int = 16,
        order: Order = "sjf",
        admission: Admission = "reserve-dynamic",
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(f"system.order is {order!r}; it must be one of {', '.join(ORDERS)}")
        if admission not in ADMISSIONS:
            raise ConfigError(f"system.admission is {admission!r}; it must be one of {', '.join(ADMISSIONS)}")
        for name, value in (("chunk_tokens", chunk_tokens), ("group", group)):
            if value is not None and value < 1:
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
        if self.chunk_tokens is None:
            self.chunk_tokens = saturating_chunk(batch.seconds)
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
        if not batch.preempted or not batch.num_running:
            swap_in(batch, 0)
            welcome(batch)
            make_room(batch, "swap")
        if batch.num_decodes:
            batch.decode()

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """Nobody overtakes those who were swapped out."""
        running, landing, size = replica.running, replica.landing, replica.block_size
        if replica.num_swapped or len(running) + len(landing) >= replica.max_num_seqs:
            return False
        free = replica.free_blocks - blocks
        predicted = _predicted_blocks(request, size) - blocks
        if self.admission == "greedy":
            return _blocks(request.input_tokens + 1, size) - blocks <= free
        if self.admission == "reserve-dynamic":
            first = min(running, key=lambda one: one.predicted_output_tokens - one.emitted_tokens, default=None)
            freed = 0 if first is None else _taken(first, size)
            return _blocks(request.input_tokens + 1, size) - blocks <= free and predicted <= free + freed
        if self.admission == "commit":
            free -= sum(max(0, _predicted_blocks(one, size) - _taken(one, size)) for one in running)
            free -= sum(_predicted_blocks(one, size) - _blocks(one.input_tokens, size) for one in landing)
        return predicted <= free

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _predicted_blocks(request: RequestView, block_size: int) -> int:
    """At its end."""
    return _blocks(request.input_tokens + request.predicted_output_tokens + 1, block_size)


def _taken(request: RequestView, block_size: int) -> int:
    """By a running request, for the token under way too."""
    return _blocks(request.input_tokens + request.emitted_tokens, block_size)
