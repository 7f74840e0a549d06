"""What every study needs: profiles by name, one way to run a simulation, and its load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from calibrate.profile.file import read_profile, shipped_profiles
from sim import Limits, Problem, Request, Result, Workload, simulate
from sim.cluster import Cluster
from sim.cost import Fitted, Overhead, Profile
from sim.model import ModelSpec, model
from sim.policy import Source, System

LLAMA = "llama-3.1-8b"


@dataclass(frozen=True)
class Recorded:
    """A source that replays a list."""

    requests: Sequence[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return self.requests if finished is None else ()


@dataclass
class Following:
    """A source whose finished requests cause others (turns of a conversation, places in a closed loop)."""

    first: Sequence[Request]
    after: Callable[[float, Request], Iterable[Request]]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return self.first if finished is None else self.after(now_s, finished)


def shipped(name: str) -> Profile:
    """A profile that comes with the package."""
    return read_profile(shipped_profiles()[name])


def run(
    cluster: Cluster,
    system: System,
    source: Source,
    profiles: Sequence[Profile],
    limits: Limits,
    overhead: Overhead | None = None,
    *,
    spec: ModelSpec | None = None,
    step_by_step: bool = False,
) -> Result:
    """Simulate a model: ``spec``, else Llama-3.1-8B in bfloat16."""
    problem = Problem(
        cluster=cluster,
        model=spec or model(LLAMA),
        cost=Fitted(profiles=tuple(profiles), overhead=overhead),
        workload=Workload(rate_per_s=1.0, lengths=((1000, 100),)),
    )
    return simulate(problem, system.with_limits(limits), source, step_by_step=step_by_step)


def busy(result: Result) -> float:
    """Share of the makespan that the busiest replica computed."""
    return float(result.replicas.busy_s.max()) / result.makespan_s
