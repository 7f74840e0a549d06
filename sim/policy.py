"""What a scheduler may see and do: the five policy protocols, and the ``System`` that composes them.

Policies are plain classes that fit a protocol; there is no base class to inherit. They see the running
system through the read-only views below, propose, and never import the engine. An illegal proposal
raises ``PolicyError``. No view shows a request's true output length: a policy that needs one reads
``predicted_output_tokens``, filled by a named predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from sim.cluster import Cluster, Gpu
from sim.cost import StepCost
from sim.model import ModelSpec
from sim.types import (
    Change,
    Chunk,
    Later,
    Move,
    Plan,
    Reject,
    Request,
    Role,
    Route,
    Signal,
    Slo,
    Work,
)

# ---------------------------------------------------------------- the planner's input


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The serving engine's settings, under vLLM's names. ``None``: the batcher's own default."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    prefix_caching: bool = False
    gpu_memory_utilization: float = 0.9
    num_kv_blocks: int | None = None
    max_model_len: int | None = None
    release: tuple[int, ...] | None = None
    """Of vLLM, whose own memory is set aside; None: the one that the tables of ``sim.memory`` call the latest."""
    async_scheduling: bool = False
    """Decide an iteration while the one before it runs, as vLLM does by default from 0.14 on. What comes or ends
    meanwhile counts one iteration later. Not with pipeline stages, which have batches in flight as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a planner may know of the traffic: its rate and a sample of lengths."""

    rate_per_s: float
    lengths: tuple[tuple[int, int], ...]
    """(input tokens, output tokens) of sampled requests."""
    classes: Mapping[str, float] = field(default_factory=dict)
    """Shares of the requests by class (``Request.klass``), where they have one."""

    @property
    def mean_input_tokens(self) -> float:
        return sum(pair[0] for pair in self.lengths) / len(self.lengths)

    @property
    def mean_output_tokens(self) -> float:
        return sum(pair[1] for pair in self.lengths) / len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything that is given before a system decides: hardware, model, costs, traffic, targets."""

    cluster: Cluster
    model: ModelSpec
    cost: StepCost
    workload: Workload
    slo: Slo = field(default_factory=Slo)
    limits: Limits = field(default_factory=Limits)
    seed: int = 0


# ---------------------------------------------------------------- read-only views


class RequestView(Protocol):
    """A request as policies see it."""

    @property
    def id(self) -> int: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def predicted_output_tokens(self) -> int: ...
    @property
    def emitted_tokens(self) -> int:
        """Output tokens so far."""

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to be prefilled (prompt, or prompt and generated tokens after a recompute)."""

    @property
    def priority(self) -> int: ...
    @property
    def klass(self) -> str | None: ...
    @property
    def session(self) -> str | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    def blocks_for(self, tokens: int, block_size: int) -> int:
        """KV blocks when so many tokens are stored, of each sample if there are several."""


class ReplicaView(Protocol):
    """A replica's state as of now, before anything that happens at this very instant on the replica."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def leg(self) -> tuple[str, ...]: ...
    @property
    def gpus(self) -> tuple[str, ...]: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_prefilling(self) -> int:
        """Requests here whose prompt is not finished, waiting ones included."""

    @property
    def num_decoding(self) -> int:
        """Requests here whose prompt is finished, those whose KV is still on its way included."""

    @property
    def num_swapped(self) -> int:
        """Requests whose KV lies in host memory."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def num_departing(self) -> int:
        """Requests prefilled here whose KV has not left yet."""

    @property
    def pending_prefill_tokens(self) -> int: ...
    @property
    def running(self) -> Collection[RequestView]:
        """Admitted requests, in order of admission."""

    @property
    def landing(self) -> Sequence[RequestView]:
        """Requests whose KV is here or on its way, its room taken, and who do not decode yet."""

    def matched_tokens(self, request: RequestView, max_age_s: float = 0.0) -> int:
        """Tokens at the beginning of its prompt whose KV is in this replica's prefix cache, by their hashes.

        ``max_age_s``: by an index that may be so old, and is made anew when asked and older; 0: as of now. At least
        one token of a prompt is always computed.
        """

    @property
    def free_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...


class View(Protocol):
    """The whole system, as routers, transfers and reschedulers see it."""

    @property
    def now_s(self) -> float: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def up(self) -> Sequence[ReplicaView]:
        """Replicas that are up and accept requests, in the plan's order."""

    @property
    def replicas(self) -> Sequence[ReplicaView]:
        """Those of ``up`` that can hold the request which is being routed, or dispatched (all, if none can)."""

    def replica(self, name: str) -> ReplicaView: ...
    def with_role(self, *roles: Role) -> Sequence[ReplicaView]:
        """Those of ``replicas`` that carry one of these labels."""

    def seconds_to_move(self, source: str, target: str, kv_bytes: float) -> float:
        """Uncontended seconds to carry KV from one replica to another."""

    def observed(self, window_s: float) -> Workload | None:
        """The traffic of the last ``window_s``: rate of arrivals, lengths of what completed; None if nothing did.

        Kept for reschedulers that tick; who asks for different windows may not ask for a longer one later."""

    @property
    def rng(self) -> np.random.Generator:
        """The policy's own named random stream."""


