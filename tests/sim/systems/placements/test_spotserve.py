"""SpotServe: pipelines that leave machines before those are lost, what goes on and what begins anew, and the rent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies.spotserve.study import FULL, arithmetic, rents
from experiments.studies.spotserve.world import (
    LATENCY_S,
    PROFILES,
    TRACES,
    arrivals,
    bursty,
    problem,
    served,
    system,
)
from sim import SYSTEMS, Cluster, ClusterEvent, ConfigError, Problem, Request, Result, System
from sim.planners.spotserve import Pipelines
from sim.planners.spotserve.mapping import chunks, pipeline
from sim.systems.placements.spotserve import MODES, PARTS, Mode, Part
from sim.types import Plan
from tests.toys import TINY, ToyCost, request, run
from tests.toys import cluster as small_cluster
from tests.toys import problem as toy_problem


def machines(count: int, gpus: int = 1) -> Problem:
    """Of the toy model's two layers a pipeline needs two GPUs."""
    where = Cluster.of(
        nodes=[{"gpu": "A100-80G-SXM", "count": gpus, "nodes": count}],
        links={"inter_node": {"gbps": 100, "latency_us": 10}},
    )
    return toy_problem(where, ToyCost())


def pairs(**options: Any) -> System:
    return SYSTEMS["spotserve"](**({"max_tp": 1, "least_gpus": 2, "need_per_s": 1.0} | options))


def notice(target: str, at_s: float, deadline_s: float = 2.0) -> ClusterEvent:
    return ClusterEvent(at_s=at_s, kind="spot_notice", target=target, deadline_s=deadline_s)


def joined(target: str, at_s: float) -> ClusterEvent:
    return ClusterEvent(at_s=at_s, kind="gpu_joined", target=target)


def notes(result: Result, *kinds: str) -> list[tuple[float, str, str]]:
    return [(note.time_ps / 1e12, note.kind, note.text) for note in result.rows.notes if note.kind in kinds]


def changes(result: Result) -> list[str]:
    """The configurations changed to."""
    return [text.split(": ")[-1].split(" ")[0] for _, _, text in notes(result, "change")]


def gap_s(result: Result, number: int) -> float:
    times = result.token_times_ps(number)
    return max(b - a for a, b in pairwise(times)) / 1e12


# ------------------------------------------------------------ moving


def test_requests_leave_with_their_kv_before_the_machine_is_lost() -> None:
    """A pipeline on n0 and n1; n2 is spare and takes the part of n0."""
    requests = [request(0, output_tokens=500), request(1, output_tokens=400)]
    result = run(pairs(), requests, machines(3), events=[notice("n0", 1.0)])
    ((_, _, why),) = notes(result, "change")
    assert why.startswith("n0.g0 about to be lost: (1,2,1)")
    ((down_s, _, down),) = notes(result, "down")
    assert down == "s0: 0 requests start over, 2 keep their KV"
    ((up_s, _, up),) = notes(result, "up")
    assert up == "s1"
    assert 2.0 < down_s < up_s < 3.0
    assert [len(result.token_times_ps(k)) for k in (0, 1)] == [500, 400]
    assert gap_s(result, 0) < up_s - down_s + 0.05
    assert [row.bytes_moved > 0 for row in result.rows.requests] == [True, True]
    assert [row.preemptions for row in result.rows.requests] == [0, 0]


def test_without_the_arranger_it_leaves_at_once_and_begins_anew() -> None:
    result = run(pairs(without=["arranger"]), [request(0, output_tokens=500)], machines(3), events=[notice("n0", 1.0)])
    assert notes(result, "down") == [(1.0, "down", "s0: 1 requests start over")]
    assert result.rows.requests[0].bytes_moved == 0
    times = result.token_times_ps(0)
    assert len(times) == 500
    assert times[0] > 1e12  # what it had generated is gone


