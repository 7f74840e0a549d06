"""A node: a replica that holds a part of the layers, and the draft of its next batch.

Requests pass from node to node (``paths.py``). A node batches what has come, whole prompts and single tokens, and
keeps the KV of its own layers. Its ledger counts blocks of one layer each, since of a node's layers a request may
need the last ones only (Helix, ASPLOS 2025, partial inference).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from sim.engine.replica.job import Job
from sim.engine.replica.state import ReplicaState
from sim.policy import Limits, RequestView
from sim.types import PolicyError, Role, Work, to_s


class Hop(NamedTuple):
    """A node, and which of its layers a request needs."""

    node: Node
    first_layer: int
    end_layer: int

    @property
    def layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(slots=True, eq=False)
class Journey:
    """A request's way over its hops, again and again: first its prompt, then token after token."""

    job: Job
    hops: tuple[Hop, ...]
    blocks: list[int]
    """KV blocks (of all the hop's layers) held at each hop."""
    at: int = 0
    """The hop it is at, or on its way to."""

    @property
    def hop(self) -> Hop:
        return self.hops[self.at]

    @property
    def tokens(self) -> int:
        """That pass the hop now: the prompt (or what is recomputed), or one."""
        return self.job.remaining_tokens or 1

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV the hop holds after this pass."""
        return self.job.target_tokens if self.job.remaining_tokens else self.job.computed_tokens + 1

    def missing(self, block_size: int) -> int:
        """Blocks of one layer that this pass still has to take here."""
        return max(0, -(-self.kv_tokens // block_size) - self.blocks[self.at]) * self.hop.layers


class Node(ReplicaState):
    """Fits ``ReplicaView``, in blocks of all its layers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prompts: OrderedDict[Job, Journey] = OrderedDict()
        self.tokens: OrderedDict[Job, Journey] = OrderedDict()
        self.held: OrderedDict[Job, Journey] = OrderedDict()
        """Everyone with KV here, wherever its next token is; first admitted first."""
        self.passing: list[Journey] = []
        self.link_free_ps: dict[str, int] = {}
        """When the link to another node has sent what it was given."""

    @property
    def num_layers(self) -> int:
        return self.spec.stages[0].num_layers

    @property
    def num_waiting(self) -> int:
        return len(self.prompts)

    @property
    def num_running(self) -> int:
        return len(self.held)

    @property
    def num_prefilling(self) -> int:
        return sum(1 for job in self.jobs() if job.remaining_tokens)

    @property
    def num_decoding(self) -> int:
        return sum(1 for job in self.jobs() if not job.remaining_tokens)

    @property
    def pending_prefill_tokens(self) -> int:
        return sum(journey.tokens for journey in self.prompts.values())

    @property
    def free_blocks(self) -> int:
        return self.ledger.free // self.num_layers

    @property
    def total_blocks(self) -> int:
        return self.ledger.total // self.num_layers

    def jobs(self) -> Iterator[Job]:
        return iter(dict.fromkeys((*self.held, *self.prompts)))

    def __repr__(self) -> str:
        return (
            f"{self.name}: prompts {len(self.prompts)}, tokens {len(self.tokens)}, with KV here {len(self.held)}, "
            f"blocks {self.ledger.used / self.num_layers:.1f}/{self.total_blocks}"
        )


