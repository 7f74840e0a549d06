"""From a scenario to what the simulator takes: problem, system, requests, events; and one call that runs it.

>>> from experiments.scenario.file import Scenario
>>> from experiments.scenario.resolve import resolve
>>> setup = resolve(Scenario.load("experiments/quickstart.yaml"))     # doctest: +SKIP
>>> result = setup.run()                                              # doctest: +SKIP
>>> setup.summary(result)["ttft_s"]["p50"]                            # doctest: +SKIP
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from math import inf
from typing import Any

import numpy as np
from pydantic import ValidationError, validate_call

from calibrate.profile.file import read_profile, shipped_profiles
from calibrate.profile.relatives import kernels_for
from experiments.scenario.complaints import first_fault
from experiments.scenario.file import Scenario
from experiments.scenario.planfile import read_plan
from experiments.scenario.requests import RequestStream
from experiments.scenario.step_times import step_times
from experiments.scenario.system import EngineSpec, EventSpec, OverheadSpec, SloSpec, SystemSpec
from sim.cluster import Cluster, Gpu, did_you_mean, gpu, gpus
from sim.cost import Fitted, Overhead, Profile, Roofline, StepCost
from sim.engine import simulate
from sim.metrics import summarise
from sim.model import ModelSpec, model
from sim.outside import is_file
from sim.policy import Predictor, Problem, System, Workload
from sim.predictors import ConstantLength, TrueLength
from sim.record import Result
from sim.systems import SYSTEMS
from sim.types import ClusterEvent, ConfigError, Plan, Slo
from traces import read_events

ENGINE = "vllm-"
"""Begins the names of the profiles that count first where a scenario names none."""
SAMPLED_REQUESTS = 2000
"""How many of the first requests planners and predictors may know the lengths of."""
ASSUMED_ANSWER_S = 10.0
"""How long a closed loop's answers take, for planners: they want a rate before anything has run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything a run needs, built and checked. It can be run any number of times."""

    scenario: Scenario
    problem: Problem
    system: System
    requests: RequestStream
    events: tuple[ClusterEvent, ...]
    predictor: Predictor
    usd_per_hour: float | None
    plan: Plan | None = None
    """In place of what the system's planner would do."""

    def run(self, *, step_by_step: bool = False, progress: Callable[[int], None] | None = None) -> Result:
        """Simulate. ``ConfigError`` if no plan fits, or for a fault further down in the trace."""
        with _named(self.scenario):
            return simulate(
                self.problem,
                self.system,
                self.requests.source(),
                plan=self.plan,
                events=self.events,
                predictor=self.predictor,
                step_by_step=step_by_step,
                until_s=self.scenario.until_s,
                progress=progress,
            )

    def summary(self, result: Result) -> dict[str, Any]:
        """``sim.metrics.summarise`` with this scenario's SLO and prices, and what became of the trace."""
        spot = self.scenario.cluster.pricing == "spot"
        figures = summarise(result, self.problem.slo, usd_per_hour=self.usd_per_hour, problem=self.problem, spot=spot)
        lengths = result.columns["input_tokens"] + result.columns["output_tokens"]
        longest = self.requests.max_model_len
        over = 0 if longest is None else int((lengths > longest).sum())
        workload = {
            "too_long": {
                "rule": self.requests.rule,
                "requests": over + self.requests.truncated,
                "max_model_len": longest,
            },
            "skipped": self.requests.skipped,
            "remarks": list(self.requests.remarks),
            "rate_per_s": self._rate_per_s(result),
        }
        return {
            **figures,
            "model": self.problem.model.name,
            "gpus": dict(Counter(self.problem.cluster.gpu(gpu_id).name for gpu_id in self.problem.cluster.gpu_ids)),
            "predicted_gpus": self._predicted(figures["unmeasured_gpus"]),
            "step_times": step_times(self.problem, result),
            "served": served(result),
            "engine": {**asdict(self.system.limits), **self.system.options},
            "workload": workload,
            "predictor": self.predictor.name,
            "seed": self.problem.seed,
        }

    def _predicted(self, unmeasured: Sequence[str]) -> list[str]:
        """Which of these GPU types took kernels scaled from a relative's; the others took the roofline."""
        cost, spec = self.problem.cost, self.problem.model
        tables = [part for profile in getattr(cost, "profiles", ()) for part in profile.kernels if part.predicted]
        return [
            name
            for name in unmeasured
            if any(name in part.gpus and part.serves(spec) and part.entry(spec, 1, gpu(name)) for part in tables)
        ]

    def _rate_per_s(self, result: Result) -> float:
        """What the workload says, or what came of it where requests wait for answers."""
        if self.scenario.workload.closed_loop is None and self.scenario.workload.sessions is None:
            return self.problem.workload.rate_per_s
        return _rate_per_s(np.sort(result.columns["arrival_s"]).tolist())


