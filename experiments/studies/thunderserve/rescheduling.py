"""Rescheduling against none: random losses of machines and random shifts of the workload on ThunderServe's cloud.

``python -m experiments.studies.thunderserve.rescheduling [--cases 50] [--how lightweight]``.

Each case draws a workload, a plan (by a short search), a load, and a machine that is lost a minute in, or, in every
third case, the other workload that comes from two minutes on. It prints the share within the SLO from then on without
rescheduling and with it, and how often and how much either is ahead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from experiments.studies.thunderserve.world import LENGTHS, at, cloud, problem
from sim import SYSTEMS, Plan, Problem, Request, simulate
from sim.metrics import met
from sim.planners.thunderserve import TabuSearch
from sim.systems.split.distserve import poisson
from sim.types import ClusterEvent
from traces import TraceSource

LOST_AT_S, SHIFTED_AT_S, LASTS_S = 60.0, 120.0, 240.0
PLANNED_FOR = {"coding": 9.0, "conversation": 7.0}
"""About what short searches find plans for."""
PLANNING_S = {None: 0.0, "lightweight": 2.0, "full": 30.0}


class Case(NamedTuple):
    workload: str
    load: float
    event: str
    without: float
    with_it: float


@cache
def planned(workload: str, seed: int) -> Plan:
    where = replace(at(problem(cloud(), workload), PLANNED_FOR[workload]), seed=seed)
    return TabuSearch(n_steps=15).plan(where)


def case(seed: int, how: str) -> Case:
    rng = np.random.default_rng(seed)
    workload = str(rng.choice(list(LENGTHS)))
    plan, load = planned(workload, int(rng.integers(4))), round(float(rng.uniform(0.4, 0.9)), 2)
    rate = load * PLANNED_FOR[workload]
    where = at(problem(cloud(), workload), rate)
    node = str(rng.choice([one.name for one in cloud().nodes]))
    if seed % 3:
        requests = poisson(where.workload.lengths, rate, round(rate * LASTS_S), seed)
        events, since_s, what = [ClusterEvent(at_s=LOST_AT_S, kind="node_lost", target=node)], LOST_AT_S, f"{node} lost"
    else:
        requests, events, since_s, what = shifting(where, workload, rate, seed), [], SHIFTED_AT_S, "shift"
    shares = [_share(where, plan, requests, events, since_s, one) for one in (None, how)]
    return Case(workload, load, what, *shares)


def shifting(where: Problem, workload: str, rate_per_s: float, seed: int) -> list[Request]:
    """This workload, and then the other, as many a second."""
    (other,) = [name for name in LENGTHS if name != workload]
    before = poisson(where.workload.lengths, rate_per_s, round(rate_per_s * SHIFTED_AT_S), seed)
    lengths = problem(cloud(), other).workload.lengths
    after = poisson(lengths, rate_per_s, round(rate_per_s * (LASTS_S - SHIFTED_AT_S)), seed + 1)
    start_s = max(before[-1].arrival_s, SHIFTED_AT_S)
    return before + [
        replace(one, id=len(before) + number, arrival_s=start_s + one.arrival_s) for number, one in enumerate(after)
    ]


def _share(
    where: Problem, plan: Plan, requests: Sequence[Request], events: Sequence[ClusterEvent], since_s: float,
    how: str | None,
) -> float:  # fmt: skip
    system = SYSTEMS["thunderserve"](n_steps=6, reschedule=how, planning_s=PLANNING_S[how])
    columns = simulate(where, system, TraceSource(list(requests)), plan=plan, events=events).columns
    return float(met(columns, where.slo)["all"][columns["arrival_s"] > since_s].mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--how", choices=("lightweight", "full"), default="lightweight")
    given = parser.parse_args(arguments)
    cases = []
    for seed in range(given.cases):
        one = case(seed, given.how)
        cases.append(one)
        print(f"{seed:3d}  {one.workload:12s}  load {one.load:.2f}  {one.event:8s}  without {one.without:6.1%}  "
              f"{given.how} {one.with_it:6.1%}", flush=True)  # fmt: skip
    gains = np.array([one.with_it - one.without for one in cases])
    print(
        f"{given.how}: ahead in {int((gains > 0).sum())}, equal in {int((gains == 0).sum())}, behind in "
        f"{int((gains < 0).sum())} of {len(cases)}; mean gain {gains.mean():+.1%}, least {gains.min():+.1%}"
    )


if __name__ == "__main__":
    main()