class NodeDraft:
    """Fits ``sim.policy.Batch`` for what a node can do: whole prompts, single tokens, preemption by recompute."""

    arrived: Sequence[Job] = ()
    prefilling: Sequence[Job] = ()
    swapped: Sequence[Job] = ()
    paused: Sequence[Job] = ()

    def __init__(
        self, node: Node, now_ps: int, price: Callable[[Work], int], start_over: Callable[[Journey, Node], None]
    ) -> None:
        self.limits: Limits = node.limits
        self.journeys: list[Journey] = []
        self.preempted = 0
        self._node = node
        self._now_ps = now_ps
        self._price = price
        self._start_over = start_over
        self._decoded = False

    # ------------------------------------------------------------ reads

    def ahead(self) -> Sequence[tuple[RequestView, int]]:
        return ()

    @property
    def now_s(self) -> float:
        return to_s(self._now_ps)

    @property
    def role(self) -> Role:
        return self._node.role

    @property
    def waiting(self) -> Iterator[Job]:
        return iter(list(self._node.prompts))

    @property
    def decoding(self) -> Sequence[Job]:
        return list(self._node.tokens)

    @property
    def num_running(self) -> int:
        return len(self._node.held)

    @property
    def num_decodes(self) -> int:
        return len(self._node.tokens)

    @property
    def free_blocks(self) -> int:
        return self._node.free_blocks

    @property
    def total_blocks(self) -> int:
        return self._node.total_blocks

    def seconds(self, work: Work) -> float:
        return to_s(self._price(work))

    def tokens_wanted(self, request: RequestView) -> int:
        return request.remaining_tokens

    @property
    def blocks_to_grow(self) -> int:
        """In blocks of all layers, rounded up, so that growth within ``free_blocks`` always succeeds."""
        return 0 if self._decoded else -(-self._growth(self._node.tokens.values()) // self._node.num_layers)

    def _growth(self, journeys: Iterable[Journey]) -> int:
        return sum(journey.missing(self._node.block_size) for journey in journeys)

    def last_running(self) -> Job | None:
        return next(reversed(self._node.held), None)

    # ------------------------------------------------------------ actions

    def admit(
        self, request: RequestView, tokens: int, *, reserve_tokens: int | None = None, keep_free_blocks: int = 0
    ) -> bool:
        job, node = cast("Job", request), self._node
        if job not in node.prompts:
            raise self._illegal(f"admits {job}, which does not wait here")
        if tokens != job.remaining_tokens or reserve_tokens is not None:
            raise self._illegal(
                f"admits {job} with {tokens} of {job.remaining_tokens} tokens; nodes take whole prompts, reserve none"
            )
        journey = node.prompts[job]
        need = journey.missing(node.block_size)
        if node.ledger.free - need < keep_free_blocks * node.num_layers:
            return False
        del node.prompts[job]
        node.held[job] = journey
        self._take(journey, need)
        return True

    def decode(self, leave_out: Iterable[RequestView] = ()) -> None:
        left_out = set(cast("list[Job]", list(leave_out)))
        going = [journey for journey in self._node.tokens.values() if journey.job not in left_out]
        need = self._growth(going)
        if self._decoded or need > self._node.ledger.free:
            what = "twice for one batch" if self._decoded else f"where {need} of {self._node.ledger.free} blocks lack"
            raise self._illegal(f"calls decode {what}")
        self._decoded = True
        for journey in going:
            del self._node.tokens[journey.job]
            self._take(journey, journey.missing(self._node.block_size))

    def preempt(self, request: RequestView, how: Literal["recompute", "swap"] = "recompute") -> None:
        job = cast("Job", request)
        if job not in self._node.held or how != "recompute":
            raise self._illegal(f"preempts {job} by {how}; only who has KV here can start over, and nobody swaps")
        journey = self._node.held[job]
        self.journeys = [other for other in self.journeys if other is not journey]
        self.preempted += 1
        job.preemptions += 1
        self._start_over(journey, self._node)

    def repeat_at_most(self, iterations: int) -> None:
        """Every batch of a node is one iteration."""

    def prefill(self, request: RequestView, tokens: int) -> bool:
        raise self._illegal(f"prefills a part of {request}; nodes take whole prompts")

    def welcome(self, request: RequestView) -> None:
        raise self._illegal(f"welcomes {request}; no KV comes to a node")

    def swap_in(self, request: RequestView, *, keep_free_blocks: int = 0) -> bool:
        raise self._illegal(f"swaps in {request}; nodes do not swap")

    # ------------------------------------------------------------ inside

    def _take(self, journey: Journey, layer_blocks: int) -> None:
        self._node.ledger.take(layer_blocks)
        journey.blocks[journey.at] += layer_blocks // journey.hop.layers
        self.journeys.append(journey)

    def _illegal(self, what: str) -> PolicyError:
        return PolicyError(f"{type(self._node.batcher).__name__} on node {self._node.name}: {what}")
