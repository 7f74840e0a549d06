"""A thin real engine: what the simulator predicts, executed. Needs torch.

``run.execute`` is the entrance. Read ``stage.py`` first (a stage runs steps), then ``decoder.py`` (one forward pass),
``step_cost.py`` (the simulator's engine with measured steps) and ``wall.py`` (the simulator's engine against the real
clock and worker processes). ``shard.py`` is tensor parallelism, ``crew.py`` says which processes a plan needs,
``carriers.py`` how KV gets from one to another.
"""

from sim.types import ConfigError

try:
    import torch  # noqa: F401
except ImportError:
    raise ConfigError("executing a model needs torch; pip install 'phasewise[calibrate]'") from None