def test_kv_that_takes_longer_than_the_work_is_left() -> None:
    """At its third token, with half a second for any migration."""
    result = run(pairs(), [request(0, 1.47, output_tokens=500)], machines(3), events=[notice("n0", 1.0, 1.05)])
    assert [text for _, _, text in notes(result, "down")] == ["s0: 1 requests start over"]


def test_only_what_a_gpu_lacks_is_fetched() -> None:
    """n1 holds the later half already: a quick link to n2 would not be faster than to nobody."""
    quick = run(pairs(), [request(0, output_tokens=500)], machines(3), events=[notice("n1", 1.0)])
    anew = run(
        pairs(mode="reparallelization"), [request(0, output_tokens=500)], machines(3), events=[notice("n1", 1.0)]
    )
    times = [notes(one, "up")[0][0] - notes(one, "down")[0][0] for one in (quick, anew)]
    model = machines(3).model
    assert times[0] == pytest.approx(model.weight_bytes(1, 2) / 12.5e9, rel=0.05)
    assert times[1] == pytest.approx(model.weight_bytes(0, 1) / 25.6e9, rel=0.3)


def test_a_spare_machine_may_go() -> None:
    result = run(pairs(), [request(0, output_tokens=500)], machines(3), events=[notice("n2", 1.0)])
    assert notes(result, "change", "down") == []
    assert gap_s(result, 0) < 0.02


def test_a_pipeline_that_stays_whole_serves_on() -> None:
    requests = [request(k, output_tokens=300) for k in range(4)]
    result = run(pairs(), requests, machines(5), events=[notice("n0", 1.0)])
    assert [text for _, _, text in notes(result, "down")] == ["s0: 0 requests start over, 2 keep their KV"]
    gaps = [gap_s(result, k) for k in range(4)]
    assert sum(gap < 0.02 for gap in gaps) == 2


def test_without_the_mapper_all_change_places() -> None:
    requests = [request(k, output_tokens=300) for k in range(4)]
    result = run(pairs(without=["mapper"]), requests, machines(5), events=[notice("n0", 1.0)])
    assert [text.split(":")[0] for _, _, text in notes(result, "down")] == ["s0", "s1"]


def test_a_pipeline_that_stays_takes_in_whom_it_has_room_for() -> None:
    """Of seven requests four run on s0, whose machines must both go, and three on s1, in batches of up to six."""
    requests = [request(k, output_tokens=300 + k) for k in range(7)]
    result = run(pairs(max_batch=6), requests, machines(4), events=[notice("n0", 1.0), notice("n1", 1.0)])
    assert [text for _, _, text in notes(result, "down")] == ["s0: 1 requests start over, 3 keep their KV"]
    moved = [row.request.id for row in result.rows.requests if row.bytes_moved]
    assert len(moved) == 3
    assert all(gap_s(result, k) < 0.1 for k in moved)


def test_who_joins_before_a_loss_waits_for_it() -> None:
    events = [notice("n0", 1.0), joined("n3", 1.2)]
    result = run(pairs(instances=3), [request(0, output_tokens=500)], machines(4), events=events)
    ((at_s, _, _),) = notes(result, "change")
    assert at_s > 2.0
    alone = run(pairs(instances=3), [request(0, output_tokens=500)], machines(4), events=events[1:])
    assert changes(alone) == ["(2,2,1)"]


def test_two_notices_are_one_change_in_time_for_the_first() -> None:
    events = [notice("n0", 1.0), notice("n2", 1.3)]
    result = run(pairs(), [request(0, output_tokens=500)], machines(5), events=events)
    ((at_s, _, _),) = notes(result, "change")
    assert 2.3 < at_s < 2.5
    assert max(when for when, _, _ in notes(result, "up")) < 3.0
    assert len(result.token_times_ps(0)) == 500


