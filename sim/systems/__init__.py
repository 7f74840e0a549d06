"""The serving systems, one file each: ``SYSTEMS[name](**options)`` gives a ``System``.

A factory's keyword parameters are the options a scenario may set, its docstring's first line is its description.
"""

from __future__ import annotations

from collections.abc import Callable

from sim.policy import System
from sim.systems.placements.alpaserve import alpaserve
from sim.systems.placements.exegpt import exegpt
from sim.systems.placements.helix import helix
from sim.systems.placements.hexgen import hexgen
from sim.systems.placements.melange import melange
from sim.systems.placements.metis import metis
from sim.systems.placements.spotserve import spotserve
from sim.systems.schedulers.dejavu import dejavu
from sim.systems.schedulers.fastertransformer import fastertransformer
from sim.systems.schedulers.orca import orca
from sim.systems.schedulers.sarathi import sarathi
from sim.systems.schedulers.sarathi_serve import sarathi_serve
from sim.systems.schedulers.vllm import vllm
from sim.systems.split.distserve import distserve
from sim.systems.split.hexgen2 import hexgen2
from sim.systems.split.splitwise import splitwise
from sim.systems.split.tetriinfer import tetriinfer
from sim.systems.split.thunderserve import thunderserve

SYSTEMS: dict[str, Callable[..., System]] = {
    "vllm": vllm,
    "orca": orca,
    "fastertransformer": fastertransformer,
    "sarathi": sarathi,
    "sarathi-serve": sarathi_serve,
    "splitwise": splitwise,
    "tetriinfer": tetriinfer,
    "distserve": distserve,
    "thunderserve": thunderserve,
    "hexgen": hexgen,
    "hexgen-2": hexgen2,
    "helix": helix,
    "exegpt": exegpt,
    "alpaserve": alpaserve,
    "deja-vu": dejavu,
    "melange": melange,
    "spotserve": spotserve,
    "metis": metis,
}
