"""Plans as files: where the model's layers are, and who sends to whom, in YAML.

``phasewise plan`` writes them; ``plan:`` in a scenario, or ``phasewise run --plan``, takes one in place of what the
system's planner would do. ``read_plan`` raises ``ConfigError`` with one line that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from experiments.scenario.complaints import first_fault
from experiments.scenario.part import Part, Share
from sim.engine.setup import check_plan
from sim.outside import read_yaml
from sim.policy import Problem
from sim.types import ConfigError, Plan, Replica, Role, Stage

SUM_TOLERANCE = 1e-3
"""Shares are written with six digits."""


class StagePart(Part):
    """GPUs that hold the layers from the first to before the last of ``layers``."""

    gpus: Annotated[tuple[str, ...], Field(min_length=1)]
    layers: tuple[int, int]


class ReplicaPart(Part):
    """A copy of the model, stage by stage; one on more than one stage is a pipeline."""

    name: str
    role: Role = "mixed"
    stages: Annotated[tuple[StagePart, ...], Field(min_length=1)]
    models: tuple[str, ...] = ()


class SharePart(Part):
    """The share of all requests that takes this pair of replicas."""

    prefill: str
    decode: str
    share: Share


class FlowPart(Part):
    """Tokens per second from one node to the next; without ``source`` from outside, without ``target`` to it."""

    source: str | None = None
    target: str | None = None
    tokens_per_s: Annotated[float, Field(gt=0)]


class PlanPart(Part):
    """A plan file. Without shares (of replicas) or flows (of nodes) the system's router chooses by itself."""

    replicas: Annotated[tuple[ReplicaPart, ...], Field(min_length=1)]
    shares: tuple[SharePart, ...] = ()
    flows: tuple[FlowPart, ...] = ()


def read_plan(path: str | Path, problem: Problem) -> Plan:
    """The plan of a file, checked against the cluster and the model it is for."""
    try:
        part = PlanPart.model_validate(read_yaml(Path(path), "plan"))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error).removeprefix(': ')}") from None
    try:
        plan = _plan(part)
        check_plan(plan, problem)
    except ConfigError as error:
        text = str(error).removeprefix("plan: ")
        mend = "; take the scenario it was made for, or plan anew" if "cluster does not have" in text else ""
        raise ConfigError(f"plan file {path}: {text}{mend}") from None
    return plan


def plan_yaml(plan: Plan) -> str:
    """The text of a plan file."""
    data: dict[str, Any] = {
        "replicas": [
            {
                "name": replica.name,
                "role": replica.role,
                "stages": [
                    {"gpus": list(stage.gpus), "layers": [stage.first_layer, stage.end_layer]}
                    for stage in replica.stages
                ],
            }
            | ({"models": list(replica.models)} if replica.models else {})
            for replica in plan.replicas
        ]
    }
    if plan.shares:
        data["shares"] = [
            {"prefill": prefill, "decode": decode, "share": round(share, 6)}
            for (prefill, decode), share in plan.shares.items()
            if round(share, 6) > 0
        ]
    if plan.flows:
        data["flows"] = [
            {name: end for name, end in (("source", source), ("target", target)) if end} | {"tokens_per_s": flow}
            for (source, target), flow in plan.flows.items()
        ]
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _plan(part: PlanPart) -> Plan:
    replicas = tuple(
        Replica(
            name=replica.name,
            role=replica.role,
            models=replica.models,
            stages=tuple(
                Stage(
                    name=f"{replica.name}.{number}",
                    gpus=stage.gpus,
                    first_layer=stage.layers[0],
                    end_layer=stage.layers[1],
                )
                for number, stage in enumerate(replica.stages)
            ),
        )
        for replica in part.replicas
    )
    names = {replica.name for replica in replicas}
    flows = {(row.source or "", row.target or ""): row.tokens_per_s for row in part.flows}
    for end in {end for pair in flows for end in pair if end} - names:
        raise ConfigError(f"flows: {end!r} is not one of its replicas; they are {', '.join(names)}")
    for place, row in enumerate(part.shares):
        for end in (row.prefill, row.decode):
            if end not in names:
                raise ConfigError(f"shares[{place}]: {end!r} is not one of its replicas; they are {', '.join(names)}")
    shares = {(row.prefill, row.decode): row.share for row in part.shares}
    if len(shares) < len(part.shares):
        raise ConfigError("shares: a pair occurs twice; name each once")
    if shares and abs(sum(shares.values()) - 1) > SUM_TOLERANCE:
        raise ConfigError(f"shares: they add up to {sum(shares.values()):g}; they must add up to 1")
    return Plan(replicas=replicas, shares=shares, flows=flows)
