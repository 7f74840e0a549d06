"""phasewise in Python: what scripts and notebooks import. Every name lives in a room of its own; this is the door.

>>> import phasewise as pw
>>> scenario = pw.load("experiments/quickstart.yaml", ["workload.limit=200"])
>>> run = pw.run(scenario)  # one system: run.summary, run.requests, run.steps  # doctest: +SKIP
>>> pw.compare(scenario, "vllm,splitwise").table  # the same requests under several  # doctest: +SKIP
>>> pw.goodput(scenario)  # how much it carries within its SLO  # doctest: +SKIP
>>> pw.plan(scenario, "thunderserve")  # how to lay it out  # doctest: +SKIP

Importing this loads nothing else; a name loads its room when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrate.profile.file import read_profile as read_profile
    from calibrate.profile.file import shipped_profiles as shipped_profiles
    from calibrate.profile.file import write_profile as write_profile
    from experiments.planning.goodput import goodput as goodput
    from experiments.planning.plan import plan as plan
    from experiments.runs.comparison import Comparison as Comparison
    from experiments.runs.comparison import compare as compare
    from experiments.runs.comparison import run as run
    from experiments.runs.rundir import Run as Run
    from experiments.runs.rundir import read_run as read_run
    from experiments.scenario.file import Scenario as Scenario
    from experiments.scenario.file import load as load
    from experiments.scenario.resolve import Setup as Setup
    from experiments.scenario.resolve import resolve as resolve
    from experiments.sweeps.sweep import sweep as sweep
    from sim.engine import simulate as simulate
    from sim.record import Result as Result
    from sim.systems import SYSTEMS as SYSTEMS
    from sim.types import ConfigError as ConfigError
    from traces import generate as generate_trace  # noqa: F401
    from traces import read as read_trace  # noqa: F401
    from traces import sample_path as sample_path
    from traces import statistics as trace_statistics  # noqa: F401
    from traces import write as write_trace  # noqa: F401

    __version__: str

_HOMES = {
    "calibrate.profile.file": ("read_profile", "shipped_profiles", "write_profile"),
    "experiments.planning.goodput": ("goodput",),
    "experiments.planning.plan": ("plan",),
    "experiments.runs.comparison": ("Comparison", "compare", "run"),
    "experiments.runs.rundir": ("Run", "read_run"),
    "experiments.scenario.file": ("Scenario", "load"),
    "experiments.scenario.resolve": ("Setup", "resolve"),
    "experiments.sweeps.sweep": ("sweep",),
    "sim.engine": ("simulate",),
    "sim.record": ("Result",),
    "sim.systems": ("SYSTEMS",),
    "sim.types": ("ConfigError",),
    "traces": ("sample_path",),
}
_PLACES = {name: (home, name) for home, names in _HOMES.items() for name in names} | {
    "generate_trace": ("traces", "generate"),
    "read_trace": ("traces", "read"),
    "trace_statistics": ("traces", "statistics"),
    "write_trace": ("traces", "write"),
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("phasewise")
    if name not in _PLACES:
        raise AttributeError(f"module 'phasewise' has no attribute {name!r}; it has {', '.join(sorted(_PLACES))}")
    home, own = _PLACES[name]
    value = getattr(import_module(home), own)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