class Batch(Protocol):
    """The next iteration of one replica, being filled by its batcher.

    Reads describe the replica after what the batcher has already done to this batch. Every action is
    checked: one that is impossible returns ``False`` (not enough blocks) or raises ``PolicyError`` (it
    makes no sense). With PP, requests inside another micro-batch in flight cannot be seen or touched.
    """

    limits: Limits

    @property
    def now_s(self) -> float: ...
    @property
    def role(self) -> Role: ...
    @property
    def waiting(self) -> Iterator[RequestView]:
        """Requests with a prompt to compute, in queue order (recomputed ones stand in front).

        Admitting the request just yielded while iterating is allowed."""

    @property
    def arrived(self) -> Sequence[RequestView]:
        """Requests whose KV has come from another replica and who do not run yet, first come first."""

    @property
    def prefilling(self) -> Sequence[RequestView]:
        """Admitted requests whose prompt is unfinished, in order of admission."""

    def ahead(self) -> Sequence[tuple[RequestView, int]]:
        """Those of ``prefilling`` that were admitted before a decoding one, with how many decode that came before."""

    @property
    def swapped(self) -> Sequence[RequestView]:
        """Requests whose KV lies in host memory, first swapped out first."""

    @property
    def paused(self) -> Sequence[RequestView]:
        """Decoding requests that were left out of the last batch, their KV kept."""

    @property
    def decoding(self) -> Sequence[RequestView]:
        """Decoding requests in order of admission (costs time linear in their number)."""

    @property
    def num_running(self) -> int:
        """Sequences of admitted requests: a group of samples counts as that many."""

    @property
    def num_decodes(self) -> int:
        """Decoding sequences that could take part in this iteration."""

    @property
    def free_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def preempted(self) -> int:
        """How many requests this batch has preempted."""

    def seconds(self, work: Work) -> float:
        """How long an iteration of that shape takes here, by the latency model: through all stages and hops."""

    def tokens_wanted(self, request: RequestView) -> int:
        """Tokens a waiting request would have to compute if admitted now (cached prefix excluded)."""

    @property
    def blocks_to_grow(self) -> int:
        """Blocks that the running decodes need to append one token each (0 once they are in the batch)."""

    def last_running(self) -> RequestView | None:
        """The most recently admitted request that could be preempted."""

    def preempt(self, request: RequestView, how: Literal["recompute", "swap"] = "recompute") -> None:
        """Free its KV: recompute puts it in front of the queue, swap moves its KV to the host."""

    def admit(
        self,
        request: RequestView,
        tokens: int,
        *,
        reserve_tokens: int | None = None,
        keep_free_blocks: int = 0,
    ) -> bool:
        """Let a waiting request run, computing ``tokens`` of its prompt now.

        Blocks are taken for ``reserve_tokens`` (default: what is computed after this step);
        ``False``, and nothing done, when that would leave fewer than ``keep_free_blocks`` free.
        """

    def welcome(self, request: RequestView) -> None:
        """Let an arrived request decode; before ``decode`` is called."""

    def prefill(self, request: RequestView, tokens: int) -> bool:
        """Compute the next ``tokens`` of an admitted prompt; ``False`` if blocks are missing."""

    def swap_in(self, request: RequestView, *, keep_free_blocks: int = 0) -> bool:
        """Bring a swapped request back."""

    def decode(self, leave_out: Iterable[RequestView] = ()) -> None:
        """Let the running decodes take part, one token each; those left out pause with their KV kept."""

    def repeat_at_most(self, iterations: int) -> None:
        """The same decision holds for at most so many iterations even if nothing comes from outside.

        Without a call the engine repeats a batch for as long as nothing arrives, completes or runs
        out of blocks and every chunk stays full; a batcher whose choice depends on more than that must
        say so here.
        """


