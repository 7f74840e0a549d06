"""Reschedulers: what to do about faults, notices and load. Returning None keeps the plan, less what is lost."""

from __future__ import annotations

from math import sqrt
from statistics import pstdev

from sim.policy import View, Workload
from sim.types import Change, Plan, Signal

SHIFT, CHANCE = 0.2, 3.0
"""What counts as another workload: ours, as papers that plan anew on a shift give no rule."""


class KeepPlan:
    """Never changes anything: lost replicas stay lost."""

    interval_s: float | None = None

    def react(self, signal: Signal, view: View) -> Change | None:
        return None


class RestorePlan:
    """As an operator would: when GPUs come back, bring back the replicas of the plan that need them.

    The plan is the given one, or what stood at the first signal.
    """

    interval_s: float | None = None

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def react(self, signal: Signal, view: View) -> Change | None:
        self._plan = self._plan or view.plan
        if signal.kind != "joined":
            return None
        return Change(plan=self._plan, reason=f"restore the plan: {', '.join(signal.gpus)} joined")


def shifted(before: Workload, now: Workload, by: float = SHIFT) -> bool:
    """Rate, mean input or mean output differs by more than this share, and by more than so few requests may by chance
    (three standard errors of what was observed; arrivals taken as Poisson)."""
    count = len(now.lengths)
    errors = (
        now.rate_per_s / sqrt(count),
        *(pstdev(lengths) / sqrt(count) for lengths in zip(*now.lengths, strict=True)),
    )
    figures = zip(_figures(before), _figures(now), errors, strict=True)
    return any(abs(new - old) > max(by * old, CHANCE * error) for old, new, error in figures)


def _figures(workload: Workload) -> tuple[float, float, float]:
    return workload.rate_per_s, workload.mean_input_tokens, workload.mean_output_tokens


def described(workload: Workload) -> str:
    rate, inputs, outputs = _figures(workload)
    return f"{rate:.3g} requests/s of {inputs:.0f} + {outputs:.0f} tokens"
