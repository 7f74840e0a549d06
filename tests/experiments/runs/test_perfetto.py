"""Chrome traces of runs, held against the rules of the trace event format."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.runs.perfetto import in_lanes, trace_events, write_trace
from experiments.runs.rundir import Run
from sim import SYSTEMS, ClusterEvent, ConfigError, Result
from sim.metrics import summarise
from tests.lab import SPLIT, Way, system
from tests.toys import cluster, problem, request
from tests.toys import run as simulate

Event = dict[str, Any]
RESOLUTION_US = 1e-5


def split_run(**options: Any) -> tuple[Result, Run]:
    """Six requests prefilled on one machine and decoded on another."""
    where = problem(cluster(gpus=1, nodes=2))
    requests = [request(n, 0.01 * n, output_tokens=20) for n in range(6)]
    result = simulate(system(router=lambda: Way("p", "d")), requests, where, plan=SPLIT, **options)
    return result, Run.of("toy", result, summarise(result))


def pipelined_run() -> tuple[Result, Run]:
    requests = [request(n, 0.001 * n, output_tokens=30) for n in range(40)]
    result = simulate(SYSTEMS["vllm"](replicas=1, tp=1, pp=2), requests)
    return result, Run.of("toy", result, summarise(result))


def of_phase(events: list[Event], *phases: str) -> list[Event]:
    return [event for event in events if event["ph"] in phases]


def test_a_run_becomes_a_file_that_json_can_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result, run = split_run()
    write_trace(path, run)
    trace = json.loads(path.read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == "batch"]
    assert len(slices) == result.segments
    assert slices[0]["name"] == "prefill"
    assert slices[0]["ts"] == 0.0
    assert slices[0]["dur"] == 11_000.0  # 10 ms and 100 tokens of 10 us each
    assert slices[0]["args"]["prompt tokens per iteration"] == 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", [split_run, pipelined_run])
def test_events_keep_the_rules_of_the_format(make: Any) -> None:
    events = list(trace_events(make()[1]))
    timed = [event for event in events if event["ph"] != "M"]
    assert events[: len(events) - len(timed)] == of_phase(events, "M")  # names come first
    times = [event["ts"] for event in timed]
    assert times == sorted(times)
    assert times[0] >= 0
    for event in events:
        assert {"ph", "pid", "name"} <= set(event)
        assert isinstance(event["pid"], int)
        assert event["ph"] in ("M", "X", "C", "s", "f", "i")
    assert all(event["dur"] >= 0 and isinstance(event["tid"], int) for event in of_phase(events, "X"))
    assert all(isinstance(value, int) for event in of_phase(events, "C") for value in event["args"].values())


@pytest.mark.parametrize("make", [split_run, pipelined_run])
def test_slices_of_a_thread_never_overlap(make: Any) -> None:
    ends: dict[tuple[int, int], float] = defaultdict(float)
    slices = of_phase(list(trace_events(make()[1])), "X")
    for event in slices:
        thread = (event["pid"], event["tid"])
        assert event["ts"] >= ends[thread] - RESOLUTION_US
        ends[thread] = event["ts"] + event["dur"]
    named = {(event["pid"], event["tid"]) for event in of_phase(list(trace_events(make()[1])), "M") if "tid" in event}
    assert named == set(ends)


def test_a_pipeline_has_a_lane_per_micro_batch_under_way() -> None:
    slices = of_phase(list(trace_events(pipelined_run()[1])), "X")
    assert {event["tid"] for event in slices} == {0, 1}


def test_every_arrow_starts_and_ends_once_inside_a_slice() -> None:
    result, run = split_run()
    events = list(trace_events(run))
    starts, ends = ({event["id"]: event for event in of_phase(events, phase)} for phase in "sf")
    assert len(starts) == len(of_phase(events, "s")) == len(result.rows.links) == 6
    assert starts.keys() == ends.keys()
    assert len(of_phase(events, "f")) == 6
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        assert start["pid"] != end["pid"]
        assert end["bp"] == "e"
        for arrow in (start, end):
            assert any(
                event["ts"] <= arrow["ts"] < event["ts"] + event["dur"]
                for event in of_phase(events, "X")
                if (event["pid"], event["tid"]) == (arrow["pid"], arrow["tid"])
            )


def test_counters_end_where_the_memory_table_does() -> None:
    _, run = split_run()
    events = list(trace_events(run))
    blocks = [event["args"]["blocks"] for event in of_phase(events, "C") if event["name"] == "KV blocks in use"]
    assert sorted(blocks) == sorted(run.memory["used_blocks"].tolist())
    assert len(of_phase(events, "C")) == 3 * len(run.memory)


def test_faults_are_flags() -> None:
    _, run = split_run(events=[ClusterEvent(at_s=0.02, kind="gpu_slow", target="n1.g0", factor=2.0)])
    flags = of_phase(list(trace_events(run)), "i")
    assert [flag["ts"] for flag in flags] == [20_000.0]
    assert flags[0]["name"].startswith("gpu_slow")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name another file"):
        write_trace(tmp_path / "no" / "trace.json", split_run()[1])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20))))
def test_lanes_are_as_few_as_can_be(items: list[tuple[int, int]]) -> None:
    spans = sorted((start, start + length) for start, length in items)
    placed = list(in_lanes(spans, lambda span: span))
    assert [span for _, span in placed] == spans
    ends: dict[int, int] = {}
    for lane, (start, end) in placed:
        assert ends.get(lane, 0) <= start
        ends[lane] = end
    most = max((sum(a <= time < b for a, b in spans) for time in range(80)), default=0)
    assert len(ends) == most
