"""ThunderServe's rescheduling: what is left is flipped or planned anew, and nobody is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ClusterEvent, ConfigError, Plan, Problem, Request, Result, Slo, System, Workload
from sim.metrics import met
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


# ---------------------------------------------------------------- never worse than none

LESS = Plan(
    replicas=(
        replica("a", ["n0.g0"], "prefill"), replica("b", ["n1.g0"], "prefill"),
        replica("c", ["n2.g0"], "decode"), replica("d", ["n3.g0"], "decode"),
    ),
    shares={("a", "c"): 0.5, ("b", "d"): 0.5},
)  # fmt: skip
SLO = Slo(ttft_s=0.2, tpot_s=0.05)


def in_time(requests: list[Request], rate_per_s: float, lost_node: str, **options: Any) -> float:
    known = Workload(rate_per_s=rate_per_s, lengths=tuple((r.input_tokens, r.output_tokens) for r in requests))
    small = replace(problem(cluster(1, 4)), workload=known, slo=SLO)
    lab = SYSTEMS["thunderserve"](**options)
    result = run(lab, requests, small, plan=LESS, events=[lost(2.0, lost_node)])
    assert len(result.rows.requests) == len(requests)
    return float(met(result.columns, SLO)["all"].mean())


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    rate_per_s=st.sampled_from([5.0, 15.0, 30.0, 60.0]),
    prompt=st.sampled_from([20, 200, 1200]),
    answer=st.sampled_from([2, 20, 60]),
    node=st.sampled_from(["n0", "n1", "n2", "n3"]),
)
def test_lightweight_rescheduling_is_never_worse_than_none(
    seed: int, rate_per_s: float, prompt: int, answer: int, node: str
) -> None:
    """Of the same arrivals, no fewer are within the SLO, whichever machine is lost, but for a hundredth of them."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate_per_s, 300)).tolist()
    requests = [request(n, at, prompt, answer) for n, at in enumerate(arrivals)]
    none, lightweight = (
        in_time(requests, rate_per_s, node, reschedule=how, n_steps=5) for how in (None, "lightweight")
    )
    assert lightweight >= none - 0.01


def test_what_serves_as_well_as_it_is_stays() -> None:
    """One of two prefill groups is lost, and the other is hardly used: nobody changes roles."""
    requests = [request(n, 0.2 * n, 100, 10) for n in range(100)]
    small = replace(problem(cluster(1, 4)), workload=Workload(rate_per_s=5.0, lengths=((100, 10),)), slo=SLO)
    result = run(SYSTEMS["thunderserve"](reschedule="lightweight"), requests, small, plan=LESS, events=[lost(2.0)])
    late = [row for row in result.rows.requests if row.request.arrival_s > 2.0]
    assert {row.prefill_stage for row in late} == {"b"}
    assert {row.outcome for row in result.rows.requests} == {"completed"}
