"""Routers: which replica prefills and which decodes a request, chosen once on arrival.

A router may read the view and its own counts; it must not look into queues behind the view, nor keep requests.
Ties go to the replica that the plan names first, so equal runs stay equal. ``counting.py`` has the plain ones,
``prefix.py`` and ``attainment.py`` one each.
"""

from sim.routers.attainment import ByAttainment, Gauge
from sim.routers.counting import ByShare, LeastLoadedPair, LeastRequests, RoundRobin
from sim.routers.prefix import PrefixAware

__all__ = [
    "ByAttainment",
    "ByShare",
    "Gauge",
    "LeastLoadedPair",
    "LeastRequests",
    "PrefixAware",
    "RoundRobin",
]
