"""Nodes that hold a part of the layers: hand-computed journeys, partial inference, preemption, faults."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sim import ClusterEvent, ConfigError, Plan, PolicyError, Problem, Request, Result, System
from sim.batchers import Passing, TokenBudget
from sim.policy import Limits, RequestView, View
from sim.reschedulers import RestorePlan
from sim.transfers import Whole
from sim.types import Reject, Replica, Route, Stage, to_ps
from tests.toys import MS, TINY, ToyCost, cluster, problem, request, run


def hop_ps(size_bytes: int, latencies: int = 1) -> int:
    """Between the two machines, alone on the link."""
    where = cluster(gpus=2, nodes=2, gbps=1e9)
    path = where.path(("n0.g0",), ("n1.g0",))
    assert path.latency_s == 1e-5
    return to_ps(size_bytes / path.bytes_per_s(where.capacity_bytes_per_s)) + latencies * 10 * 10**6


def node(name: str, gpu: str, first: int, end: int) -> Replica:
    return Replica(name=name, stages=(Stage(name=name, gpus=(gpu,), first_layer=first, end_layer=end),))


@dataclass
class Given:
    """Routes over the first of these paths whose nodes are up."""

    paths: tuple[tuple[str, ...], ...]

    def route(self, request: RequestView, view: View) -> Route | Reject:
        up = {replica.name for replica in view.replicas}
        for path in self.paths:
            if up.issuperset(path):
                return Route(path, path)
        return Reject("no path is up")

    def finished(self, request: RequestView) -> None:
        """It keeps no reservations."""


@dataclass
class Stated:
    replicas: tuple[Replica, ...]

    def plan(self, problem: Problem) -> Plan:
        return Plan(replicas=self.replicas)


def system(replicas: tuple[Replica, ...], *paths: tuple[str, ...], **limits: object) -> System:
    return System(
        name="paths", mirrors="a test", planner=Stated(replicas), router=lambda: Given(paths),
        batcher=lambda role: Passing(watermark=0.0), transfer=Whole, rescheduler=RestorePlan,
        limits=Limits(**limits),  # type: ignore[arg-type]
    )  # fmt: skip


TWO = (node("a", "n0.g0", 0, 1), node("b", "n1.g0", 1, 2))
FAST = ToyCost(base_ps=20 * MS, per_token_ps=0, per_context_ps=0, per_pair_ps=0)


def simulate(replicas: tuple[Replica, ...], requests: list[Request], *paths: tuple[str, ...], **more: object) -> Result:
    limits = more.pop("limits", {})
    where = problem(cluster(gpus=2, nodes=2, gbps=1e9), more.pop("cost", FAST))
    return run(system(replicas, *paths, **limits), requests, where, **more)  # type: ignore[arg-type]


def test_a_token_passes_every_node_and_goes_back_by_the_coordinator() -> None:
    result = simulate(TWO, [request(0, output_tokens=3)], ("a", "b"))
    activations = 2 * TINY.hidden_size
    first = 20 * MS + hop_ps(100 * activations)  # half of the layers at each node
    another = hop_ps(4, latencies=2) + 20 * MS + hop_ps(activations)
    assert result.token_times_ps(0) == [first, first + another, first + 2 * another]
    assert result.requests["prefill_stage"].tolist() == ["a > b"]


def test_nodes_work_at_the_same_time() -> None:
    alone = simulate(TWO, [request(0, output_tokens=40)], ("a", "b"))
    both = simulate(TWO, [request(0, output_tokens=40), request(1, 0.01, output_tokens=40)], ("a", "b"))
    assert both.makespan_s < alone.makespan_s + 0.03


def test_only_the_missing_layers_are_computed() -> None:
    nodes = (node("a", "n0.g0", 0, 1), node("b", "n1.g0", 0, 2))
    partial = simulate(nodes, [request(0, output_tokens=1)], ("a", "b"))
    assert partial.token_times_ps(0) == [20 * MS + hop_ps(100 * 2 * TINY.hidden_size)]
    whole = simulate(nodes, [request(0, output_tokens=1)], ("b",))
    assert whole.token_times_ps(0) == [20 * MS]


def test_a_batch_of_both_kinds_computes_the_first_layers_for_some_only() -> None:
    cost = ToyCost(base_ps=0, per_token_ps=MS, per_context_ps=0, per_pair_ps=0)
    nodes = (node("a", "n0.g0", 0, 1), node("b", "n1.g0", 0, 2))
    # request 0 needs layer 1 of b only, request 1 both; together: 50 ms for layer 0 of request 1, 60 ms for layer 1
    requests = [request(0, 0.0, input_tokens=20, output_tokens=1), request(1, 0.0, input_tokens=100, output_tokens=1)]

    class Split(Given):
        def route(self, request: RequestView, view: View) -> Route | Reject:
            path = ("a", "b") if request.id == 0 else ("b",)
            return Route(path, path)

    of_both = system(nodes, ("a", "b"))
    of_both = System(
        **{name: getattr(of_both, name) for name in of_both.__dataclass_fields__} | {"router": lambda: Split(())}
    )
    result = run(of_both, requests, problem(cluster(gpus=2, nodes=2, gbps=1e9), cost))
    assert result.token_times_ps(1) == [100 * MS]
    assert result.token_times_ps(0) == [110 * MS]  # it came while b was at work
    steps = result.steps
    assert steps["replica"].tolist() == ["a", "b", "b"]


def test_without_blocks_the_last_admitted_starts_over() -> None:
    requests = [request(n, 0.001 * n, input_tokens=60, output_tokens=60) for n in range(6)]
    result = simulate(TWO, requests, ("a", "b"), limits={"num_kv_blocks": 24})
    assert (result.requests["outcome"] == "completed").all()
    assert result.requests["preemptions"].sum() > 0
    assert result.requests["preemptions"].iloc[0] == 0


def test_a_lost_node_sends_its_requests_another_way() -> None:
    nodes = (*TWO, node("c", "n1.g1", 1, 2))
    lost = ClusterEvent(at_s=0.5, kind="gpu_lost", target="n1.g0")
    result = simulate(nodes, [request(0, output_tokens=50)], ("a", "b"), ("a", "c"), events=(lost,))
    row = result.requests.iloc[0]
    assert (row["outcome"], row["prefill_stage"]) == ("completed", "a > c")
    times = result.token_times_ps(0)
    assert len(times) == 50
    assert times == sorted(times)


def test_while_a_node_loads_its_weights_requests_wait_for_it() -> None:
    events = (
        ClusterEvent(at_s=0.5, kind="gpu_lost", target="n1.g0"),
        ClusterEvent(at_s=0.6, kind="gpu_joined", target="n1.g0"),
    )
    result = simulate(TWO, [request(n, 0.1 * n, output_tokens=50) for n in range(9)], ("a", "b"), events=events)
    outcomes = result.requests.sort_values("request")["outcome"].tolist()
    assert outcomes == 6 * ["failed"] + ["rejected"] + 2 * ["completed"]  # number 6 comes with the GPU, before its load


def test_a_cut_off_run_reports_everybody() -> None:
    result = simulate(TWO, [request(n, 0.1 * n, output_tokens=50) for n in range(9)], ("a", "b"), until_s=1.0)
    assert result.requests["request"].is_unique
    assert len(result.requests) == 9
    assert set(result.requests["outcome"]) == {"running"}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a",), "over 1 layers only"),
        (("b", "a"), "where layer 0 is next"),
        (("a", "x"), "not the stages of a replica that is up"),
    ],
)
def test_an_impossible_path_is_the_routers_fault(paths: tuple[str, ...], message: str) -> None:
    class Blind(Given):
        def route(self, request: RequestView, view: View) -> Route | Reject:
            return Route(paths, paths)

    wrong = system(TWO)
    wrong = System(
        **{name: getattr(wrong, name) for name in wrong.__dataclass_fields__} | {"router": lambda: Blind(())}
    )
    with pytest.raises(PolicyError, match=message):
        run(wrong, [request(0)], problem(cluster(gpus=2, nodes=2)))


def test_a_batcher_that_cuts_prompts_is_told() -> None:
    cutting = system(TWO, ("a", "b"), max_num_batched_tokens=64)
    cutting = System(
        **{name: getattr(cutting, name) for name in cutting.__dataclass_fields__}
        | {"batcher": lambda role: TokenBudget()}
    )
    with pytest.raises(PolicyError, match="nodes take whole prompts"):
        run(cutting, [request(0)], problem(cluster(gpus=2, nodes=2)))


def test_bad_plans_are_named() -> None:
    hole = (node("a", "n0.g0", 0, 1),)
    with pytest.raises(ConfigError, match="no replica holds layer 1"):
        simulate(hole, [request(0)], ("a",))
    with pytest.raises(ConfigError, match="prefix_caching"):
        simulate(TWO, [request(0)], ("a", "b"), limits={"prefix_caching": True})
    assert TINY.num_layers == 2
