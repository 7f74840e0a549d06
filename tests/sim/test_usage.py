"""Energy, utilisation and bubbles, on runs one can do by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import SYSTEMS, Cluster, Result
from sim.cluster import Node, gpu
from sim.metrics import summarise
from sim.model import ModelSpec, model
from sim.record import ReplicaRow
from sim.usage import bubble_share, energy, mfu, mfu_by_replica, useful_flops
from tests.lab import PIPELINE, SPLIT, Way, system
from tests.toys import ToyCost, cluster, problem, request, run

A100 = gpu("A100-80G-SXM")
ONE_GPU = problem(cluster(gpus=1))


def one_request() -> Result:
    """100 tokens in, 11 out: 11 ms, then ten steps of 10 ms, 10 us for the token, and 1 ns a token of context."""
    return run(SYSTEMS["vllm"](replicas=1, tp=1), [request(0, 1.0, 100, 11)], ONE_GPU)


def test_a_gpu_that_is_always_busy_draws_its_tdp() -> None:
    result = one_request()
    assert A100.tdp_w is not None
    figures = energy(result, ONE_GPU)
    assert figures["joules"] == pytest.approx(A100.tdp_w * result.makespan_s)
    assert figures["joules_per_token"] == pytest.approx(A100.tdp_w * result.makespan_s / 11)


def test_idle_gpus_and_waiting_cost_idle_power() -> None:
    where = problem(cluster(gpus=3))
    requests = [request(0, 0.0, 100, 11), request(1, 1.0, 100, 11)]
    result = run(SYSTEMS["vllm"](replicas=1, tp=1), requests, where)
    (row,) = result.rows.replicas
    assert A100.tdp_w is not None
    assert A100.idle_w is not None
    joules = 3 * A100.idle_w * result.makespan_s + (A100.tdp_w - A100.idle_w) * row.busy_s
    assert energy(result, where)["joules"] == pytest.approx(joules)
    (replica,) = summarise(result, problem=where)["replicas"]
    assert replica["joules"] == pytest.approx(joules - 2 * A100.idle_w * result.makespan_s)


def test_unknown_power_is_none_not_zero() -> None:
    dark = replace(A100, idle_w=None)
    where = problem(Cluster(nodes=(Node(name="n0", gpu=dark, count=1),)))
    result = run(SYSTEMS["vllm"](replicas=1, tp=1), [request(0)], where)
    assert energy(result, where) == {"joules": None, "joules_per_token": None}
    assert summarise(result, problem=where)["replicas"][0]["joules"] is None
    assert summarise(result)["joules"] is summarise(result)["mfu"] is None


def test_a_replica_draws_power_only_while_it_is_up() -> None:
    result = one_request()
    row = result.rows.replicas[0]
    half = result.makespan_s / 2
    result.rows.replicas[:] = [row._replace(up_s=1.0 + half, stage_busy_s=(half / 2,))]
    assert A100.tdp_w is not None
    assert A100.idle_w is not None
    (replica,) = summarise(result, problem=ONE_GPU)["replicas"]
    assert replica["up_s"] == pytest.approx(half)
    assert replica["joules"] == pytest.approx(half * (A100.tdp_w + A100.idle_w) / 2)


def test_the_flops_of_a_request_by_hand() -> None:
    tiny = ONE_GPU.model
    prefill, decode = useful_flops(one_request().columns, tiny)
    linear = tiny.num_layers * tiny.linear_flops_per_token_layer
    pair = tiny.num_layers * tiny.attention_flops_per_pair
    assert prefill.tolist() == [100 * linear + 5050 * pair + tiny.head_flops_per_token]
    seen = sum(range(101, 111))  # the first decoded token attends to 100 and itself
    assert decode.tolist() == [10 * (linear + tiny.head_flops_per_token) + seen * pair]


@pytest.mark.parametrize(
    "spec",
    [model("llama-2-70b"), model("mistral-7b"), replace(model("mixtral-8x7b"), first_dense_layers=3)],
    ids=lambda spec: spec.name,
)
@given(st.integers(1, 9000), st.integers(1, 500))
def test_flops_agree_with_the_model_s_own_sum(spec: ModelSpec, prompt: int, output: int) -> None:
    columns = {
        "outcome": np.array(["completed"], dtype=object), "input_tokens": np.array([prompt]),
        "output_tokens": np.array([output]), "cached_tokens": np.array([0]),
    }  # fmt: skip
    dense = spec.first_dense_layers
    token = sum(
        layers * 2 * sum(gemm.n * gemm.k * gemm.active for gemm in spec.gemms(dense=is_dense))
        for layers, is_dense in ((dense, True), (spec.num_layers - dense, False))
    )
    attention = spec.num_layers * (spec.attention_flops(prompt, 0) + spec.attention_flops(output - 1, prompt))
    total = token * (prompt + output - 1) + attention + output * spec.head_flops_per_token
    assert sum(float(part[0]) for part in useful_flops(columns, spec)) == pytest.approx(total, rel=1e-12)


def test_mfu_is_useful_flops_over_the_peak() -> None:
    result = one_request()
    done = sum(float(flops.sum()) for flops in useful_flops(result.columns, ONE_GPU.model))
    peak = A100.flops_for(ONE_GPU.model.dtype)
    assert mfu(result, ONE_GPU) == pytest.approx(done / (peak * result.makespan_s))
    bigger = problem(cluster(gpus=4))
    assert mfu(result, bigger) == pytest.approx(done / (4 * peak * result.makespan_s))


def test_a_split_request_counts_for_both_replicas() -> None:
    where = problem(cluster(gpus=1, nodes=2))
    result = run(system(router=lambda: Way("p", "d")), [request(0, 0.0, 100, 11)], where, plan=SPLIT)
    prefill, decode = useful_flops(result.columns, where.model)
    able = A100.flops_for(where.model.dtype) * result.makespan_s
    shares = mfu_by_replica(result, where)
    assert shares == {"p": pytest.approx(prefill[0] / able), "d": pytest.approx(decode[0] / able)}


def test_rejected_requests_and_recomputation_are_no_use() -> None:
    result = one_request()
    useful = [part.sum() for part in useful_flops(result.columns, ONE_GPU.model)]
    refused = dict(result.columns, outcome=np.array(["rejected"], dtype=object))
    assert all(useful)
    assert [part.sum() for part in useful_flops(refused, ONE_GPU.model)] == [0, 0]


def test_a_lone_batch_in_a_pipeline_of_two_leaves_half_as_bubbles() -> None:
    even = ToyCost(per_token_ps=0, per_context_ps=0, per_pair_ps=0)
    free = problem(Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 2}]), even)
    result = run(system(), [request(0, 0.0, 100, 11)], free, plan=PIPELINE)
    (row,) = result.rows.replicas
    share = bubble_share(result, row)
    assert share is not None
    assert share == pytest.approx(0.5, abs=0.01)  # and the hop between the stages
    full = run(system(), [request(n, 0.005 * n, 100, 50) for n in range(2)], free, plan=PIPELINE)
    fuller = bubble_share(full, full.rows.replicas[0])
    assert fuller is not None
    assert 0 <= fuller < 0.1  # two micro-batches keep both stages busy


def test_no_pipeline_no_bubbles() -> None:
    result = one_request()
    row: ReplicaRow = result.rows.replicas[0]
    assert bubble_share(result, row) is None
    assert bubble_share(result, row._replace(pp=2, replica="never ran")) is None


@pytest.mark.parametrize("name", ["vllm", "sarathi-serve"])
def test_figures_are_the_same_step_by_step(name: str) -> None:
    requests = [request(n, 0.004 * n, 150, 12) for n in range(20)]
    where = problem(cluster(gpus=2))
    collapsed, stepped = (
        summarise(run(SYSTEMS[name](replicas=1, tp=1, pp=2) if name == "vllm" else SYSTEMS[name](replicas=2, tp=1),
                      requests, where, step_by_step=step), problem=where)
        for step in (False, True)
    )  # fmt: skip
    for key in ("joules", "mfu"):
        assert collapsed[key] == pytest.approx(stepped[key], rel=1e-12)
    for a, b in zip(collapsed["replicas"], stepped["replicas"], strict=True):
        assert a["joules"] == pytest.approx(b["joules"], rel=1e-12)
        assert a["bubble_share"] == (None if b["bubble_share"] is None else pytest.approx(b["bubble_share"]))


def test_work_after_the_last_completion_is_not_in_the_makespan() -> None:
    result = one_request()
    row = result.rows.replicas[0]
    result.rows.replicas[:] = [row._replace(stage_busy_s=(10 * result.makespan_s,))]
    assert A100.tdp_w is not None
    assert energy(result, ONE_GPU)["joules"] == pytest.approx(A100.tdp_w * result.makespan_s)
