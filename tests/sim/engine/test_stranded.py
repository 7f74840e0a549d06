"""A link that is cut for good: who waits for it fails with the reason, the others are served, in both engines alike."""

from __future__ import annotations

from collections import Counter

import pytest

from sim import ClusterEvent, Result
from tests.lab import SPLIT, TWO, Way, system
from tests.toys import cluster, problem, request, run

CUT = ClusterEvent(at_s=0.02, kind="link_scaled", target="nic:n0:out", factor=0.0)
RESTORED = ClusterEvent(at_s=5.0, kind="link_scaled", target="nic:n0:out", factor=1.0)
REQUESTS = [request(n, 0.005 * n, input_tokens=200, output_tokens=4) for n in range(12)]


def served(*events: ClusterEvent, **more) -> Result:
    return run(
        system(router=lambda: Way("p", "d")),
        REQUESTS,
        problem(cluster(gpus=2, nodes=2)),
        plan=SPLIT,
        events=events,
        **more,
    )


def test_who_is_on_the_cut_link_fails_and_says_so() -> None:
    result = served(CUT)
    rows = result.rows.requests
    assert len(rows) == len(REQUESTS)
    outcomes = Counter(row.outcome for row in rows)
    assert outcomes["failed"] > 0
    assert set(outcomes) <= {"completed", "failed"}
    reasons = {row.reason for row in rows if row.outcome == "failed"}
    assert reasons == {"the link from p to d is cut, and nothing restores it"}


def test_a_link_that_comes_back_strands_nobody() -> None:
    assert {row.outcome for row in served(CUT, RESTORED).rows.requests} == {"completed"}


@pytest.mark.parametrize("events", [(CUT,), (CUT, RESTORED), ()])
def test_both_engines_agree(events: tuple[ClusterEvent, ...]) -> None:
    assert served(*events).log() == served(*events, step_by_step=True).log()


def test_a_plan_without_that_link_does_not_notice() -> None:
    result = run(system(), REQUESTS, problem(cluster(gpus=2, nodes=2)), plan=TWO, events=[CUT])
    assert {row.outcome for row in result.rows.requests} == {"completed"}
