"""``phasewise plan``: candidates of a system's planner, tried in the engine, ranked and written.

``found`` asks the planner, ``replanned`` after a loss, ``budget.py`` on GPUs it may choose. ``tried`` runs a candidate
on a short trace, ``ranked`` orders them, ``saved.py`` writes the lot. ``InfeasibleError`` says what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.jobs.workers import Here
from experiments.planning import goodput
from experiments.planning.climb import climb
from experiments.planning.race import Contender
from experiments.runs.comparison import Given, variants
from experiments.scenario.file import Scenario, load
from experiments.scenario.planfile import plan_yaml, read_plan
from experiments.scenario.requests import RequestStream
from experiments.scenario.resolve import Setup, resolve
from sim.cluster import did_you_mean
from sim.engine import simulate
from sim.metrics import attainment, cost
from sim.planners.hexgen2 import HexGen2
from sim.planners.thunderserve import Candidate, LogRow, TabuSearch
from sim.planners.thunderserve.capacity import Bound
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan, Stage, Work

Progress = Callable[[int, float], None]
"""Gets the step and the best value so far."""
SEARCH_SHARE = 0.25
"""Of ``seconds``, for the planner's own search; the rest is for trials in the engine."""
PATIENCE = 15
"""Steps without gain after which that search ends, where trials in the engine follow."""
TOLERANCE = 0.05
"""Share of the rate to which a candidate's goodput is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A plan and what is known of it. ``setup``: what it is a plan for; None: not predicted, not asked for, unknown."""

    setup: Setup
    plan: Plan
    predicted: Candidate | None = None
    simulated: float | None = None
    usd_per_million_tokens: float | None = None
    goodput_per_s: float | None = None
    label: str | None = None
    """Where it comes from, if several ways were tried."""
    binds: str | None = None

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(gpu for replica in self.plan.replicas for gpu in replica.gpus)

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of the GPUs that the plan uses."""
        return None if self.unpriced else sum(self._price(gpu) or 0.0 for gpu in self.gpus)

    @property
    def unpriced(self) -> set[str]:
        """GPU types without a price."""
        cluster = self.setup.problem.cluster
        return {cluster.gpu(gpu).name for gpu in self.gpus if self._price(gpu) is None}

    def _price(self, name: str) -> float | None:
        gpu = self.setup.problem.cluster.gpu(name)
        return gpu.usd_per_hour_spot if self.setup.scenario.cluster.pricing == "spot" else gpu.usd_per_hour

    @property
    def requests_per_usd(self) -> float | None:
        return self.goodput_per_s * 3600 / self.usd_per_hour if self.goodput_per_s and self.usd_per_hour else None

    @property
    def layout(self) -> str:
        """``3 prefill + 2 decode``."""
        roles = Counter(replica.role for replica in self.plan.replicas)
        return " + ".join(f"{roles[role]} {role}" for role in ("prefill", "decode", "mixed") if roles[role])

    @property
    def loss_share(self) -> float | None:
        """The largest part of the plan's GPUs that one GPU's loss takes with it."""
        return max((len(one.gpus) for one in self.plan.replicas), default=0) / len(self.gpus) if self.gpus else None

    def row(self) -> dict[str, Any]:
        """What is printed and written of it."""
        cluster, predicted = self.setup.problem.cluster, self.predicted
        return {
            "system": self.setup.system.name,
            "replicas": self.layout,
            "gpus": dict(Counter(cluster.gpu(gpu).name for gpu in self.gpus)),
            "idle_gpus": len(cluster.gpu_ids) - len(self.gpus),
            "predicted_attainment": None if predicted is None else predicted.attainment,
            "served": None if predicted is None else predicted.served,
            "simulated_attainment": self.simulated,
            "goodput_per_s": self.goodput_per_s,
            "usd_per_hour": self.usd_per_hour,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "requests_per_usd": self.requests_per_usd,
            "bottleneck": self.binds if predicted is None else predicted.bottleneck,
            "loss_share": self.loss_share,
            "found_by": self.label,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Candidates as their planner ranks them, every evaluation on the way (none: it does not search), and what the
    planner says of its choice."""

    options: tuple[Option, ...]
    log: tuple[LogRow, ...] = ()
    notes: tuple[str, ...] = ()
    bound: Bound | None = None
    baselines: tuple[Option, ...] = ()
    cheapest: Option | None = None


