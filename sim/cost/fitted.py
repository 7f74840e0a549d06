"""Step times from a profile of measured operators; what a profile leaves out is priced by a roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from sim.cluster import Cluster
from sim.cost.graphs import Captured
from sim.cost.kernels import Kernels
from sim.cost.links import collective_seconds
from sim.cost.overlapped import Overlapped
from sim.cost.pieces import Curve, Row, Surface, chained, surface
from sim.cost.polynomial import Polynomial
from sim.cost.roofline import Overhead, Rates, Roofline, kv_read_ps, pair_ps
from sim.cost.step import Composed, Fixed, Operators, StageCost
from sim.cost.tables import Grid, ProfileEntry, Table
from sim.model import ModelSpec
from sim.types import PS_PER_S, ConfigError, Stage, to_ps


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where measurements come from: citation, licence, date, tool that made the profile, engine measured, method."""

    source: str
    licence: str
    date: str
    tool: str
    engine: str
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The device that a profile was measured on, as it was then; None = unknown, or no such thing there.

    ``gpu``: its name in the catalogue. ``flops``, ``bandwidth_bytes_per_s``: the best that was measured, by dtype.
    """

    gpu: str
    description: str
    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    torch: str | None = None
    driver: str | None = None
    cuda: str | None = None
    threads: int | None = None
    attention_backend: str | None = None
    git_commit: str | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_w: float | None = None
    power_w: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured operators and where they come from: of models (``entries``), or of GPUs for any model (``kernels``).

    ``polynomials``: whole steps of models in a closed form, instead of operators.
    ``device``: where it was measured, if ``phasewise calibrate`` did. ``tables``: what no step is made of, by name:
    copies, KV gather and scatter, 4-bit quantise and dequantise, launches ... (docs/calibrate.md lists them).
    """

    name: str
    provenance: Provenance
    entries: tuple[ProfileEntry, ...] = ()
    kernels: tuple[Kernels, ...] = ()
    polynomials: tuple[Polynomial, ...] = ()
    device: Device | None = None
    tables: Mapping[str, Table | Grid] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[ProfileEntry | Kernels | Polynomial, ...]:
        """All that prices steps."""
        return (*self.entries, *self.kernels, *self.polynomials)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Uses the first entry that matches a stage's GPU type, model, tensor-parallel degree and dtype exactly.

    Without one, the first kernel tables of its GPU type and dtype make one; they also give an entry the
    collectives that it lacks. Without either, the first polynomial that matches as an entry does prices whole steps.
    ``overhead``: the serving engine's, instead of what profiles or the fallback say. A stage without an
    entry, and every operator that an entry lacks, takes the fallback. Beyond the measured range an
    operator grows by its last slope or the fallback's, whichever is more, and its lines say ``extrapolated``.
    """

    profiles: Sequence[Profile]
    fallback: Roofline = Roofline()
    overhead: Overhead | None = None
    name: str = "fitted"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        if self.overhead is None or not self.overhead.overlapped:
            return self._bind(model, stage, cluster, slow)
        kernels = replace(self, overhead=Overhead(slowdown=self.overhead.slowdown))._bind(model, stage, cluster, slow)
        return Overlapped.of(kernels, self.overhead, slow) if stage.first_layer == 0 else kernels

    def _bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float) -> StageCost:
        entry = self.entry(model, stage, cluster)
        whole = None if entry is not None else self.polynomial(model, stage, cluster)
        for part in (entry, whole):
            if part is not None and part.num_layers != model.num_layers:
                raise ConfigError(
                    f"profile entry {part.model}: num_layers is {part.num_layers}, the model has {model.num_layers}"
                )
        if whole is not None:
            return whole.bind(stage, self.overhead, slow)
        kernels_slow = slow if self.overhead is None else slow * self.overhead.slowdown
        operators = self.fallback.operators(model, stage, cluster, kernels_slow)
        if entry is not None:
            rates = self.fallback.rates(model, stage, cluster, kernels_slow)
            operators = _measured(entry, operators, _Scale(model, stage, rates, kernels_slow))
        if self.overhead is not None:
            here = slow if stage.first_layer == 0 else 0.0
            operators = replace(
                operators,
                overhead_ps=to_ps(self.overhead.step_s * here),
                sequence_ps=to_ps(self.overhead.sequence_s * here),
            )
        cost = Composed(operators, measured=entry is not None and not entry.predicted)
        graphs = None if entry is None else entry.graphs
        if graphs is None or graphs.block_tokens is None:
            return cost
        return Captured(cost, graphs, graphs.block_tokens)

    def entry(self, model: ModelSpec, stage: Stage, cluster: Cluster) -> ProfileEntry | None:
        """The entry that a stage would use, or None (always for weight-only quantized models)."""
        names = _names(model, stage, cluster)
        kernels = self._kernels(model, stage, cluster, names)
        for entry in (entry for profile in self.profiles for entry in profile.entries):
            if _matches(entry, model, stage, names):
                if entry.collective is not None and not _all_reduced(stage, cluster):
                    entry = replace(entry, collective=None)
                lacks = entry.collective is None and "collective" not in entry.included
                return kernels.with_collectives(entry, model) if lacks and kernels is not None else entry
        return None if kernels is None else kernels.entry(model, stage.tp, cluster.gpu(stage.gpus[0]))

    def origin(
        self, model: ModelSpec, stage: Stage, cluster: Cluster
    ) -> tuple[Profile, ProfileEntry | Kernels | Polynomial] | None:
        """The profile that prices a stage's steps, and its part that does; None: the roofline."""
        names = _names(model, stage, cluster)
        for profile in self.profiles:
            for entry in profile.entries:
                if _matches(entry, model, stage, names):
                    return profile, entry
        for profile in self.profiles:
            for kernels in profile.kernels:
                if kernels.serves(model) and any(names == {gpu.lower()} for gpu in kernels.gpus):
                    composed = kernels.entry(model, stage.tp, cluster.gpu(stage.gpus[0]))
                    return None if composed is None else (profile, kernels)
        for profile in self.profiles:
            for form in profile.polynomials:
                if _matches(form, model, stage, names):
                    return profile, form
        return None

    def polynomial(self, model: ModelSpec, stage: Stage, cluster: Cluster) -> Polynomial | None:
        """The closed form of whole steps that matches a stage as an entry does, or None."""
        names = _names(model, stage, cluster)
        forms = (form for profile in self.profiles for form in profile.polynomials)
        return next((form for form in forms if _matches(form, model, stage, names)), None)

    def _kernels(self, model: ModelSpec, stage: Stage, cluster: Cluster, names: set[str]) -> Kernels | None:
        """The first tables of a stage's GPU type; their all-reduces only where they hold (``_all_reduced``)."""
        for kernels in (kernels for profile in self.profiles for kernels in profile.kernels):
            if kernels.serves(model) and any(names == {gpu.lower()} for gpu in kernels.gpus):
                return kernels if _all_reduced(stage, cluster) else replace(kernels, all_reduce={})
        return None