def served(result: Result) -> dict[str, Any]:
    """Which requests got their whole answer, so that two runs can be told apart: how many, and a sum over them."""
    columns = result.columns
    done = columns["outcome"] == "completed"
    numbers = np.stack([columns[name][done].astype(np.int64) for name in ("request", "input_tokens", "output_tokens")])
    order = np.argsort(numbers[0], kind="stable")
    known = sha256(np.ascontiguousarray(numbers[:, order]).tobytes())
    return {"requests": int(done.sum()), "sum": known.hexdigest()[:16]}


def resolve(scenario: Scenario) -> Setup:
    """Build everything a scenario describes; ``ConfigError`` names the file, the field, the value and the mend."""
    with _named(scenario):
        spec = scenario.cluster
        cluster = Cluster.of(
            nodes=[node.model_dump(exclude_none=True) for node in spec.nodes],
            links=spec.links.model_dump(exclude_none=True),
        )
        system = build_system(scenario.system)
        the_model = model(scenario.model, scenario.dtype)
        if scenario.kv_dtype is not None:
            the_model = replace(the_model, kv_dtype=scenario.kv_dtype)
        longest = context(scenario, the_model) or system.limits.max_model_len
        limits = replace(system.limits, max_model_len=longest)
        if system.defaults is not None:
            kinds = {node.gpu.name: node.gpu for node in cluster.nodes}
            limits = system.defaults(limits, frozenset(_stated(scenario.system)), list(kinds.values()))
        system = system.with_limits(limits)
        requests = RequestStream(scenario.workload, seed=scenario.seed, max_model_len=longest)
        workload = known_workload(requests)
        problem = Problem(
            cluster=cluster,
            model=the_model,
            cost=build_cost(
                scenario.latency,
                scenario.overhead,
                scenario.accept_error,
                system.limits.async_scheduling,
                {node.gpu.name: node.gpu for node in cluster.nodes}.values(),
            ),
            workload=workload,
            slo=build_slo(scenario.slo),
            limits=system.limits,
            seed=scenario.seed,
        )
        return Setup(
            scenario=scenario,
            problem=problem,
            system=system,
            requests=requests,
            events=build_events(scenario.events),
            predictor=build_predictor(scenario.predictor, workload, system),
            usd_per_hour=cluster.usd_per_hour(spot=spec.pricing == "spot"),
            plan=None if scenario.plan is None else read_plan(scenario.plan, problem),
        )


def run(scenario: Scenario, *, step_by_step: bool = False, progress: Callable[[int], None] | None = None) -> Result:
    """Resolve and simulate."""
    return resolve(scenario).run(step_by_step=step_by_step, progress=progress)


def context(scenario: Scenario, the_model: ModelSpec) -> int | None:
    """Tokens that a request may have, the same under every system: the model's context, or less if that is stated.

    None: neither says. A system's own default (2,048 of those with slots) holds only then.
    """
    known = [length for length in (scenario.system.engine.max_model_len, the_model.max_position_embeddings) if length]
    return min(known, default=None)


