"""ThunderServe's planner (MLSys 2025; arXiv 2502.09334): who is grouped, in which phase, and who sends to whom.

Start with ``tabu.TabuSearch``. ``groups`` has the start and the moves, ``parallel`` lays a group out, ``replay``
predicts its latencies, ``orchestrate`` routes by an LP, ``world`` joins them into the price of a state. What the
paper's public summaries leave open is ours and says so.
"""

from sim.planners.thunderserve.tabu import LogRow, Search, TabuSearch
from sim.planners.thunderserve.world import Candidate

__all__ = ["Candidate", "LogRow", "Search", "TabuSearch"]
