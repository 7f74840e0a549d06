"""From timestamps to figures, on requests made by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import SYSTEMS, ClusterEvent, Request, Result, Slo
from sim.metrics import attainment, attainment_curve, distribution, summarise
from sim.record import Recorder, ReplicaRow, RequestRow
from sim.types import to_ps
from tests.toys import cluster, problem, request, run


def served(number: int, arrival_s: float, ttft_s: float, tpot_s: float, output_tokens: int = 11) -> RequestRow:
    """A request that waits half of its TTFT, then is prefilled and decoded in one place."""
    first_ps = to_ps(arrival_s + ttft_s)
    return RequestRow(
        request=Request(id=number, arrival_s=arrival_s, input_tokens=100, output_tokens=output_tokens),
        outcome="completed",
        reason="",
        scheduled_ps=to_ps(arrival_s + ttft_s / 2),
        first_token_ps=first_ps,
        prefill_end_ps=first_ps,
        transfer_ps=0,
        finish_ps=first_ps + to_ps(tpot_s * (output_tokens - 1)),
        tokens=(first_ps,),
        preemptions=0,
        cached_tokens=0,
        bytes_moved=0,
        prefill_stage="r0",
        decode_stage="r0",
    )


def refused(number: int, reason: str, outcome: str = "rejected") -> RequestRow:
    unserved = {"scheduled_ps": None, "first_token_ps": None, "prefill_end_ps": None, "finish_ps": None, "tokens": ()}
    return served(number, 0.0, 1.0, 0.1)._replace(outcome=outcome, reason=reason, **unserved)


def result(*rows: RequestRow, measured: bool = True) -> Result:
    replica = ReplicaRow(
        replica="r0", role="mixed", gpus="n0.g0", gpu="L4", tp=1, pp=1, total_blocks=10, busy_s=2.0,
        stage_busy_s=(2.0,), measured=measured, stage_tp=(1,), up_s=0.0, down_s=None,
    )  # fmt: skip
    recorder = Recorder(requests=list(rows), replicas=[replica])
    return Result(recorder, system="toy", mirrors="nothing", events=7, wall_s=0.5, extrapolated_share=0.25)


def test_a_run_of_two_requests_by_hand() -> None:
    summary = summarise(
        result(served(0, 0.0, ttft_s=1.0, tpot_s=0.1), served(1, 2.0, ttft_s=3.0, tpot_s=0.5)),
        Slo(ttft_s=2.0, tpot_s=0.2, attainment=0.5),
        usd_per_hour=36.0,
    )
    assert summary["makespan_s"] == 10.0  # 0 to 2 + 3 + 10 x 0.5
    assert summary["ttft_s"]["mean"] == 2.0
    assert summary["ttft_s"]["p50"] == 2.0
    assert summary["e2e_s"]["max"] == 8.0
    assert summary["output_tokens_per_s"] == 2.2
    assert summary["requests_per_s"] == 0.2
    assert summary["slo"]["attainment"] == 0.5
    assert summary["slo"]["reached"] is True
    assert summary["slo"]["goodput_per_s"] == 0.1
    assert summary["slo"]["goodput_tokens_per_s"] == 1.1
    assert summary["usd_per_million_tokens"] == pytest.approx(0.1 / 22 * 1e6)  # $36/h is a cent a second
    assert summary["simulated_requests_per_s"] == 4.0
    assert summary["replicas"][0]["busy_share"] == 0.2
    assert summary["extrapolated_share"] == 0.25


def test_tpot_of_one_token_is_undefined_and_meets_its_bound() -> None:
    one = result(served(0, 0.0, ttft_s=1.0, tpot_s=0.0, output_tokens=1))
    assert np.isnan(one.columns["tpot_s"][0])
    assert summarise(one)["tpot_s"]["count"] == 0
    assert attainment(one.columns, Slo(tpot_s=1e-9))["attainment"] == 1.0


@pytest.mark.parametrize("outcome", ["rejected", "failed", "running"])
def test_what_is_not_completed_misses_the_slo(outcome: str) -> None:
    run = result(served(0, 0.0, 1.0, 0.1), refused(1, "why", outcome))
    shares = attainment(run.columns, Slo(ttft_s=10.0, tpot_s=10.0))
    assert shares["attainment"] == shares["ttft_attainment"] == shares["tpot_attainment"] == 0.5
    assert attainment(run.columns, Slo())["attainment"] == 0.5


def test_a_bound_that_is_not_set_has_no_attainment() -> None:
    shares = attainment(result(served(0, 0.0, 1.0, 0.1)).columns, Slo(ttft_s=1.0))
    assert shares == {"attainment": 1.0, "ttft_attainment": 1.0, "tpot_attainment": None, "e2e_attainment": None}


def test_nothing_completed_still_says_so() -> None:
    summary = summarise(
        result(refused(0, "900 tokens exceed the context of 8"), refused(1, "901 tokens exceed the context of 8")),
        Slo(ttft_s=1.0),
        usd_per_hour=10.0,
    )
    assert (summary["requests"], summary["completed"], summary["rejected"]) == (2, 0, 2)
    assert summary["reasons"] == {"tokens exceed the context of 8": 2}
    assert summary["slo"]["attainment"] == 0.0
    assert summary["ttft_s"]["p99"] is None
    assert summary["usd_per_million_tokens"] is None
    assert summary["output_tokens_per_s"] is None


def test_no_requests_at_all() -> None:
    summary = summarise(result(), Slo(ttft_s=1.0))
    assert summary["requests"] == 0
    assert summary["slo"]["attainment"] is None
    assert summary["slo"]["reached"] is None


def test_many_reasons_are_summed_up() -> None:
    summary = summarise(result(*(refused(n, f"r{n}: full") for n in range(15))))
    assert sum(summary["reasons"].values()) == 15
    assert summary["reasons"]["other reasons"] == 5


def test_an_unknown_price_stays_unknown() -> None:
    summary = summarise(result(served(0, 0.0, 1.0, 0.1)))
    assert summary["cluster_usd_per_hour"] is None
    assert summary["usd_per_million_tokens"] is None


def test_unmeasured_gpus_are_named() -> None:
    assert summarise(result(measured=True))["unmeasured_gpus"] == []
    summary = summarise(result(measured=False))
    assert (summary["measured"], summary["unmeasured_gpus"]) == (False, ["L4"])


def test_summary_is_strict_json() -> None:
    text = json.dumps(summarise(result(refused(0, "no"), served(1, 0.0, 1.0, 0.1, output_tokens=1))), allow_nan=False)
    assert json.loads(text)["requests"] == 2


def test_inter_token_gaps_on_request() -> None:
    row = served(0, 0.0, 1.0, 0.1, output_tokens=3)._replace(tokens=(to_ps(1.0), to_ps(1.25), to_ps(2.0)))
    assert summarise(result(row), itl=True)["itl_s"]["mean"] == 0.5
    assert "itl_s" not in summarise(result(row))


def test_distribution_by_hand() -> None:
    figures = distribution([1.0, 2.0, 3.0, 4.0, float("nan")])
    assert figures["count"] == 4
    assert figures["mean"] == figures["p50"] == 2.5
    assert figures["std"] == pytest.approx(1.25**0.5)
    assert figures["p90"] == pytest.approx(3.7)
    assert (figures["min"], figures["max"]) == (1.0, 4.0)
    assert distribution([])["p50"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered(values: list[float]) -> None:
    figures = distribution(values)
    names = ["min", "p50", "p90", "p95", "p99", "p999", "max"]
    ordered = [float(figures[name] or 0.0) for name in names]
    assert all(a <= b + 1e-9 * abs(b) for a, b in pairwise(ordered))


@given(
    st.lists(st.tuples(st.floats(0.001, 5), st.floats(0.001, 1), st.integers(1, 20)), min_size=1, max_size=20),
    st.floats(0.01, 5),
    st.floats(0.01, 1),
)
def test_attainment_never_falls_as_the_slo_relaxes(
    shapes: list[tuple[float, float, int]], ttft_s: float, tpot_s: float
) -> None:
    run = result(*(served(n, 0.0, *shape) for n, shape in enumerate(shapes)))
    curve = attainment_curve(run.columns, Slo(ttft_s=ttft_s, tpot_s=tpot_s), (0.1, 0.5, 1.0, 2.0, 1e6))
    assert curve == sorted(curve)
    assert curve[-1] == 1.0


def test_only_gpus_that_were_used_are_rent() -> None:
    """One of two machines all the time, the other until it is lost a second after the first arrival."""
    where = problem(cluster(gpus=1, nodes=2))
    requests = [request(0, 1.0, output_tokens=30), request(1, 2.5, output_tokens=30)]
    lost = ClusterEvent(at_s=2.0, kind="gpu_lost", target="n1.g0")
    found = run(SYSTEMS["vllm"](tp=1), requests, where, events=(lost,))
    price = where.cluster.gpu("n0.g0").usd_per_hour
    assert price is not None
    summary = summarise(found, usd_per_hour=2 * price, problem=where)
    hours = (found.makespan_s + 1.0) / 3600
    assert summary["used_usd_per_million_tokens"] == pytest.approx(price * hours / 60 * 1e6)
    assert summary["used_usd_per_million_tokens"] < summary["usd_per_million_tokens"]
    assert summarise(found, usd_per_hour=1.0)["used_usd_per_million_tokens"] is None
    cheaper = summarise(found, problem=where, spot=True)["used_usd_per_million_tokens"]
    spot_price = where.cluster.gpu("n0.g0").usd_per_hour_spot
    assert cheaper == (None if spot_price is None else pytest.approx(spot_price * hours / 60 * 1e6))
