"""What is written is read back equal, and a run's own log replayed is the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.cli import main
from experiments.runs.request_log import requests_of
from experiments.runs.rundir import Run, read_run, write_run
from experiments.runs.vllm_bench import figures, of_run, read_bench, write_bench
from sim import SYSTEMS, Request, Result, System
from sim.engine import simulate
from sim.types import ConfigError, Slo
from tests.toys import ToyCost, cluster, problem, run, with_limits
from traces import ClosedLoop, Sessions, TraceSource, read, write

SPLIT = {"prefill": {"replicas": 2, "tp": 1}, "decode": {"replicas": 2, "tp": 1}}
SYSTEMS_TRIED: dict[str, Callable[[], System]] = {
    "vllm": lambda: SYSTEMS["vllm"](replicas=2, tp=1),
    "priority": lambda: SYSTEMS["vllm"](policy="priority", replicas=2, tp=1),
    "split": lambda: SYSTEMS["vllm"](**SPLIT),
    "splitwise": lambda: SYSTEMS["splitwise"](**SPLIT),
    "sarathi-serve": lambda: SYSTEMS["sarathi-serve"](token_budget=64, replicas=2, tp=1),
}
names = st.none() | st.sampled_from(["a", "b, c", 'say "d"', "\u00e9"])


@st.composite
def requests(draw: st.DrawFn, *, timed: bool = True) -> list[Request]:
    """Requests with everything that a trace can say; times and lengths vary little, so that ties are many."""
    found: list[Request] = []
    arrival_s = 0.0
    for number in range(draw(st.integers(1, 14))):
        arrival_s += draw(st.sampled_from([0.0, 0.01, 0.0371])) if timed else 0.0
        input_tokens = draw(st.sampled_from([20, 48, 100]))
        prefix = tuple(draw(st.sampled_from([(), (1, 2, 3), (1, 9, -7)]))[: input_tokens // 16])
        samples = draw(st.sampled_from([1, 1, 3]))
        found.append(
            Request(
                id=number,
                arrival_s=arrival_s,
                input_tokens=input_tokens,
                output_tokens=draw(st.sampled_from([1, 3, 30])),
                session=draw(names),
                klass=draw(names),
                priority=draw(st.integers(-1, 1)),
                prefix=prefix,
                prefix_block_tokens=16 if prefix else None,
                samples=samples,
                beam_search=samples > 1 and draw(st.booleans()),
            )
        )
    return found


def served(result: Result) -> list[tuple[Any, ...]]:
    """Everything that happened to each request, in order of arrival; numbers of requests left out."""
    rows = sorted(result.rows.requests, key=lambda row: (row.request.arrival_s, row.request.id))
    return [
        (row.request.arrival_s, *row[1:8], result.token_times_ps(row.request.id), row.preemptions, row.cached_tokens,
         row.bytes_moved, row.prefill_stage, row.decode_stage)
        for row in rows
    ]  # fmt: skip


def logged(result: Result) -> list[Request]:
    return requests_of(Run.of("it", result, {}))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=40)
@given(trace=requests())
def test_a_trace_in_our_format_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, trace: list[Request]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"trip{suffix}"
    write(path, trace)
    assert list(read(path)) == trace


@pytest.mark.parametrize("name", SYSTEMS_TRIED)
@settings(max_examples=12)
@given(trace=requests(), caching=st.booleans(), until_s=st.sampled_from([None, 0.09]))
def test_a_log_replayed_is_the_run_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, name: str, trace: list[Request], caching: bool, until_s: float | None
) -> None:
    system = with_limits(SYSTEMS_TRIED[name](), num_kv_blocks=60, prefix_caching=caching)
    first = run(system, trace, until_s=until_s)
    path = tmp_path_factory.getbasetemp() / "log.csv"
    write(path, logged(first))
    second = run(system, list(read(path)), until_s=until_s)
    assert second.log() == first.log()
    assert second.rows.step_fields == first.rows.step_fields
    assert second.requests.to_csv() == first.requests.to_csv()


@pytest.mark.parametrize("name", SYSTEMS_TRIED)
@settings(max_examples=15)
@given(
    trace=requests(timed=False),
    users=st.integers(1, 6),
    think_s=st.sampled_from([0.0, 0.05]),
    cv=st.sampled_from([0.0, 1.0]),
)
def test_a_closed_loop_replays_as_an_open_trace(
    name: str, trace: list[Request], users: int, think_s: float, cv: float
) -> None:
    where, system = problem(cost=ToyCost()), with_limits(SYSTEMS_TRIED[name](), num_kv_blocks=60, prefix_caching=True)
    source = ClosedLoop(trace, users=users, think_s=think_s, think_cv=cv)
    loop = simulate(where, system, source)
    again = simulate(where, system, TraceSource(logged(loop)))
    assert served(again) == served(loop)
    assert again.rows.step_fields == loop.rows.step_fields
    assert simulate(where, system, source, step_by_step=True).log() == loop.log()


@pytest.mark.parametrize("name", SYSTEMS_TRIED)
@settings(max_examples=15)
@given(
    talks=st.lists(st.lists(st.sampled_from([5, 40]), min_size=1, max_size=4), min_size=1, max_size=5),
    think_s=st.sampled_from([0.0, 0.02]),
)
def test_sessions_replay_as_an_open_trace(name: str, talks: list[list[int]], think_s: float) -> None:
    turns = [
        Request(id=0, arrival_s=0.01 * talk, input_tokens=tokens, output_tokens=7, session=str(talk))
        for talk, inputs in enumerate(talks)
        for tokens in inputs
    ]
    where, system = problem(where=cluster()), with_limits(SYSTEMS_TRIED[name](), prefix_caching=True)
    talked = simulate(where, system, Sessions(turns, think_s=think_s, think_cv=0))
    again = simulate(where, system, TraceSource(logged(talked)))
    assert served(again) == served(talked)


SCENARIO = """\
model: llama-2-7b
cluster: {nodes: [{gpu: A100-80G-SXM, count: 2}]}
workload:
  mix:
    chat: {generate: {requests: 12, input: {uniform: [20, 90]}, output: {fixed: 20}, turns: {uniform: [1, 4]}}}
    batch: {generate: {requests: 12, input: {fixed: 600}, output: {uniform: [1, 40]}}, priority: 1, samples: 2}
  rate: 12
  sessions: {think_s: 0.5}
