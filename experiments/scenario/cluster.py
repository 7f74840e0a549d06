"""``cluster`` of a scenario file: machines, links and what they cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from experiments.scenario.part import (
    Count,
    Gbps,
    NonNegative,
    Part,
)

MOST_GPUS = 2**16


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
