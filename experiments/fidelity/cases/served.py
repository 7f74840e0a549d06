"""TensorRT-LLM 1.0, Llama-3.1-8B on one to eight H100: a closed loop of 8 to 128 clients, from kernels of vLLM.

The file gives means, not the number of requests: each of its 177 points is simulated for ``ROUNDS`` requests a client,
and the mean is over those while all clients are at work. Answers are all of one length; were all clients to start at
once, their prompts would come in waves for ever, and no decode would see anyone else's. So the first answers are cut to
spread the clients evenly, as they are in the long run of any benchmark. The engine differs from the one whose kernels
are used; nothing is fitted.
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
from sim.systems.schedulers.vllm import vllm

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
            f"{ROUNDS} requests a client, the first cut so that clients are spread evenly, means over the others but "
            "the last; 8,192 tokens a step; ASYNCHRONOUS overhead (TensorRT-LLM overlaps scheduling)",
            "were all clients to start at once, equal answers would keep them in step for ever, prompts would "
            "interrupt hardly any decodes, and TPOT would be 15 % low in the median",
            "TTFT is shown but has no bar: the measured one has about one E2E over the number of clients more than a "
            "prompt takes, as if one request more than the engine has places were always there",
            "what is left grows with TP (median error: 1 % low at TP1, 16 % at TP8). A floor of 20 ms under steps with "
            "prompts, whose kernels the processor launches one by one, would leave 5.5 %; no table has it, so it is "
            "not applied. From 128 clients on TP4 and TP8 all serve some 9,000 tokens/s: the server, not the GPUs",
        ),
    )


def simulate_point(clients: int, input_tokens: int, output_tokens: int, tp: int) -> Result:
    """Every client sends its next request when its last one is answered; the first answers differ in length."""
    total = clients * ROUNDS

    def request(number: int, at_s: float) -> Request:
        tokens = output_tokens if number >= clients else -(-output_tokens * (number + 1) // clients)
        return Request(id=number, arrival_s=at_s, input_tokens=input_tokens, output_tokens=tokens)

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
    requests = requests[requests.request.between(clients, clients * (ROUNDS - 1), inclusive="left")]
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
