"""SpotServe (ASPLOS 2024; arXiv 2311.15566): pipelines on preemptible instances that move, with KV, when those change.

Left out, or otherwise than in the paper: a stage begins when its whole pipeline has its weights (there as soon as the
stage has); weights and KV flow at once and share links (there layer by layer; ``Migration.ready_s`` estimates that
order); whoever loses its KV to a loss without notice keeps what it has generated; each pipeline has a queue of its own,
dealt anew when pipelines come or go; batches are of up to ``system.engine.max_num_seqs``, whichever the optimiser chose
(as in the artifact); who joins is seen when ready.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sim.batchers import RequestLevel
from sim.batchers.common import make_room, welcome
from sim.planners.spotserve import Choice, Configuration, Pipelines
from sim.planners.spotserve.configure import Iterations, iterations, steps_before
from sim.planners.spotserve.mapping import Context, Shard, groups, in_order, matched, pipeline, shards
from sim.planners.spotserve.migration import Migration, migration
from sim.planners.spotserve.profile import times_of
from sim.policy import Batch, Limits, Problem, ReplicaView, RequestView, Rescheduler, System, View
from sim.reschedulers import shifted
from sim.routers import LeastRequests
from sim.transfers import Whole
from sim.types import Change, ConfigError, Later, Plan, Replica, Signal

Mode = Literal["spotserve", "reparallelization", "rerouting"]
MODES: tuple[Mode, ...] = ("spotserve", "reparallelization", "rerouting")
Part = Literal["controller", "mapper", "arranger"]
PARTS: tuple[Part, ...] = ("controller", "mapper", "arranger")
WINDOW_S = 30.0
"""In which the rate of arrivals is seen."""


class Resuming(RequestLevel):
    """Batches run to completion; who comes with its KV joins at once."""

    def fill(self, batch: Batch) -> None:
        make_room(batch)
        welcome(batch)
        super().fill(batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """Pipelines to change to. ``heirs``: by replica that goes, the one that goes on with its requests."""

    replicas: tuple[Replica, ...]
    migration: Migration
    heirs: dict[str, str]
    choice: Configuration


class Migrate:
    """Plans anew on notices, losses and joins, and when the rate of a window has shifted (unless it is given).

    After a notice the pipelines serve on as long as the migration, as estimated, still ends in time; whoever joins
    meanwhile waits for it. What is fetched comes from GPUs that hold it, doomed ones too, and requests go on where
    their KV has moved, unless they would be as far sooner if begun anew; the others begin anew. If no pipeline fits,
    what is left of the plan stays. ``mode`` and ``without``: see ``spotserve``.
    """

    def __init__(
        self,
        planner: Pipelines,
        *,
        mode: Mode = "spotserve",
        without: Collection[Part] = (),
        disk_bytes_per_s: float | None = None,
        window_s: float = WINDOW_S,
    ) -> None:
        self.interval_s: float | None = None if planner.need_per_s is not None else window_s
        self.planner = planner
        self.mode = mode
        self.without = without
        self.disk_bytes_per_s = disk_bytes_per_s
        self.window_s = window_s
        self._there: set[str] = set()
        self._doomed: set[str] = set()
        self._held: dict[str, Shard] = {}
        self._up: set[str] = set()
        self._dead: set[str] = set()
        self._problem: Problem | None = None  # with the traffic that was planned for
        self._shape = (0, 0)
        self._number = 0
        self._due: tuple[float, str] | None = None

    def react(self, signal: Signal, view: View) -> Change | Later | None:
        self._remember(signal, view)
        if signal.kind == "notice":
            return self._put_off(signal, view)
        if signal.kind == "due":
            if self._due is None or self._due[0] > signal.at_s + 1e-9:
                return None
            return self._change(view, self._due[1])
        if signal.kind == "lost":
            gone = any(set(signal.gpus) & set(spec.gpus) for spec in view.plan.replicas)
            return self._change(view, f"{', '.join(signal.gpus)} lost") if gone else None
        if self._due is not None or (signal.kind == "tick" and not self._rate_shifted(view)):
            return None
        return self._change(view, f"{', '.join(signal.gpus)} joined" if signal.gpus else "the rate shifted")

    # ------------------------------------------------------------ what is there

    def _remember(self, signal: Signal, view: View) -> None:
        if self._problem is None:
            self._begin(view)
        gpus = set(signal.gpus)
        up = {replica.name for replica in view.replicas}
        if signal.kind == "joined":
            self._there |= gpus
        elif signal.kind == "notice":
            self._doomed |= gpus
        elif signal.kind == "lost":
            self._there -= gpus
            self._doomed -= gpus
            self._dead |= {spec.name for spec in view.plan.replicas if gpus & set(spec.gpus)}
            for spec in view.plan.replicas:  # it may have come up since, or not
                if spec.name not in self._up and gpus & set(spec.gpus):
                    gpus |= set(spec.gpus)
        self._held.update(shards([spec for spec in view.plan.replicas if spec.name in up]))
        if signal.kind == "lost":
            self._held = {gpu: shard for gpu, shard in self._held.items() if gpu not in gpus}
        self._up = up

    def _begin(self, view: View) -> None:
        self._problem = view.problem
        self._there = set(self.planner.at_start(view.problem)) | {g for spec in view.plan.replicas for g in spec.gpus}
        self._held = shards(view.plan.replicas)
        self._up = {spec.name for spec in view.plan.replicas}
        self._shape = shape(view.plan.replicas[0])
        self._number = len(view.plan.replicas)

    def _rate_shifted(self, view: View) -> bool:
        assert self._problem is not None
        seen = view.observed(self.window_s) if view.now_s >= 2 * self.window_s else None  # what ends first was short
        if seen is None or not shifted(self._problem.workload, seen):
            return False
        self._problem = replace(self._problem, workload=seen)
        return True

    # ------------------------------------------------------------ when

    def _put_off(self, signal: Signal, view: View) -> Change | Later | None:
        """To as late as is in time; two notices: to the earlier of both times."""
        why = f"{', '.join(signal.gpus)} about to be lost"
        found = self._next(view)
        if found is not None and set(found.replicas) == set(self._standing(view)):
            return None
        due_s = self._in_time(signal, view, found)
        if self._due is not None:
            due_s = min(due_s, self._due[0])
        if due_s <= signal.at_s:
            return self._change(view, why)
        self._due = (due_s, why)
        return Later(due_s)

    def _in_time(self, signal: Signal, view: View, found: Next | None) -> float:
        assert signal.deadline_s is not None
        if self.mode != "spotserve" or found is None:
            return signal.deadline_s
        if "arranger" in self.without:
            return signal.at_s
        left_s = signal.deadline_s - signal.at_s - found.migration.seconds()
        step_s = self._iterations(view.plan.replicas[0]).step_s
        steps = steps_before(Iterations(0.0, step_s, 0.0), left_s, int(left_s / step_s) + 1)
        return signal.at_s + (steps or 0) * step_s

    def _iterations(self, replica: Replica) -> Iterations:
        assert self._problem is not None
        return iterations(times_of(self._problem), *shape(replica), self.planner.max_batch)

    # ------------------------------------------------------------ to what

    def _change(self, view: View, why: str) -> Change | None:
        self._due = None
        found = self._next(view)
        if found is None:
            left = tuple(one for one in self._standing(view) if self._stays(one))
            return Change(plan=Plan(replicas=left), reason=f"{why}; no pipeline fits", drain=False) if left else None
        if set(found.replicas) == set(view.plan.replicas):
            return None
        self._number += sum(1 for one in found.replicas if one not in self._standing(view))
        return Change(
            plan=Plan(replicas=found.replicas),
            reason=f"{why}: {found.choice}",
            drain=False,
            loads=found.migration.loads(),
            keep=self._keep(view, found),
            forget=True,
            requeue=True,
        )

    def _standing(self, view: View) -> list[Replica]:
        """Up, or on their way."""
        return [one for one in view.plan.replicas if one.name not in self._dead]

    def _stays(self, replica: Replica) -> bool:
        return set(replica.gpus) <= self._there - self._doomed

    def _next(self, view: View) -> Next | None:
        here = self._there - self._doomed
        if self.mode == "rerouting":
            return self._rerouted(view, here)
        assert self._problem is not None
        fixed = self._shape if "controller" in self.without else None
        best = self.planner.choose(self._problem, here, shape=fixed)
        if best is None:
            return None
        if self.mode == "reparallelization":
            return self._restarted(view, here, best)
        return self._moved(view, here, best)

    def _rerouted(self, view: View, here: Collection[str]) -> Next | None:
        """Pipelines that are whole stay; new ones of the same shape on what is free."""
        staying = [one for one in self._standing(view) if self._stays(one)]
        stages, tp = self._shape
        free = groups(view.problem.cluster, set(here) - {gpu for one in staying for gpu in one.gpus}, tp)
        count = sum(map(len, free)) // (stages * tp)
        more = self._named(view, in_order(Configuration(count, stages, tp, 1), free))
        if not staying and not more:
            return None
        config = Configuration(len(staying) + len(more), stages, tp, self.planner.max_batch)
        return self._with(view, [*staying, *more], config, {})

    def _restarted(self, view: View, here: Collection[str], best: Choice) -> Next:
        """All anew, on the GPUs in order, if anything changes."""
        config = best.configuration
        grid = in_order(config, groups(view.problem.cluster, here, config.tp))
        if {places(one) for one in self._standing(view)} == set(grid):
            return self._with(view, self._standing(view), config, {})
        return self._with(view, self._named(view, grid), config, {})

    def _moved(self, view: View, here: Collection[str], best: Choice) -> Next:
        config = best.configuration
        found = groups(view.problem.cluster, here, config.tp)
        tokens = {one.name: sum(map(kv_tokens, decoding(one))) for one in view.replicas}
        old = sorted(self._standing(view), key=lambda one: -tokens.get(one.name, 0))
        inherits = [one.name for one in old[: config.pipelines]]
        inherits += [""] * (config.pipelines - len(inherits))
        if "mapper" in self.without:
            grid = in_order(config, found)
        else:
            context = Context.of(self._standing(view), self._held, tokens)
            grid = matched(view.problem.model, config, found, context, inherits)
        known = {places(one): one for one in old}
        new = iter(self._named(view, [one for one in grid if one not in known]))
        replicas = [known.get(one) or next(new) for one in grid]
        stay = {"", *(one.name for one in replicas)}
        heirs = {name: one.name for name, one in zip(inherits, replicas, strict=True) if name not in stay}
        return self._with(view, replicas, config, heirs)

    def _named(self, view: View, grid: Iterable[tuple[tuple[str, ...], ...]]) -> list[Replica]:
        model = view.problem.model
        return [pipeline(model, f"s{number}", stages) for number, stages in enumerate(grid, self._number)]

    def _with(self, view: View, replicas: Sequence[Replica], config: Configuration, heirs: dict[str, str]) -> Next:
        new = [one for one in replicas if one not in self._standing(view)]
        specs = {one.name: one for one in (*self._standing(view), *new)}
        per_token = view.problem.model.kv_bytes_per_token()
        kv = [
            (specs[one.name].gpus, specs[heirs[one.name]].gpus, float(per_token * sum(map(kv_tokens, decoding(one)))))
            for one in view.replicas
            if one.name in heirs
        ]
        held = self._held if self.mode == "spotserve" else {}
        where = view.problem
        moves = migration(where.cluster, where.model, new, held, kv=kv, disk_bytes_per_s=self.disk_bytes_per_s)
        return Next(replicas=tuple(replicas), migration=moves, heirs=heirs, choice=config)

    # ------------------------------------------------------------ who goes on

    def _keep(self, view: View, found: Next) -> dict[int, str]:
        """Those on a pipeline that another inherits whose steps so far took longer than the migration does; if that one
        is at work itself, as many as it has room for."""
        if "arranger" in self.without:
            return {}
        seconds = found.migration.seconds()
        up = {one.name: one for one in view.replicas}
        keep: dict[int, str] = {}
        for name in [name for name in found.heirs if name in up]:
            one, heir = up[name], found.heirs[name]
            times = self._iterations(next(spec for spec in view.plan.replicas if spec.name == name))
            able = [request for request in decoding(one) if seconds < times.after(request.emitted_tokens)]
            room = one.max_num_seqs - (up[heir].num_running if heir in up else 0)
            keep.update({request.id: heir for request in able[: max(0, room)]})
        return keep


def shape(replica: Replica) -> tuple[int, int]:
    return len(replica.stages), replica.stages[0].tp


def places(replica: Replica) -> tuple[tuple[str, ...], ...]:
    return tuple(stage.gpus for stage in replica.stages)


def decoding(replica: ReplicaView) -> list[RequestView]:
    """Whose KV is whole."""
    return [one for one in (*replica.running, *replica.landing) if one.emitted_tokens and not one.remaining_tokens]


def kv_tokens(request: RequestView) -> int:
    return request.input_tokens + request.emitted_tokens


def _check(mode: Mode, without: Sequence[Part]) -> None:
    if mode not in MODES:
        raise ConfigError(f"system.mode is {mode!r}; spotserve has {', '.join(MODES)}")
    for part in without:
        if part not in PARTS:
            raise ConfigError(f"system.without names {part!r}; it can do without {', '.join(PARTS)}")
    if without and mode != "spotserve":
        raise ConfigError(f"system.without is for mode spotserve; {mode} has none of the parts")


def spotserve(
    mode: Mode = "spotserve",
    need_per_s: float | None = None,
    instances: int | None = None,
    max_tp: int = 8,
    max_batch: int = 4,
    least_gpus: int = 1,
    padded_layers: int | None = None,
    disk_bytes_per_s: float | None = None,
    without: Sequence[Part] = (),
) -> System:
    """SpotServe: pipelines for the instances there are; on notices, losses and joins weights and KV move to others.

    ``mode``: reparallelization begins all anew from disk; rerouting has the stages and tp for all machines of the
    cluster, and only changes how many pipelines there are.
    ``need_per_s``: requests/s that must be served; null: the workload's, then what the last half minute saw.
    ``instances``: machines that are there at the start (the first); null: all. Pipelines are of ``least_gpus`` or more,
    tensor-parallel over ``max_tp`` at most, for batches of up to ``max_batch``; stages divide ``padded_layers``.
    ``disk_bytes_per_s``: of each machine, for weights that no GPU gives; null: from its memory. ``without``, of mode
    spotserve: controller (stages and tp stay), mapper (GPUs in order), arranger (at once, and no KV is kept).
    """
    _check(mode, without)
    counts = {"max_tp": max_tp, "max_batch": max_batch, "least_gpus": least_gpus}
    counts |= {"instances": instances or 1, "padded_layers": padded_layers or 1}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"system.{name} is {value}; it must be a whole number >= 1")
    for name, rate in (("need_per_s", need_per_s), ("disk_bytes_per_s", disk_bytes_per_s)):
        if rate is not None and not rate > 0:
            raise ConfigError(f"system.{name} is {rate}; it must be > 0, or left out")
    planner = Pipelines(
        need_per_s=need_per_s,
        least_gpus=least_gpus,
        max_tp=max_tp,
        max_batch=max_batch,
        padded_layers=padded_layers,
        instances=instances,
        shape_for_all=mode == "rerouting",
    )

    def rescheduler() -> Rescheduler:
        return Migrate(planner, mode=mode, without=without, disk_bytes_per_s=disk_bytes_per_s)

    return System(
        name="spotserve",
        mirrors="SpotServe (ASPLOS 2024), by its artifact",
        planner=planner,
        router=LeastRequests,
        batcher=lambda role: Resuming(),
        transfer=Whole,
        rescheduler=rescheduler,
        limits=Limits(max_num_seqs=max_batch, max_model_len=2048),
    )