def _names(model: ModelSpec, stage: Stage, cluster: Cluster) -> set[str]:
    """A stage's GPU types; none for weights that no profile was measured with."""
    if model.weight_bytes_per_param is not None:
        return set()
    return {cluster.gpu(gpu_id).name.lower() for gpu_id in stage.gpus}


def _all_reduced(stage: Stage, cluster: Cluster) -> bool:
    """Whether measured all-reduces hold: between the GPUs of one machine, over the link that the catalogue gives it.

    A link that a scenario states (``links.intra_node``) is not the one that was measured, and goes first.
    """
    machines = {cluster.node(gpu_id).name for gpu_id in stage.gpus}
    return len(machines) == 1 and cluster.intra_node is None


def _matches(part: ProfileEntry | Polynomial, model: ModelSpec, stage: Stage, names: set[str]) -> bool:
    if part.model.lower() != model.name.lower() or part.tp != stage.tp or model.dtype not in part.dtypes:
        return False
    if model.kv_dtype is not None:  # every entry was measured with a cache of the activations' dtype
        return False
    return any(names == {gpu.lower()} for gpu in part.gpus)


class _Scale:
    """Turns an entry's seconds into a stage's picoseconds, and knows the roofline's slopes there."""

    def __init__(self, model: ModelSpec, stage: Stage, rates: Rates, slow: float) -> None:
        self.layers = {"layer": stage.num_layers * slow, "model": stage.num_layers / model.num_layers * slow}
        self.slow = slow
        self.first = stage.first_layer == 0
        self.last = stage.end_layer == model.num_layers
        self.tp, self.link = rates.tp, rates.link
        self.logits_bytes = model.vocab_size * model.activation_bytes_per_value
        self.pair_ps = pair_ps(model, stage, rates)
        self.context_ps = max(self.pair_ps, kv_read_ps(model, stage, rates))

    def curve(self, table: Table, factor: float, guess: Fixed) -> Fixed:
        values = [round(value * factor * PS_PER_S) for value in table.seconds]
        end = table.counts[-1]
        last = (values[-1] - values[-2]) / (end - table.counts[-2])
        analytic = (guess(2 * end)[0] - guess(end)[0]) / end
        return Curve(table.counts, tuple(values), ceil(max(last, analytic))).price

    def gathered(self, head: Fixed) -> Fixed:
        """A shard's head, and bringing all logits together over the stage's link."""

        def price(seqs: int) -> tuple[int, bool]:
            value_ps, beyond = head(seqs)
            gather_s = collective_seconds("all_gather", seqs * self.logits_bytes, self.link, self.tp)
            return value_ps + round(gather_s * PS_PER_S), beyond

        return price

    def surface(self, grid: Grid, pair_ps: float, *, causal: bool) -> Surface:
        factor = self.layers[grid.per] * PS_PER_S
        rows = [[value * factor for value in row] for row in grid.seconds]
        return surface(grid.counts, grid.contexts, rows, pair_ps=pair_ps, causal=causal)


