"""FasterTransformer: a batch begins when the one before has ended."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, Request
from tests.lab import ONE, PIPELINE, spied
from tests.sim.systems.schedulers.test_orca import served, sharegpt
from tests.toys import request, run, with_limits


def engine(**limits: Any) -> Any:
    return with_limits(SYSTEMS["fastertransformer"](replicas=1, tp=1), **limits)


def test_the_next_batch_waits_for_the_longest_request() -> None:
    requests = [request(n, output_tokens=tokens) for n, tokens in enumerate([5, 40, 10, 10])]
    rows = run(engine(max_num_seqs=2), requests).rows.requests
    assert [row.scheduled_ps for row in rows] == [0, 0, rows[1].finish_ps, rows[1].finish_ps]
    assert rows[0].finish_ps < rows[1].finish_ps  # type: ignore[operator]


def test_the_batch_is_as_large_as_contexts_fit() -> None:
    """1000 blocks of 16 tokens hold seven contexts of 2048."""
    rows = run(engine(num_kv_blocks=1000), [request(n) for n in range(9)]).rows.requests
    assert [row.scheduled_ps for row in rows] == [0] * 7 + [rows[0].finish_ps] * 2


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.sampled_from([ONE, PIPELINE]),
)
def test_nobody_joins_a_batch_under_way(shapes: list[tuple[int, int, int]], seats: int, plan: Any) -> None:
    arrival, requests = 0.0, list[Request]()
    for number, (gap, tokens, output) in enumerate(shapes):
        arrival = round(arrival + gap / 100, 3)
        requests.append(request(number, arrival, tokens, output))
    lab, fills = spied(engine(max_num_seqs=seats))
    rows = run(lab, requests, plan=plan, step_by_step=True).rows.requests
    batches = [fill.admitted for fill in fills if fill.admitted]
    assert [number for batch in batches for number in batch] == list(range(len(requests)))
    assert max(map(len, batches)) <= seats
    for before, after in pairwise(batches):
        assert max(rows[n].finish_ps or 0 for n in before) <= (rows[after[0]].scheduled_ps or 0)


@pytest.mark.parametrize(
    ("what", "limits", "reason"),
    [
        ({"input_tokens": 2040}, {}, "2050 tokens exceed system.engine.max_model_len, 2048"),
        ({}, {"num_kv_blocks": 100}, "a: a context of 2048 tokens exceeds the 1600 of the KV cache"),
        ({"samples": 2}, {}, "a: 2 samples: this scheduler has one a request"),
        ({"input_tokens": 2040}, {"max_model_len": None}, "a: 2050 tokens exceed the context of 2048 that is reserved"),
    ],
)
def test_what_never_fits_is_refused(what: dict[str, int], limits: dict[str, int], reason: str) -> None:
    row = run(engine(**limits), [request(0, **what)], plan=ONE).rows.requests[0]  # type: ignore[arg-type]
    assert row.outcome == "rejected"
    assert row.reason.startswith(reason)


def test_sosp_2023_figure_12_rates_served() -> None:
    """OPT-13B, ShareGPT: vLLM serves up to 22 times the rate of FasterTransformer, which is the worst of all."""
    requests = sharegpt(300, 10.0)
    paged, orca, plain = (
        served(name, requests, **options).makespan_s
        for name, options in (("vllm", {"mode": "paper"}), ("orca", {}), ("fastertransformer", {}))
    )
    assert paged < orca < plain < 22 * paged
