"""The frozen vocabulary every other module speaks: facts, decisions and events, as plain data.

Read this first. Nothing here imports anything else of the package. Quantities carry their unit in their
name; ``None`` means unknown. The engine's clock is an integer number of picoseconds (``*_ps``); seconds
are floats and appear only at the edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

PS_PER_S = 10**12
LAST_S = 1e9
"""No simulation is longer (30 years): what says more is a date, or in another unit."""
MOST_TOKENS = 10**9
"""Of one request: beyond any context."""
MOST_SAMPLES = 10**6

Role = Literal["mixed", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")
Outcome = Literal["completed", "rejected", "failed", "running"]


def to_ps(seconds: float) -> int:
    """Nearest picosecond."""
    return round(seconds * PS_PER_S)


def to_s(picoseconds: int) -> float:
    return picoseconds / PS_PER_S


class SimulationError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SimulationError):
    """An input that cannot be used; the message names the place, the value and the mend."""


class InfeasibleError(ConfigError):
    """No plan can do what is asked; the message says what is missing: memory, bandwidth or rate."""


class PolicyError(SimulationError):
    """A policy proposed something illegal; the message names the policy, the request and the numbers."""


class StalledError(SimulationError):
    """Nothing is left to happen but requests are unfinished; the message lists every replica's state."""


