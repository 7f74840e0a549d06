"""What a schedule needs to know of the lengths: prompts, decode iterations, and when requests end within a phase.

A request of S output tokens takes S - 1 decode iterations, as its prompt gives the first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sim.policy import Workload

Rule = Literal["littles_law", "paper"]
RULES: tuple[Rule, ...] = ("littles_law", "paper")
BOUNDED_SHARE = 0.99
"""The latency that is bounded is that of the output length which so many requests do not exceed."""


def latency_s(tokens: float, decode_iterations: int, phase_s: float) -> float:
    """A request stays for whole phases: 63 tokens, 7 a phase, nine of them (Table 6)."""
    return max(1, ceil(tokens / decode_iterations)) * phase_s


@dataclass(frozen=True)
class Traffic:
    """Prompt tokens and decode iterations of sampled requests."""

    prompts: tuple[int, ...]
    iterations: tuple[int, ...]

    @classmethod
    def of(cls, workload: Workload) -> Traffic:
        return cls(tuple(one for one, _ in workload.lengths), tuple(output - 1 for _, output in workload.lengths))

    @cached_property
    def _counts(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Distinct numbers of iterations, and their shares."""
        values, counts = np.unique(np.array(self.iterations, dtype=np.int64), return_counts=True)
        return values, counts / counts.sum()

    @cached_property
    def prompt_tokens(self) -> float:
        return sum(self.prompts) / len(self.prompts)

    @cached_property
    def decode_iterations(self) -> float:
        return sum(self.iterations) / len(self.iterations)

    @cached_property
    def bounded_iterations(self) -> int:
        return int(np.quantile(np.array(self.iterations), BOUNDED_SHARE, method="inverted_cdf"))

    @cached_property
    def context_tokens(self) -> float:
        """Tokens that a decoding sequence attends to, over all its iterations; long answers weigh more."""
        steps = sum(self.iterations)
        if not steps:
            return self.prompt_tokens + 1
        pairs = zip(self.prompts, self.iterations, strict=True)
        return sum(count * prompt + count * (count + 1) / 2 for prompt, count in pairs) / steps

    @cached_property
    def _phases(self) -> dict[int, float]:
        return {}

    def phases(self, n: int) -> float:
        """Phases of ``n`` decode iterations that a request takes, in the mean."""
        if n not in self._phases:
            values, shares = self._counts
            self._phases[n] = float(np.sum(shares * np.ceil(values / n)))
        return self._phases[n]

    def ending(self, n: int) -> NDArray[np.float64]:
        """The paper's P_D(U): shares of a batch that end with iteration 1 to ``n`` of a phase."""
        values, shares = self._counts
        ends = np.zeros(n)
        running = values > 0
        values, shares = values[running], shares[running]
        phases = np.ceil(values / n)
        np.add.at(ends, (values - 1) % n, shares / phases)
        return ends

    def batch(self, encode_batch: int, n: int, rule: Rule) -> tuple[float, float]:
        """Decoding sequences when a phase begins, and their mean over its ``n`` iterations.

        ``littles_law``: requests enter at ``encode_batch`` a phase and stay for their own number of phases. ``paper``:
        the batch of which ``encode_batch`` end in a phase, if those in it were like those that arrive; short ones leave
        sooner, so it holds too many.
        """
        if rule == "littles_law":
            return encode_batch * self.phases(n), encode_batch * self.decode_iterations / n
        ends = self.ending(n)
        share = float(ends.sum())
        if not share:
            return 0.0, 0.0
        gone = float(np.sum(ends * (n - 1 - np.arange(n)))) / n
        return encode_batch / share, encode_batch / share * (1 - gone)
