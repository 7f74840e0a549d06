"""DistServe's placement: the searches on judges one can do in one's head, its arithmetic, and once on the simulator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles
from sim import Cluster, ConfigError, Problem, Slo, Workload, simulate
from sim.cost import Fitted, Roofline
from sim.engine.setup import check_plan
from sim.model import model
from sim.planners.distserve import (
    BestColocated,
    DistServe,
    Placement,
    Rated,
    Search,
    Shape,
    Unit,
    instances,
    paired_plan,
    pairs,
)
from sim.planners.md1 import crossover_load, inter_op_ttft_s, intra_op_ttft_s, ttft_s
from sim.systems.split.distserve import LIMITS, Rehearsal, poisson

SHORT = ((200, 50),)
PROMPT_RATE, DECODE_RATE = {1: 2.0, 2: 3.6, 4: 6.0, 8: 8.0}, {1: 8.0, 2: 14.0, 4: 22.0, 8: 30.0}
"""Requests/s of an instance by its TP degree."""


def world(name: str = "opt-13b", nodes: int = 1, count: int = 8, **more: Any) -> Problem:
    cluster = Cluster.of(
        nodes=[{"gpu": "A100-80G-SXM", "count": count, "nodes": nodes}],
        links={"inter_node": {"gbps": 25, "latency_us": 10}},
    )
    given_: dict[str, Any] = {
        "workload": Workload(rate_per_s=10.0, lengths=SHORT),
        "slo": Slo(ttft_s=0.25, tpot_s=0.1),
        "cost": Roofline(),
        "limits": LIMITS,
    }
    return Problem(cluster=cluster, model=model(name), **{**given_, **more})


def limits_of(unit: Unit) -> list[float]:
    """The highest rate of each instance of a unit: pipelines lose a tenth a stage, and capacity grows with them."""
    tables = {"prefill": PROMPT_RATE, "decode": DECODE_RATE, "mixed": PROMPT_RATE}
    return [tables[role].get(shape.tp, 5.0) * shape.pp * 0.9 ** (shape.pp - 1) for role, shape in unit.parts.items()]


def judged(problem: Problem, unit: Unit, rate_per_s: float) -> bool:
    return rate_per_s <= min(limits_of(unit))


def fine() -> Search:
    return Search(judge=judged, tolerance=0.001)


def test_each_phase_gets_the_shape_that_serves_most_per_gpu() -> None:
    """TP 1 serves 2 prompts/s and 8 decodes/s a GPU; wider or longer instances serve less a GPU."""
    placement = DistServe(search=fine()).placement(world())
    assert placement.prefill.unit == Unit(prefill=Shape(1, 1))
    assert placement.decode.unit == Unit(decode=Shape(1, 1))
    assert placement.prefill.per_gpu == pytest.approx(2.0, rel=0.001)
    assert placement.counts(10.0) == (6, 2)  # of instances that serve 2 and 8, a little less as found
    assert placement.counts(9.9) == (5, 2)


def test_counts_for_a_rate_and_for_the_cluster() -> None:
    by_rate = DistServe(search=fine(), count="rate").plan(world(workload=Workload(rate_per_s=7.9, lengths=SHORT)))
    assert [replica.role for replica in by_rate.replicas] == ["prefill"] * 4 + ["decode"]
    filled = DistServe(search=fine()).plan(world(nodes=2))
    roles = [replica.role for replica in filled.replicas]
    assert (roles.count("prefill"), roles.count("decode")) == (12, 4)  # 24 requests/s; 13 and 3 serve no more
    with pytest.raises(ConfigError, match="50 prefill replica"):
        DistServe(search=fine(), count="rate").plan(world(workload=Workload(rate_per_s=99.0, lengths=SHORT)))


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.5, 4.0), min_size=4, max_size=4), st.lists(st.floats(0.5, 4.0), min_size=4, max_size=4),
    st.integers(1, 3),
)  # fmt: skip
def test_the_algorithms_find_what_trying_everything_finds(prompt: Any, decode: Any, nodes: int) -> None:
    where = world(nodes=nodes, count=4)
    speeds = {
        "prefill": dict(zip((1, 2, 4), prompt, strict=False)),
        "decode": dict(zip((1, 2, 4), decode, strict=False)),
    }

    def capacity(unit: Unit) -> float:
        return min(speeds[role][shape.tp] * shape.pp**0.9 for role, shape in unit.parts.items())

    def judge(problem: Problem, unit: Unit, rate_per_s: float) -> bool:
        return rate_per_s <= capacity(unit)

    search = Search(judge=judge, tolerance=1e-4)
    high = DistServe(search=search, affinity="high").placement(where)
    low = DistServe(search=search, affinity="low").placement(where)
    for rated, units in (
        (high.prefill, [Unit(prefill=shape) for shape in instances(where)]),
        (high.decode, [Unit(decode=shape) for shape in instances(where)]),
        (low.prefill, pairs(where)),
    ):
        assert rated.per_gpu == pytest.approx(max(capacity(unit) / unit.gpus for unit in units), rel=2e-4)
    both = 1 / (1 / high.prefill.per_gpu + 1 / high.decode.per_gpu)  # GPUs a request/s, with many instances of each
    assert both >= low.prefill.per_gpu * (1 - 3e-4)


def test_ties_go_to_the_fewest_gpus_and_then_to_narrow_tensor_parallelism() -> None:
    search = Search(judge=lambda problem, unit, rate: rate <= 1.1 * unit.gpus, width_per_gpu=0.25, most_per_gpu=5)
    high = DistServe(search=search).placement(world(count=2))
    assert high.prefill == Rated(Unit(prefill=Shape(1, 1)), 1.09375)
    four = Search(judge=lambda problem, unit, rate: unit.gpus == 4 and rate <= 4, width_per_gpu=0.25, most_per_gpu=5)
    assert DistServe(search=four).placement(world(count=8)).decode.unit == Unit(decode=Shape(1, 4))


def test_degrees_divide_heads_and_layers_and_fit() -> None:
    """OPT-66B has 72 heads and 64 layers, and 132 GB of weights: no single GPU of 80 GB holds it."""
    shapes = instances(world("opt-66b", nodes=4))
    assert {shape.tp for shape in shapes} == {1, 2, 3, 4, 6, 8}
    assert {shape.pp for shape in shapes} == {1, 2, 4, 8, 16, 32}
    assert Shape(1, 1) not in shapes
    assert Shape(2, 1) in shapes
    assert Shape(6, 8) not in shapes  # one group of six a machine, so eight machines
    assert all(shape.gpus <= 32 for shape in shapes)
    assert all(unit.gpus <= 8 * unit.nodes for unit in pairs(world("opt-66b", nodes=4)))


def test_shapes_without_measurements_are_left_out_if_others_have_some() -> None:
    profile = read_profile(shipped_profiles()["distserve-a100"])
    assert {shape.tp for shape in instances(world("opt-66b", cost=Fitted(profiles=(profile,))))} == {2, 3, 4, 8}
    assert {shape.tp for shape in instances(world("opt-30b", cost=Fitted(profiles=(profile,))))} == {1, 2, 4, 7, 8}


@pytest.mark.parametrize("nodes", [1, 2])
def test_kv_of_a_pair_never_leaves_its_machines(nodes: int) -> None:
    where = world("opt-66b", nodes=4)
    unit = Unit(prefill=Shape(4, nodes), decode=Shape(2, 2 * nodes), nodes=nodes)
    plan = paired_plan(where, unit)
    check_plan(plan, where)
    assert len(plan.replicas) == 2 * len(plan.shares) == 8 // nodes
    by_name = {replica.name: replica for replica in plan.replicas}
    for prefill, decode in plan.shares:
        path = where.cluster.path(by_name[prefill].gpus, by_name[decode].gpus)
        assert {name.split(":")[0] for name, _ in path.usage} == {"gpu"}
    with pytest.raises(ConfigError, match="5 pairs of 8 GPUs are needed, the cluster has room for 4"):
        paired_plan(where, Unit(prefill=Shape(4, 1), decode=Shape(2, 2)), 5)


def test_a_search_remembers_until_the_problem_changes() -> None:
    asked: list[Unit] = []

    def judge(problem: Problem, unit: Unit, rate_per_s: float) -> bool:
        asked.append(unit)
        return judged(problem, unit, rate_per_s)

    search = Search(judge=judge)
    planner = DistServe(search=search)
    first = planner.plan(world())
    count = len(asked)
    assert planner.plan(world(workload=Workload(rate_per_s=3.0, lengths=SHORT))) == first
    assert len(asked) == count  # the rate is no part of it
    planner.plan(world(workload=Workload(rate_per_s=3.0, lengths=((300, 50),))))
    assert len(asked) == 2 * count


def test_an_executor_changes_nothing_and_reports_progress() -> None:
    done: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        search = Search(judge=judged, executor=pool, done=lambda: done.append(1))
        assert DistServe(search=search).plan(world()) == DistServe(search=Search(judge=judged)).plan(world())
    assert len(done) == 2 * len(instances(world()))


def test_colocated_by_the_same_search() -> None:
    planner = BestColocated(search=fine())
    assert planner.placement(world()).unit == Unit(mixed=Shape(1, 1))
    assert len(planner.plan(world()).replicas) == 8


@pytest.mark.parametrize(
    ("where", "judge", "message"),
    [
        ({"slo": Slo(ttft_s=1.0)}, judged, "searched for TTFT and TPOT; set slo.ttft_s and slo.tpot_s"),
        ({"count": 1, "name": "opt-175b"}, judged, "no prefill instance fits; add GPUs"),
        ({}, lambda problem, unit, rate: False, "no prefill instance attains the SLO at any rate; loosen slo"),
    ],
)
def test_what_cannot_be_placed_is_an_error(where: dict[str, Any], judge: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistServe(search=Search(judge=judge)).plan(world(**where))


def test_unequal_machines_are_an_error() -> None:
    mixed = Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 8}, {"gpu": "L40S", "count": 4}])
    with pytest.raises(ConfigError, match="equal machines, the cluster has 8 x A100-80G-SXM, 4 x L40S; state prefill"):
        DistServe(search=fine()).plan(replace(world(), cluster=mixed))


def test_no_room_for_both_phases_is_an_error() -> None:
    search = Search(judge=lambda problem, unit, rate: unit.gpus == 2 and rate <= 2)
    with pytest.raises(ConfigError, match=r"the cluster.s 2 GPUs have no room for both phases; add GPUs"):
        DistServe(search=search).plan(world(count=2))


# ------------------------------------------------------------ arithmetic of the paper


def test_kv_of_a_prompt_of_512_tokens() -> None:
    """Section 3.3: OPT-66B, 1.13 GB; ten requests a second take 90 Gbit/s."""
    kv_bytes = 512 * model("opt-66b").kv_bytes_per_token()
    assert kv_bytes == 1.125 * 2**30
    assert 10 * kv_bytes * 8 / 2**30 == 90


@pytest.mark.parametrize(("speedup", "load"), [(1.2, 0.434), (1.5, 0.936), (1.8, 1.429)])
def test_above_a_load_two_stages_beat_two_tensor_parallel_gpus(speedup: float, load: float) -> None:
    found = crossover_load(speedup)
    assert found == pytest.approx(load, abs=0.0005)
    assert inter_op_ttft_s(1, found) == pytest.approx(intra_op_ttft_s(1, found, speedup), rel=1e-12)
    assert inter_op_ttft_s(1, 0.9 * found) > intra_op_ttft_s(1, 0.9 * found, speedup)
    assert inter_op_ttft_s(1, 1.01 * found) < intra_op_ttft_s(1, 1.01 * found, speedup)


def test_the_formulas_of_section_3() -> None:
    prompt_s, rate, speedup = 0.2, 3.0, 1.5
    assert ttft_s(prompt_s, rate) == pytest.approx(0.2 + 3 * 0.04 / (2 * 0.4))
    assert inter_op_ttft_s(prompt_s, rate) == pytest.approx(0.2 + 3 * 0.04 / (4 * (2 - 0.6)))
    assert intra_op_ttft_s(prompt_s, rate, speedup) == pytest.approx(0.2 / 1.5 + 3 * 0.04 / (3 * (1.5 - 0.6)))
    assert ttft_s(prompt_s, 5.0) == inf


def test_simulated_prefill_is_the_queue() -> None:
    """Equal prompts, one a batch, on one GPU of 0.1 s a prompt: within 2 % of the M/D/1 formula (section 3.1)."""
    from sim.systems.split.distserve import distserve
    from tests.toys import MS, Requests, ToyCost, cluster, problem

    where = problem(cluster(gpus=2), ToyCost(base_ps=100 * MS, per_token_ps=0, per_pair_ps=0))
    system = distserve(max_prompts=1, prefill={"replicas": 1, "tp": 1}, decode={"replicas": 1, "tp": 1})
    requests = [replace(request, output_tokens=1) for request in poisson(((100, 1),), 6.0, 30_000, 1)]
    simulated = simulate(where, system, Requests(requests)).columns["ttft_s"]
    assert float(np.mean(simulated)) == pytest.approx(ttft_s(0.1, 6.0), rel=0.02)


# ------------------------------------------------------------ on the simulator

DECILES = (
    (10, 162, 365, 506, 637, 814, 959, 1175, 1370, 1591, 2003),
    (2, 6, 13, 21, 34, 55, 169, 239, 291, 469, 894),
)
"""Prompt and output tokens of 100 ShareGPT requests, LLMServe/DistServe 20a1633, alignment/.../vllm-100-1.exp."""


def sharegpt() -> tuple[tuple[int, int], ...]:
    rng = np.random.default_rng(0)
    drawn = [np.interp(rng.random(2000), np.linspace(0, 1, 11), deciles) for deciles in DECILES]
    return tuple(
        (round(a), min(round(b), 2048 - round(a))) for a, b in zip(*(part.tolist() for part in drawn), strict=True)
    )


def measured(name: str, slo: Slo, count: int = 8, tensor: tuple[int, ...] = (1, 2, 3, 4, 8)) -> Problem:
    profile = read_profile(shipped_profiles()["distserve-a100"])
    known = tuple(terms for terms in profile.polynomials if terms.tp in tensor)
    cost = Fitted(profiles=(replace(profile, polynomials=known),))
    return world(name, count=count, cost=cost, slo=slo, workload=Workload(rate_per_s=1.0, lengths=sharegpt()))


@pytest.mark.slow
def test_readme_example_of_the_released_search() -> None:
    """OPT-13B, ShareGPT, four GPUs, P90 of 200 and 100 ms: (2, 1) and (1, 1); 1.56 requests/s and GPU, to the grid."""
    judge = Rehearsal(simulate=simulate, criterion="separate", spans=0, prompt_tokens=8192)
    search = Search(judge=judge, width_per_gpu=0.25, most_per_gpu=5)
    found = DistServe(search=search, affinity="low").placement(
        measured("opt-13b", Slo(ttft_s=0.2, tpot_s=0.1), 4, (1, 2))
    )
    assert found.prefill.unit == Unit(prefill=Shape(2, 1), decode=Shape(1, 1))
    assert found.prefill.per_gpu == pytest.approx(1.5625, abs=0.16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slo", "tensor", "prefill", "decode"),
    [
        ("opt-13b", Slo(ttft_s=0.25, tpot_s=0.1), (1, 2), Shape(2, 1), Shape(1, 1)),
        ("opt-66b", Slo(ttft_s=2.5, tpot_s=0.15), (2, 4), Shape(4, 1), Shape(2, 2)),
    ],
)
def test_table_3(name: str, slo: Slo, tensor: tuple[int, ...], prefill: Shape, decode: Shape) -> None:
    """Chosen shapes, by algorithm 2 on one machine and the released code's grid.

    With the degrees for which the code has memory sizes; OPT-13B's TP 4 terms would give (4, 1) and (2, 1).
    """
    judge = Rehearsal(simulate=simulate, spans=0, prompt_tokens=8192)
    search = Search(judge=judge, width_per_gpu=0.25, most_per_gpu=5)
    placement = DistServe(search=search, affinity="low").placement(measured(name, slo, tensor=tensor))
    assert placement == Placement(placement.prefill, placement.prefill)
    assert placement.prefill.unit == Unit(prefill=prefill, decode=decode)


# ------------------------------------------------------------ the study


def test_the_study_writes_its_page_and_capacities_are_those_of_the_released_code(tmp_path: Path) -> None:
    from experiments.studies.distserve import study as study_distserve

    study_distserve.main(["--out", str(tmp_path), "--part", "arithmetic"])
    study_distserve.main(["--out", str(tmp_path), "--part", "md1"])
    rows = pd.read_csv(tmp_path / "study_distserve.csv")
    assert rows["ratio"].between(0.94, 1.01).all()
    assert "1.125 GiB" in (tmp_path / "study_distserve.md").read_text()
    curves = pd.read_csv(tmp_path / "study_distserve_md1.csv")
    assert set(curves["way"]) == {"one GPU", "2 stages", *(f"TP 2, {k}x as fast" for k in (1.2, 1.5, 1.8))}


def test_lengths_of_the_study_keep_to_the_context_of_opt() -> None:
    from experiments.studies.distserve.world import APPLICATIONS

    for application in APPLICATIONS:
        lengths = application.problem("distserve-a100").workload.lengths
        assert all(sum(pair) <= 2048 for pair in lengths), application.name
