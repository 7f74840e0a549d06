"""Changes of plan: what drains, what loads, what starts over, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sim import ConfigError, Plan, StalledError
from sim.batchers import TokenBudget
from sim.policy import View, Workload
from sim.routers import LeastLoadedPair
from sim.types import Change, Signal
from tests.lab import ONE, SPLIT, TWO, Script, Way, system
from tests.sim.engine.test_faults import TWO_DECODES, US, decode_ps, event, load_ps, outcomes, where
from tests.toys import MS, replica, request, run

WIDE = Plan(replicas=(replica("w", ["n0.g0", "n0.g1"]),))


def test_requests_wait_for_a_replica_that_loads_its_weights() -> None:
    """Not drained: the request starts over on the new replica, whose GPUs load their halves side by side."""
    change = Change(plan=WIDE, reason="wider", drain=False)
    result = run(
        system(rescheduler=lambda: Script([change], interval_s=0.035)), [request(0, output_tokens=5)], where(), plan=ONE
    )
    up = 35 * MS + load_ps(WIDE.replicas[0], where())
    assert load_ps(WIDE.replicas[0], where()) < load_ps(ONE.replicas[0], where())
    assert [(note.kind, note.time_ps) for note in result.rows.notes] == [
        ("change", 35 * MS), ("down", 35 * MS), ("up", up),
    ]  # fmt: skip
    assert len(result.token_times_ps(0)) == 5
    assert result.token_times_ps(0)[3] == up + 10 * MS + 103 * 10 * US


def test_a_draining_replica_finishes_what_runs_and_hands_over_what_waits() -> None:
    """The new replica needs the old one's GPU, so it loads when that has drained."""
    change = Change(plan=WIDE, reason="wider")
    requests = [request(0, output_tokens=5), request(1, output_tokens=5)]
    result = run(
        system(rescheduler=lambda: Script([change], interval_s=0.035), max_num_seqs=1), requests, where(), plan=ONE
    )
    drained = 11 * MS + sum(decode_ps(context) for context in range(101, 105))
    up = drained + load_ps(WIDE.replicas[0], where())
    assert result.rows.requests[0].finish_ps == drained
    assert [(note.kind, note.time_ps) for note in result.rows.notes] == [
        ("change", 35 * MS), ("drained", drained), ("up", up),
    ]  # fmt: skip
    assert result.rows.requests[1].scheduled_ps == up
    assert [row.prefill_stage for row in result.rows.requests] == ["a", "w"]


def test_a_draining_decode_replica_waits_for_kv_under_way() -> None:
    rest = Plan(replicas=(TWO_DECODES.replicas[0], TWO_DECODES.replicas[2]))
    script = Script([Change(plan=rest, reason="fewer")], interval_s=0.0111)
    result = run(
        system(router=lambda: Way("p", "d"), rescheduler=lambda: script), [request(0)], where(), plan=TWO_DECODES
    )
    assert outcomes(result) == ["completed"]
    assert result.rows.requests[0].decode_stage == "d"
    assert result.rows.notes[-1].kind == "drained"
    assert result.rows.notes[-1].time_ps == result.rows.requests[0].finish_ps


def test_a_role_flip_is_free() -> None:
    flipped = Plan(
        replicas=tuple(replace(one, role=role) for one, role in zip(SPLIT.replicas, ("decode", "prefill"), strict=True))
    )
    change = Change(plan=flipped, reason="flip")
    requests = [request(0, output_tokens=30), request(1, 0.1)]
    result = run(
        system(router=LeastLoadedPair, rescheduler=lambda: Script([change], interval_s=0.05)),
        requests,
        where(),
        plan=SPLIT,
    )
    assert [note.kind for note in result.rows.notes] == ["change"]
    assert [(row.prefill_stage, row.decode_stage) for row in result.rows.requests] == [("p", "d"), ("d", "p")]
    assert [row.role for row in result.rows.replicas] == ["decode", "prefill"]
    alone = run(system(router=LeastLoadedPair), requests[:1], where(), plan=SPLIT)
    assert result.token_times_ps(0)[:8] == alone.token_times_ps(0)[:8]


def test_a_change_replaces_what_has_not_come_up_yet() -> None:
    """Two changes in a row: the replica of the first is still loading, on a GPU that the second needs."""
    first = Plan(replicas=(ONE.replicas[0], replica("x", ["n1.g0", "n1.g1"])))
    second = Plan(replicas=(ONE.replicas[0], replica("y", ["n1.g0"])))
    script = Script([Change(plan=plan, reason="") for plan in (first, second)], interval_s=0.01)
    result = run(system(rescheduler=lambda: script), [request(0, output_tokens=200)], where(), plan=ONE)
    ups = [(note.text, note.time_ps) for note in result.rows.notes if note.kind == "up"]
    assert ups == [("y", 20 * MS + load_ps(second.replicas[1], where()))]


def test_a_loading_replica_that_is_lost_fails_who_waits_for_it() -> None:
    change = Change(plan=Plan(replicas=(replica("x", ["n1.g0"]),)), reason="move", drain=False)
    result = run(
        system(rescheduler=lambda: Script([change], interval_s=0.02)), [request(0, output_tokens=50)], where(),
        plan=ONE, events=[event("gpu_lost", "n1.g0", 0.0201)],
    )  # fmt: skip
    assert [(row.outcome, row.reason) for row in result.rows.requests] == [("failed", "no replica is up")]


