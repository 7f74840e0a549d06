"""The scenario file: what it may say, and how it is read and checked. ``resolve.py`` builds what it describes.

What its ``workload`` may say is in ``workload.py``; ``docs/reference/scenario.md`` lists every key.

``Scenario.load(path)`` for a file, ``Scenario.of(mapping)`` for a dict, ``Scenario(...)`` for Python objects. The
first two raise ``ConfigError`` with one line that names file, field, value and mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from experiments.scenario.complaints import first_fault, nested_fault
from experiments.scenario.overrides import apply
from experiments.scenario.part import (
    Count,
    Gbps,
    NonNegative,
    Part,
    Positive,
    PositiveSeconds,
    Seconds,
    Seed,
    Share,
    StepSeconds,
)
from experiments.scenario.workload import WorkloadSpec
from sim.cluster import did_you_mean
from sim.outside import is_file, read_yaml
from sim.types import ConfigError
from traces.cluster.events import NEEDS

MOST_GPUS = 2**16
Dtype = Literal["float32", "float16", "bfloat16", "float8", "int8"]


# ---------------------------------------------------------------- cluster


class NodeSpec(Part):
    """One row of equal machines."""

    gpu: str = Field(description="GPU type of the catalogue ('phasewise gpus')", examples=["A100-80G-SXM"])
    count: Annotated[Count, Field(le=1024)] = Field(description="GPUs per machine", examples=[8])
    nodes: Annotated[Count, Field(le=65536)] = Field(default=1, description="machines in this row", examples=[2])
    region: str = Field(
        default="default", description="machines of different regions talk over inter_region", examples=["east"]
    )
    name: str | None = Field(
        default=None,
        description="with several machines a number is put behind it; null: n0, n1, ... by position",
        examples=["big"],
    )
    nic_gbps: Gbps | None = Field(
        default=None, description="network port of each machine, each way; null: links.inter_node", examples=[400]
    )
    usd_per_hour: NonNegative | None = Field(
        default=None, description="price of one GPU; null: the catalogue's", examples=[2.5]
    )
    usd_per_hour_spot: NonNegative | None = Field(
        default=None, description="its price as a spot instance; null: the catalogue's", examples=[1.1]
    )


class LinkSpec(Part):
    """A connection. gbps = 1e9 bits/s, each way, as transfers achieve them: RoCE and InfiniBand reached 0.7 to 0.8 of a
    port's nominal rate, and rings of more than two PCIe cards differ sevenfold between machines.
    """

    gbps: Gbps = Field(description="bandwidth each way; 0: no connection", examples=[200])
    latency_us: NonNegative = Field(default=0.0, description="one-way latency", examples=[10])


class PairSpec(LinkSpec):
    """A dedicated line from node ``a`` to node ``b``; for both directions give two."""

    a: str = Field(description="name of the node that sends", examples=["n0"])
    b: str = Field(description="name of the node that receives", examples=["n1"])


class LinksSpec(Part):
    """What joins the machines, and the GPUs in them."""

    inter_node: LinkSpec | None = Field(
        default=None,
        description="network port of each machine, shared by its traffic; null: machines of a region have no link",
        examples=[{"gbps": 200, "latency_us": 10}],
    )
    inter_region: LinkSpec | None = Field(
        default=None,
        description="line of each ordered pair of regions; null: regions have no link",
        examples=[{"gbps": 5, "latency_us": 20000}],
    )
    intra_node: LinkSpec | None = Field(
        default=None,
        description="peer link of each GPU, also for all-reduces; null: its NVLink or PCIe by the catalogue, and "
        "all-reduces as they were measured there",
        examples=[{"gbps": 2400, "latency_us": 2}],
    )
    pairs: tuple[PairSpec, ...] = Field(
        default=(), description="dedicated lines between two machines", examples=[[{"a": "n0", "b": "n1", "gbps": 400}]]
    )


class ClusterSpec(Part):
    """The machines, what joins them, and which of their prices counts."""

    nodes: Annotated[tuple[NodeSpec, ...], Field(min_length=1)] = Field(
        description="rows of equal machines", examples=[[{"gpu": "A100-80G-SXM", "count": 8, "nodes": 2}]]
    )
    links: LinksSpec = Field(
        default=LinksSpec(), description="what joins the machines", examples=[{"inter_node": {"gbps": 200}}]
    )
    pricing: Literal["on_demand", "spot"] = Field(
        default="on_demand", description="which price of the GPUs counts", examples=["spot"]
    )

    @model_validator(mode="after")
    def _can_be_simulated(self) -> ClusterSpec:
        gpus = sum(row.count * row.nodes for row in self.nodes)
        if gpus > MOST_GPUS:
            raise ValueError(f"nodes: {gpus:,} GPUs in all; at most {MOST_GPUS:,} can be simulated")
        return self


# ---------------------------------------------------------------- system and the rest


class OverheadSpec(Part):
    """What a step takes beside what the latency model says: the processor's time, which adds to the kernels (but for
    ``async_scheduling``), and how much slower the kernels are here."""

    step_s: StepSeconds = Field(default=0.0, description="per step", examples=[0.002])
    sequence_s: StepSeconds = Field(default=0.0, description="per sequence in the step", examples=[0.00002])
    slowdown: Annotated[Positive, Field(ge=1e-3, le=1e6)] = Field(
        default=1.0, description="times as long as in the latency model that the kernels take here", examples=[1.1]
    )


class EngineSpec(Part):
    """The serving engine's settings, under vLLM's names; null: the system's default."""

    version: str | None = Field(
        default=None,
        description="vLLM's release whose defaults hold for the settings that are null; null: 0.20 under vllm",
        examples=["0.20"],
    )
    max_num_seqs: Count | None = Field(default=None, description="most sequences in a step", examples=[256])
    max_num_batched_tokens: Count | None = Field(default=None, description="most tokens in a step", examples=[2048])
    block_size: Count | None = Field(default=None, description="tokens in a KV block", examples=[16])
    prefix_caching: bool | None = Field(
        default=None, description="keep the KV of prompts that may be repeated", examples=[True]
    )
    gpu_memory_utilization: Share | None = Field(
        default=None, description="share of the GPU's memory for weights, activations and KV", examples=[0.9]
    )
    num_kv_blocks: Count | None = Field(
        default=None, description="KV blocks of a replica, in place of what follows from the memory", examples=[4096]
    )
    max_model_len: Count | None = Field(
        default=None, description="longest input and output together; null: the model's", examples=[8192]
    )
    async_scheduling: bool | None = Field(
        default=None,
        description="decide each step while the one before it runs (vLLM's default from 0.14 on): what comes or ends "
        "counts a step later, and a step takes the longer of overhead and kernels, not the sum",
        examples=[True],
    )


