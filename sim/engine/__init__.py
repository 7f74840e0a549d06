"""The engine: the life of requests, replicas, links and plan changes over integer time.

Read ``run.py`` first (a request's life, top to bottom), then ``flight.py`` (an iteration, or many equal ones, in
flight on a replica), ``batch.py`` (what a batcher may do), ``links.py`` and ``changes.py``.
Only ``clock.py`` imports simpy.
"""

from sim.engine.run import simulate

__all__ = ["simulate"]