def build_system(spec: SystemSpec) -> System:
    """The system a scenario names, with its options and engine settings."""
    if spec.name not in SYSTEMS:
        raise ConfigError(f"system.name: {did_you_mean(spec.name, SYSTEMS)}")
    factory = SYSTEMS[spec.name]
    known = system_options(factory)
    for option in spec.options:
        if option not in known:
            if option in EngineSpec.model_fields:
                raise ConfigError(f"system.{option}: is a setting of the engine; state it as system.engine.{option}")
            raise ConfigError(f"system.{option}: the key {did_you_mean(option, [*known, 'engine', 'name'])}")
    parameters = inspect.signature(factory).parameters
    given: dict[str, Any] = {"simulate": simulate} if "simulate" in parameters else {}
    if spec.engine.version is not None:
        if "version" not in parameters:
            raise ConfigError(
                f"system.engine.version: {spec.name} follows no release of vLLM (it mirrors {factory().mirrors}); "
                "drop it, and state the settings that you mean"
            )
        given["version"] = spec.engine.version
    try:
        system = validate_call(factory)(**spec.options, **given)
    except ValidationError as error:
        raise ConfigError(f"system.{first_fault(error)}") from None
    return system.with_limits(replace(system.limits, **_stated(spec)))


def _stated(spec: SystemSpec) -> dict[str, Any]:
    """The engine's settings that a scenario names."""
    return spec.engine.model_dump(exclude_none=True, exclude={"version"})


def system_options(factory: Callable[..., System]) -> list[str]:
    """What a scenario may set; ``simulate`` is given by us, to planners that search by simulation."""
    return [name for name in inspect.signature(factory).parameters if name not in ("simulate", "version")]


def known_workload(requests: RequestStream) -> Workload:
    """Rate and lengths of the first requests: what planners and predictors are told."""
    head = list(islice(requests, SAMPLED_REQUESTS))
    if not head:
        raise ConfigError("workload: it has no requests; widen start_s and end_s, or name another trace")
    loop = requests.workload.closed_loop
    arrivals_s = [item.arrival_s for item in head]
    rate_per_s = _rate_per_s(arrivals_s) if loop is None else loop.clients / (loop.think_s + ASSUMED_ANSWER_S)
    counts = Counter(item.klass for item in head if item.klass is not None)
    return Workload(
        rate_per_s=rate_per_s,
        lengths=tuple((item.input_tokens, item.output_tokens) for item in head),
        classes={name: count / len(head) for name, count in sorted(counts.items())},
    )


def _rate_per_s(arrivals_s: Sequence[float]) -> float:
    span_s = arrivals_s[-1] - arrivals_s[0] if arrivals_s else 0.0
    return (len(arrivals_s) - 1) / span_s if span_s > 0 else float(len(arrivals_s))


def build_slo(spec: SloSpec) -> Slo:
    classes = {name: Slo(**own.model_dump()) for name, own in spec.classes.items()}
    return Slo(**spec.model_dump(exclude={"classes"}), classes=classes)


def build_predictor(name: str | None, workload: Workload, system: System) -> Predictor:
    if name is None and system.predictor is not None:
        return system.predictor
    if name == "oracle":
        return TrueLength()
    if name == "max":
        return ConstantLength(max(pair[1] for pair in workload.lengths), "max")
    return ConstantLength(max(1, round(workload.mean_output_tokens)), "mean")


def build_events(events: str | tuple[EventSpec, ...] | None) -> tuple[ClusterEvent, ...]:
    if isinstance(events, str):
        return tuple(read_events(events))
    return tuple(ClusterEvent(**event.model_dump()) for event in events or ())


def build_cost(
    latency: str | Mapping[str, str] | None,
    overhead: OverheadSpec | None = None,
    accept_error: float = inf,
    overlapped: bool = False,
    kinds: Iterable[Gpu] = (),
) -> StepCost:
    """Step times: all shipped profiles, one named, one per GPU type, or the roofline alone.

    ``kinds``: GPU types for which, with all profiles, kernels of a measured relative stand in where they have none.
    ``overlapped``: the engine decides ahead, so that its overhead, the roofline's where none is stated, hides behind
    the kernels.

    ``ConfigError`` if a profile that is named states a mean held-out error of an operator above ``accept_error``.
    """
    if latency == "roofline" and overhead is None and not overlapped:
        return Roofline()
    engine = None
    if overhead is not None or overlapped:
        stated = {"step_s": Roofline().overhead_s} if overhead is None else overhead.model_dump()
        engine = Overhead(**stated, overlapped=overlapped)
    profiles = tuple(_profiles(latency, kinds))
    for profile in profiles if latency is not None else ():
        _check_error(profile, accept_error)
    return Fitted(profiles=profiles, overhead=engine)


