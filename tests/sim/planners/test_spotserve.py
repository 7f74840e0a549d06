"""SpotServe's planner: the printed latencies and configurations, and what must hold of any map and migration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.studies.spotserve.world import (
    LATENCY_S,
    LEAST_GPUS,
    MAX_TP,
    NEEDS,
    OUTPUT_TOKENS,
    PROFILES,
    TRACES,
    cluster,
    problem,
    spec,
)
from sim import Cluster, ConfigError, Limits
from sim.planners.spotserve import Configuration, LayerProfile, Optimizer, Pipelines
from sim.planners.spotserve.configure import Iterations, iterations, steps_before, steps_until, wanted_instances
from sim.planners.spotserve.mapping import chunks, pipeline
from sim.planners.spotserve.profile import Costed, between
from sim.types import InfeasibleError, Work
from tests.toys import TINY, ToyCost
from tests.toys import problem as toy_problem
from traces.cluster.availability import availability


def optimizer(name: str, **more: int) -> Optimizer:
    return Optimizer(
        times=PROFILES[name], output_tokens=OUTPUT_TOKENS, padded_layers=PROFILES[name].padded_layers,
        least_gpus=LEAST_GPUS[name], max_tp=MAX_TP[name], max_batch=more.get("max_batch", 4),
    )  # fmt: skip


# ------------------------------------------------------------ configurations


@pytest.mark.parametrize("instances", range(4, 12))
def test_the_printed_configurations(instances: int) -> None:
    """Section 6.2: GPT-20B on so many instances of four GPUs."""
    best = optimizer("GPT-20B").choose(4 * instances, NEEDS["GPT-20B"])
    assert best is not None
    printed = (1, 2, 8) if instances < 6 else (2, 3, 4) if instances < 8 else (2, 2, 8)
    assert best.configuration == (*printed, 4)
    rates = {(1, 2, 8): 0.309, (2, 3, 4): 0.553, (2, 2, 8): 0.617}
    assert best.rate_per_s == pytest.approx(rates[printed], abs=5e-4)


@pytest.mark.parametrize("name", LATENCY_S)
def test_the_printed_latencies(name: str) -> None:
    """Table 1."""
    stages, tp, seconds = LATENCY_S[name]
    assert optimizer(name).latency_s(stages, tp, 1) == pytest.approx(seconds, abs=5e-4)


def test_the_profiles_and_traces_are_the_artifact_s(shared_data: Path) -> None:
    data = json.loads((shared_data / "spotserve_groundtruth.json").read_text())
    for name, given_data in data["profiles"].items():
        assert LayerProfile.of(name, given_data) == PROFILES[name]
        assert given_data["max_tp"] == MAX_TP[name]
    for label, rows in data["traces"].items():
        name = next(known for known in TRACES if label.split(" ")[0] == known)
        assert availability(rows, name) == TRACES[name]


@given(
    name=st.sampled_from(list(PROFILES)),
    gpus=st.integers(0, 60),
    need=st.floats(0.01, 4),
    batch=st.sampled_from([1, 8]),
)
def test_the_need_is_met_as_quickly_as_can_be(name: str, gpus: int, need: float, batch: int) -> None:
    search = optimizer(name, max_batch=batch)
    known = list(search.candidates(lambda tp: gpus))
    best = search.choose(gpus, need)
    if best is None:
        assert not known
        assert gpus < LEAST_GPUS[name]
        return
    able = [one for one in known if one.rate_per_s >= need]
    assert best.configuration.gpus <= gpus
    if able:
        assert best.rate_per_s >= need
        assert best.latency_s <= min(one.latency_s for one in able) * (1 + 1e-6)
    else:
        assert best.rate_per_s == max(one.rate_per_s for one in known)


def test_a_tie_goes_to_fewer_gpus() -> None:
    class Same(Costed):
        def __init__(self) -> None:
            self.slack = 1.0

        def prompts_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
            return 1.0

        def step_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
            return 1.0

    best = Optimizer(times=Same(), output_tokens=9, padded_layers=8, max_tp=4, max_batch=1).choose(15, 0.09)
    assert best is not None
    assert best.configuration.gpus == 8  # of 8, 12, 14 and 15
    assert best.latency_s == 10.0


def test_two_spare_instances_are_asked_for() -> None:
    best = Configuration(2, 2, 8, 4)
    assert wanted_instances(best, gpus=32, per_instance=4) == 2
    assert wanted_instances(best, gpus=24, per_instance=4) == 4
    assert wanted_instances(best, gpus=48, per_instance=4) == -2


# ------------------------------------------------------------ just in time


@given(prompts=st.floats(0, 5), step=st.floats(0.01, 1), left=st.floats(0.1, 60), more=st.floats(0, 30))
def test_as_many_steps_as_end_in_time(prompts: float, step: float, left: float, more: float) -> None:
    times = Iterations(prompts, step, 0.0)
    steps = steps_before(times, left, OUTPUT_TOKENS)
    if steps is None:
        assert prompts >= left
        return
    assert times.after(steps) < left
    assert steps == OUTPUT_TOKENS or times.after(steps + 1) >= left
    longer = steps_before(times, left + more, OUTPUT_TOKENS)
    assert longer is not None
    assert longer >= steps


@given(prompts=st.floats(0, 5), step=st.floats(0.01, 1), wait=st.floats(0, 60))
def test_as_few_steps_as_fill_the_wait(prompts: float, step: float, wait: float) -> None:
    times = Iterations(prompts, step, 0.0)
    steps = steps_until(times, wait)
    assert times.after(steps) >= wait
    assert steps == 0 or times.after(steps - 1) < wait


# ------------------------------------------------------------ times


def test_a_request_alone_takes_what_the_table_says() -> None:
    profile = PROFILES["GPT-20B"]
    found = iterations(profile, 3, 4, 1)
    assert found.prompts_s == pytest.approx(1.1 * (0.037562 * 15 * 3 + 0.007 * 2))
    assert found.step_s == pytest.approx(1.1 * (0.001968 * 15 * 3 + 0.0001 * 2))
    stages = pipeline(spec("GPT-20B"), "p", chunks([f"n{k // 4}.g{k % 4}" for k in range(12)], 4)).stages
    costs = [profile.bind(spec("GPT-20B"), stage, cluster(3)) for stage in stages]
    step, prompt = (
        sum(cost.line(work).first_ps for cost in costs) / 1e12 for work in (Work((), 1, 600), Work(((512, 0),), 0, 0))
    )
    part = 44 / 45  # the last stage has a layer less
    assert step == pytest.approx(part * found.step_s, rel=1e-9)
    assert prompt == pytest.approx(part * found.prompts_s + found.ends_s, rel=1e-9)


def test_a_batch_in_the_engine_takes_what_the_cost_model_says() -> None:
    """Of four: prompts go in four parts, steps in one."""
    profile = PROFILES["GPT-20B"]
    stages = pipeline(spec("GPT-20B"), "p", chunks([f"n{k // 4}.g{k % 4}" for k in range(16)], 8)).stages
    costs = [profile.bind(spec("GPT-20B"), stage, cluster(4)) for stage in stages]
    for count in (1, 2, 4, 8):
        found = iterations(profile, 2, 8, count)
        prompts = sum(cost.line(Work(((512, 0),) * count, 0, 0)).first_ps for cost in costs) / 1e12
        steps = sum(cost.line(Work((), count, 600 * count)).first_ps for cost in costs) / 1e12
        assert prompts == pytest.approx(found.prompts_s + found.ends_s, rel=1e-9)
        assert steps == pytest.approx(found.step_s, rel=1e-9)
    assert iterations(profile, 2, 8, 4).prompts_s == pytest.approx(1.1 * (0.0322 * 22 * 5 + 0.007) / 4)
    assert costs[0].line(Work((), 9, 900)).extrapolated
    assert not costs[0].line(Work((), 8, 900)).extrapolated


def test_between_batches_times_are_linear() -> None:
    row = {1: 10.0, 2: 14.0, 4: 30.0}
    assert [between(row, count) for count in (0.5, 1, 1.5, 3, 4, 6)] == [5.0, 10.0, 12.0, 22.0, 30.0, 46.0]


def test_without_a_profile_the_latency_model_is_asked() -> None:
    """The toy's steps cost 10 ms and more, spread over the stages."""
    times = Costed(toy_problem(cost=ToyCost()))
    one = times.step_s(1, 1, 2, 1)
    assert one == pytest.approx(0.010 + 2e-5 + 2 * 105e-9)
    assert times.step_s(2, 1, 2, 1) == pytest.approx(one)
    assert times.step_s(2, 1, 2, 2) == pytest.approx(3 * (0.010 + 1e-5 + 105e-9) / 2)
    assert times.prompts_s(1, 1, 2, 1) == pytest.approx(0.010 + 200e-5)
    assert times.embed_s(4) == 0