def plan(
    scenario: Given,
    system: str | None = None,
    *,
    seconds: float | None = None,
    top: int = 5,
    requests: int = 1000,
    with_goodput: bool = False,
) -> list[Option]:
    """Layouts of the scenario's model on its cluster, simulated, the best first.

    ``system``: whose planner; None: the scenario's own. ``seconds``: how long it may search. ``top``: how many of its
    candidates are simulated, on so many ``requests``. ``with_goodput`` also finds the highest rate of each, which takes
    a dozen simulations; planners that race in the engine (``climbs``) do so anyway. ``InfeasibleError`` says what is
    missing.
    """
    setup = resolve(under(load(scenario), system))
    offers = found(setup, seconds=search_seconds(setup, seconds))
    if climbs(setup):
        return ranked([tried(option, requests) for option in climbed(setup, offers, top=top, seconds=seconds).options])
    judged = [tried(option, requests) for option in offers.options[:top]]
    if with_goodput:
        judged = [rated(option, goodput.Settings(seeds=1, tolerance=TOLERANCE)) for option in judged]
    return ranked(judged)


def under(scenario: Scenario, system: str | None) -> Scenario:
    """The scenario under one system, without a plan."""
    chosen = variants(scenario, system or scenario.system.name)
    if len(chosen) != 1:
        raise ConfigError(f"--system {system}: name one system; 'phasewise compare' takes several")
    return next(iter(chosen.values())).model_copy(update={"plan": None})


# ---------------------------------------------------------------- candidates


@runtime_checkable
class Explains(Protocol):
    """A planner that has something to say of its choice, a line each."""

    def explain(self, problem: Problem) -> Iterable[str]: ...


def found(setup: Setup, *, seconds: float | None = None, progress: Progress | None = None) -> Found:
    """What the system's planner offers: many candidates if it searches, else one."""
    check_minimum(setup)
    problem = replace(setup.problem, limits=setup.system.limits)
    planner = setup.system.planner
    if seconds is not None:
        planner = timed(setup, seconds)
    if isinstance(planner, TabuSearch) and climbs(setup):
        planner = replace(planner, patience=min(planner.patience, PATIENCE))
    if not isinstance(planner, TabuSearch | HexGen2):
        only = Option(setup=setup, plan=planner.plan(problem))
        return Found(options=(only,), notes=tuple(planner.explain(problem)) if isinstance(planner, Explains) else ())
    search = planner.search(problem, progress=progress)
    options = tuple(Option(setup=setup, plan=one.plan, predicted=one) for one in search.candidates if one.served)
    return Found(options=options, log=search.log)


def climbs(setup: Setup) -> bool:
    """Whether the most that is carried is looked for in the engine: the rate may vary, and the SLO bounds something."""
    slo, workload = setup.problem.slo, setup.scenario.workload
    bounded = (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None) and not slo.classes
    open_loop = workload.closed_loop is None and workload.sessions is None
    return isinstance(setup.system.planner, TabuSearch) and bounded and open_loop


def search_seconds(setup: Setup, seconds: float | None) -> float | None:
    """Of the whole time, for the planner's own search: the rest is for trials in the engine."""
    return seconds if seconds is None or not climbs(setup) else SEARCH_SHARE * seconds


def climbed(
    setup: Setup, offers: Found, *, top: int, seconds: float | None = None, progress: Progress = lambda step, best: None
) -> Found:
    """From what a search offers to what carries most, with the bound, colocated vLLM and the least rent beside it.

    ``seconds``: of the search and this together.
    """
    left_s = None if seconds is None else (1 - SEARCH_SHARE) * seconds
    ascent = climb(setup, [one.plan for one in offers.options], top=top, seconds=left_s, progress=progress)
    if not ascent.contenders:
        return offers
    options = tuple(_option(one) for one in ascent.contenders)
    return replace(
        offers,
        options=options,
        bound=ascent.bound,
        baselines=tuple(_option(one) for one in ascent.baselines),
        cheapest=None if ascent.cheapest is None else _option(ascent.cheapest),
    )


def _option(one: Contender) -> Option:
    setup, planner = one.setup, one.setup.system.planner
    predicted = None
    if isinstance(planner, TabuSearch):
        predicted = planner.predicted(replace(setup.problem, limits=setup.system.limits), one.plan)
    return Option(
        setup=setup, plan=one.plan, predicted=predicted, goodput_per_s=one.goodput_per_s, label=one.label,
        binds=one.binds,
    )  # fmt: skip


