"""``system``, ``slo``, ``overhead`` and ``events`` of a scenario file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from experiments.scenario.part import (
    Count,
    NonNegative,
    Part,
    Positive,
    Seconds,
    Share,
    StepSeconds,
)
from traces.cluster.events import NEEDS

MOST_GPUS = 2**16


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
