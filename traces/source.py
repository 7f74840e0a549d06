"""Sources: what feeds requests to the simulator. An open loop, a closed loop of users, and multi-turn sessions.

All fit ``sim.policy.Source``. In the last two a completion causes the next request. What comes next depends on the
completed request alone, never on the order of completions, so a source has no state and can be used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Literal, NamedTuple, get_args

import numpy as np

from sim.policy import Source
from sim.types import ConfigError, Request
from traces.arrivals import positive
from traces.table import nearest
from traces.transform import renumber

Inputs = Literal["new", "whole"]
BLOCKS_PER_DOCUMENT = 2**32


@dataclass(frozen=True, slots=True)
class TraceSource:
    """An open loop: requests arrive when the trace says, whatever becomes of the earlier ones.

    The stream is read as the simulation asks for it.
    """

    requests: Iterable[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        """The stream at the start; a completion causes nothing new."""
        del now_s
        return self.requests if finished is None else ()


class Turn(NamedTuple):
    """A request that waits for its turn; ``document`` names the text that its prompt begins, if one is known."""

    request: Request
    think_s: float = 0.0
    document: int | None = None


class Chains:
    """Requests of which each follows another's end, after a time to think. ``first`` start by themselves."""

    __slots__ = ("block_tokens", "first", "following")

    def __init__(self, first: Sequence[Turn], following: dict[int, Turn], block_tokens: int = 16) -> None:
        self.first, self.following, self.block_tokens = first, following, block_tokens

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        """At the start, the first of every chain in order of arrival; then the one after ``finished``, if any.

        A request that was rejected or failed has ended too: its user goes on.
        """
        if finished is None:
            return (self._issued(turn, turn.request.arrival_s) for turn in self.first)
        turn = self.following.get(finished.id)
        return () if turn is None else (self._issued(turn, now_s + turn.think_s),)

    def _issued(self, turn: Turn, arrival_s: float) -> Request:
        request = replace(turn.request, arrival_s=arrival_s)
        whole_blocks = (request.input_tokens + request.output_tokens) // self.block_tokens
        if turn.document is None or not whole_blocks:
            return request
        start = -(turn.document + 1) * BLOCKS_PER_DOCUMENT  # negative: recorded hashes are not
        blocks = tuple(range(start, start + whole_blocks))
        return replace(request, prefix=blocks, prefix_block_tokens=self.block_tokens)


class ClosedLoop(Chains):
    """So many users, each of whom thinks, sends a request, waits until it has ended, and thinks again.

    The requests of a stream are dealt to the users in turn, whatever their arrival times; a user stops
    when there are none left. ``think_s`` is the mean of gamma-distributed times of coefficient of variation
    ``think_cv`` (1: exponential, 0: always ``think_s``). Holds the stream in memory.
    """

    __slots__ = ()

    def __init__(
        self, requests: Iterable[Request], *, users: int, think_s: float = 0.0, think_cv: float = 1.0, seed: int = 0
    ) -> None:
        if users < 1:
            raise ConfigError(f"users is {users}; expected a whole number >= 1")
        dealt = list(renumber(requests))
        thinks = _think_times(len(dealt), think_s, think_cv, seed)
        turns = [Turn(request, think) for request, think in zip(dealt, thinks, strict=True)]
        first = [turn._replace(request=replace(turn.request, arrival_s=turn.think_s)) for turn in turns[:users]]
        super().__init__(
            sorted(first, key=lambda turn: turn.think_s), {turn.request.id - users: turn for turn in turns[users:]}
        )


class Sessions(Chains):
    """Conversations: the next turn follows the end of the last one after a time to think; its prompt repeats it.

    Requests with the same ``session`` are the turns of one conversation, in order. The first arrives as the stream
    says, later ones ``think_s`` (mean; see ``ClosedLoop``) after the turn before has ended, or as long as they say
    themselves. ``inputs``: ``new`` if a turn's input tokens are its new text, to which the earlier prompts and answers
    are added; ``whole`` if they are the whole prompt. Prompts get the hashes of their full blocks of ``block_tokens``,
    equal within a conversation as far as the prompt repeats, so that a prefix cache hits; recorded hashes (of whole
    prompts) are kept. A whole prompt too short for the turn before it shares nothing with it.
    Requests without session come as they are. Holds the stream in memory.
    """

    __slots__ = ()

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        think_s: float = 0.0,
        think_cv: float = 1.0,
        inputs: Inputs = "new",
        block_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        if inputs not in get_args(Inputs):
            raise ConfigError(f"inputs is {inputs!r}; {nearest(inputs, get_args(Inputs))}")
        if block_tokens < 1:
            raise ConfigError(f"block_tokens is {block_tokens}; expected a whole number >= 1")
        turns = list(renumber(requests))
        thinks = _think_times(len(turns), think_s, think_cv, seed)
        first: list[Turn] = []
        following: dict[int, Turn] = {}
        last: dict[str, Turn] = {}
        for request, think in zip(turns, thinks, strict=True):
            before = last.get(request.session) if request.session is not None else None
            think = think if request.think_s is None else request.think_s
            turn = _after(before, request, think, inputs)
            if before is None:
                first.append(turn)
            else:
                following[before.request.id] = turn
            if request.session is not None:
                last[request.session] = turn
        super().__init__(first, following, block_tokens)


def unroll(source: Source, token_s: float) -> Iterator[Request]:
    """An open trace of what a closed loop or sessions ask, were every answer to take ``token_s`` per output token.

    In order of arrival, ids are running numbers. It shows a workload without a simulation; a run's own log has the
    arrivals that a simulated system would have caused. Holds the requests in memory.
    """
    positive("token_s", token_s)
    due = [(request.arrival_s, request.id, request) for request in source.next(0.0, None)]
    heapify(due)
    for number in count():
        if not due:
            return
        request = heappop(due)[2]
        yield replace(request, id=number)
        for later in source.next(request.arrival_s + request.output_tokens * token_s, request):
            heappush(due, (later.arrival_s, later.id, later))


def _after(before: Turn | None, request: Request, think_s: float, inputs: Inputs) -> Turn:
    """A turn of a conversation, given the one before it. Its own id names a new document."""
    if request.session is None:
        return Turn(request)
    if request.prefix:
        if inputs == "new":
            raise ConfigError(
                f"request {request.id} has prefix hashes, so its input is a whole prompt; set inputs='whole'"
            )
        return Turn(request, think_s)
    if before is None:
        return Turn(request, think_s, request.id)
    context_tokens = before.request.input_tokens + before.request.output_tokens
    if inputs == "new":
        request = replace(request, input_tokens=context_tokens + request.input_tokens)
    repeats = request.input_tokens >= context_tokens and before.document is not None
    return Turn(request, think_s, before.document if repeats else request.id)


def _think_times(number: int, think_s: float, think_cv: float, seed: int) -> Iterator[float]:
    if think_s:
        positive("think_s", think_s)
    if think_cv:
        positive("think_cv", think_cv)
    if not think_s or not think_cv:
        return iter([think_s] * number)
    shape = think_cv**-2
    drawn: list[float] = (np.random.default_rng(seed).standard_gamma(shape, number) * (think_s / shape)).tolist()
    return iter(drawn)
