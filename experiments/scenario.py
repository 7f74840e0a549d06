"""The scenario file: what it may say, and how it is read and checked. ``resolve.py`` builds what it describes.

``Scenario.load(path)`` for a file, ``Scenario.of(mapping)`` for a dict, ``Scenario(...)`` for Python objects. The
first two raise ``ConfigError`` with one line that names file, field, value and mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from experiments.complaints import first_fault, nested_fault
from experiments.overrides import apply
from sim.types import ConfigError
from traces.events import NEEDS

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "float16", "bfloat16", "float8", "int8"]


class Part(BaseModel):
    """A mapping of the file. Unknown keys are errors that name the nearest key there is."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError("unknown_key", "{key}", {"key": key, "known": list(cls.model_fields)})
        return data


# ---------------------------------------------------------------- cluster


class NodeSpec(Part):
    """One row of equal machines."""

    gpu: str = Field(description="GPU type of the catalogue (phasewise gpus)")
    count: Count = Field(description="GPUs per machine")
    nodes: Count = Field(default=1, description="machines in this row")
    region: str = "default"
    name: str | None = Field(default=None, description="default: n0, n1, ... by position")
    nic_gbps: NonNegative | None = Field(
        default=None, description="network port of each machine; default: links.inter_node"
    )
    usd_per_hour: NonNegative | None = Field(default=None, description="price of one GPU, in place of the catalogue's")
    usd_per_hour_spot: NonNegative | None = None


class LinkSpec(Part):
    """gbps = 1e9 bits/s, each way."""

    gbps: NonNegative
    latency_us: NonNegative = 0.0


class PairSpec(LinkSpec):
    """A dedicated line from node ``a`` to node ``b``."""

    a: str
    b: str


class LinksSpec(Part):
    inter_node: LinkSpec | None = Field(default=None, description="network port of each machine, shared by its traffic")
    inter_region: LinkSpec | None = Field(default=None, description="line of each ordered pair of regions")
    intra_node: LinkSpec | None = Field(
        default=None, description="peer link of each GPU, in place of its NVLink or PCIe"
    )
    pairs: tuple[PairSpec, ...] = ()


class ClusterSpec(Part):
    nodes: Annotated[tuple[NodeSpec, ...], Field(min_length=1)]
    links: LinksSpec = LinksSpec()
    pricing: Literal["on_demand", "spot"] = "on_demand"


# ---------------------------------------------------------------- workload


class LengthsSpec(Part):
    """A distribution of token counts: one of fixed, uniform, mean with median (lognormal), or quantiles."""

    fixed: Count | None = None
    uniform: tuple[Count, Count] | None = None
    mean: Positive | None = None
    median: Positive | None = None
    max: Count | None = Field(default=None, description="cut of the lognormal distribution")
    quantiles: tuple[tuple[NonNegative, Positive], ...] | None = Field(
        default=None, description="(share, tokens) from 0 to 1"
    )

    @model_validator(mode="after")
    def _one_form(self) -> LengthsSpec:
        given = {name for name in LengthsSpec.model_fields if getattr(self, name) is not None}
        if given not in ({"fixed"}, {"uniform"}, {"quantiles"}, {"mean", "median"}, {"mean", "median", "max"}):
            raise ValueError(f"{sorted(given)} given; set one of fixed, uniform, quantiles, or mean and median")
        return self


class GenerateSpec(Part):
    """Requests out of distributions; ``workload.rate`` and ``arrivals`` say when they come."""

    requests: Count
    input: LengthsSpec
    output: LengthsSpec
    rank_correlation: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = 0.0


