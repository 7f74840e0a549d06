"""AlpaServe (OSDI 2023; arXiv 2302.11665): models share groups of GPUs, so that a burst for one finds them all."""

from __future__ import annotations

from collections import defaultdict

from sim.batchers import OneModel
from sim.planners.alpaserve import Placement, Search, stage_seconds
from sim.planners.alpaserve.fast import PIPELINE_OVERHEAD
from sim.policy import RequestView, System, View
from sim.reschedulers import RestorePlan
from sim.transfers import Whole
from sim.types import ConfigError, Plan, Reject, Replica, Route


class ByClock:
    """To the hosting group that is free first, by a clock of its own for each (section 4.3).

    ``admission``: who would miss ``slo.e2e_s`` is refused at once, so that others do not wait for it. Times are the
    latency model's for one request alone, of the predicted answer. A request without a class may go anywhere.
    """

    def __init__(self, admission: bool = True) -> None:
        self.admission = admission
        self._free_s: dict[str, float] = defaultdict(float)
        self._seen: Plan | None = None
        self._hosts: dict[str, Replica] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if view.plan is not self._seen:
            self._seen, self._hosts = view.plan, {replica.name: replica for replica in view.plan.replicas}
        hosts = [replica for replica in view.replicas if self._hosts_model(replica.name, request.klass)]
        if not hosts:
            return Reject(f"no group that is up hosts {request.klass or 'the model'}")
        best = min(hosts, key=lambda replica: self._free_s[replica.name])
        spec = self._hosts[best.name]
        row = stage_seconds(view.problem, spec.stages, request.input_tokens, request.predicted_output_tokens)
        row = tuple(stage_s * (1 + PIPELINE_OVERHEAD * len(row)) for stage_s in row)
        start_s = max(self._free_s[best.name], view.now_s)
        bound_s = view.problem.slo.classes.get(request.klass or "", view.problem.slo).e2e_s
        if self.admission and bound_s is not None and start_s + sum(row) - request.arrival_s > bound_s:
            return Reject(f"it would take {start_s + sum(row) - request.arrival_s:.3g} s, over {bound_s:g} s")
        self._free_s[best.name] = start_s + max(row)
        return Route(best.leg, best.leg)

    def _hosts_model(self, name: str, klass: str | None) -> bool:
        models = self._hosts[name].models
        return klass is None or not models or klass in models

    def finished(self, request: RequestView) -> None:
        """It keeps no reservations."""


def alpaserve(
    search: Search = "greedy",
    max_tp: int = 4,
    max_pp: int = 8,
    slo_scale: float = 5.0,
    arrivals: int = 2000,
    cv: float = 1.0,
    admission: bool = True,
    batch: int | None = 1,
) -> System:
    """AlpaServe: classes of requests are models; groups of GPUs, their shapes and whose models each hosts, by search.

    ``search``: greedy or beam, over groups in every shape up to ``max_tp`` and ``max_pp``, or single (each GPU by
    itself, SR), scored on simulated ``arrivals`` (gamma, ``cv``) within ``slo.e2e_s``, else ``slo_scale`` times a
    request alone. ``admission`` refuses who would miss ``slo.e2e_s``. ``batch``: requests in one; null: all that fit.
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"system.batch is {batch}; it must be a whole number >= 1, or null")
    return System(
        name="alpaserve",
        mirrors="AlpaServe (OSDI 2023), by its artifact's simulator; one shape of model",
        planner=Placement(search=search, max_tp=max_tp, max_pp=max_pp, slo_scale=slo_scale, arrivals=arrivals, cv=cv),
        router=lambda: ByClock(admission),
        batcher=lambda role: OneModel(batch),
        transfer=Whole,
        rescheduler=RestorePlan,
    )
