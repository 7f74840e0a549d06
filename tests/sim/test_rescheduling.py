"""ThunderServe's rescheduling: what is left is flipped or planned anew, and nobody is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sim import SYSTEMS, ClusterEvent, ConfigError, Plan, Problem, Request, Result, System, Workload
from sim.planners.thunderserve import TabuSearch
from sim.systems.split.thunderserve import Reschedule
from tests.toys import cluster, problem, replica, request, run

GROUPS = Plan(
    replicas=(
        replica("a", ["n0.g0"], "prefill"), replica("b", ["n1.g0"], "decode"), replica("c", ["n2.g0"], "decode"),
    )
)  # fmt: skip
SEARCH = TabuSearch(n_steps=10, n_neighbors=4)


def where() -> Problem:
    return replace(problem(cluster(1, 3)), workload=Workload(rate_per_s=5.0, lengths=((100, 10),)))


def system(**options: Any) -> System:
    return replace(
        SYSTEMS["thunderserve"](), rescheduler=lambda: Reschedule(SEARCH, interval_s=1.0, window_s=4.0, **options)
    )


def served(lab: System, events: list[ClusterEvent], requests: list[Request] | None = None) -> Result:
    requests = requests or [request(number, 0.2 * number) for number in range(100)]
    return run(lab, requests, where(), plan=GROUPS, events=events)


def lost(at_s: float, node: str = "n0") -> ClusterEvent:
    return ClusterEvent(at_s=at_s, kind="node_lost", target=node)


def notes(result: Result, kind: str) -> list[str]:
    return [note.text for note in result.rows.notes if note.kind == kind]


def test_when_the_only_prefill_group_is_lost_a_decode_group_flips_and_nothing_is_loaded() -> None:
    result = served(system(), [lost(5.0)])
    assert notes(result, "change") == ["n0.g0 lost"]
    assert notes(result, "up") == []
    late = [row for row in result.rows.requests if row.request.arrival_s > 5]
    assert {row.outcome for row in result.rows.requests} == {"completed"}
    assert {(row.prefill_stage, row.decode_stage) for row in late} in ({("b", "c")}, {("c", "b")})
    kept = served(replace(system(), rescheduler=SYSTEMS["thunderserve"]().rescheduler), [lost(5.0)])
    assert [row.outcome for row in kept.rows.requests if row.request.arrival_s > 5] == ["rejected"] * 74


def test_planning_takes_its_time() -> None:
    """Two seconds and the tick after; who comes meanwhile is refused."""
    result = served(system(planning_s=1.5), [lost(5.1)])
    (change,) = [note for note in result.rows.notes if note.kind == "change"]
    assert change.time_ps == 7 * 10**12
    refused = [row.request.arrival_s for row in result.rows.requests if row.outcome != "completed"]
    assert refused
    assert 5.1 <= min(refused) <= max(refused) <= 7.0


def test_groups_that_return_load_their_own_weights() -> None:
    back = ClusterEvent(at_s=12.0, kind="gpu_joined", target="n0")
    result = served(system(), [lost(5.0), back])
    assert notes(result, "change") == ["n0.g0 lost", "n0.g0 joined"]
    assert notes(result, "up") == ["a"]


def test_full_rescheduling_plans_for_the_gpus_there_are() -> None:
    result = served(system(lightweight=False), [lost(5.0)])
    assert {row.outcome for row in result.rows.requests} <= {"completed", "failed", "rejected"}
    assert notes(result, "up")  # whatever it laid out anew was loaded
    gpus = {gpu for row in result.rows.replicas if row.down_s is None for gpu in row.gpus.split()}
    assert not any(gpu.startswith("n0") for gpu in gpus)
    assert [row.outcome for row in result.rows.requests[-20:]] == ["completed"] * 20


def test_a_shift_of_the_workload_is_planned_for() -> None:
    """From long prompts with short answers to the opposite; groups and layers stay."""
    requests = [request(n, 0.2 * n, *((400, 4) if n < 150 else (20, 60))) for n in range(300)]
    result = served(system(fewest_requests=10), [], requests)
    reasons = notes(result, "change")
    assert all("workload shifted" in reason for reason in reasons)
    assert notes(result, "up") == []
    assert {row.outcome for row in result.rows.requests} == {"completed"}


def test_when_no_plan_serves_what_is_left_stays() -> None:
    result = served(system(), [lost(5.0), lost(6.0, "n1")])
    assert "no better plan" in notes(result, "change")[-1]
    assert {row.outcome for row in result.rows.requests} == {"completed", "rejected", "failed"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"reschedule": "often"}, "system.reschedule is 'often'"), ({"planning_s": -1.0}, r"system.planning_s is -1\.0")],
)
def test_options_are_checked(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SYSTEMS["thunderserve"](**options)