class WorkloadSpec(Part):
    """A trace, or generated requests; then, in this order: slice, limit, time_scale, rate, too_long."""

    trace: str | None = Field(default=None, description="a trace file; 'sample' or nothing: the sample that is shipped")
    generate: GenerateSpec | None = None
    format: str | None = Field(default=None, description="trace format; guessed where unambiguous")
    format_options: dict[str, Any] = Field(
        default={}, description="block_tokens, time_unit: of the formats that have them"
    )
    sort: bool = Field(default=False, description="order the trace by arrival (holds it in memory)")
    start_s: NonNegative = 0.0
    end_s: Positive | None = None
    limit: Count | None = Field(default=None, description="the first N requests")
    time_scale: Positive | None = Field(default=None, description="stretches every interval: 2 halves the rate")
    rate: Positive | None = Field(default=None, description="requests/s: arrivals are drawn anew")
    arrivals: Literal["poisson", "constant", "gamma", "bursts", "ramp"] = Field(
        default="poisson", description="how, if rate is given"
    )
    arrival_options: dict[str, Positive] = Field(
        default={}, description="bursts: on_s, off_s; ramp: start_rate_per_s, ramp_s"
    )
    cv: Positive | None = Field(default=None, description="coefficient of variation of gamma arrivals")
    too_long: Literal["reject", "truncate", "error"] = Field(default="reject", description="over the model's context")

    @model_validator(mode="after")
    def _fits_together(self) -> WorkloadSpec:
        if self.generate is not None:
            if self.trace is not None:
                raise ValueError("both trace and generate are given; drop one")
            if self.rate is None:
                raise ValueError("generate needs a rate; set workload.rate (requests/s)")
        if (self.cv is not None) != (self.arrivals == "gamma"):
            raise ValueError("cv belongs to arrivals: gamma, and gamma needs it; set both or neither")
        if self.arrivals != "poisson" and self.rate is None:
            raise ValueError(f"arrivals: {self.arrivals} needs a rate; set workload.rate (requests/s)")
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s {self.end_s:g} must be greater than start_s {self.start_s:g}")
        return self


# ---------------------------------------------------------------- system and the rest


class OverheadSpec(Part):
    """Seconds of processor time per step, and per sequence in it; 0 under asynchronous scheduling."""

    step_s: NonNegative = 0.0
    sequence_s: NonNegative = 0.0


class EngineSpec(Part):
    """The serving engine's settings, under vLLM's names; what is absent is the system's default."""

    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    block_size: Count | None = None
    prefix_caching: bool | None = None
    gpu_memory_utilization: Share | None = None
    num_kv_blocks: Count | None = Field(default=None, description="overrides what follows from the memory")
    max_model_len: Count | None = None


