"""The scenario file: what it may say, and how it is read and checked. ``resolve.py`` builds what it describes.

What its parts may say is in ``cluster.py``, ``workload.py`` and ``system.py``; ``docs/reference/scenario.md`` lists
every key.

``Scenario.load(path)`` for a file, ``Scenario.of(mapping)`` for a dict, ``Scenario(...)`` for Python objects. The
first two raise ``ConfigError`` with one line that names file, field, value and mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from experiments.scenario.cluster import ClusterSpec
from experiments.scenario.complaints import first_fault, nested_fault
from experiments.scenario.overrides import apply
from experiments.scenario.part import (
    Part,
    Positive,
    PositiveSeconds,
    Seed,
)
from experiments.scenario.system import EngineSpec, EventSpec, OverheadSpec, SloSpec, SystemSpec, VariantSpec
from experiments.scenario.workload import WorkloadSpec
from sim.cluster import did_you_mean
from sim.outside import is_file, read_yaml
from sim.types import ConfigError

MOST_GPUS = 2**16
Dtype = Literal["float32", "float16", "bfloat16", "float8", "int8"]


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
