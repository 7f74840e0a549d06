"""Reschedulers: what to do about faults, notices and load. Returning None keeps the plan, less what is lost."""

from __future__ import annotations

from sim.policy import View
from sim.types import Change, Plan, Signal


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