def timed(setup: Setup, seconds: float) -> TabuSearch:
    """The planner, to stop after so many seconds."""
    planner = setup.system.planner
    if not isinstance(planner, TabuSearch):
        raise ConfigError(f"--seconds: {setup.system.name}'s planner has no time limit; leave it out")
    return replace(planner, seconds=seconds)


def replanned(setup: Setup, start: Path, lost: Collection[str], *, full: bool, seconds: float | None) -> Found:
    """A plan for what is left of another one, by flips alone or (``full``) from nothing."""
    planner = setup.system.planner if seconds is None else timed(setup, seconds)
    if not isinstance(planner, TabuSearch):
        raise ConfigError(f"--from: {setup.system.name}'s planner cannot plan on; add --system thunderserve")
    problem = replace(setup.problem, limits=setup.system.limits)
    plan = read_plan(start, problem)
    search = planner.replan(problem, plan, lost=lost_gpus(setup, lost), flips_only=not full)
    options = tuple(Option(setup=setup, plan=one.plan, predicted=one) for one in search.candidates if one.served)
    return Found(options=options, log=search.log)


def lost_gpus(setup: Setup, names: Collection[str]) -> set[str]:
    """GPUs by their own names and by those of their machines."""
    cluster = setup.problem.cluster
    machines = {node.name: node.gpu_ids for node in cluster.nodes}
    gpus: set[str] = set()
    for name in names:
        if name not in machines and name not in cluster.gpu_ids:
            raise ConfigError(f"--lost {did_you_mean(name, [*machines, *cluster.gpu_ids])}")
        gpus.update(machines.get(name, (name,)))
    return gpus


def reloaded(before: Plan, after: Plan) -> list[str]:
    """Replicas of the second plan with a stage that the first does not have: they load weights."""
    held = {(stage.gpus, stage.first_layer, stage.end_layer) for one in before.replicas for stage in one.stages}
    return [
        one.name
        for one in after.replicas
        if any((stage.gpus, stage.first_layer, stage.end_layer) not in held for stage in one.stages)
    ]


# ---------------------------------------------------------------- what no plan can beat


def check_minimum(setup: Setup) -> None:
    """``InfeasibleError`` if an SLO bound is below what the requests need on the fastest machine alone."""
    slo = setup.problem.slo
    bounds = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_s": slo.e2e_s}
    if slo.classes or not any(bounds.values()):
        return
    for name, least_s in minimum(setup).items():
        bound = bounds[name]
        if bound is not None and bound < least_s:
            raise InfeasibleError(
                f"slo.{name} is {bound:g}: to have {slo.attainment:.0%} of the requests within it takes "
                f"{least_s:.3g} s at least, each alone on the fastest machine by the latency model; raise it, or take "
                "faster GPUs"
            )


def minimum(setup: Setup) -> dict[str, float]:
    """The least bounds that the SLO's share of the sampled requests keeps when each is alone, by name.

    On the best machine and TP degree. A pipeline is no faster, since its stages work in turn; memory is left out.
    """
    problem, model = setup.problem, setup.problem.model
    price = setup.system.cost(problem.cost)
    lengths = list(problem.workload.lengths)
    latencies = np.full((3, len(lengths)), np.inf)
    for node in {(node.gpu, node.count): node for node in problem.cluster.nodes}.values():
        for tp in (tp for tp in range(1, node.count + 1) if model.num_attention_heads % tp == 0):
            stage = Stage(name="alone", gpus=node.gpu_ids[:tp], first_layer=0, end_layer=model.num_layers)
            bound = price.bind(model, stage, problem.cluster)
            known: dict[Work, float] = {}

            def seconds(work: Work, line: Callable[..., Any] = bound.line, known: dict[Work, float] = known) -> float:
                if work not in known:
                    known[work] = line(work).first_ps * 1e-12
                return known[work]

            prefill = np.array([seconds(Work(((tokens, 0),), 0, 0)) for tokens, _ in lengths])
            step = np.array([seconds(Work((), 1, tokens + 1)) if answer > 1 else 0.0 for tokens, answer in lengths])
            answers = np.array([answer for _, answer in lengths])
            latencies = np.minimum(latencies, [prefill, step, prefill + (answers - 1) * step])
    place = ceil(problem.slo.attainment * len(lengths) - 1e-9) - 1
    return dict(zip(("ttft_s", "tpot_s", "e2e_s"), np.sort(latencies)[:, place].tolist(), strict=True))


