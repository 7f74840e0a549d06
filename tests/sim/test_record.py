"""What a run leaves behind: tables, token times recovered from segments, the log."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sim import ClusterEvent, ConfigError
from sim.record import REQUEST_COLUMNS
from tests.lab import ONE, SPLIT, TWO, Way, system
from tests.toys import MS, cluster, problem, request, run


def test_tables_have_one_row_per_thing_in_seconds() -> None:
    result = run(
        system(router=lambda: Way("p", "d")),
        [request(0), request(1, 0.1, klass="chat")],
        problem(cluster(1, 2)),
        plan=SPLIT,
    )
    assert tuple(result.requests.columns) == REQUEST_COLUMNS
    assert list(result.requests.request) == [0, 1]
    assert list(result.columns["klass"]) == [None, "chat"]
    assert list(result.requests.prefill_stage) == ["p", "p"]
    assert list(result.links.request) == [0, 1]
    assert (result.links.end_s > result.links.start_s).all()
    assert set(result.steps.replica) == {"p", "d"}
    assert result.steps.iterations.sum() == result.iterations == 20
    assert set(result.replicas.replica) == {"p", "d"}
    assert (result.memory.used_blocks <= result.memory.total_blocks).all()
    assert result.notes.empty


def test_the_parts_of_a_request_add_up() -> None:
    result = run(
        system(router=lambda: Way("p", "d"), max_num_seqs=2), [request(n, 0.005 * n) for n in range(10)],
        problem(cluster(1, 2)), plan=SPLIT,
    )  # fmt: skip
    table = result.requests
    parts = table.queue_s + table.prefill_s + table.transfer_s + table.decode_s
    assert np.allclose(parts, table.e2e_s)
    assert np.allclose(table.queue_s + table.prefill_s, table.ttft_s)
    assert np.allclose(table.tpot_s * 9, table.e2e_s - table.ttft_s)


def test_token_times_over_moves_faults_and_preemptions_are_those_of_the_step_by_step_engine() -> None:
    requests = [request(n, 0.003 * n, 20 + 7 * n, 40) for n in range(12)]
    lost = [ClusterEvent(at_s=0.2, kind="node_lost", target="n1")]
    both = [
        run(system(num_kv_blocks=12), requests, problem(cluster(1, 2)), plan=TWO, events=lost, step_by_step=mode)
        for mode in (False, True)
    ]
    assert sum(row.preemptions for row in both[0].rows.requests) > 0
    for number in range(12):
        times = both[0].token_times_ps(number)
        assert times == both[1].token_times_ps(number)
        assert len(times) == 40
    assert sorted(both[0].itl_s()) == sorted(both[1].itl_s())
    assert len(both[0].itl_s()) == 12 * 39


def test_the_log_is_integers_one_line_a_request() -> None:
    result = run(system(), [request(0, output_tokens=2), request(1, output_tokens=1)], plan=ONE)
    lines = [json.loads(line) for line in result.log().splitlines()]
    assert [line[0] for line in lines] == [0, 1]
    assert result.token_times_ps(0) in lines[0]
    floats = [item for line in lines for item in line if isinstance(item, float)]
    assert floats == []


def test_results_are_sorted_by_request_and_unknown_ones_are_key_errors() -> None:
    result = run(
        system(max_num_seqs=1), [request(0, 0.0, output_tokens=50), request(1, 0.0, output_tokens=1)], plan=ONE
    )
    assert [row.request.id for row in result.rows.requests] == [0, 1]
    with pytest.raises(KeyError):
        result.token_times_ps(7)


def test_makespan_is_first_arrival_to_last_completion() -> None:
    result = run(system(), [request(0, 1.0, output_tokens=1), request(1, 2.0, output_tokens=1)], plan=ONE)
    assert result.makespan_s == pytest.approx(1.011)
    rejected = run(system(num_kv_blocks=1), [request(0, 1.0)], plan=ONE)
    assert rejected.makespan_s == 0.0


def test_undefined_is_nan_never_zero() -> None:
    result = run(system(num_kv_blocks=1), [request(0, 1.0)], plan=ONE)
    row = result.requests.iloc[0]
    assert row.outcome == "rejected"
    assert np.isnan([row.queue_s, row.prefill_s, row.ttft_s, row.tpot_s, row.e2e_s]).all()


def test_busy_time_is_what_the_steps_took() -> None:
    result = run(system(), [request(0, 0.0), request(1, 5.0)], plan=ONE)
    steps_s = sum(step.end_ps - step.start_ps for step in result.rows.steps) / 1e12
    assert result.rows.replicas[0].busy_s == pytest.approx(steps_s)
    assert sum(step.end_ps - step.start_ps for step in result.rows.steps[:2]) < 200 * MS


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arrival_s": -1.0}, r"request 7: arrival_s is -1\.0; it must be a number >= 0"),
        ({"arrival_s": float("nan")}, "request 7: arrival_s is nan"),
        ({"input_tokens": 0}, "request 7: input_tokens 0 and output_tokens 10 must both be >= 1"),
        ({"output_tokens": 0}, "request 7: input_tokens 100 and output_tokens 0 must both be >= 1"),
        ({"prefix": (1, 2)}, "request 7: prefix hashes need prefix_block_tokens"),
    ],
)
def test_a_request_is_checked_where_it_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(7, **wrong)
