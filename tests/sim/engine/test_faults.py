"""Faults and notices: nobody is lost, what was generated is kept, and every time is exact."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import ClusterEvent, ConfigError, Plan, PolicyError, Result
from sim.batchers import PrefillFirst
from sim.engine.setup import hop_time_ps
from sim.policy import Problem
from sim.reschedulers import RestorePlan
from sim.routers import LeastLoadedPair
from sim.types import Change, Replica
from tests.lab import ONE, PIPELINE, SPLIT, TWO, Script, Way, system
from tests.toys import MS, TINY, cluster, problem, replica, request, run

US = 10**6
TWO_DECODES = Plan(replicas=(*SPLIT.replicas, replica("e", ["n1.g1"], "decode")))


def where() -> Problem:
    return problem(cluster(gpus=2, nodes=2))


def event(kind: Any, target: str, at_s: float, **more: Any) -> ClusterEvent:
    return ClusterEvent(at_s=at_s, kind=kind, target=target, **more)


def decode_ps(context: int) -> int:
    return 10 * MS + 10 * US + 1000 * context


def outcomes(result: Result) -> list[str]:
    return [row.outcome for row in result.rows.requests]


def load_ps(spec: Replica, world: Problem) -> int:
    """Each GPU loads its part of the weights over its own PCIe; 5 us of latency."""
    stage = spec.stages[0]
    part = TINY.weight_bytes(stage.first_layer, stage.end_layer) / stage.tp
    return ceil(part / world.cluster.capacity_bytes_per_s[f"pcie:{stage.gpus[0]}:in"] * 1e12) + 5 * US


def test_a_request_in_prefill_starts_again_elsewhere() -> None:
    lost = run(system(), [request(0)], where(), plan=TWO, events=[event("gpu_lost", "n0.g0", 0.005)])
    assert outcomes(lost) == ["completed"]
    assert lost.token_times_ps(0)[0] == 5 * MS + 11 * MS
    assert lost.rows.requests[0].prefill_stage == "b"
    assert lost.rows.requests[0].scheduled_ps == 0  # queueing ended when it was first scheduled


def test_a_request_in_decode_keeps_its_tokens_and_recomputes_their_kv() -> None:
    result = run(system(), [request(0, output_tokens=5)], where(), plan=TWO, events=[event("node_lost", "n0", 0.035)])
    first, second, third = 11 * MS, 11 * MS + decode_ps(101), 11 * MS + decode_ps(101) + decode_ps(102)
    again = 35 * MS + 10 * MS + 103 * 10 * US  # prompt and three tokens, at once
    assert third < 35 * MS < third + decode_ps(103)
    assert result.token_times_ps(0) == [first, second, third, again, again + decode_ps(104)]


@pytest.mark.parametrize("late_ps", [0, 1])
def test_an_iteration_that_ends_as_the_gpu_is_lost_is_lost_too(late_ps: int) -> None:
    """Faults come before boundaries at the same instant."""
    lost = event("gpu_lost", "n0.g0", 0.011 + late_ps * 1e-12)
    result = run(system(), [request(0, output_tokens=2)], where(), plan=TWO, events=[lost])
    assert (result.token_times_ps(0)[0] == 11 * MS) is bool(late_ps)
    assert len(result.token_times_ps(0)) == 2


def test_a_gpu_lost_at_the_very_instant_of_an_arrival_computes_nothing() -> None:
    """The loss that a notice announced comes after the arrival at the same time; the request starts elsewhere."""
    notice = event("spot_notice", "n0", 0.06, deadline_s=0.05)
    result = run(system(), [request(0, 0.11)], where(), plan=TWO, events=[notice])
    assert result.token_times_ps(0)[0] == 110 * MS + 11 * MS
    assert {step.replica for step in result.rows.steps} == {"b"}


@pytest.mark.parametrize("end", ["n0.g0", "n1.g0"])
def test_kv_on_its_way_is_lost_with_either_end(end: str) -> None:
    """The transfer takes 262 us; the sender or the receiver goes in its midst. The first token was out."""
    plan = Plan(replicas=(*TWO_DECODES.replicas, replica("q", ["n0.g1"], "prefill")))
    result = run(
        system(router=LeastLoadedPair), [request(0)], where(), plan=plan, events=[event("gpu_lost", end, 0.0111)]
    )
    row = result.rows.requests[0]
    assert row.outcome == "completed"
    assert row.first_token_ps == 11 * MS
    assert len(result.token_times_ps(0)) == 10
    assert result.token_times_ps(0)[1] >= 11_100 * US + 10 * MS + 101 * 10 * US
    assert len(result.rows.links) == 1
    assert {memory.used_blocks for memory in result.rows.memory if memory.replica == "d"} <= {7, 8}


def test_a_receiver_lost_while_kv_waits_for_room_frees_the_sender() -> None:
    requests = [request(number, input_tokens=50, output_tokens=10) for number in range(4)]
    result = run(
        system(router=LeastLoadedPair, num_kv_blocks=4), requests, where(), plan=TWO_DECODES,
        events=[event("gpu_lost", "n1.g0", 0.05)],
    )  # fmt: skip
    assert outcomes(result) == ["completed"] * 4
    assert {row.decode_stage for row in result.rows.requests} <= {"d", "e"}


def test_a_prompt_whose_receiver_is_gone_is_routed_again() -> None:
    """Lost during the prefill: the engine finds out when the KV would leave."""
    result = run(
        system(router=LeastLoadedPair),
        [request(0)],
        where(),
        plan=TWO_DECODES,
        events=[event("gpu_lost", "n1.g0", 0.005)],
    )
    row = result.rows.requests[0]
    assert (row.outcome, row.decode_stage, row.first_token_ps) == ("completed", "e", 11 * MS)
    assert result.token_times_ps(0)[1] == 11 * MS + 1 + 10 * MS + 101 * 10 * US


def test_without_a_replica_requests_fail_or_are_rejected_with_the_reason() -> None:
    requests = [request(0, output_tokens=50), request(1, 1.0)]
    result = run(system(), requests, plan=ONE, events=[event("gpu_lost", "n0.g0", 0.1)])
    assert [(row.outcome, row.reason) for row in result.rows.requests] == [
        ("failed", "no replica is up"),
        ("rejected", "no replica is up"),
    ]
    assert len(result.token_times_ps(0)) == 9  # what it had got


def test_a_split_system_without_its_decode_side_fails_what_it_has() -> None:
    result = run(
        system(router=LeastLoadedPair), [request(0), request(1, 1.0)], where(), plan=SPLIT,
        events=[event("node_lost", "n1", 0.005)],
    )  # fmt: skip
    assert [(row.outcome, row.reason) for row in result.rows.requests] == [
        ("failed", "no decode replica is up"),
        ("rejected", "no decode replica is up"),
    ]


def test_a_slow_gpu_is_slow_from_the_next_iteration_on() -> None:
    slow = [event("gpu_slow", "n0.g0", 0.012, factor=2.0), event("gpu_slow", "n0.g0", 0.04, factor=1.0)]
    result = run(system(), [request(0, output_tokens=5)], plan=ONE, events=slow)
    first = 11 * MS
    second = first + decode_ps(101)  # under way
    third = second + 2 * decode_ps(102)
    fourth = third + decode_ps(103)
    assert result.token_times_ps(0) == [first, second, third, fourth, fourth + decode_ps(104)]


def test_a_gpu_that_slows_in_mid_pipeline_does_not_change_the_iteration_under_way() -> None:
    """One stage slows while a lone decode is under way; prompts that arrive then find the stages free as before."""
    slow = [event("gpu_slow", "n0.g0", 0.5, factor=1.5)]
    requests = [request(0, output_tokens=100), request(1, 0.5), request(2, 0.501)]
    both = [run(system(), requests, where(), plan=PIPELINE, events=slow, step_by_step=mode) for mode in (False, True)]
    assert both[0].log() == both[1].log()


def test_a_prompt_recomputed_after_a_fault_may_be_longer_than_a_batch() -> None:
    """Displaced, not preempted: prompt and generated tokens exceed max_num_batched_tokens, so they go alone."""
    lost = [event("gpu_lost", "n0.g0", 0.035)]
    lab = system(PrefillFirst, max_num_batched_tokens=100)
    result = run(lab, [request(0)], where(), plan=TWO, events=lost)
    assert outcomes(result) == ["completed"]
    assert result.token_times_ps(0)[3] == 35 * MS + 10 * MS + 103 * 10 * US


def test_a_notice_comes_before_the_loss() -> None:
    script = Script([None, None])
    result = run(
        system(rescheduler=lambda: script), [request(0, output_tokens=50)], where(), plan=TWO,
        events=[event("spot_notice", "n0", 0.02, deadline_s=0.1)],
    )  # fmt: skip
    assert [(signal.kind, signal.at_s) for signal in script.seen] == [("notice", 0.02), ("lost", 0.12)]
    assert [signal.deadline_s for signal in script.seen] == [pytest.approx(0.12), None]
    assert script.seen[0].gpus == ("n0.g0", "n0.g1")
    notes = [(note.time_ps, note.kind) for note in result.rows.notes]
    assert notes == [(20 * MS, "spot_notice"), (120 * MS, "gpu_lost"), (120 * MS, "down")]
    assert outcomes(result) == ["completed"]


def test_a_notice_gives_time_to_drain() -> None:
    """Told at 20 ms, a rescheduler evacuates the machine before it is lost at 1 s: nothing starts over."""
    rest = Plan(replicas=TWO.replicas[1:])
    script = Script([Change(plan=rest, reason="evacuate n0")])
    result = run(
        system(rescheduler=lambda: script), [request(0, output_tokens=50), request(1, 0.5)], where(), plan=TWO,
        events=[event("spot_notice", "n0", 0.02, deadline_s=0.98)],
    )  # fmt: skip
    assert [row.decode_stage for row in result.rows.requests] == ["a", "b"]
    assert [note.kind for note in result.rows.notes] == ["spot_notice", "change", "drained", "gpu_lost"]
    assert result.token_times_ps(0)[-1] == 11 * MS + sum(decode_ps(context) for context in range(101, 150))


def test_gpus_that_join_bring_their_replica_back_once_the_weights_are_loaded() -> None:
    events = [event("gpu_lost", "n0.g0", 0.1), event("gpu_joined", "n0.g0", 1.0)]
    requests = [request(0), request(1, 0.5), request(2, 3.0)]
    result = run(system(rescheduler=RestorePlan), requests, plan=ONE, events=events)
    assert outcomes(result) == ["completed"] * 3  # what comes meanwhile, waits
    up = next(note for note in result.rows.notes if note.kind == "up")
    assert up.time_ps == 1000 * MS + load_ps(ONE.replicas[0], problem())
    assert len(result.rows.replicas) == 2  # before and after


@pytest.mark.parametrize("step_by_step", [False, True])
def test_while_no_replica_is_up_requests_wait_for_the_last_gpus_that_may_join(step_by_step: bool) -> None:
    """Nobody brings the replica back: they fail when the last GPU has joined, later ones at once."""
    events = [event("gpu_lost", "n0.g0", 0.05), *(event("gpu_joined", f"n0.g{n}", 1.0 + n) for n in range(2))]
    requests = [request(0), request(1, 0.5), request(2, 3.0)]
    result = run(system(), requests, where(), plan=ONE, events=events, step_by_step=step_by_step)
    assert {row.request.id: (row.outcome, row.reason) for row in result.rows.requests} == {
        0: ("failed", "no replica is up"), 1: ("failed", "no replica is up"), 2: ("rejected", "no replica is up"),
    }  # fmt: skip


# ------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (event("gpu_lost", "n9", 1.0), "gpu_lost at 1.0 s names 'n9'; known are n0.g0"),
        (event("link_scaled", "wire", 1.0, factor=0.5), "link_scaled at 1.0 s names 'wire'; known are gpu:n0.g0:out"),
        (event("link_scaled", "nic:n0:out", 0.0), "link_scaled of nic:n0:out at 0.0 s needs a factor >= 0, not None"),
        (event("gpu_slow", "n0.g0", 0.0, factor=-1.0), "gpu_slow of n0.g0 at 0.0 s needs a factor >= 0, not -1.0"),
    ],
)
def test_wrong_events_name_field_and_value(wrong: ClusterEvent, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(system(), [request(0)], where(), plan=TWO, events=[wrong])


def test_hops_of_a_lone_stage_cost_nothing() -> None:
    assert hop_time_ps(where(), ONE.replicas[0])(1000) == 0


def test_a_view_of_a_lost_replica_is_an_error() -> None:
    with pytest.raises(PolicyError, match="asks for replica 'a'; up are b"):
        run(
            system(router=lambda: Way("a", "a")), [request(0, 1.0)], where(), plan=TWO,
            events=[event("gpu_lost", "n0.g0", 0.5)],
        )  # fmt: skip


# ------------------------------------------------------------ nobody is lost


@settings(max_examples=60)
@given(
    faults=st.lists(
        st.tuples(
            st.sampled_from(["gpu_lost", "node_lost", "gpu_joined", "spot_notice", "gpu_slow"]),
            st.sampled_from(["n0", "n1", "n0.g0", "n1.g1"]),
            st.integers(0, 40),
        ),
        max_size=6,
    ),
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=15),
    blocks=st.sampled_from([16, 40, None]),
)
def test_every_request_ends_whatever_happens(
    faults: list[tuple[str, str, int]], shapes: list[tuple[int, int, int]], blocks: int | None
) -> None:
    plan = Plan(replicas=(*TWO_DECODES.replicas, replica("q", ["n0.g1"], "prefill")))
    arrivals = sorted(shapes)
    requests = [request(n, at / 100, tokens, out) for n, (at, tokens, out) in enumerate(arrivals)]
    events = [event(kind, target, at / 50, deadline_s=0.05, factor=1.5) for kind, target, at in faults]
    lab = system(router=LeastLoadedPair, rescheduler=RestorePlan, num_kv_blocks=blocks, max_num_batched_tokens=128)
    collapsed = run(lab, requests, where(), plan=plan, events=events)
    stepped = run(lab, requests, where(), plan=plan, events=events, step_by_step=True)
    assert collapsed.log() == stepped.log()
    assert [row.request.id for row in collapsed.rows.requests] == list(range(len(requests)))
    for row in collapsed.rows.requests:
        times = collapsed.token_times_ps(row.request.id)
        assert times == sorted(times)
        if row.outcome == "completed":
            assert len(times) == row.request.output_tokens
        else:
            assert row.reason
            assert len(times) < row.request.output_tokens
