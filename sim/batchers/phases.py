"""ExeGPT's two runtimes: phases of prompts and decodes in turn on all GPUs, or pools that hand KV over as it comes."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from math import ceil

from sim.batchers.common import make_room, refuse_groups, refuse_if_full, welcome
from sim.policy import Batch, Limits, ReplicaView, RequestView
from sim.types import ConfigError


class Encoding:
    """How many prompts are taken at once: about ``encode_batch`` of ``prompt_tokens`` each (ExeGPT, section 6).

    First come first served while their tokens stay within ``1 + band`` times that, at least one; more than
    ``encode_batch`` only as long as they are below ``1 - band`` times it.
    """

    def __init__(self, encode_batch: int, prompt_tokens: float, band: float) -> None:
        if encode_batch < 1:
            raise ConfigError(f"system.encode_batch is {encode_batch}; it must be a whole number >= 1")
        if not 0 <= band < 1:
            raise ConfigError(f"system.band is {band}; it must be in [0, 1)")
        self.encode_batch = encode_batch
        self.prompt_tokens = prompt_tokens
        self.band = band

    def quota(self, batch: Batch, wanted: int) -> int:
        """Of the requests that wait, so many where ``wanted`` of mean length are."""
        target = wanted * self.prompt_tokens
        free = batch.limits.max_num_seqs - batch.num_running
        number = tokens = 0
        for request in batch.waiting:
            more = batch.tokens_wanted(request)
            enough = number >= wanted and tokens >= (1 - self.band) * target
            if number >= free or (number and (enough or tokens + more > (1 + self.band) * target)):
                break
            number += 1
            tokens += more
        return number

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, 0, limits)


def admit(batch: Batch, most: int, keep: Callable[[], int]) -> int:
    """Whole prompts at the head of the queue within ``max_num_batched_tokens`` (a longer one alone); how many.

    As many blocks stay free as ``keep`` says before each; none where all are free.
    """
    limit, used, number = batch.limits.max_num_batched_tokens, 0, 0
    for request in batch.waiting:
        tokens = batch.tokens_wanted(request)
        if number >= most or (number and limit is not None and used + tokens > limit):
            break
        if not batch.admit(request, tokens, keep_free_blocks=keep() if batch.free_blocks < batch.total_blocks else 0):
            break
        number += 1
        used += tokens
    return number


class PromptPhases(Encoding):
    """RRA: a phase of prompts, then exactly ``decode_iterations`` of all decodes; nobody is admitted in between.

    Who is done leaves at once. With ``stages`` of a pipeline prompts and decodes go in as many micro-batches, each of
    which turns to its next prompts when its decodes are through. Whenever the batch would be off ``decode_batch`` by
    more than ``band``, the next prompts are so many more or fewer as mend it over the phases that a request stays.
    Admission leaves room for what everybody takes in a phase; where predicted room is short all the same, the latest is
    recomputed. Without anybody in the queue a phase has no prompts.
    """

    def __init__(
        self, encode_batch: int, decode_iterations: int, decode_batch: float, prompt_tokens: float,
        stages: int = 1, band: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(encode_batch, prompt_tokens, band)
        if decode_iterations < 1:
            raise ConfigError(f"system.decode_iterations is {decode_iterations}; it must be a whole number >= 1")
        self.decode_iterations = decode_iterations
        self.decode_batch = max(decode_batch, encode_batch)
        self.stages = stages
        self._left = self._share = 0
        self._began: dict[int, int] = {}
        """Tokens that the requests seen in this phase had when it began for them."""

    def fill(self, batch: Batch) -> None:
        if not self._left and self._is_over(batch):
            self._begin(batch)
        if self._left and self._encode(batch):
            return
        self._decode(batch)

    def _is_over(self, batch: Batch) -> bool:
        if not batch.num_running:
            return True
        return batch.num_decodes > 0 and not any(self._owed(request) for request in batch.decoding)

    def _owed(self, request: RequestView) -> int:
        """Iterations that a decoding request has before it in this phase."""
        began = self._began.setdefault(request.id, request.emitted_tokens)
        return max(0, began + self.decode_iterations - request.emitted_tokens)

    def _begin(self, batch: Batch) -> None:
        self._began.clear()
        self._left = self.quota(batch, self.wanted(batch.num_running))
        self._share = ceil(self._left / self.stages)

    def wanted(self, running: int) -> int:
        """Prompts of the next phase by how many decode already: a gap is spread over the phases of a request."""
        off = self.decode_batch - (running + self.encode_batch)
        if abs(off) <= self.band * self.decode_batch:
            return self.encode_batch
        phases = max(1.0, self.decode_batch / self.encode_batch)
        return max(1, self.encode_batch + round(off / phases))

    def _encode(self, batch: Batch) -> int:
        growth = ceil(self.decode_iterations / batch.limits.block_size)
        number = admit(batch, min(self._left, self._share), lambda: (batch.num_running + 1) * growth)
        self._left = self._left - number if number else 0
        return number

    def _decode(self, batch: Batch) -> None:
        make_room(batch)
        decoding = batch.decoding
        owed = [self._owed(request) for request in decoding]
        size = ceil(batch.num_running / self.stages)
        going = sorted((at for at, left in enumerate(owed) if left), key=lambda at: -owed[at])[:size]
        if going:
            leave_out(batch, decoding, set(going))
            batch.repeat_at_most(min(owed[at] for at in going))


class HandedOver(Encoding):
    """WAA: a prefill pool computes about ``encode_batch`` prompts at once, a decode pool all whose KV has come.

    Neither waits for the other: KV joins the decodes at their next iteration. With several stages the decodes go in
    ``micro_batches``. The decode pool lets in KV of ``most_decodes`` sequences; with a batch in each of its ``stages``
    and another whose KV has not left, the prefill pool computes no more. Decodes that run out of blocks are recomputed
    where they are, the latest first.
    """

    def __init__(
        self, encode_batch: int, micro_batches: int, most_decodes: int, prompt_tokens: float,
        stages: int = 1, band: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(encode_batch, prompt_tokens, band)
        if micro_batches < 1:
            raise ConfigError(f"system.micro_batches is {micro_batches}; it must be a whole number >= 1")
        self.micro_batches = micro_batches
        self.most_decodes = max(1, most_decodes)
        self.stages = stages

    def fill(self, batch: Batch) -> None:
        if admit(batch, self.quota(batch, self.encode_batch), lambda: self._keep(batch)):
            return
        welcome(batch)
        make_room(batch)
        if not batch.num_running:  # who came holds the blocks that the others lack
            welcome(batch)
            make_room(batch)
        if not batch.num_decodes:
            return
        decoding = batch.decoding
        size = ceil(batch.num_running / self.micro_batches)
        paused = {request.id for request in batch.paused}
        going = sorted(range(len(decoding)), key=lambda at: decoding[at].id not in paused)[:size]
        leave_out(batch, decoding, set(going))

    def _keep(self, batch: Batch) -> int:
        """Blocks that prompts leave free: for decodes, or so that no more KV waits to leave."""
        if batch.role != "prefill":
            return batch.blocks_to_grow
        prompt_blocks = ceil(self.prompt_tokens / batch.limits.block_size)
        return max(
            0, batch.total_blocks - ceil((self.stages + 1) * (1 + self.band) * self.encode_batch * prompt_blocks)
        )

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """Nobody overtakes those who are recomputed here."""
        return len(replica.running) + len(replica.landing) < self.most_decodes and not replica.num_prefilling


def leave_out(batch: Batch, decoding: Sequence[RequestView], going: Container[int]) -> None:
    """Decode those at these places; the others pause."""
    batch.decode([request for at, request in enumerate(decoding) if at not in going])