def test_what_a_gpu_held_before_it_loaded_is_not_taken_for_what_it_holds() -> None:
    """All change places at 2.4 s, and n1 is lost before anything else is heard: n2 has the other layer by then."""
    events = [notice("n0", 1.0), ClusterEvent(at_s=2.8, kind="node_lost", target="n1")]
    result = run(pairs(without=["mapper"]), [request(0, output_tokens=500)], machines(5), events=events)
    assert changes(result) == ["(2,2,1)", "(1,2,1)"]
    assert len(result.token_times_ps(0)) == 500


def test_a_loss_without_notice_is_made_good_from_peers() -> None:
    lost = ClusterEvent(at_s=1.0, kind="node_lost", target="n0")
    result = run(pairs(), [request(0, output_tokens=300)], machines(3), events=[lost])
    assert changes(result) == ["(1,2,1)"]
    assert len(result.token_times_ps(0)) == 300


def test_the_doomed_give_what_nobody_else_has() -> None:
    """Without it the host would; n2 has a link a tenth as quick, and takes as long as that says."""
    slow = Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 1, "nodes": 3}], links={"inter_node": {"gbps": 10}})
    where = replace(machines(3), cluster=slow)
    result = run(pairs(), [request(0, output_tokens=900)], where, events=[notice("n0", 1.0, 5.0)])
    (down_s, _, _), (up_s, _, _) = notes(result, "down", "up")
    assert up_s - down_s == pytest.approx(where.model.weight_bytes(0, 1) / 1.25e9, rel=0.1)
    assert up_s < 6.0


def test_what_is_left_serves_on_if_no_pipeline_fits() -> None:
    result = run(
        pairs(), [request(0, output_tokens=100), request(1, 3.0)], machines(2), events=[notice("n0", 0.2, 0.5)]
    )
    assert [row.outcome for row in result.rows.requests] == ["failed", "rejected"]
    back = run(
        pairs(), [request(0, output_tokens=20), request(1, 3.0)], machines(2),
        events=[notice("n0", 0.5, 0.5), joined("n0", 2.0)],
    )  # fmt: skip
    assert [row.outcome for row in back.rows.requests] == ["completed", "completed"]


def test_a_rate_that_rises_takes_more_pipelines() -> None:
    """Steps that cost by the token: eight GPUs in one quick pipeline, then in several."""
    where = replace(machines(2, gpus=4), cost=ByWidth())
    requests = [request(k, 2.0 * k, output_tokens=20) for k in range(40)]
    requests += [request(40 + k, 80 + 0.1 * k, output_tokens=20) for k in range(900)]
    calm = SYSTEMS["spotserve"](max_tp=4, max_batch=1)
    workload = replace(where.workload, rate_per_s=0.5, lengths=((100, 20),))
    result = run(calm, requests, replace(where, workload=workload))
    text = next(text for _, _, text in notes(result, "change"))
    assert text.startswith("the rate shifted: ")
    assert changes(result)[0] > "(2,"


class ByWidth(ToyCost):
    """A stage of k GPUs is k times as quick, less a tenth."""

    def bind(self, model: Any, stage: Any, where: Any, slow: float = 1.0) -> Any:
        return super().bind(model, stage, where, slow * 20 / stage.tp**0.9)


# ------------------------------------------------------------ baselines


def test_reparallelization_begins_all_anew() -> None:
    requests = [request(k, output_tokens=300) for k in range(4)]
    result = run(pairs(mode="reparallelization"), requests, machines(5), events=[notice("n0", 1.0)])
    downs = notes(result, "down")
    assert [when for when, _, _ in downs] == [3.0, 3.0]
    assert [text for _, _, text in downs] == ["s0: 2 requests start over", "s1: 2 requests start over"]
    assert all(row.bytes_moved == 0 for row in result.rows.requests)


