"""Metis's planner (USENIX ATC 2024): pipelines over GPUs of several types, with stages of unequal size and layers.

Read ``groups.py`` for what is searched, ``balance.py`` for layers and shares, ``training.py`` for the planner as it is
(training steps, from a profile), ``serving.py`` for ours: a prefill and a decode pool, each laid out by that search.
Source: the paper's public repository (SamsungLabs/Metis), whose code and data are not here: CC BY-NC 4.0.
"""

from sim.planners.metis.serving import Metis

__all__ = ["Metis"]