class VariantSpec(Part):
    """A system and its options; every key beside these is an option (``phasewise systems`` lists them)."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(default=None, description="of the system; null: the entry's own name", examples=["vllm"])
    engine: EngineSpec = Field(
        default=EngineSpec(), description="settings of the serving engine", examples=[{"max_num_seqs": 128}]
    )

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SystemSpec(VariantSpec):
    """The system that serves; every key beside these is one of its options (``phasewise systems`` lists them)."""

    name: str = Field(description="one of those that 'phasewise systems' lists", examples=["splitwise"])


class BoundsSpec(Part):
    """Latency bounds of a request, and how many requests must meet them; null: no bound."""

    ttft_s: Positive | None = Field(default=None, description="time to first token, from arrival", examples=[2.5])
    tpot_s: Positive | None = Field(default=None, description="time per output token after the first", examples=[0.15])
    e2e_s: Positive | None = Field(default=None, description="from arrival to the last token", examples=[30])
    attainment: Share = Field(
        default=0.9, description="share of the requests that must meet every bound", examples=[0.99]
    )


class SloSpec(BoundsSpec):
    """Latency targets; requests that were rejected or did not finish count as misses."""

    classes: dict[str, BoundsSpec] = Field(
        default={},
        description="class -> its own bounds, in place of those beside; classes come from workload.mix or the trace",
        examples=[{"batch": {"e2e_s": 600, "attainment": 0.5}}],
    )


class EventSpec(Part):
    """Something that happens to the cluster."""

    at_s: Seconds = Field(description="when it happens", examples=[60])
    kind: Literal["gpu_lost", "node_lost", "spot_notice", "gpu_slow", "gpu_joined", "link_scaled"] = Field(
        description="what happens", examples=["spot_notice"]
    )
    target: str = Field(description="a GPU, a node, or the resource of a link", examples=["n0.g1"])
    factor: Annotated[NonNegative, Field(le=1e6)] | None = Field(
        default=None, description="gpu_slow: of step times; link_scaled: of bandwidth (0 cuts it)", examples=[1.5]
    )
    deadline_s: Seconds | None = Field(
        default=None, description="spot_notice: how long after it the target is lost", examples=[30]
    )

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

    model: str = Field(
        description="catalogue name ('phasewise models'), or the path of a Hugging Face config.json",
        examples=["llama-2-70b"],
    )
    dtype: Dtype | None = Field(default=None, description="of the weights; null: the model's own", examples=["float16"])
    cluster: ClusterSpec = Field(
        description="the machines", examples=[{"nodes": [{"gpu": "A100-80G-SXM", "count": 8}]}]
    )
    kv_dtype: Dtype | None = Field(
        default=None,
        description="of the KV cache (float8: vLLM's --kv-cache-dtype fp8); null: the checkpoint's, else 16 bits",
        examples=["float8"],
    )
    workload: WorkloadSpec = Field(
        default=WorkloadSpec(), description="what is asked of them", examples=[{"trace": "sample", "rate": 5}]
    )
    system: SystemSpec = Field(description="what serves it", examples=[{"name": "vllm", "tp": 4}])
    plan: str | None = Field(
        default=None,
        description="a plan file ('phasewise plan' writes them), in place of what the system's planner would do",
        examples=["plan.yaml"],
    )
    compare: dict[str, VariantSpec] = Field(
        default={},
        description="what 'phasewise compare' runs: label -> system",
        examples=[{"vllm": {"tp": 4}, "small": {"name": "vllm", "tp": 2}}],
    )
    latency: str | dict[str, str] | None = Field(
        default=None,
        description=(
            "roofline, a profile's name or path, or one of these per GPU type; null: shipped ones, else a relative's"
        ),
        examples=["roofline"],
    )
    accept_error: Positive = Field(
        default=0.3,
        description="a profile named in latency is refused if an operator's mean held-out error is more (a share)",
        examples=[0.5],
    )
    overhead: OverheadSpec | None = Field(
        default=None,
        description="what the serving engine adds to a step outside its kernels; null: what the profiles say",
        examples=[{"step_s": 0.002}],
    )
    slo: SloSpec = Field(
        default=SloSpec(), description="latency targets", examples=[{"ttft_s": 2, "tpot_s": 0.1, "attainment": 0.9}]
    )
    events: str | tuple[EventSpec, ...] | None = Field(
        default=None,
        description="a file of cluster events, or a list of them",
        examples=[[{"at_s": 60, "kind": "node_lost", "target": "n1"}]],
    )
    predictor: Literal["mean", "max", "oracle"] | None = Field(
        default=None,
        description="how policies guess output lengths; null: the system's own way, else mean",
        examples=["oracle"],
    )
    until_s: PositiveSeconds | None = Field(
        default=None, description="cut the run off at this simulated time", examples=[600]
    )
    seed: Seed = Field(default=0, description="of everything that is drawn", examples=[1])

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

    @model_validator(mode="after")
    def _classes_exist(self) -> Scenario:
        for name in self.slo.classes if self.workload.mix else ():
            if name not in self.workload.mix:
                raise ValueError(f"slo.classes.{name}: the class {did_you_mean(name, self.workload.mix)}")
        return self

    @classmethod
    def of(cls, data: Any, *, where: str = "scenario") -> Scenario:
        """From plain data; ``where`` is the file named in errors."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: it must be a mapping with the keys {', '.join(cls.model_fields)}")
        try:
            scenario = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {first_fault(error).removeprefix(': ')}") from None
        scenario._where = where
        return scenario

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
        """Read a scenario file. ``overrides``: "key.sub=value", the value in YAML, applied before the check.

        Relative paths in it are those beside the file, else those in the current folder.
        """
        path = Path(path)
        data = read_yaml(path, "scenario")
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
        if self.workload.closed_loop is not None:
            raise ConfigError(
                f"{self.where}: workload.closed_loop: the clients set the pace, so it has no rate to vary; vary clients"
            )
        return self._with(workload=self.workload.model_copy(update={"rate": rate_per_s}), seed=seed)

    def seeded(self, seed: int) -> Scenario:
        """The same experiment with another seed."""
        return self._with(seed=seed)

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
            return next((str(place.resolve()) for place in places if is_file(place)), name)

        latency = self.latency
        if isinstance(latency, str):
            latency = found(latency)
        elif latency is not None:
            latency = {gpu: found(name) for gpu, name in latency.items()}
        workload = self.workload.anchored(found)
        events = found(self.events) if isinstance(self.events, str) else self.events
        plan = found(self.plan) if self.plan is not None else None
        return self._with(model=found(self.model), latency=latency, workload=workload, events=events, plan=plan)


def load(source: str | Path | Mapping[str, Any] | Scenario, overrides: Sequence[str] = ()) -> Scenario:
    """A scenario from the path of its file, from plain data, or as it is.

    ``overrides``: "key.sub=value", the value in YAML, as ``--set`` on the command line. ``ConfigError`` in one line
    that names file, field, value and mend.
    """
    if isinstance(source, str | Path):
        return Scenario.load(source, overrides)
    if isinstance(source, Scenario):
        if not overrides:
            return source
        where, source = source.where, source.model_dump(mode="json", exclude_unset=True)
    else:
        where, source = "scenario", deepcopy(dict(source))
    for override in overrides:
        apply(source, override)
    return Scenario.of(source, where=where)


def _event(place: int, item: Any) -> EventSpec:
    """One entry of an inline list; in the union with a path, pydantic would lose its place."""
    try:
        return item if isinstance(item, EventSpec) else EventSpec.model_validate(item)
    except ValidationError as error:
        raise PydanticCustomError("nested", "{text}", {"text": f"[{place}]{nested_fault(error)}"}) from None