# ---------------------------------------------------------------- in the engine


def tried(option: Option, requests: int) -> Option:
    """With its attainment and dollars per token on the first requests of the workload, in the engine.

    Where arrivals are drawn, as many as a trial of goodput has, if that is more.
    """
    setup = option.setup
    spec = setup.scenario.workload
    need = requests
    if spec.rate is not None:
        need = max(requests, goodput.needed(setup, setup.problem.workload.rate_per_s))
    stream = RequestStream(
        spec.model_copy(update={"limit": min(need, spec.limit or need)}),
        seed=setup.scenario.seed,
        max_model_len=setup.requests.max_model_len,
        at_least=None if spec.rate is None else need,
    )
    result = simulate(setup.problem, setup.system, stream.source(), plan=option.plan, predictor=setup.predictor)
    columns = result.columns
    tokens = int(columns["output_tokens"][columns["outcome"] == "completed"].sum())
    price = cost(tokens, result.makespan_s, option.usd_per_hour)["usd_per_million_tokens"]
    return replace(option, simulated=attainment(columns, setup.problem.slo)["attainment"], usd_per_million_tokens=price)


def too_brief(option: Option, requests: int) -> str | None:
    """Why so few recorded requests cannot tell whether queues grow: they all arrive before one has to be done."""
    problem = option.setup.problem
    if (
        option.setup.scenario.workload.rate is not None
        or problem.slo.ttft_s is problem.slo.tpot_s is problem.slo.e2e_s is None
    ):
        return None
    span_s, longest_s = requests / problem.workload.rate_per_s, goodput.longest_s(option.setup)
    if span_s > longest_s:
        return None
    return (
        f"{requests} requests arrive within {span_s:.3g} s, and one may take {longest_s:.3g} s: too few to see queues "
        "grow; give --requests more (and the workload, if it has no more)"
    )


def rated(option: Option, settings: goodput.Settings) -> Option:
    """With its goodput; None if it attains the SLO at no rate."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.yaml"
        file.write_text(plan_yaml(option.plan), encoding="utf-8")
        scenario = option.setup.scenario.model_copy(update={"plan": str(file)})
        row, _ = goodput.search(scenario, settings, Here())
    return replace(option, goodput_per_s=row["rate_per_s"])


def ranked(options: Sequence[Option], *, by_price: bool = False) -> list[Option]:
    """By what was simulated, then by prediction, then the cheapest first.

    ``by_price``: all that reach the SLO's share are equal but for their price. Goodput goes before that where it was
    asked for (``by_price``: per dollar).
    """

    def worth(option: Option) -> tuple[float, ...]:
        share, target = option.simulated or 0.0, option.setup.problem.slo.attainment
        predicted = 0.0 if option.predicted is None else option.predicted.attainment
        if by_price:
            return option.requests_per_usd or 0.0, min(share, target), -(option.usd_per_hour or 0.0), share
        return option.goodput_per_s or 0.0, share, predicted, -(option.usd_per_hour or 0.0)

    return sorted(options, key=worth, reverse=True)


def shortfall(option: Option) -> str | None:
    """What the best plan lacks, if it is within the SLO less often than asked."""
    target = option.setup.problem.slo.attainment
    share, predicted = option.simulated, option.predicted
    if share is None or share >= target:
        return None
    what = f"slo.attainment is {target:g}; the best plan reaches {share:.3f} in the simulation"
    if option.binds is not None:
        rate, asked = option.goodput_per_s, option.setup.problem.workload.rate_per_s
        carried = "nothing" if rate is None else f"{rate:.4g}"
        return (
            f"{what} and carries {carried} of the {asked:.4g} requests/s, held back by {option.binds}; it takes more "
            "of that, a lower rate or a looser slo"
        )
    if predicted is None:
        return f"{what}; it takes a lower rate, a looser slo or more GPUs"
    if predicted.served < 1:
        return (
            f"{what} and is predicted to serve {predicted.served:.0%} of the rate, held back by "
            f"{predicted.bottleneck}; it takes more of that, or a lower rate"
        )
    return f"{what} and is predicted to serve the whole rate; it takes a looser slo, a lower rate or faster GPUs"
