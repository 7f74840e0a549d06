"""A request inside the engine: its place, its progress, and the marks its record is made of."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from sim.memory import Run, beam_tail_blocks, copied_blocks
from sim.record import CohortId
from sim.types import Request, Route, to_ps


class Membership(Protocol):
    """A decoding job's cohort, as far as the job is concerned."""

    it: int
    """Iterations that the cohort has completed: the job's progress is read from it."""

    def leave(self, job: Job) -> None: ...


class Job:
    """Policies see the public reads of ``RequestView``; ``_output_tokens`` is for the engine alone.

    A job always catches up: it has ``computed_tokens`` of the ``target_tokens`` whose KV it needs before its
    next token can be emitted. The target is the prompt, and grows by the generated tokens on recompute.
    """

    __slots__ = (
        "_output_tokens",
        "arrival_ps",
        "arrival_s",
        "base",
        "blocks",
        "bytes_moved",
        "cached_tokens",
        "cohort",
        "computed_tokens",
        "copied_blocks",
        "epoch",
        "first_scheduled_ps",
        "first_token_ps",
        "generated_tokens",
        "grows",
        "hashes",
        "id",
        "in_flight",
        "input_tokens",
        "join_it",
        "klass",
        "kv_ready_ps",
        "places",
        "predicted_output_tokens",
        "preemptions",
        "prefill_end_ps",
        "priority",
        "published",
        "queued_ps",
        "request",
        "route",
        "run",
        "samples",
        "seat",
        "session",
        "shared",
        "target_tokens",
        "tokens",
        "transfer_ps",
    )

    def __init__(self, request: Request, predicted_output_tokens: int) -> None:
        self.request = request
        self.id = request.id
        self.arrival_s = request.arrival_s
        self.arrival_ps = to_ps(request.arrival_s)
        self.input_tokens = request.input_tokens
        self._output_tokens = request.output_tokens
        self.predicted_output_tokens = predicted_output_tokens
        self.priority = request.priority
        self.klass = request.klass
        self.samples = request.samples
        self.session = request.session
        self.hashes: tuple[Hashable, ...] = ()
        self.target_tokens = request.input_tokens
        self.computed_tokens = 0
        self.generated_tokens = 0  # as of the last time the job left a cohort
        self.route: Route | None = None
        self.epoch = 0  # grows when a fault takes the job's place away: late mail recognises itself by it
        self.in_flight = False
        self.blocks = 0  # blank KV blocks held; `shared` are held on top
        self.copied_blocks = 0  # and those of a group's other samples
        self.shared: list[Hashable] = []
        self.queued_ps: int | None = None
        self.published = 0  # hashes[:published] have been looked at for publishing
        self.run: Run | None = None  # whole blocks beyond those with hashes, left behind when it was preempted
        self.grows = 0  # blocks it takes when it begins a new one, while in a cohort
        self.cohort: Membership | None = None
        self.base = 0
        self.join_it = 0
        self.seat = 0
        self.tokens: list[int | tuple[CohortId, int, int]] = []  # emission time, or (cohort, from it, to it)
        self.first_scheduled_ps: int | None = None
        self.first_token_ps: int | None = None
        self.prefill_end_ps: int | None = None
        self.kv_ready_ps = 0
        self.transfer_ps = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self.bytes_moved = 0
        self.places = ("", "")

    def __repr__(self) -> str:
        return f"request {self.id}"

    @property
    def remaining_tokens(self) -> int:
        return self.target_tokens - self.computed_tokens

    @property
    def decodes(self) -> bool:
        """All KV for its next token is there, and it has emitted one at least."""
        return not self.remaining_tokens and self.emitted_tokens > 0

    @property
    def emitted_tokens(self) -> int:
        return self.generated_tokens + (0 if self.cohort is None else self.cohort.it - self.join_it)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV is stored now."""
        return self.computed_tokens if self.cohort is None else self.base + self.cohort.it

    @property
    def held_blocks(self) -> int:
        return self.blocks + len(self.shared)

    def moves_on(self, leg: tuple[str, ...]) -> bool:
        """Prefilled over these stages, it decodes over others."""
        return self.route is not None and self.route.decode != leg

    def copies(self, tokens: int, block_size: int) -> int:
        """Blocks of the other samples when each has so many tokens."""
        if self.samples == 1:
            return 0
        tail_blocks = beam_tail_blocks(self.samples, block_size) if self.request.beam_search else None
        return copied_blocks(tokens, self.input_tokens, self.samples, block_size, tail_blocks)

    def blocks_for(self, tokens: int, block_size: int) -> int:
        """Blocks that hold so many tokens of the job, of each sample if it is a group."""
        blocks = -(-tokens // block_size)
        return blocks + self.copies(tokens, block_size) if self.samples > 1 else blocks

    def growth(self, tokens: int, block_size: int) -> tuple[int, int | None]:
        """Blocks it takes at its next block boundary after so many tokens, and the tokens at which that changes."""
        spare = self.held_blocks * block_size - tokens
        if spare >= block_size:  # they were reserved
            return 0, tokens + spare
        if self.samples == 1:
            return 1, None
        start = -(-tokens // block_size) * block_size
        if not self.request.beam_search:
            return self.samples, None
        full = (self.input_tokens // block_size + beam_tail_blocks(self.samples, block_size)) * block_size
        return (1, None) if start >= full else (self.samples, full)

    @property
    def tokens_left(self) -> int:
        """Output tokens still to be emitted, for a job outside any cohort."""
        return self._output_tokens - self.generated_tokens

    def start_over(self, *, forget: bool = False) -> None:
        """Forget all KV; what was generated is recomputed with the prompt, or forgotten too.

        A group of samples cannot be recomputed in one pass: it begins anew.
        """
        if self.samples > 1 or forget:
            self.generated_tokens = 0
            self.tokens.clear()
            self.first_token_ps = self.prefill_end_ps = None
        if forget:
            self.run = None  # it may be longer than what is computed again
        self.computed_tokens = 0
        self.target_tokens = self.input_tokens + self.generated_tokens
        self.published = 0
        self.cohort = None
        self.in_flight = False


def block_hashes(request: Request, block_size: int) -> tuple[Hashable, ...]:
    """The content hashes of prompt and answer per ledger block, from hashes per ``prefix_block_tokens``.

    A larger trace block becomes several ledger blocks, several smaller ones are joined; sizes that do not
    divide each other use the tokens both cover, by whole ledger blocks of whole trace blocks.
    """
    size = request.prefix_block_tokens
    if not request.prefix or not size:
        return ()
    most = (request.input_tokens + request.output_tokens) // block_size
    if size == block_size:
        return request.prefix[:most]
    if size % block_size == 0:
        parts = size // block_size
        return tuple((key, part) for key in request.prefix for part in range(parts))[:most]
    count = min(most, len(request.prefix) * size // block_size)
    return tuple(request.prefix[: -(-(block + 1) * block_size // size)] for block in range(count))