class VariantSpec(Part):
    """A system and its options: the keyword parameters of its factory (``phasewise systems``)."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(default=None, description="of the system; default: the entry's own name")
    engine: EngineSpec = EngineSpec()

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SystemSpec(VariantSpec):
    name: str = Field(description="one of those that 'phasewise systems' lists")


class SloSpec(Part):
    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    e2e_s: Positive | None = None
    attainment: Share = Field(default=0.9, description="share of the requests that must meet every bound")


class EventSpec(Part):
    """Something that happens to the cluster; ``sim.types.ClusterEvent`` says what each kind means."""

    at_s: NonNegative
    kind: Literal["gpu_lost", "node_lost", "spot_notice", "gpu_slow", "gpu_joined", "link_scaled"]
    target: str
    factor: NonNegative | None = None
    deadline_s: NonNegative | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> EventSpec:
        for field in ("factor", "deadline_s"):
            needed = NEEDS.get(self.kind) == field
            if needed != (getattr(self, field) is not None):
                raise ValueError(
                    f"{self.kind} {'needs' if needed else 'has no'} {field}; {'add' if needed else 'drop'} it"
                )
        return self


class Scenario(Part):
    """One experiment: a model on a cluster under a workload, served by a system."""

    _where: str = PrivateAttr("scenario")
    _system_place: str = PrivateAttr("system")

    model: str = Field(description="catalogue name (phasewise models), or the path of a Hugging Face config.json")
    dtype: Dtype | None = Field(default=None, description="of the weights; default: the model's own")
    cluster: ClusterSpec
    workload: WorkloadSpec = WorkloadSpec()
    system: SystemSpec
    compare: dict[str, VariantSpec] = Field(default={}, description="what 'phasewise compare' runs: label -> system")
    latency: str | dict[str, str] | None = Field(
        None, description="roofline, a profile's name or path, or one of these per GPU type; null: shipped profiles"
    )
    overhead: OverheadSpec | None = Field(
        None, description="what the serving engine adds to a step outside its kernels; null: what the profiles say"
    )
    slo: SloSpec = SloSpec()
    events: str | tuple[EventSpec, ...] | None = Field(default=None, description="a file of cluster events, or a list")
    predictor: Literal["mean", "max", "oracle"] | None = Field(
        None, description="how policies guess output lengths; null: the system's own way, else mean"
    )
    until_s: Positive | None = Field(default=None, description="cut the run off at this simulated time")
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("latency", mode="before")
    @classmethod
    def _latency_form(cls, value: Any) -> Any:
        names = list(value.values()) if isinstance(value, Mapping) else [value]
        if value is not None and not all(isinstance(name, str) for name in names):
            raise ValueError(f"{value!r} must be a profile's name or path, or a mapping of these by GPU type")
        return value

    @field_validator("events", mode="before")
    @classmethod
    def _events_form(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} must be the path of a file, or a list of events")
        return tuple(_event(place, item) for place, item in enumerate(value))

    @classmethod
    def of(cls, data: Any, *, where: str = "scenario") -> Scenario:
        """From plain data; ``where`` is the file named in errors."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: it must be a mapping with the keys {', '.join(cls.model_fields)}")
        try:
            scenario = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {first_fault(error)}") from None
        scenario._where = where
        return scenario

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
        """Read a scenario file. ``overrides``: "key.sub=value", the value in YAML, applied before the check.

        Relative paths in it are those beside the file, else those in the current folder.
        """
        path = Path(path)
        data = _read_yaml(path)
        for override in overrides:
            apply(data, override)
        return cls.of(data, where=str(path))._anchored(path.parent)

    @property
    def where(self) -> str:
        """The file it comes from, for errors."""
        return self._where

    @property
    def system_place(self) -> str:
        """The key under which its system stands, for errors."""
        return self._system_place

    def variant(self, label: str, spec: VariantSpec) -> Scenario:
        """The same experiment under another system; engine settings it does not state stay."""
        engine = self.system.engine.model_dump(exclude_unset=True) | spec.engine.model_dump(exclude_unset=True)
        system = SystemSpec(**{**spec.options, "name": spec.name or label, "engine": EngineSpec(**engine)})
        variant = self._with(system=system, compare={})
        variant._system_place = f"compare.{label}" if label in self.compare else "system"
        return variant

    def at(self, *, rate_per_s: float, seed: int) -> Scenario:
        """The same experiment at another arrival rate (requests/s) and seed."""
        return self._with(workload=self.workload.model_copy(update={"rate": rate_per_s}), seed=seed)

    def to_yaml(self) -> str:
        """Everything spelt out, so that the run can be repeated from this text."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=120
        )

    def _with(self, **fields: Any) -> Scenario:
        other = self.model_copy(update=fields)
        other._where = self._where
        return other

    def _anchored(self, folder: Path) -> Scenario:
        """Names of files made absolute, so that the scenario means the same anywhere on this machine."""

        def found(name: str) -> str:
            places = (folder / name, Path(name))
            return next((str(place.resolve()) for place in places if place.is_file()), name)

        latency = self.latency
        if isinstance(latency, str):
            latency = found(latency)
        elif latency is not None:
            latency = {gpu: found(name) for gpu, name in latency.items()}
        trace = self.workload.trace
        workload = self.workload.model_copy(update={"trace": found(trace) if trace else None})
        events = found(self.events) if isinstance(self.events, str) else self.events
        return self._with(model=found(self.model), latency=latency, workload=workload, events=events)


def _event(place: int, item: Any) -> EventSpec:
    """One entry of an inline list; in the union with a path, pydantic would lose its place."""
    try:
        return item if isinstance(item, EventSpec) else EventSpec.model_validate(item)
    except ValidationError as error:
        raise PydanticCustomError("nested", "{text}", {"text": f"[{place}]{nested_fault(error)}"}) from None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a scenario file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a scenario is YAML in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or 'check the text'}"
        ) from None
