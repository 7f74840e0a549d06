"""Helix: requests take paths of their own, in the proportions of the flow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from sim import SYSTEMS, ClusterEvent, ConfigError, Plan, Problem, Result, System
from sim.planners.helix import END, HelixPlacement
from sim.types import Replica, Stage
from tests.toys import ToyCost, cluster, problem, request, run

LAYERS = {"a": (0, 1), "b": (0, 1), "c": (1, 2), "d": (1, 2)}
GPUS = {"a": "n0.g0", "b": "n0.g1", "c": "n1.g0", "d": "n1.g1"}
FLOWS = {
    (END, "a"): 3.0, (END, "b"): 1.0, ("a", "c"): 2.0, ("a", "d"): 1.0, ("b", "d"): 1.0,
    ("c", END): 2.0, ("d", END): 2.0,
}  # fmt: skip


class Stated:
    def plan(self, problem: Problem) -> Plan:
        nodes = {
            name: Stage(name=name, gpus=(GPUS[name],), first_layer=s, end_layer=e) for name, (s, e) in LAYERS.items()
        }
        return Plan(replicas=tuple(Replica(name=name, stages=(stage,)) for name, stage in nodes.items()), flows=FLOWS)


def helix(**options: object) -> System:
    return replace(SYSTEMS["helix"](**options), planner=Stated())


def simulate(system: System, count: int = 400, **more: object) -> Result:
    requests = [request(n, 0.05 * n, input_tokens=50, output_tokens=5) for n in range(count)]
    return run(system, requests, problem(cluster(gpus=2, nodes=2), ToyCost()), **more)


def paths(result: Result) -> Counter[str]:
    return Counter(result.requests["prefill_stage"])


def test_shares_of_the_paths_converge_to_the_flow() -> None:
    taken = paths(simulate(helix()))
    edges: Counter[tuple[str, str]] = Counter()
    for path, count in taken.items():
        for edge in pairwise(["", *path.split(" > ")]):
            edges[edge] += count
    for (source, target), flow in FLOWS.items():
        if target != END:
            assert edges[source, target] / 400 == pytest.approx(flow / 4, abs=0.02)


def test_prompt_and_answer_take_the_same_path() -> None:
    table = simulate(helix(), 40).requests
    assert (table["prefill_stage"] == table["decode_stage"]).all()
    assert (table["bytes_moved"] == 0).all()


@pytest.mark.parametrize("routing", ["random", "shortest-queue"])
def test_other_routings_use_several_chains(routing: str) -> None:
    result = simulate(helix(routing=routing), 200)
    assert {"a > c", "b > d"} <= set(paths(result)) <= {"a > c", "a > d", "b > d"}
    assert (result.requests["outcome"] == "completed").all()


def test_a_node_whose_kv_is_expected_to_be_full_is_passed_over() -> None:
    small = helix(high_water=0.5)
    small = small.with_limits(replace(small.limits, num_kv_blocks=16))
    requests = [request(n, 0.0, input_tokens=60, output_tokens=5) for n in range(8)]
    result = run(small, requests, problem(cluster(gpus=2, nodes=2), ToyCost()))
    taken = paths(result)
    assert taken["a > c"] <= 5  # two fit below the mark; then d and b are filled before anybody must be placed
    assert (result.requests["outcome"] == "completed").all()


def test_a_lost_node_is_left_out_of_all_paths() -> None:
    lost = ClusterEvent(at_s=1.0, kind="gpu_lost", target="n1.g0")
    result = simulate(helix(), 100, events=(lost,))
    assert (result.requests["outcome"] == "completed").all()
    late = result.requests[result.requests["arrival_s"] > 1.0]
    assert set(late["prefill_stage"]) == {"a > d", "b > d"}


def test_without_any_chain_requests_are_refused() -> None:
    events = tuple(ClusterEvent(at_s=1.0, kind="gpu_lost", target=gpu) for gpu in ("n1.g0", "n1.g1"))
    outcomes = Counter(simulate(helix(), 60, events=events).requests["outcome"])
    assert outcomes["rejected"] > 0
    assert outcomes["completed"] > 0


def test_the_planned_system_serves() -> None:
    system = SYSTEMS["helix"](moves=20)
    requests = [request(n, 0.05 * n) for n in range(50)]
    result = run(system, requests, problem(cluster(gpus=1, nodes=3), ToyCost()))
    assert (result.requests["outcome"] == "completed").all()
    assert isinstance(system.planner, HelixPlacement)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "best"}, "helix, petals, swarm, separate"),
        ({"routing": "best"}, "flow, random, shortest-queue"),
        ({"high_water": 0.0}, "system.high_water is 0.0"),
        ({"max_prompts": 0}, "system.max_prompts is 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["helix"](**options)