# ------------------------------------------------------------ the planner


def test_the_plan_of_seven_instances() -> None:
    where = replace(problem("GPT-20B", 10), limits=Limits(max_num_seqs=4, max_model_len=2048))
    plan = Pipelines(need_per_s=0.4, least_gpus=12, instances=7).plan(where)
    assert [[stage.gpus[0] for stage in one.stages] for one in plan.replicas] == [
        ["n0.g0", "n1.g0", "n2.g0"], ["n3.g0", "n4.g0", "n5.g0"],
    ]  # fmt: skip
    for_all = Pipelines(need_per_s=0.4, least_gpus=12, instances=7, shape_for_all=True).plan(where)
    assert [(len(one.stages), one.stages[0].tp) for one in for_all.replicas] == [(2, 8)]


def test_stages_must_divide_the_layers_of_a_profile_only() -> None:
    where = toy_problem()
    planner = Pipelines(least_gpus=3, max_tp=1)
    with pytest.raises(InfeasibleError, match="no pipeline of tiny fits on 4 GPUs"):
        planner.plan(where)  # two layers
    three = replace(where, model=replace(TINY, num_layers=3))
    assert len(planner.plan(three).replicas[0].stages) == 3
    with pytest.raises(InfeasibleError):
        replace(planner, padded_layers=4, least_gpus=3).plan(
            replace(three, cluster=Cluster.of(nodes=[{"gpu": "T4", "count": 3}]))
        )


def test_a_model_that_fills_its_gpus_takes_more_of_them() -> None:
    where = replace(problem("GPT-20B", 8), limits=Limits(max_num_seqs=4))
    shapes = {one.configuration[1:3] for one in Pipelines().optimizer(where).candidates(lambda tp: 32)}
    tables = {one.configuration[1:3] for one in Pipelines(least_gpus=12).optimizer(where).candidates(lambda tp: 32)}
    assert min(stages * tp for stages, tp in tables) == 12
    assert 6 <= min(stages * tp for stages, tp in shapes) <= 12


def test_a_degree_that_was_not_profiled_is_an_error() -> None:
    with pytest.raises(ConfigError, match="LLaMA-30B: tp 16 is not in the profile; it has 1, 2, 4, 8"):
        PROFILES["LLaMA-30B"].step_s(1, 16, 1, 1)
