"""How long a step takes: ``StepCost`` binds to a stage and prices its work in integer picoseconds.

Read ``step.py`` for the contract and the law, ``roofline.py`` for the analytic model, ``fitted.py`` for
profiles, ``kernels.py`` for models built from kernel tables, ``polynomial.py`` for whole steps in a closed form,
``overlapped.py`` for asynchronous scheduling, ``graphs.py`` for CUDA graphs, ``tables.py`` for what a profile measures,
``pieces.py`` for the integer functions behind them, ``links.py`` for collectives and the KV codec.
"""

from sim.cost.capped import PowerCapped
from sim.cost.fitted import Device, Fitted, Profile, Provenance
from sim.cost.graphs import VLLM_GRAPHS, Graphs
from sim.cost.kernels import AttentionTable, GemmTable, Kernels
from sim.cost.links import Reached, codec_seconds, collective_seconds
from sim.cost.padded import PaddedChunks, saturating_chunk
from sim.cost.polynomial import DecodeTerms, Polynomial, PromptTerms
from sim.cost.roofline import Overhead, Roofline
from sim.cost.sparse import Sparse, Sparsity
from sim.cost.step import StageCost, StepCost, advanced, seconds
from sim.cost.tables import SHARED_LAUNCH, Grid, HeldOut, ProfileEntry, Table

__all__ = [
    "SHARED_LAUNCH",
    "VLLM_GRAPHS",
    "AttentionTable",
    "DecodeTerms",
    "Device",
    "Fitted",
    "GemmTable",
    "Graphs",
    "Grid",
    "HeldOut",
    "Kernels",
    "Overhead",
    "PaddedChunks",
    "Polynomial",
    "PowerCapped",
    "Profile",
    "ProfileEntry",
    "PromptTerms",
    "Provenance",
    "Reached",
    "Roofline",
    "Sparse",
    "Sparsity",
    "StageCost",
    "StepCost",
    "Table",
    "advanced",
    "codec_seconds",
    "collective_seconds",
    "saturating_chunk",
    "seconds",
]