def _check_error(profile: Profile, accept_error: float) -> None:
    for part in profile.parts:
        for operator, held in part.held_out.items():
            if held.mape > accept_error:
                raise ConfigError(
                    f"latency: profile {profile.name}: {operator} is {held.mape:.0%} off where the fit did not see the "
                    f"times, over accept_error, {accept_error:.0%}; measure anew, or raise accept_error"
                )


def _profiles(latency: str | Mapping[str, str] | None, kinds: Iterable[Gpu]) -> list[Profile]:
    if latency is None:
        return [*_of_one_engine(), *filter(None, map(kernels_for, kinds))]
    if latency == "roofline":
        return []
    if isinstance(latency, str):
        return [_profile("latency", latency)]
    profiles = []
    for kind, name in latency.items():
        if str(kind).lower() not in {entry.name.lower() for entry in gpus()}:
            raise ConfigError(f"latency.{kind}: the GPU {did_you_mean(kind, [entry.name for entry in gpus()])}")
        if name != "roofline":
            profiles.append(_only_on(gpu(kind).name, name, _profile(f"latency.{kind}", name)))
    return profiles


def _of_one_engine() -> list[Profile]:
    """vLLM's shipped profiles, and of other engines' what is about GPU types that those have nothing of.

    A cluster's GPUs are then compared under one engine, not one of them under a kernel of 2023.
    """
    shipped = {name: read_profile(path) for name, path in shipped_profiles().items()}
    ours = [profile for name, profile in shipped.items() if name.startswith(ENGINE)]
    covered = {kind for profile in ours for part in profile.parts for kind in part.gpus}
    others = (profile for name, profile in shipped.items() if not name.startswith(ENGINE))
    return [*ours, *(_filtered(profile, lambda gpus: not covered & set(gpus)) for profile in others)]


def _profile(place: str, name: str) -> Profile:
    shipped = shipped_profiles()
    if name in shipped:
        return read_profile(shipped[name])
    if is_file(name):
        return read_profile(name)
    raise ConfigError(f"{place}: the profile {did_you_mean(name, ['roofline', *shipped])}; or give the path of a file")


def _only_on(kind: str, name: str, profile: Profile) -> Profile:
    """What the profile has of one GPU type."""
    if not any(kind in part.gpus for part in profile.parts):
        has = sorted({gpu for part in profile.parts for gpu in part.gpus})
        raise ConfigError(f"latency.{kind}: the profile {name} has no entry for it; it has {', '.join(has)}")
    here = _filtered(profile, lambda kinds: kind in kinds)
    return replace(
        here,
        entries=tuple(replace(entry, gpus=(kind,)) for entry in here.entries),
        kernels=tuple(replace(tables, gpus=(kind,)) for tables in here.kernels),
        polynomials=tuple(replace(form, gpus=(kind,)) for form in here.polynomials),
    )


def _filtered(profile: Profile, keeps: Callable[[tuple[str, ...]], bool]) -> Profile:
    """Its parts about GPU types that are wanted."""
    return replace(
        profile,
        entries=tuple(entry for entry in profile.entries if keeps(entry.gpus)),
        kernels=tuple(tables for tables in profile.kernels if keeps(tables.gpus)),
        polynomials=tuple(form for form in profile.polynomials if keeps(form.gpus)),
    )


@contextmanager
def _named(scenario: Scenario) -> Iterator[None]:
    """Puts the scenario file's name in front of errors, other than those that name the trace file first."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        if any(stream.trace and text.startswith(stream.trace) for stream in scenario.workload.streams.values()):
            raise
        if text.startswith("system."):
            text = scenario.system_place + text.removeprefix("system")
        raise type(error)(f"{scenario.where}: {text}") from None
