"""The serving systems, one file each: ``SYSTEMS[name](**options)`` gives a ``System``.

A factory's keyword parameters are the options a scenario may set, its docstring's first line is its description.
"""

from __future__ import annotations

from collections.abc import Callable

from sim.policy import System
from sim.systems.alpaserve import alpaserve
from sim.systems.dejavu import dejavu
from sim.systems.distserve import distserve
from sim.systems.exegpt import exegpt
from sim.systems.fastertransformer import fastertransformer
from sim.systems.helix import helix
from sim.systems.hexgen import hexgen
from sim.systems.hexgen2 import hexgen2
from sim.systems.melange import melange
from sim.systems.metis import metis
from sim.systems.orca import orca
from sim.systems.sarathi import sarathi
from sim.systems.sarathi_serve import sarathi_serve
from sim.systems.splitwise import splitwise
from sim.systems.spotserve import spotserve
from sim.systems.tetriinfer import tetriinfer
from sim.systems.thunderserve import thunderserve
from sim.systems.vllm import vllm

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
