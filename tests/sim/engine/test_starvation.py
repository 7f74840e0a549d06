"""A decode replica that holds work for several sequences, and room for them, does not run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings

from sim import SYSTEMS, Request, System
from sim.batchers import Saturating
from sim.engine.replica.batch import Draft
from sim.engine.replica.job import Job
from sim.engine.replica.state import ReplicaState
from sim.policy import Batcher
from sim.predictors import TrueLength
from sim.routers import ByShare
from sim.types import Role
from tests.lab import SPLIT, spied
from tests.lab import system as lab
from tests.test_laws import OF_NODES, SETTINGS, traffic, worlds
from tests.toys import cluster, problem, request, run, with_limits

PATIENCE = 3
"""Iterations that a replica may take to notice: what came during one is looked at after it. A scheduler that decides a
step ahead takes one more."""


class Watch:
    """A batcher, watched: how long its replica has run one sequence while another had room to its end."""

    def __init__(self, batcher: Batcher, found: list[int]) -> None:
        self._batcher = batcher
        self._found = found
        self._alone = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batcher, name)

    def fill(self, batch: Draft) -> None:
        self._batcher.fill(batch)
        replica = batch.replica
        alone = replica.role == "decode" and len(replica.running) == 1 and not batch.chunks and not batch.preempted
        self._alone = self._alone + 1 if alone and could_join(replica) else 0
        self._found.append(self._alone)


def could_join(replica: ReplicaState) -> bool:
    """Whoever arrived holds its blocks and only needs those of the next token; whoever is swapped out, or first in line
    with its KV elsewhere, needs room beside the one that runs until both have ended."""
    (runs,) = replica.running
    made = getattr(replica.batcher, "_made", None)  # ExeGPT's: its plan may be made for one sequence at a time
    planned = getattr(made(), "most_decodes", replica.max_num_seqs) if made else replica.max_num_seqs
    seats = min(replica.max_num_seqs, planned) - runs.samples
    above = replica.ledger.free - replica.ledger.total // 100  # a watermark
    if any(job.samples <= seats and job.samples + runs.samples < above for job in replica.arrived):
        return True
    free = above - at_the_end(runs, replica) + runs.held_blocks + runs.copied_blocks

    def fits(job: Job) -> bool:
        return job.samples <= seats and at_the_end(job, replica) < free

    if replica.arrived or replica.swapped:
        return bool(replica.swapped) and all(map(fits, replica.swapped))
    if replica.waiting:  # somebody whose prompt is computed again here is first in line
        return False
    return bool(replica.inbox) and not replica.arriving and fits(replica.inbox[0].job)


def at_the_end(job: Job, replica: ReplicaState) -> int:
    return job.blocks_for(job.input_tokens + job._output_tokens, replica.block_size)


def watched(system: System) -> tuple[System, list[int]]:
    found: list[int] = []

    def make(role: Role) -> Any:
        return Watch(system.batcher(role), found)

    return replace(system, batcher=make), found


def tight(system: System, batcher: Callable[[], Batcher] | None = None) -> list[int]:
    """More requests than their decode replica has room for: iterations alone, fill by fill."""
    if batcher is not None:
        system = replace(system, batcher=lambda role: batcher())
    watching, found = watched(with_limits(system, num_kv_blocks=60))
    requests = [request(n, 0.001 * n, 90, 60 + 50 * (n % 4)) for n in range(100)]
    run(watching, requests, problem(cluster(1, 2)), plan=SPLIT, step_by_step=True)
    return found


class Overtaking(Saturating):
    """As it was: KV takes whatever is free, and waits while anybody is swapped out."""

    lets_in = None  # type: ignore[assignment]

    def fill(self, batch: Any) -> None:
        swapped = batch.swapped
        super().fill(_Hiding(batch) if swapped and batch.num_running else batch)


class _Hiding:
    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self.arrived = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


def test_the_law_can_fail() -> None:
    """A replica that lets KV in before those whom it swapped out drains to one sequence, and stays there."""
    assert max(tight(SYSTEMS["thunderserve"](), Overtaking)) > 10 * PATIENCE
    assert max(tight(SYSTEMS["thunderserve"]())) <= PATIENCE


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.split()[0] not in OF_NODES])
@settings(max_examples=10, phases=[Phase.generate])
@given(world=worlds(), requests=traffic())
def test_no_decode_replica_starves_itself(name: str, world: dict[str, Any], requests: list[Request]) -> None:
    system, found = watched(with_limits(SETTINGS[name](), **world["limits"]))
    where = problem(cluster(gpus=2, nodes=2, gbps=world["gbps"]), world["cost"])
    run(system, requests, where, step_by_step=True, predictor=TrueLength())
    assert max(found, default=0) <= PATIENCE + world["limits"]["async_scheduling"]


# ---------------------------------------------------------------- how Saturating sees to it


def test_nobody_overtakes_those_who_were_swapped_out() -> None:
    """While one is swapped out no KV is let in: whoever is swapped out returns before a later request decodes."""
    system, fills = spied(lab(Saturating, router=ByShare, num_kv_blocks=30))
    run(system, [request(n, 0.0, 90, 60) for n in range(8)], problem(cluster(1, 2)), plan=SPLIT, step_by_step=True)
    seen: set[int] = set()
    for fill in fills:
        if fill.role == "decode":
            assert not fill.swapped or set(fill.decodes) - set(fill.swapped) <= seen | set(fill.decodes[:1]), fill
            seen |= set(fill.decodes)
    assert any(fill.swapped for fill in fills)