def _measured(entry: ProfileEntry, guess: Operators, scale: _Scale) -> Operators:
    """The roofline's operators, each replaced where the entry knows better."""
    fixed: dict[str, Fixed] = dict.fromkeys(entry.included - {"overhead"}, _free)
    fixed["linear"] = scale.curve(entry.linear, scale.layers[entry.linear.per], guess.linear)
    if entry.collective is not None:
        fixed["collective"] = scale.curve(entry.collective, scale.layers[entry.collective.per], guess.collective)
    if entry.head is not None:
        fixed["head"] = scale.curve(entry.head, scale.slow, guess.head) if scale.last else _free
        if entry.collective is None and "collective" not in entry.included and scale.last:
            fixed["head"] = scale.gathered(fixed["head"])
    if entry.graphs is not None and entry.graphs.block_tokens is None:
        for name in ("linear", "collective"):
            fixed[name] = entry.graphs.of_tokens(fixed.get(name, getattr(guess, name)))
    overhead_ps = 0 if "overhead" in entry.included else guess.overhead_ps
    if entry.overhead_s is not None:
        overhead_ps = round(entry.overhead_s * scale.slow * PS_PER_S) if scale.first else 0
    chunk, decode, shared_ps = guess.chunk, guess.decode, 0
    if entry.attention_prefill is not None:
        chunk = _chunk_rows(scale.surface(entry.attention_prefill, scale.pair_ps, causal=True))
        shared_ps = int(entry.shared_launch * chunk(1).values[0])
    if entry.attention_decode is not None:
        decode = _decode_rows(scale.surface(entry.attention_decode, scale.context_ps, causal=False))
    mixed = decode
    if entry.attention_mixed is not None:
        mixed = _decode_rows(scale.surface(entry.attention_mixed, scale.context_ps, causal=False))
    operators = replace(guess, overhead_ps=overhead_ps, chunk=chunk, decode=decode, mixed=mixed, shared_ps=shared_ps)
    return replace(operators, **fixed)  # type: ignore[arg-type]


def _free(_count: int) -> tuple[int, bool]:
    return 0, False


def _chunk_rows(table: Surface) -> Callable[[int], Row]:
    def row(tokens: int) -> Row:
        value, slopes = table.at(tokens)
        return chained(table.knots, round(value), [round(slope) for slope in slopes], 1, table.beyond(tokens))

    return row


def _decode_rows(table: Surface) -> Callable[[int], Row]:
    """Slopes are per token of mean context, so that a run of steps, each one token a sequence, adds whole ones."""

    def row(seqs: int) -> Row:
        value, slopes = table.at(seqs)
        knots = [knot * seqs for knot in table.knots]
        return chained(knots, round(value), [round(slope) for slope in slopes], seqs, table.beyond(seqs))

    return row
