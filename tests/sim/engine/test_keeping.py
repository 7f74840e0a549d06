"""A change of plan whose requests keep their KV, and whose GPUs fetch only what they do not hold."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest

from sim import Plan, PolicyError, Result
from sim.memory import common_weight_bytes
from sim.policy import Problem, View
from sim.types import Change, Later, Load, Signal, Stage
from tests.lab import ONE, TWO, Script, system
from tests.sim.engine.test_faults import US, decode_ps, event, outcomes
from tests.toys import MS, TINY, cluster, problem, replica, request, run

AGAIN = Plan(replicas=(replica("b", ["n0.g0"]),))
"""The replica of ``ONE`` under another name, on the same GPU."""
NEXT = Plan(replicas=(replica("b", ["n0.g1"]),))
AWAY = Plan(replicas=(replica("b", ["n1.g0"]),))
WEIGHTS = TINY.weight_bytes(0, TINY.num_layers)
TICK_S = 0.035
"""In the fourth decode step after a prompt of 100 tokens, which takes 11 ms."""


def where() -> Problem:
    return problem(cluster(gpus=2, nodes=2))


def changed(change: Change, requests: Sequence[Any] | None = None, **more: Any) -> Result:
    script = Script([change], interval_s=TICK_S)
    requests = requests or [request(0, output_tokens=6)]
    return run(system(rescheduler=lambda: script), requests, where(), **({"plan": ONE} | more))


def keep(plan: Plan, *loads: Load, **ids: Any) -> Change:
    return Change(plan=plan, reason="move", drain=False, loads={"b": loads}, keep={0: "b"} | ids)


def sent_ps(path: Any, size_bytes: float) -> int:
    """When the last byte is there, of one flow alone."""
    return ceil(size_bytes / path.bytes_per_s(where().cluster.capacity_bytes_per_s) * 1e12) + round(
        path.latency_s * 1e12
    )


@pytest.mark.parametrize("step_by_step", [False, True])
def test_kv_and_weights_that_are_there_cost_nothing(step_by_step: bool) -> None:
    """The step under way is lost; the request goes on with the next token, after the latency of a look."""
    result = changed(keep(AGAIN), step_by_step=step_by_step)
    latency_ps = sent_ps(where().cluster.load_path(("n0.g0",)), 0)
    up = 35 * MS + latency_ps
    assert [(note.kind, note.text, note.time_ps) for note in result.rows.notes] == [
        ("change", "move", 35 * MS),
        ("down", "a: 0 requests start over, 1 keep their KV", 35 * MS),
        ("up", "b", up),
    ]
    times = result.token_times_ps(0)
    third = 11 * MS + decode_ps(101) + decode_ps(102)
    assert times[:4] == [11 * MS, 11 * MS + decode_ps(101), third, up + decode_ps(103)]
    assert len(times) == 6
    row = result.rows.requests[0]
    assert (row.prefill_stage, row.decode_stage, row.outcome) == ("a", "b", "completed")


@pytest.mark.parametrize("step_by_step", [False, True])
def test_they_move_together_over_the_link_of_two_gpus(step_by_step: bool) -> None:
    """KV and weights share it; the replica is up when its weights are there, and KV came before."""
    result = changed(keep(NEXT, Load(gpu="n0.g1", source="n0.g0", size_bytes=WEIGHTS)), step_by_step=step_by_step)
    path = where().cluster.path(("n0.g0",), ("n0.g1",))
    kv_bytes = 102 * TINY.kv_bytes_per_token()
    up = 35 * MS + sent_ps(path, WEIGHTS + kv_bytes)
    (link,) = result.rows.links
    assert (link.source, link.target, link.bytes) == ("a", "b", kv_bytes)
    assert link.end_ps < up
    assert result.rows.notes[-1].time_ps == pytest.approx(up, abs=3)
    assert result.token_times_ps(0)[3] == result.rows.notes[-1].time_ps + decode_ps(103)


def test_what_is_not_named_starts_over() -> None:
    requests = [request(0, output_tokens=6), request(1, 0.001, output_tokens=6)]
    result = changed(keep(AGAIN), requests)
    assert result.rows.notes[1].text == "a: 1 requests start over, 1 keep their KV"
    assert outcomes(result) == ["completed"] * 2
    assert {row.request.id: row.decode_stage for row in result.rows.requests} == {0: "b", 1: "b"}


def test_a_prompt_that_is_not_finished_starts_over() -> None:
    change = keep(AGAIN)
    result = changed(change, [request(0, input_tokens=3000, output_tokens=2)])
    assert result.rows.notes[1].text == "a: 1 requests start over"
    assert result.rows.requests[0].prefill_stage == "b"


@pytest.mark.parametrize("step_by_step", [False, True])
@pytest.mark.parametrize("end", ["n0", "n1.g0"])
def test_if_an_end_is_lost_meanwhile_it_starts_over(end: str, step_by_step: bool) -> None:
    """Its KV takes 267 us to the other machine. ``c`` is up all the while."""
    plan = Plan(replicas=(*AWAY.replicas, replica("c", ["n1.g1"])))
    start = Plan(replicas=(*ONE.replicas, replica("c", ["n1.g1"])))
    change = Change(plan=plan, reason="move", drain=False, keep={0: "b"})
    result = changed(
        change, [request(0, output_tokens=6)], plan=start, events=[event("gpu_lost" if "." in end else "node_lost",
        end, 0.0351)], step_by_step=step_by_step,
    )  # fmt: skip
    row = result.rows.requests[0]
    assert (row.prefill_stage, row.decode_stage) == ("c", "c")
    assert result.token_times_ps(0)[3] == 35_100 * US + 10 * MS + 103 * 10 * US
    assert result.rows.links == []


def test_weights_whose_source_is_lost_come_from_the_host() -> None:
    start = Plan(replicas=(*ONE.replicas, replica("c", ["n1.g1"])))
    load = Load(gpu="n1.g0", source="n0.g0", size_bytes=WEIGHTS)
    change = Change(plan=Plan(replicas=(*AWAY.replicas, start.replicas[1])), reason="move", loads={"b": (load,)})
    result = changed(change, [request(0)], plan=start, events=[event("gpu_lost", "n0.g0", 0.0351)])
    (up,) = [note.time_ps for note in result.rows.notes if note.kind == "up"]
    assert up == 35_100 * US + sent_ps(where().cluster.load_path(("n1.g0",)), WEIGHTS)


@pytest.mark.parametrize("step_by_step", [False, True])
@pytest.mark.parametrize(("num_kv_blocks", "moves"), [(14, False), (15, True)])
def test_without_room_it_is_recomputed(num_kv_blocks: int, moves: bool, step_by_step: bool) -> None:
    """The other replica has taken its eighth block in its third step, just before the KV comes that fills seven."""
    requests = [request(0, output_tokens=20), request(1, input_tokens=110, output_tokens=20)]
    change = Change(plan=Plan(replicas=(TWO.replicas[1],)), reason="one less", drain=False, keep={0: "b"})
    script = Script([change], interval_s=TICK_S)
    result = run(
        system(rescheduler=lambda: script, num_kv_blocks=num_kv_blocks), requests, where(), plan=TWO,
        step_by_step=step_by_step,
    )  # fmt: skip
    assert outcomes(result) == ["completed"] * 2
    assert bool(result.rows.links) is moves
    assert {row.request.id: row.prefill_stage for row in result.rows.requests}[0] == ("a" if moves else "b")


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_target_that_is_given_up_leaves_nobody_behind(step_by_step: bool) -> None:
    """A second plan, 10 ms later, wants the first one's replica no more; its weights were on their way."""
    other = Plan(replicas=(replica("c", ["n1.g1"]),))
    script = Script([Change(plan=AWAY, reason="1", drain=False, keep={0: "b"}), Change(plan=other, reason="2")], 0.035)
    result = run(
        system(rescheduler=lambda: script), [request(0, output_tokens=6)], where(), plan=ONE, step_by_step=step_by_step
    )
    assert [note.text for note in result.rows.notes if note.kind == "up"] == ["c"]
    assert result.rows.requests[0].prefill_stage == "c"
    assert len(result.token_times_ps(0)) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (keep(NEXT), "Script leaves n0.g1 of b without"),
        (keep(NEXT, Load(gpu="n0.g1", source="n0.g0", size_bytes=0.9 * WEIGHTS)), "Script leaves n0.g1 of b without"),
        (keep(NEXT, Load(gpu="n0.g1", source="n1.g1", size_bytes=WEIGHTS)), "from n1.g1, which holds none"),
        (Change(plan=NEXT, reason="x", loads={"z": ()}), "loads weights for 'z', which its plan does not have"),
        (Change(plan=NEXT, reason="x", keep={0: "b"}), "whose replica drains; set drain=False"),
        (Change(plan=NEXT, reason="x", drain=False, keep={0: "z"}), r"keeps KV for replica 'z'"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change: Change, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        changed(change)


def stage(gpus: int, first: int, end: int) -> Stage:
    return Stage(name="s", gpus=tuple(f"g{i}" for i in range(gpus)), first_layer=first, end_layer=end)


def test_ranks_have_equal_parts_of_layers_in_common() -> None:
    whole = TINY.weight_bytes(0, TINY.num_layers)
    assert common_weight_bytes(TINY, (stage(1, 0, 2), 0), (stage(1, 0, 2), 0)) == whole
    assert common_weight_bytes(TINY, (stage(1, 0, 2), 0), (stage(2, 0, 2), 1)) == whole / 2
    assert common_weight_bytes(TINY, (stage(4, 0, 2), 1), (stage(2, 0, 2), 0)) == whole / 4
    assert common_weight_bytes(TINY, (stage(4, 0, 2), 2), (stage(2, 0, 2), 0)) == 0
    assert common_weight_bytes(TINY, (stage(1, 0, 1), 0), (stage(1, 1, 2), 0)) == 0
    assert common_weight_bytes(TINY, (stage(1, 0, 2), 0), (stage(1, 1, 2), 0)) == TINY.weight_bytes(1, 2)


@pytest.mark.parametrize("step_by_step", [False, True])
def test_requests_may_restart_from_their_prompts(step_by_step: bool) -> None:
    """None of the three tokens that were out count."""
    change = Change(plan=AGAIN, reason="restart", drain=False, loads={"b": ()}, forget=True)
    result = changed(change, step_by_step=step_by_step)
    up = 35 * MS + sent_ps(where().cluster.load_path(("n0.g0",)), 0)
    assert result.token_times_ps(0)[:2] == [up + 11 * MS, up + 11 * MS + decode_ps(101)]
    assert len(result.token_times_ps(0)) == 6
    assert result.rows.requests[0].first_token_ps == up + 11 * MS


@pytest.mark.parametrize("step_by_step", [False, True])
@pytest.mark.parametrize("requeue", [False, True])
def test_what_waits_may_be_routed_again_when_a_replica_comes_up(requeue: bool, step_by_step: bool) -> None:
    """One at a time on ``a``; the second request waits there, or goes to ``b`` as soon as it is up."""
    requests = [request(n, 0.001 * n, output_tokens=10) for n in range(3)]
    plan = Plan(replicas=(*ONE.replicas, *NEXT.replicas))
    change = Change(plan=plan, reason="one more", requeue=requeue)
    script = Script([change], interval_s=TICK_S)
    result = run(
        system(rescheduler=lambda: script, max_num_seqs=1), requests, where(), plan=ONE, step_by_step=step_by_step
    )
    assert outcomes(result) == ["completed"] * 3
    places = {row.request.id: row.prefill_stage for row in result.rows.requests}
    assert places == ({0: "a", 1: "b", 2: "a"} if requeue else {0: "a", 1: "a", 2: "a"})
    (up,) = [note.time_ps for note in result.rows.notes if note.kind == "up"]
    if requeue:
        assert result.token_times_ps(1)[0] == up + 11 * MS


class PutsOff:
    """Asks to be asked again, twice, and changes nothing."""

    interval_s: float | None = None

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def react(self, signal: Signal, view: View) -> Later | None:
        self.seen.append((signal.kind, signal.at_s))
        return Later(signal.at_s + 0.01) if len(self.seen) < 3 else None


def test_a_rescheduler_is_asked_again_when_it_says() -> None:
    puts_off = PutsOff()
    run(
        system(rescheduler=lambda: puts_off), [request(0, output_tokens=6)], where(), plan=ONE,
        events=[event("spot_notice", "n1", 0.002, deadline_s=0.04)],
    )  # fmt: skip
    assert puts_off.seen == [("notice", 0.002), ("due", 0.012), ("due", 0.022), ("lost", 0.042)]