# ---------------------------------------------------------------- what arrives


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One line of a trace. Policies never see ``output_tokens``; the engine alone does."""

    id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    session: str | None = None
    prefix: tuple[int, ...] = ()
    """Content hashes of the leading full blocks of the prompt, and as far as they are known of the answer after it,
    each of ``prefix_block_tokens`` tokens. A prefix cache can share them; whoever asks next may begin with both."""
    prefix_block_tokens: int | None = None
    priority: int = 0
    """Lower is served first, by schedulers that look at it."""
    klass: str | None = None
    samples: int = 1
    """Outputs sampled in parallel from one prompt, each of ``output_tokens``; they share the prompt's KV."""
    beam_search: bool = False
    """The samples are the beams of one search: they share all but their last blocks (``memory.beam_tail_blocks``)."""
    think_s: float | None = None
    """How long after the end of its session's turn before it is sent, where that was recorded."""

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s <= LAST_S:
            mend = f"at most {LAST_S:g} s from the start (a date?)" if self.arrival_s > 0 else "a number >= 0"
            raise ConfigError(f"request {self.id}: arrival_s is {self.arrival_s}; it must be {mend}")
        if not (1 <= self.input_tokens <= MOST_TOKENS and 1 <= self.output_tokens <= MOST_TOKENS):
            small = min(self.input_tokens, self.output_tokens) < 1
            raise ConfigError(
                f"request {self.id}: input_tokens {self.input_tokens} and output_tokens "
                f"{self.output_tokens} must both be {'>= 1' if small else f'at most {MOST_TOKENS:,}'}"
            )
        if not 1 <= self.samples <= MOST_SAMPLES:
            mend = ">= 1" if self.samples < 1 else f"at most {MOST_SAMPLES:,}"
            raise ConfigError(f"request {self.id}: samples is {self.samples}; it must be {mend}")
        if self.think_s is not None and not 0 <= self.think_s <= LAST_S:
            raise ConfigError(f"request {self.id}: think_s is {self.think_s}; it must be a number >= 0")
        if self.prefix and not self.prefix_block_tokens:
            raise ConfigError(f"request {self.id}: prefix hashes need prefix_block_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of one request, and the share of requests that must meet all of them.

    ``classes``: targets of requests of a class (``Request.klass``), in place of those beside.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    attainment: float = 0.9
    classes: Mapping[str, Slo] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """Something that happens to the cluster from outside.

    ``gpu_lost``, ``node_lost``, ``gpu_joined``: ``target`` names a GPU (``n0.g1``) or a node (``n0``).
    ``spot_notice``: as above, lost ``deadline_s`` after ``at_s``. ``gpu_slow``: step times of stages on
    it are multiplied by ``factor``. ``link_scaled``: the bandwidth of the link resource ``target`` is
    multiplied by ``factor`` (0 cuts it).
    """

    at_s: float
    kind: Literal["gpu_lost", "node_lost", "spot_notice", "gpu_slow", "gpu_joined", "link_scaled"]
    target: str
    factor: float | None = None
    deadline_s: float | None = None


# ---------------------------------------------------------------- how the model is laid out


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Tensor-parallel GPUs that hold the contiguous layers ``first_layer <= layer < end_layer``."""

    name: str
    gpus: tuple[str, ...]
    first_layer: int
    end_layer: int

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def tp(self) -> int:
        return len(self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Stages that together hold the whole model and share one scheduler and one KV ledger.

    Or, in a plan of nodes, one stage with a part of the layers, which requests pass on their way through several.
    ``role`` is a label for policies: the engine itself runs any work on any replica.
    """

    name: str
    stages: tuple[Stage, ...]
    role: Role = "mixed"
    models: tuple[str, ...] = ()
    """The models it serves, where requests ask for several of one shape (``Request.klass``): weights of each are on its
    GPUs. Empty: one for all."""

    @property
    def leg(self) -> tuple[str, ...]:
        """The stage names in layer order: what a ``Route`` names."""
        return tuple(stage.name for stage in self.stages)

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(gpu for stage in self.stages for gpu in stage.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the model is, and optionally which share of the requests takes which (prefill, decode) pair.

    ``flows``: in a plan of nodes, tokens per second from one replica to the next; "" is where they come from and go to.
    """

    replicas: tuple[Replica, ...]
    shares: Mapping[tuple[str, str], float] = field(default_factory=dict)
    flows: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def of_nodes(self, num_layers: int) -> bool:
        """Whether a replica holds a part of the model's layers only, so that requests pass from one to another."""
        return any(r.stages[0].first_layer > 0 or r.stages[-1].end_layer < num_layers for r in self.replicas)


class Route(NamedTuple):
    """A request's way: the stages that prefill it and those that decode it. Equal legs move no KV.

    ``decode`` None: its router will say once the prompt is computed (``sim.policy.Dispatcher``).
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Reject:
    """A router's refusal."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Weights that a GPU of a new stage fetches: from another that holds them, or from its host (``source`` None)."""

    gpu: str
    source: str | None
    size_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A new plan. The engine prices the difference: role flips are free, new stages load their weights.

    ``drain``: replicas that disappear finish what they run first; otherwise it is recomputed elsewhere.
    ``loads``: all that the GPUs of a new replica (by name) fetch; what they hold of the last stage they were in, they
    need not. A replica that is not named loads everything from its hosts. ``keep``, without ``drain``: by id, requests
    that decode on a replica that disappears, and the replica (by name) on which they go on; their KV moves there.
    ``forget``: the others on it lose what they have generated too, as where an engine restarts them. ``requeue``: what
    waits is routed again, now and when the new replicas come up, as where all replicas draw from one queue.
    """

    plan: Plan
    reason: str
    drain: bool = True
    loads: Mapping[str, tuple[Load, ...]] = field(default_factory=dict)
    keep: Mapping[int, str] = field(default_factory=dict)
    forget: bool = False
    requeue: bool = False


@dataclass(frozen=True, slots=True)
class Later:
    """A rescheduler's wish to be asked again at that time, by a signal ``due``."""

    at_s: float


# ---------------------------------------------------------------- what a step is made of


class Work(NamedTuple):
    """The shape of one iteration, as the cost models see it (counts only, never a phase name).

    ``chunks``: (new tokens, tokens of the same prompt already in the KV cache) per prompt chunk.
    ``decode_context``: sum over the decoding sequences of the tokens each attends to, itself included.
    """

    chunks: tuple[tuple[int, int], ...]
    decode_seqs: int
    decode_context: int

    @property
    def tokens(self) -> int:
        return sum(chunk[0] for chunk in self.chunks) + self.decode_seqs


class Line(NamedTuple):
    """Integer duration of a work that repeats: iteration ``i`` takes ``first_ps + i * slope_ps``.

    From one iteration to the next every decoding sequence grows by one token and every chunk moves on by
    its own length. The formula is exact while ``i < iterations``. ``extrapolated`` marks shapes
    outside the measured range.
    """

    first_ps: int
    slope_ps: int
    iterations: int
    extrapolated: bool = False


class Chunk(NamedTuple):
    """A part of a KV move: ``share`` of its bytes, ready at the fraction ``ready`` of the last prefill step."""

    share: float
    ready: float


class Move(NamedTuple):
    """KV to be taken from one replica to another."""

    request_id: int
    tokens: int
    kv_bytes: int
    num_layers: int
    source: str
    target: str


SignalKind = Literal["tick", "notice", "lost", "joined", "due"]


class Signal(NamedTuple):
    """What wakes a rescheduler: a timer tick, a cluster event, or a time that it named itself."""

    kind: SignalKind
    at_s: float
    gpus: tuple[str, ...] = ()
    deadline_s: float | None = None
