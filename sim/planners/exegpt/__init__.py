"""ExeGPT's scheduler (ASPLOS 2024; arXiv 2404.07947): the schedule with the highest throughput within a latency bound.

Start with ``search.ExeGPT``. ``schedule`` has the two kinds of schedule and what a point of either gives, ``bound`` the
branch and bound, ``lengths`` how many requests end when, ``layout`` who has which layers, ``timing`` what it takes.
"""

from sim.planners.exegpt.bound import Found, Perf, branch_and_bound, exhaustive
from sim.planners.exegpt.layout import Tensor
from sim.planners.exegpt.lengths import Rule, Traffic
from sim.planners.exegpt.schedule import Kind, Schedule
from sim.planners.exegpt.search import ExeGPT, Search

__all__ = [
    "ExeGPT",
    "Found",
    "Kind",
    "Perf",
    "Rule",
    "Schedule",
    "Search",
    "Tensor",
    "Traffic",
    "branch_and_bound",
    "exhaustive",
]
