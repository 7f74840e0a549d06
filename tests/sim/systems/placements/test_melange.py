"""Melange's load balancer, its simulated rates, and how the planned mix serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from experiments.planning.plan import found
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import resolve
from experiments.studies.melange.world import lengths, problem
from sim import SYSTEMS, Cluster, ConfigError, Plan, Problem, Result, Workload, simulate
from sim.planners.melange import Bucket, ClosedForm, Melange, Profile
from sim.policy import Limits
from sim.predictors import ConstantLength, TrueLength
from sim.systems.placements.melange import ByThroughput, Simulated
from sim.systems.split.distserve import poisson
from sim.types import ClusterEvent, Replica, Slo
from tests.toys import TINY, ToyCost, replica, request, run

TWO = Plan(replicas=(replica("a", ["n0.g0"]), replica("b", ["n1.g0"])))


def world(**more: Any) -> Problem:
    """Two machines with a GPU each; one sampled size."""
    given = {
        "cluster": Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 1, "nodes": 2}]),
        "model": TINY,
        "cost": ToyCost(),
        "workload": Workload(rate_per_s=1.0, lengths=((100, 10), (900, 40))),
        "slo": Slo(tpot_s=0.1),
    }
    return Problem(**(given | more))  # type: ignore[arg-type]


def rates(**by_replica: float) -> Callable[[Problem, Replica], Profile]:
    """The same for every bucket."""

    def profiler(_: Problem, replica: Replica) -> Profile:
        return lambda bucket: by_replica[replica.name]

    return profiler


@dataclass
class Asked:
    """A profiler that answers alike and notes the buckets that it is asked for."""

    buckets: list[Bucket] = field(default_factory=list)

    def __call__(self, problem: Problem, replica: Replica) -> Profile:
        def profile(bucket: Bucket) -> float:
            self.buckets.append(bucket)
            return 1.0

        return profile


def routed(router: ByThroughput, requests: list[Any], plan: Plan = TWO, **more: Any) -> Result:
    where = more.pop("where", None) or world()
    return run(replace(SYSTEMS["melange"](), router=lambda: router), requests, where, plan=plan, **more)


def test_requests_are_drawn_by_what_a_replica_serves() -> None:
    """Machines of two types, so that their rates are their own: chi-square of 3 to 1 (g of the specification)."""
    where = world(cluster=Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 1}, {"gpu": "L4", "count": 1}]))
    requests = [request(number, 0.05 * number) for number in range(2000)]
    result = routed(ByThroughput(rates(a=3.0, b=1.0)), requests, where=where)
    counts = Counter(result.requests["prefill_stage"])
    expected = {"a": 1500, "b": 500}
    chi_square = sum((counts[name] - number) ** 2 / number for name, number in expected.items())
    assert chi_square < 6.63  # of 99 in 100 fair draws


def test_who_cannot_serve_the_size_gets_none() -> None:
    where = world(cluster=Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 1}, {"gpu": "L4", "count": 1}]))
    requests = [request(number, 0.05 * number) for number in range(200)]
    table = routed(ByThroughput(rates(a=0.0, b=1.0)), requests, where=where).requests
    assert set(table["prefill_stage"]) == {"b"}


def test_where_nobody_does_all_count_alike() -> None:
    requests = [request(number, 0.05 * number) for number in range(200)]
    table = routed(ByThroughput(rates(a=0.0, b=0.0)), requests).requests
    assert min(Counter(table["prefill_stage"]).values()) > 70


# ------------------------------------------------------------ the size that it expects


def test_the_first_request_is_expected_as_the_sample_has_it() -> None:
    """Prompts of 251 to 500 have no sample: the mean of all, (10 + 40) / 2."""
    asked = Asked()
    routed(ByThroughput(asked), [request(0, 0.0, 90), request(1, 0.0, 800), request(2, 0.0, 400)])
    assert list(dict.fromkeys(asked.buckets)) == [(100, 25), (1000, 100), (500, 25)]


def test_then_as_the_mean_of_those_that_were_answered() -> None:
    """The first two, of 20 and 300 tokens, mean 160; the third comes after both, the fourth is of another bucket."""
    asked = Asked()
    requests = [request(0, 0.0, 90, 20), request(1, 0.0, 80, 300), request(2, 60.0, 100, 5), request(3, 60.0, 900, 5)]
    routed(ByThroughput(asked), requests)
    assert list(dict.fromkeys(asked.buckets)) == [(100, 25), (100, 250), (1000, 100)]


def test_no_true_length_is_used_before_the_end() -> None:
    """Whatever a predictor says and however long the answers are, a burst is drawn alike."""
    places = []
    for answer, predictor in ((3, TrueLength()), (900, ConstantLength(1))):
        requests = [request(number, 0.0, 100, answer) for number in range(50)]
        table = routed(ByThroughput(), requests, predictor=predictor).requests.sort_values("request")
        places.append(list(table["prefill_stage"]))
    assert places[0] == places[1]


def test_a_request_that_lost_its_replica_counts_once() -> None:
    """Replica a goes after some tokens of each; in the end the mean is that of whole answers."""
    router = ByThroughput()
    requests = [request(number, 0.0, 100, 40) for number in range(20)]
    lost = ClusterEvent(at_s=0.2, kind="node_lost", target="n0")
    result = routed(router, requests, events=(lost,))
    assert set(result.requests["prefill_stage"]) <= {"a", "b"}
    assert (result.requests["outcome"] == "completed").all()
    assert result.requests["output_tokens"].sum() == 800
    assert router._answers[100] == (800, 20)  # tokens, requests


# ------------------------------------------------------------ rates by simulation


def test_simulated_rates_are_near_the_closed_forms() -> None:
    """One replica, Poisson arrivals; at the rate that was found the mean is within the SLO, at 1.1 of it it is not."""
    where = replace(world(), slo=Slo(tpot_s=0.014), limits=Limits(num_kv_blocks=4000))
    profiler, a = Simulated(simulate, requests=300), TWO.replicas[0]
    bucket = Bucket(100, 25)
    found = profiler(where, a)(bucket)
    assert 0.6 < found / ClosedForm(where, a)(bucket) < 1.6
    assert profiler._serves(where, a, bucket, found)
    assert not profiler._serves(where, a, bucket, 1.1 * found)
    assert profiler(replace(where, workload=Workload(rate_per_s=9.0, lengths=((1, 1),))), a)(bucket) == found


def test_simulated_rates_plan_too() -> None:
    where = replace(world(), slo=Slo(tpot_s=0.014), workload=Workload(rate_per_s=60.0, lengths=((100, 25),)))
    system = SYSTEMS["melange"](profile="simulated", simulate=simulate)
    assert 1 <= len(system.planner.plan(priced(where)).replicas) <= 2


def priced(where: Problem) -> Problem:
    nodes = [{"gpu": "A100-80G-SXM", "count": 1, "nodes": 2, "usd_per_hour": 2.0}]
    return replace(where, cluster=Cluster.of(nodes=nodes))


def test_without_a_bound_nothing_can_be_bisected() -> None:
    with pytest.raises(ConfigError, match=r"set slo\.tpot_s"):
        SYSTEMS["melange"](profile="simulated", simulate=simulate).planner.plan(replace(world(), slo=Slo()))


# ------------------------------------------------------------ the whole


def test_the_planned_mix_keeps_the_slo() -> None:
    """Arena-like traffic at 4 requests/s on what was rented, as in the paper's figure 12, smaller."""
    sample = lengths("arena")
    where = problem(0.12, Workload(rate_per_s=4.0, lengths=sample), {"L4": 8, "A10G": 8, "A100": 2})
    plan = Melange().plan(where)
    system = SYSTEMS["melange"]()
    result = run(system, poisson(sample, 4.0, 300, 1), where, plan=plan)
    columns = result.columns
    assert (columns["outcome"] == "completed").all()
    assert np.mean(columns["e2e_s"] / columns["output_tokens"] <= 0.12) > 0.97
    half = Plan(replicas=plan.replicas[: len(plan.replicas) // 2])
    crowded = run(system, poisson(sample, 16.0, 300, 1), where, plan=half).columns
    assert np.mean(crowded["e2e_s"] / crowded["output_tokens"] <= 0.12) < 0.9


def test_the_plan_command_rents_part_of_a_scenarios_cluster() -> None:
    scenario = {
        "model": "llama-2-7b",
        "cluster": {
            "nodes": [
                {"gpu": "L4", "count": 1, "nodes": 4, "usd_per_hour": 0.7},
                {"gpu": "A100-80G-PCIe", "count": 2, "usd_per_hour": 3.67},
            ],
            "links": {"inter_node": {"gbps": 10}},
        },
        "workload": {"rate": 1.0, "generate": {"requests": 200, "input": {"fixed": 200}, "output": {"fixed": 200}}},
        "system": {"name": "melange", "slices": 4},
        "latency": "roofline",
        "slo": {"tpot_s": 0.12},
    }
    offered = found(resolve(Scenario.of(scenario)))
    option = offered.options[0]
    assert {option.setup.problem.cluster.gpu(gpu).name for gpu in option.gpus} == {"L4"}
    assert option.usd_per_hour == pytest.approx(0.7 * len(option.gpus))
    assert option.row()["idle_gpus"] == 6 - len(option.gpus)
    assert offered.notes[0].startswith("cheapest mix for 1.") or offered.notes[0].startswith("cheapest mix for 0.")
    assert any(note.startswith("only A100-80G-PCIe: 1 = 3.67 $/h; the mix saves") for note in offered.notes)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"slices": 0}, "system.slices is 0"),
        ({"overprovision": -0.1}, "system.overprovision is -0.1"),
        ({"tp": 0}, "system.tp is 0"),
        ({"profile": "guess"}, "system.profile is 'guess'"),
        ({"profile": "simulated"}, "simulated rates want simulate"),
    ],
)
def test_options_are_checked(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        SYSTEMS["melange"](**options)