def test_rerouting_keeps_stages_and_whole_pipelines() -> None:
    requests = [request(k, output_tokens=300) for k in range(4)]
    events = [notice("n0", 1.0), joined("n5", 3.5)]
    result = run(pairs(mode="rerouting", instances=4), requests, machines(6), events=events)
    assert [text for _, _, text in notes(result, "down")] == ["s0: 2 requests start over"]
    assert changes(result) == ["(1,2,1)", "(2,2,1)"]
    assert [row.outcome for row in result.rows.requests] == ["completed"] * 4


def test_who_waits_goes_to_a_pipeline_that_comes() -> None:
    """Twelve requests in batches of four; a second pipeline comes and takes most of those that wait."""
    requests = [request(k, output_tokens=100) for k in range(12)]
    events = [joined("n2", 0.3), joined("n3", 0.5)]
    result = run(pairs(mode="rerouting", instances=2), requests, machines(4), events=events)
    assert notes(result, "down") == []
    assert sorted(row.decode_stage for row in result.rows.requests) == ["s0"] * 6 + ["s1"] * 6
    alone = run(pairs(mode="rerouting"), requests, machines(2))
    assert result.makespan_s < 0.9 * alone.makespan_s


def test_a_disk_makes_a_new_beginning_long() -> None:
    slow = pairs(mode="reparallelization", disk_bytes_per_s=1e8)
    result = run(slow, [request(0, output_tokens=300)], machines(3), events=[notice("n0", 1.0)])
    (down_s, _, _), (up_s, _, _) = notes(result, "down", "up")
    assert up_s - down_s == pytest.approx(machines(3).model.weight_bytes(1, 2) / 1e8, rel=0.3)


# ------------------------------------------------------------ nobody is lost


@settings(max_examples=80)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["spot_notice", "spot_notice", "node_lost", "gpu_joined"]),
            st.sampled_from(["n0", "n1", "n2", "n3", "n0.g1", "n2.g0"]),
            st.integers(0, 80),
            st.sampled_from([0.0, 0.3, 0.8, 2.0]),
        ),
        max_size=7,
    ),
    shapes=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 200), st.integers(1, 150)), min_size=1, max_size=20),
    mode=st.sampled_from(MODES),
    without=st.sets(st.sampled_from(PARTS)),
    tp=st.sampled_from([1, 2, 4]),
    instances=st.sampled_from([1, 3, None]),
    gbps=st.sampled_from([1, 100]),
)
def test_every_request_ends_whatever_comes_and_goes(
    turns: list[tuple[Any, str, int, float]], shapes: list[tuple[int, int, int]], mode: Mode, without: set[Part],
    tp: int, instances: int | None, gbps: float,
) -> None:  # fmt: skip
    where = replace(toy_problem(small_cluster(gpus=2, nodes=4, gbps=gbps)), model=replace(TINY, num_layers=4))
    arrived = sorted(shapes)
    requests = [request(n, at / 20, tokens, out) for n, (at, tokens, out) in enumerate(arrived)]
    events = [
        ClusterEvent(at_s=at / 20, kind=kind, target=target, deadline_s=left if kind == "spot_notice" else None)
        for kind, target, at, left in turns
    ]
    options = {"mode": mode, "max_tp": tp, "least_gpus": 2, "instances": instances, "need_per_s": 5.0}
    what = pairs(**options, without=sorted(without) if mode == "spotserve" else [])
    collapsed = run(what, requests, where, events=events)
    stepped = run(what, requests, where, events=events, step_by_step=True)
    assert collapsed.log() == stepped.log()
    for row in collapsed.rows.requests:
        times = collapsed.token_times_ps(row.request.id)
        assert times == sorted(times)
        if row.outcome == "completed":
            assert len(times) == row.request.output_tokens
        else:
            assert "no replica is up" in row.reason


# ------------------------------------------------------------ the paper's world


