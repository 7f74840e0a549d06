"""How long a step takes: ``StepCost`` binds to a stage and prices its work in integer picoseconds.

Read ``step.py`` for the contract and the law, ``roofline.py`` for the analytic model, ``fitted.py`` for
profiles, ``pieces.py`` for the integer functions behind both, ``links.py`` for collectives and the KV codec.
"""

from sim.cost.fitted import Fitted, Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.cost.links import codec_seconds, collective_seconds
from sim.cost.roofline import Roofline
from sim.cost.step import StageCost, StepCost, advanced, seconds

__all__ = [
    "Fitted",
    "Grid",
    "HeldOut",
    "Profile",
    "ProfileEntry",
    "Provenance",
    "Roofline",
    "StageCost",
    "StepCost",
    "Table",
    "advanced",
    "codec_seconds",
    "collective_seconds",
    "seconds",
]
