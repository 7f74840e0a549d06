"""phasewise's simulator: LLM serving on heterogeneous GPUs whose two phases may run on different machines.

Reading guide, in order: ``types`` (the words), ``cluster`` and ``model`` (the hardware and what it runs), ``cost``
(how long a step takes), ``policy`` (what a scheduler may see and do), ``engine`` (the life of a request), ``record``
and ``metrics`` (what comes out). ``batchers``, ``routers``, ``transfers``, ``reschedulers`` and ``planners`` hold the
policies, ``systems`` composes them. Imports only point upward in that list.

>>> from sim import Cluster, Problem, simulate            # doctest: +SKIP
>>> result = simulate(problem, SYSTEMS["vllm"](tp=4), source)
"""

from sim.cluster import Cluster
from sim.engine import simulate
from sim.model import ModelSpec
from sim.policy import Limits, Problem, System, Workload
from sim.record import Result
from sim.systems import SYSTEMS
from sim.types import (
    ClusterEvent,
    ConfigError,
    Plan,
    PolicyError,
    Request,
    SimulationError,
    Slo,
    StalledError,
)

__all__ = [
    "SYSTEMS",
    "Cluster",
    "ClusterEvent",
    "ConfigError",
    "Limits",
    "ModelSpec",
    "Plan",
    "PolicyError",
    "Problem",
    "Request",
    "Result",
    "SimulationError",
    "Slo",
    "StalledError",
    "System",
    "Workload",
    "simulate",
]