system: {name: vllm, tp: 1, policy: priority, engine: {prefix_caching: true}}
seed: 5
"""


def test_export_writes_a_trace_that_a_scenario_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talk.yaml").write_text(SCENARIO)
    (tmp_path / "again.yaml").write_text(SCENARIO.split("workload:")[0] + "workload: {trace: log.csv}\n"
                                         + SCENARIO[SCENARIO.index("system:"):])  # fmt: skip
    for command in (
        ["run", str(tmp_path / "talk.yaml"), "--out", str(tmp_path / "first")],
        ["export", str(tmp_path / "first"), "--trace", str(tmp_path / "log.csv")],
        ["run", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "second")],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--quiet"] if command[0] == "run" else command)
        assert ended.value.code == 0
    assert str(tmp_path / "log.csv") in capsys.readouterr().out
    first, second = read_run(tmp_path / "first"), read_run(tmp_path / "second")
    assert first.requests["cached_tokens"].sum() > 0
    in_order = first.requests.sort_values(["arrival_s", "request"], ignore_index=True).drop(columns="request")
    assert in_order.to_csv() == second.requests.drop(columns="request").to_csv()
    for table in ("steps", "memory", "replicas"):
        assert getattr(first, table).to_csv() == getattr(second, table).to_csv()
    for figure in ("slo", "makespan_s", "output_tokens_per_s", "cached_tokens", "preemptions"):
        assert first.summary[figure] == second.summary[figure]
    assert first.summary["classes"].keys() == second.summary["classes"].keys() == {"chat", "batch"}


def test_the_request_table_is_itself_a_trace(tmp_path: Path) -> None:
    trace = [Request(id=0, arrival_s=0.5, input_tokens=40, output_tokens=2, prefix=(3, 4), prefix_block_tokens=16)]
    result = run(SYSTEMS_TRIED["vllm"](), trace)
    write_run(tmp_path / "run", Run.of("it", result, {}), "")
    assert list(read(tmp_path / "run" / "requests.parquet")) == trace
    assert requests_of(read_run(tmp_path / "run")) == trace


def test_a_run_of_an_earlier_version_says_what_it_lacks() -> None:
    old = Run.of("old", run(SYSTEMS_TRIED["vllm"](), [Request(id=0, arrival_s=0, input_tokens=5, output_tokens=5)]), {})
    with pytest.raises(ConfigError, match="old: its requests have no column priority; run the scenario again"):
        requests_of(Run(**{**{name: getattr(old, name) for name in Run.__slots__},
                           "requests": old.requests.drop(columns="priority")}))  # fmt: skip


@settings(max_examples=25)
@given(trace=requests(), until_s=st.sampled_from([None, 0.05]))
def test_vllm_bench_json_reads_back_to_the_same_figures(
    tmp_path_factory: pytest.TempPathFactory, trace: list[Request], until_s: float | None
) -> None:
    result = run(with_limits(SYSTEMS_TRIED["vllm"](), num_kv_blocks=30), trace, until_s=until_s)
    bench = of_run(Run.of("it", result, {"makespan_s": result.makespan_s}, tokens=True))
    path, slo = tmp_path_factory.getbasetemp() / "bench.json", Slo(ttft_s=0.05, tpot_s=0.004)
    write_bench(path, bench, slo=slo)
    again = read_bench(path)
    ours, theirs = figures(bench, slo), figures(again, slo)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), name
    assert all(np.array_equal(a, b) for a, b in zip(bench.gaps_s, again.gaps_s, strict=True) if len(b))
    write_bench(path.with_suffix(".again.json"), again, slo=slo)
    assert figures(read_bench(path.with_suffix(".again.json")), slo) == theirs