@pytest.mark.parametrize("name", LATENCY_S)
def test_a_request_alone_in_the_engine_takes_what_table_1_says(name: str) -> None:
    """But for a step, as the first token comes with the prompt, and for a last stage that has fewer layers."""
    stages, tp, seconds = LATENCY_S[name]
    profile = PROFILES[name]
    where = problem(name, stages * tp // 4)
    lone = Request(id=0, arrival_s=0.0, input_tokens=512, output_tokens=128)
    options = {"need_per_s": 1e-6, "max_tp": tp, "max_batch": 1}
    what = replace(system(name, stages * tp // 4, **options), planner=Fixed(stages, tp))
    result = served(where, what, [lone])
    prompt_s = profile.prompts[tp][1] * profile.num_layers + profile.prompts_hop_s * (stages - 1)
    step_s = profile.steps[tp][1] * profile.num_layers + profile.step_hop_s * (stages - 1)
    ends_s = 2 * profile.ends_s[1]
    assert result.columns["e2e_s"][0] == pytest.approx(1.1 * (prompt_s + 127 * step_s + ends_s), rel=1e-3)
    assert result.columns["e2e_s"][0] == pytest.approx(seconds, rel=0.03)


@dataclass
class Fixed:
    """One pipeline of that shape on the first GPUs."""

    stages: int
    tp: int

    def plan(self, where: Problem) -> Plan:
        gpus = chunks(where.cluster.gpu_ids[: self.stages * self.tp], self.tp)
        return Plan(replicas=(pipeline(where.model, "s0", gpus),))


@pytest.mark.parametrize(
    ("trace", "configurations"), [("A_S", ["(2,2,8)"] * 2), ("B_S", ["(2,2,8)", "(2,3,4)", "(2,2,8)"])]
)
def test_the_traces_change_to_the_printed_configurations(trace: str, configurations: list[str]) -> None:
    turns = TRACES[trace]
    result = served(problem("GPT-20B", 12), system("GPT-20B", turns.at_start), arrivals(0.35, turns.end_s), turns)
    assert changes(result) == configurations
    assert set(result.columns["outcome"]) == {"completed"}
    losses = [when for when, _, _ in notes(result, "gpu_lost")]
    for loss_s in losses:  # whatever had to move had moved
        before = [kind for when, kind, _ in notes(result, "down", "up") if when < loss_s]
        assert before.count("down") == before.count("up")
    assert any("keep their KV" in text for _, _, text in notes(result, "down"))


def test_the_artifact_s_arrivals_are_almost_regular() -> None:
    for requests, cv in ((arrivals(0.35, 30_000), 0.046), (bursty(0.35, 600_000, 6.0), 6.0)):
        gaps = np.diff([0.0, *(one.arrival_s for one in requests)])
        assert gaps.mean() == pytest.approx(1 / 0.35, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


# ------------------------------------------------------------ the study, and options


def test_what_is_exact_in_the_study_is() -> None:
    rows = [*arithmetic(), *rents(FULL)]
    assert sum(one.kind == "exact" for one in rows) == 8
    for one in rows:
        assert one.ratio == pytest.approx(1, abs=1e-4 if one.kind != "ratio" else 0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "system.mode is 'fast'; spotserve has spotserve, reparallelization, rerouting"),
        ({"without": ["planner"]}, "system.without names 'planner'; it can do without controller, mapper, arranger"),
        ({"without": ["mapper"], "mode": "rerouting"}, "rerouting has none of the parts"),
        ({"max_tp": 0}, "system.max_tp is 0; it must be a whole number >= 1"),
        ({"instances": -1}, "system.instances is -1"),
        ({"need_per_s": 0.0}, "system.need_per_s is 0.0; it must be > 0, or left out"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["spotserve"](**options)


def test_what_a_plan_tells() -> None:
    where = replace(problem("GPT-20B", 10), limits=SYSTEMS["spotserve"]().limits)
    first, second = Pipelines(need_per_s=0.4, least_gpus=12, instances=7).explain(where)
    assert first == "(2,3,4) for batches of 4: 14.5 s a batch, up to 0.553 requests/s"
    assert second == "instances: ask for 1 more, so that 2 are spare"
