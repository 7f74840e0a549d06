"""``Limits.async_scheduling``: an iteration is decided while the one before it runs (10 ms + 10 us a token)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from experiments.scenario.file import Scenario
from experiments.scenario.resolve import resolve
from sim import Request, Result
from sim.cost import Fitted
from sim.types import PS_PER_S
from tests.lab import ONE, PIPELINE, system
from tests.toys import MS, request, run

NS, US = 10**3, 10**6
LONG = 400


def decode_ps(*contexts: int) -> int:
    return 10 * MS + 10 * US * len(contexts) + NS * sum(contexts)


def both(requests: Sequence[Request], **limits: int) -> tuple[Result, Result]:
    """The same requests, decided ahead, and not."""
    ahead, present = (run(system(async_scheduling=on, **limits), requests, plan=ONE) for on in (True, False))
    return ahead, present


def started(result: Result, number: int) -> int:
    found = result.rows.requests[number].scheduled_ps
    assert found is not None
    return found


def test_what_comes_joins_one_iteration_later() -> None:
    ahead, present = both([request(0, output_tokens=LONG), request(1, 0.015)])
    prompt_ps = 11 * MS
    second_ps = prompt_ps + decode_ps(101)
    assert started(present, 1) == second_ps
    assert started(ahead, 1) == second_ps + decode_ps(102)
    row = ahead.rows.requests[1]
    assert row.queued_ps == second_ps  # the scheduler looks at its queue between iterations
    assert ahead.requests.intake_s[1] == pytest.approx(second_ps / PS_PER_S - 0.015)
    assert ahead.token_times_ps(0)[2] == second_ps + decode_ps(102)  # decided before it came


def test_an_idle_engine_starts_at_once() -> None:
    ahead, present = both([request(0), request(1, 5.0)])
    assert ahead.log() == present.log()
    assert started(ahead, 1) == 5 * PS_PER_S
    assert ahead.requests.intake_s.tolist() == [0.0, 0.0]


def test_what_comes_during_the_last_iteration_waits_for_nobody() -> None:
    """Nothing could be decided ahead: the one that runs is known to end with this token."""
    ahead, present = both([request(0, output_tokens=1), request(1, 0.005)])
    assert ahead.log() == present.log()
    assert started(ahead, 1) == 11 * MS


def test_a_seat_is_free_one_iteration_later() -> None:
    """Two seats: 0 ends with its second token while 1 goes on and 2 waits."""
    requests = [request(0, output_tokens=2), request(1, output_tokens=LONG), request(2, 0.001)]
    ahead, present = both(requests, max_num_seqs=2)
    ended_ps = 12 * MS + decode_ps(101, 101)
    assert [result.rows.requests[0].finish_ps for result in (ahead, present)] == [ended_ps, ended_ps]
    assert started(present, 2) == ended_ps
    assert started(ahead, 2) == ended_ps + decode_ps(102)


def test_blocks_are_free_one_iteration_later() -> None:
    """Room for two prompts with their answers, not for three."""
    requests = [request(0, output_tokens=2), request(1, output_tokens=30), request(2, 0.001)]
    ahead, present = both(requests, num_kv_blocks=18)
    ended_ps = 12 * MS + decode_ps(101, 101)
    assert started(present, 2) == ended_ps
    assert started(ahead, 2) == ended_ps + decode_ps(102)


def test_the_only_seat_is_free_at_once() -> None:
    """With nobody left to decide for, the engine waits for the iteration to end, and then knows all."""
    requests = [request(0, output_tokens=3), request(1, 0.001)]
    ahead, present = both(requests, max_num_seqs=1)
    assert ahead.log() == present.log()


def test_a_pipeline_has_batches_in_flight_as_it_is() -> None:
    requests = [request(0, output_tokens=20), request(1, 0.015), request(2, 0.021)]
    ahead, present = (run(system(async_scheduling=on), requests, plan=PIPELINE) for on in (True, False))
    assert ahead.log() == present.log()


def test_a_scenario_states_it_once_for_schedule_and_overhead() -> None:
    fields = {
        "model": "llama-3.1-8b",
        "cluster": {"nodes": [{"gpu": "H100-SXM", "count": 1}]},
        "workload": {"generate": {"requests": 4, "input": {"fixed": 64}, "output": {"fixed": 4}}, "rate": 1.0},
        "overhead": {"step_s": 0.002},
    }
    for on in (True, False):
        engine = {"name": "vllm", "tp": 1, "replicas": 1, "engine": {"async_scheduling": on}}
        setup = resolve(Scenario.model_validate({**fields, "system": engine}))
        assert isinstance(setup.problem.cost, Fitted)
        assert setup.problem.cost.overhead is not None
        assert (setup.system.limits.async_scheduling, setup.problem.cost.overhead.overlapped) == (on, on)
