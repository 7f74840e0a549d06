"""Prefill of equal prompts without batching as an M/D/1 queue: DistServe, section 3.1, equations 1 to 3.

``prompt_s`` is how long one GPU takes for a prompt, ``rate_per_s`` how many arrive. All give the mean TTFT in seconds,
infinite where the queue grows for ever.
"""

from __future__ import annotations

from math import inf, sqrt


def ttft_s(prompt_s: float, rate_per_s: float) -> float:
    """One GPU."""
    return prompt_s + _wait_s(prompt_s, rate_per_s)


def inter_op_ttft_s(prompt_s: float, rate_per_s: float, stages: int = 2) -> float:
    """A pipeline of equal stages: a prompt takes as long as before, but the next may start after a stage's share."""
    return prompt_s + _wait_s(prompt_s / stages, rate_per_s)


def intra_op_ttft_s(prompt_s: float, rate_per_s: float, speedup: float) -> float:
    """Tensor parallelism that makes every prompt ``speedup`` times as fast."""
    return ttft_s(prompt_s / speedup, rate_per_s)


def crossover_load(speedup: float) -> float:
    """Load (rate times one GPU's prompt time) above which two stages beat two tensor-parallel GPUs.

    ``speedup`` in (1, 2): there, at low load tensor parallelism wins by its speed, at high load the pipeline by its
    capacity. The root of the difference of the two TTFTs, a quadratic in the load.
    """
    k = speedup
    # 1 - 1/k + x / (4 (2 - x)) = x / (2 k (k - x)), times 4 k (2 - x) (k - x)
    a = 4 * (k - 1) - k + 2
    b = -4 * (k - 1) * (2 + k) + k * k - 4
    c = 8 * k * (k - 1)
    return (-b - sqrt(b * b - 4 * a * c)) / (2 * a)


def _wait_s(service_s: float, rate_per_s: float) -> float:
    load = rate_per_s * service_s
    return inf if load >= 1 else load * service_s / (2 * (1 - load))
