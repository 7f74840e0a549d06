"""TensorRT-LLM 1.0, Llama-3.1-8B on one to eight H100: a closed loop of 8 to 128 clients, from kernels of vLLM.

The file gives means, not the number of requests: each of its 177 points is simulated for ``ROUNDS`` requests a client.
The engine differs from the one whose kernels are used; nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from experiments.fidelity.constants import ASYNCHRONOUS
from experiments.fidelity.setup import Following, busy, run, shipped
from experiments.fidelity.table import Bar, Row, Study, judged, median_bar
from sim import Limits, Request, Result
from sim.cluster import Cluster
from sim.systems.vllm import vllm

STUDY = "aiconfigurator-served"
FILE = "aiconfigurator/served_llama-3.1-8b_h100_trtllm.csv"
ROUNDS = 4
LIMITS = Limits(max_num_batched_tokens=8192, max_num_seqs=256)
"""TensorRT-LLM's default max_num_tokens; the points ask for at most 128 sequences."""


def study(measured: Path) -> Study:
    """``measured``: the folder of real runs."""
    points = pd.read_csv(measured / FILE)
    rows = tuple(row for point in points.to_dict("records") for row in _rows(point))
    return Study(
        title="TensorRT-LLM 1.0, Llama-3.1-8B, H100 at TP 1 to 8, closed loop, from kernels of vLLM 0.19",
        rows=rows,
        bars=(median_bar(STUDY, judged(rows, "TPOT"), 0.15, 0.08), _rank(judged(rows, "TPOT"))),
        notes=(
            f"{ROUNDS} requests a client, the first ones at once; 8,192 tokens a step; ASYNCHRONOUS overhead "
            "(TensorRT-LLM overlaps scheduling); TTFT is shown but has no bar: it depends on the number of requests",
        ),
    )


def simulate_point(clients: int, input_tokens: int, output_tokens: int, tp: int) -> Result:
    """Every client sends its next request when its last one is answered."""
    total = clients * ROUNDS

    def request(number: int, at_s: float) -> Request:
        return Request(id=number, arrival_s=at_s, input_tokens=input_tokens, output_tokens=output_tokens)

    def after(now_s: float, finished: Request) -> Iterable[Request]:
        number = finished.id + clients
        return (request(number, now_s),) if number < total else ()

    first = [request(number, 0.0) for number in range(clients)]
    cluster = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": tp}])
    system = vllm(replicas=1, tp=tp)
    return run(cluster, system, Following(first, after), [shipped("vllm-0.19-h100-sxm")], LIMITS, ASYNCHRONOUS)


def _rows(point: Mapping[Hashable, Any]) -> Iterator[Row]:
    clients, tp, isl, osl = (int(point[name]) for name in ("batch_size", "tp_size", "isl", "osl"))
    result = simulate_point(clients, isl, osl, tp)
    requests = result.requests
    for metric, column in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
        yield Row(
            study=STUDY,
            case=f"TP{tp}, {isl} -> {osl} tokens, {clients} clients",
            metric=metric,
            unit="ms",
            measured=float(point[f"silicon_{metric.lower()}_ms"]),
            predicted=float(requests[column].mean()) * 1e3,
            load=busy(result),
        )


def _rank(rows: list[Row]) -> Bar:
    value = float(spearmanr([row.measured for row in rows], [row.predicted for row in rows]).statistic)
    return Bar(
        study=STUDY, name="TPOT, rank correlation", value=value, must=0.95, aim=0.98, points=len(rows), floor=True
    )


def by_degree(rows: Iterable[Row]) -> dict[str, float]:
    """Median TPOT error by tensor-parallel degree."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.metric == "TPOT":
            found.setdefault(row.case.partition(",")[0], []).append(abs(row.error))
    return {degree: float(np.median(values)) for degree, values in found.items()}