def test_a_change_does_not_bring_up_what_is_lost() -> None:
    script = Script([None, Change(plan=TWO, reason="all")], interval_s=0.05)
    result = run(
        system(rescheduler=lambda: script), [request(0, output_tokens=20)], where(), plan=TWO,
        events=[event("gpu_lost", "n0.g0", 0.01)],
    )  # fmt: skip
    assert [note.kind for note in result.rows.notes] == ["gpu_lost", "down", "change"]


def test_an_impossible_change_is_an_error() -> None:
    script = Script([Change(plan=Plan(replicas=()), reason="nothing")], interval_s=0.01)
    with pytest.raises(ConfigError, match="it has no replicas"):
        run(system(rescheduler=lambda: script), [request(0)], plan=ONE)


def test_ticks_end_with_the_work() -> None:
    script = Script([], interval_s=0.01)
    run(system(rescheduler=lambda: script), [request(0, output_tokens=3)], plan=ONE)
    assert [signal.at_s for signal in script.seen] == [0.01, 0.02, 0.03]
    assert {signal.kind for signal in script.seen} == {"tick"}


def test_a_link_that_is_cut_for_good_ends_the_run_under_ticks() -> None:
    """The receiver's link is cut for good; a rescheduler that only watches must not keep the run going forever."""
    script = Script([], interval_s=1.0)
    result = run(
        system(router=lambda: Way("p", "d"), rescheduler=lambda: script), [request(0)], where(), plan=SPLIT,
        events=[event("link_scaled", "nic:n1:in", 0.0, factor=0.0)],
    )  # fmt: skip
    (row,) = result.rows.requests
    assert (row.outcome, row.reason) == ("failed", "the link from p to d is cut, and nothing restores it")
    assert 1000 <= len(script.seen) < 1100


def test_the_run_ends_stalled_if_a_policy_parks_requests_for_good() -> None:
    class Idle(TokenBudget):
        def fill(self, batch: Any) -> None:
            pass

    with pytest.raises(StalledError, match=r"1 requests are unfinished.*a \(mixed\): waiting 1"):
        run(system(Idle), [request(0)], plan=ONE)


def test_a_cut_off_counts_who_waits_for_a_replica() -> None:
    change = Change(plan=WIDE, reason="wider", drain=False)
    result = run(
        system(rescheduler=lambda: Script([change], interval_s=0.02)), [request(0)], where(), plan=ONE, until_s=0.021
    )
    assert outcomes(result) == ["running"]


def test_a_load_over_a_cut_link_is_given_up_and_says_so() -> None:
    change = Change(plan=WIDE, reason="wider", drain=False)
    result = run(
        system(rescheduler=lambda: Script([change])), [request(0, output_tokens=50)], where(), plan=ONE,
        events=[event("link_scaled", "pcie:n0.g0:in", 0.0, factor=0.0), event("gpu_joined", "n0.g0", 0.02)],
    )  # fmt: skip
    (row,) = result.rows.requests
    assert (row.outcome, row.reason) == ("failed", "no replica is up")


class Watching:
    """A rescheduler that notes the traffic of the last 100 ms at every tick."""

    interval_s: float | None = 0.1

    def __init__(self) -> None:
        self.seen: list[tuple[float, Workload | None]] = []

    def react(self, signal: Signal, view: View) -> Change | None:
        self.seen.append((signal.at_s, view.observed(0.1)))
        return None


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_rescheduler_sees_the_traffic_of_its_window(step_by_step: bool) -> None:
    """Arrivals count when they come, lengths when their request has completed."""
    watching = Watching()
    requests = [
        request(0, 0.0, 100, 1),
        request(1, 0.02, 60, 5),
        request(2, 0.09, 40, 12),
        request(3, 0.31, 100, 3),
        request(4, 0.38, 40, 9),
    ]
    run(system(rescheduler=lambda: watching), requests, plan=ONE, step_by_step=step_by_step)
    assert watching.seen == [
        (0.1, Workload(rate_per_s=30.0, lengths=((100, 1), (60, 5)))),
        (0.2, None),  # nothing arrived
        (0.3, None),
        (0.4, Workload(rate_per_s=20.0, lengths=((100, 3),))),
    ]


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_new_replica_waits_for_the_names_of_one_that_drains(step_by_step: bool) -> None:
    """The same name, on another GPU that is free: it loads once the old one has finished what it runs."""
    elsewhere = Plan(replicas=(replica("a", ["n0.g1"]),))
    change = Change(plan=elsewhere, reason="another GPU")
    requests = [request(0, output_tokens=5), request(1, 0.04, output_tokens=5)]
    result = run(
        system(rescheduler=lambda: Script([change], interval_s=0.035)), requests, where(), plan=ONE,
        step_by_step=step_by_step,
    )  # fmt: skip
    drained = 11 * MS + sum(decode_ps(context) for context in range(101, 105))
    up = drained + load_ps(elsewhere.replicas[0], where())
    assert [(note.kind, note.time_ps) for note in result.rows.notes][1:] == [("drained", drained), ("up", up)]
    assert [len(result.token_times_ps(number)) for number in (0, 1)] == [5, 5]
    assert result.rows.requests[1].scheduled_ps == up  # it waited while the replica was loading