# ---------------------------------------------------------------- the policies


class Planner(Protocol):
    """Lays the model out over the cluster."""

    def plan(self, problem: Problem) -> Plan: ...


class Router(Protocol):
    """Chooses a request's way once, on arrival (and again if a fault takes its way from it)."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        """``Reject`` while replicas are loading: asked again when one is up."""

    def finished(self, request: RequestView) -> None:
        """A request this router placed has left the system, or lost its place to a fault."""


class Dispatcher(Router, Protocol):
    """A router that leaves open where requests decode (``Route.decode`` None) until their prompts are computed."""

    def dispatch(self, request: RequestView, view: View) -> tuple[str, ...] | float | Reject:
        """The stages that decode it (those it is on: it stays), or after how many seconds (> 0) to ask again."""


class Batcher(Protocol):
    """Decides what a replica's next iteration computes. One instance per replica."""

    def fill(self, batch: Batch) -> None: ...

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        """Why a request that ends with ``total_tokens`` in the KV cache can never be served here, or None.

        The engine asks once, on arrival; ``total_tokens`` must not be kept or used for scheduling.
        """


class Gatekeeper(Batcher, Protocol):
    """A batcher that does not let in all KV that there is room for."""

    def lets_in(self, request: RequestView, blocks: int, replica: ReplicaView) -> bool:
        """Whether KV of so many (free) blocks may come now. Asked for the first in line, again whenever something was
        freed here; not asked by a replica that has nothing else to do."""


class Transfer(Protocol):
    """How KV goes from the prefill to the decode replica."""

    pull: bool
    """True: the decode side asks for the KV (one more link latency); False: the prefill side pushes."""

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        """Parts in sending order; their shares add up to 1 (less if compressed)."""

    def overhead_s(self, move: Move) -> float:
        """Fixed seconds after the last byte until the KV can be used (synchronisation, codec)."""


class Rescheduler(Protocol):
    """Reacts to faults, notices and load; ``None`` keeps the plan (less what is lost), ``Later`` puts it off."""

    interval_s: float | None
    """Period of the ``tick`` signal; None: no ticks."""

    def react(self, signal: Signal, view: View) -> Change | Later | None: ...


class Source(Protocol):
    """Where requests come from."""

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        """Called once with ``finished=None`` for the initial stream (in order of arrival, may be
        lazy), then at every completion for the requests it causes (closed loops, sessions)."""


class Predictor(Protocol):
    """Fills ``predicted_output_tokens``: the one policy-side object that may be given the truth."""

    name: str

    def predict(self, request: Request) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A serving system: one planner, router, batcher, transfer and rescheduler, and its settings."""

    name: str
    mirrors: str
    """Paper and engine version whose behaviour this copies."""
    planner: Planner
    router: Callable[[], Router]
    batcher: Callable[[Role], Batcher]
    transfer: Callable[[], Transfer]
    rescheduler: Callable[[], Rescheduler]
    limits: Limits = field(default_factory=Limits)
    defaults: Callable[[Limits, frozenset[str], Sequence[Gpu]], Limits] | None = None
    """Of an engine whose settings depend on the GPUs: the limits with what is not among the names given filled in."""
    cost: Callable[[StepCost], StepCost] = lambda cost: cost
    model: Callable[[ModelSpec], ModelSpec] = lambda model: model
    """The model with what the system keeps in memory beside it."""
    remarks: Callable[[ModelSpec], Sequence[str]] = lambda model: ()
    """What a reader must know before trusting the figures."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Settings of its scheduler beside the limits, as they came out; for results to show."""
    predictor: Predictor | None = None
    """Of output lengths, where the system is defined by one; whoever simulates may give another."""

    def with_limits(self, limits: Limits) -> System:
        return replace(self, limits=limits)
