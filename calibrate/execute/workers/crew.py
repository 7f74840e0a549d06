"""The workers of a plan: one for each GPU of each stage, what it is called, what it must be told, whom it talks to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import distributed

from calibrate.execute.how import Execution
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.shard import Shard
from calibrate.execute.workers.fleet import cores_for
from sim.memory import kv_blocks
from sim.policy import Problem, System
from sim.types import ConfigError, Plan, Replica, Stage

Configs = dict[str, dict[str, Any]]


class Part(NamedTuple):
    """Layers and key-value heads of a move that one worker sends to another; heads are counted as either has them."""

    source: str
    target: str
    first: int
    end: int
    source_head: int
    target_head: int
    heads: int

    @property
    def size(self) -> int:
        return (self.end - self.first) * self.heads


def workers_of(stage: Stage) -> tuple[str, ...]:
    """By rank."""
    return (stage.name,) if stage.tp == 1 else tuple(f"{stage.name}/{rank}" for rank in range(stage.tp))


def parts_of(source: Replica, target: Replica, kv_heads: int) -> list[Part]:
    """What each worker of ``source`` sends to each of ``target``, so that all have the layers and heads they compute.

    Where several hold the same heads, they take turns in sending.
    """
    found = []
    for one in source.stages:
        for other in target.stages:
            first, end = max(one.first_layer, other.first_layer), min(one.end_layer, other.end_layer)
            if first < end:
                found += [
                    Part(workers_of(one)[a], workers_of(other)[b], first, end, *span)
                    for a, b, *span in _shared_heads(one.tp, other.tp, kv_heads)
                ]
    return found


def link_shares(parts: Sequence[Part]) -> list[float]:
    """What each part of a move may use of the path: its sender's share, since a sender sends its parts one by one."""
    total = sum(part.size for part in parts)
    return [sum(each.size for each in parts if each.source == part.source) / total for part in parts]


def _shared_heads(source_tp: int, target_tp: int, kv_heads: int) -> list[tuple[int, int, int, int, int]]:
    """(source rank, target rank, first head as the source counts, as the target counts, heads) of what is sent."""
    found = []
    copies = max(1, source_tp // kv_heads)
    for b in range(target_tp):
        want = Shard(b, target_tp).share(kv_heads)
        for a in range(source_tp):
            have = Shard(a, source_tp).share(kv_heads)
            start, stop = max(have.start, want.start), min(have.stop, want.stop)
            if start < stop and a % copies == b % copies:
                found.append((a, b, start - have.start, start - want.start, stop - start))
    return found


def joins(replica: Replica) -> list[tuple[str, list[str]]]:
    """(worker, those of the next stage that get its hidden states): every rank has all of them, so ranks pair up."""
    found = []
    for front, back in zip(replica.stages, replica.stages[1:], strict=False):
        for rank, name in enumerate(workers_of(front)):
            found.append((name, list(workers_of(back)[rank :: front.tp])))
    return found


def worker_configs(
    problem: Problem, system: System, plan: Plan, arch: Architecture, how: Execution, store: str, *, paced: bool = False
) -> Configs:
    """What each process must be told, by worker. ``store``: a file that does not exist, for workers to meet by.
    ``paced``: they say how fast their device is (``pace.py``).

    ``ConfigError`` if a stage's GPUs cannot share the model, or are not there.
    """
    limited = replace(problem, limits=system.limits)
    configs: Configs = {}
    for replica in plan.replicas:
        blocks = kv_blocks(limited, replica.stages, system.limits)
        for stage in replica.stages:
            _check(stage, arch, how.device)
            for rank, name in enumerate(workers_of(stage)):
                configs[name] = {
                    "architecture": arch.as_json(), "first": stage.first_layer, "end": stage.end_layer,
                    "blocks": blocks, "block_size": system.limits.block_size, "device": _device(how, len(configs)),
                    "seed": problem.seed, "folder": how.folder, "rank": rank, "ranks": workers_of(stage),
                    "paced": paced,
                }  # fmt: skip
    cores = cores_for(configs)
    world = _world(plan, arch, how, configs, store)
    for name, config in configs.items():
        config |= {"core": cores[name] if config["device"] == "cpu" else None, "world": world}
    return configs


def _check(stage: Stage, arch: Architecture, device: str) -> None:
    try:
        Shard(0, stage.tp).architecture(arch)
    except ConfigError as error:
        raise ConfigError(f"plan: stage {stage.name}: {error}") from None
    gpus = 1 if ":" in device else torch.cuda.device_count()
    if stage.tp > 1 and device.startswith("cuda") and stage.tp > gpus:
        raise ConfigError(
            f"plan: stage {stage.name}: tp {stage.tp} on {device}, which is {gpus} GPU(s) here; NCCL needs one for "
            "each rank: use fewer, or the CPU"
        )


def _device(how: Execution, number: int) -> str:
    return how.device if how.device != "cuda" else f"cuda:{number % torch.cuda.device_count()}"


def _world(plan: Plan, arch: Architecture, how: Execution, configs: Configs, store: str) -> dict[str, Any] | None:
    """The process groups of a run: one for each stage of several ranks, and for each pair that KV may go between."""
    groups = [workers_of(stage) for replica in plan.replicas for stage in replica.stages if stage.tp > 1]
    if how.kv_by_group:
        groups += _pairs(plan, arch, configs)
    if not groups:
        return None
    backend = "nccl" if how.device.startswith("cuda") else "gloo"
    if backend == "nccl" and not distributed.is_nccl_available():
        raise ConfigError("device: cuda: several GPUs want NCCL, which this torch was built without; use tp 1")
    return {"workers": list(configs), "groups": groups, "backend": backend, "store": store}


def _pairs(plan: Plan, arch: Architecture, configs: Mapping[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Ordered pairs of workers that may send KV; not those that share a GPU, which NCCL refuses."""
    parts = [
        part
        for source, target in permutations(plan.replicas, 2)
        for part in parts_of(source, target, arch.num_kv_heads)
    ]
    ends = dict.fromkeys((part.source, part.target) for part in parts)
    devices = {name: config["device"] for name, config in configs.items()}
    return [(a, b) for a, b in ends if devices[a] == "cpu" or devices[a] != devices[b]]
