"""The profiles, instances, traces and printed figures of SpotServe's evaluation (ASPLOS 2024), for its study.

Source: the paper's artifact (Hsword/SpotServe, Apache-2.0, (c) 2024 Xupeng Miao): profiles of g4dn.12xlarge, traces of
availability, scripts and the figures in its plotting code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sim import SYSTEMS, Cluster, Problem, Request, Result, System, Workload, simulate
from sim.model import ModelSpec, model
from sim.planners.spotserve import LayerProfile
from sim.predictors import TrueLength
from traces import TraceSource
from traces.cluster.availability import Availability, availability

INPUT_TOKENS, OUTPUT_TOKENS = 512, 128
GPUS, NIC_GBPS = 4, 50
SPOT_USD, ON_DEMAND_USD = 1.9046, 3.912
"""Of an instance and hour."""
BOOT_S = 120.0
MAX_BATCH = 4
RATES = {"OPT-6.7B": 1.5, "GPT-20B": 0.35, "LLaMA-30B": 0.2}
NEEDS = {"OPT-6.7B": 2.0, "GPT-20B": 0.4, "LLaMA-30B": 0.2}
"""Requests/s that come, and that a configuration must serve."""
LEAST_GPUS = {"OPT-6.7B": 4, "GPT-20B": 12, "LLaMA-30B": 16}
MAX_TP = {"OPT-6.7B": 16, "GPT-20B": 8, "LLaMA-30B": 8}
DISK_BYTES_PER_S = 1e9
"""Of an instance, ours: the artifact restarts from local disks and does not say how fast they are."""

Row = tuple[float, ...]


def _profile(
    name: str, layers: int, padded: int, hops_ms: tuple[float, float], ends_ms: Row, table: dict[int, tuple[Row, Row]]
) -> LayerProfile:
    """Of a layer: milliseconds of batches of 1, 2, 4 and 8 prompts, and of steps, by tensor-parallel degree."""
    batches = (1, 2, 4, 8)
    data: dict[str, Any] = {
        "layer_num": layers, "padded_layer_num": padded, "final_fix_factor": 1.1,
        "pp_init_comm_ms": hops_ms[0], "pp_incr_comm_ms": hops_ms[1],
        "embed_ms": dict(zip(batches, ends_ms, strict=True)),
        "per_layer_ms": {
            tp: {b: {"init": p, "incr": s} for b, p, s in zip(batches, prompts, steps, strict=True)}
            for tp, (prompts, steps) in table.items()
        },
    }  # fmt: skip
    return LayerProfile.of(name, data)


PROFILES = {
    "OPT-6.7B": _profile(
        "OPT-6.7B", 32, 36, (5.3, 0.07), (0.298, 0.372, 0.461, 0.719),
        {
            1: ((44.087, 97.182, 191.815, 404.76), (3.224, 3.31, 3.632, 4.435)),
            2: ((26.411, 50.779, 105.607, 218.979), (1.841, 1.701, 1.898, 2.26)),
            4: ((19.567, 31.043, 61.566, 124.341), (1.056, 0.932, 1.021, 1.314)),
            8: ((17.733, 26.569, 44.562, 85.833), (1.278, 1.05, 1.309, 1.442)),
            16: ((14.31, 24.214, 35.517, 69.537), (1.437, 1.568, 1.695, 1.867)),
        },
    ),
    "GPT-20B": _profile(
        "GPT-20B", 44, 48, (7.0, 0.1), (0.318, 0.471, 0.607, 1.079),
        {
            1: ((107.203, 224.025, 454.014, 912.695), (7.144, 7.259, 7.949, 9.919)),
            2: ((54.478, 115.698, 244.748, 509.399), (3.808, 3.759, 4.076, 4.702)),
            4: ((37.562, 64.61, 132.855, 275.512), (1.968, 1.938, 2.13, 2.484)),
            8: ((32.2, 42.778, 80.624, 165.775), (1.758, 1.764, 1.932, 2.149)),
            16: ((22.921, 38.432, 61.086, 118.336), (1.893, 1.758, 2.163, 2.444)),
        },
    ),
    "LLaMA-30B": _profile(
        "LLaMA-30B", 48, 48, (8.0, 0.15), (0.404, 0.519, 0.797, 1.448),
        {
            1: ((160.742, 347.878, 823.624, 1326.51), (9.541, 10.286, 10.838, 11.402)),
            2: ((84.197, 173.763, 362.301, 798.263), (4.98, 5.235, 5.657, 5.91)),
            4: ((66.079, 93.799, 191.445, 422.916), (2.618, 2.632, 2.837, 3.172)),
            8: ((41.947, 67.061, 109.761, 232.918), (2.263, 2.493, 2.418, 2.618)),
        },
    ),
}  # fmt: skip
_SHAPES = {"OPT-6.7B": (32, 4096, 32), "GPT-20B": (44, 6144, 64), "LLaMA-30B": (48, 7168, 56)}
"""Layers, width, heads."""
_TRACES: dict[str, Sequence[tuple[float, str, tuple[int, ...]]]] = {
    "A_S": (
        (0, "add", (0, 1, 2, 3, 4, 5, 6)),
        (240, "add", (7,)),
        (360, "add", (8, 9)),
        (600, "remove", (8,)),
        (900, "add", (10,)),
        (1200, "remove", (3, 10)),
        (1320, "end", ()),
    ),
    "B_S": (
        (0, "add", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        (120, "remove", (4, 8)),
        (240, "remove", (0,)),
        (720, "add", (10,)),
        (960, "add", (11,)),
        (1020, "end", ()),
    ),
    "A_S+O": (
        (0, "add", (0, 1, 2, 3, 4, 5, 6)),
        (120, "add", (7, 8, 9)),
        (600, "remove", (8,)),
        (690, "add", (10,)),
        (1200, "remove", (0, 7)),
        (1290, "add", (11, 12)),
        (1380, "end", ()),
    ),
    "B_S+O": (
        (0, "add", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        (120, "remove", (4, 8)),
        (210, "add", (10, 11)),
        (240, "remove", (0,)),
        (330, "add", (12,)),
        (720, "end", ()),
    ),
    "trace_0203_real": (
        (0, "add", (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        (120, "remove", (4,)),
        (180, "remove", (1, 5)),
        (480, "add", (9,)),
        (540, "add", (10,)),
        (600, "add", (11,)),
        (660, "add", (12,)),
        (720, "end", ()),
    ),
}


def _availability(name: str) -> Availability:
    return availability([{"t_s": at_s, "op": op, "nodes": nodes} for at_s, op, nodes in _TRACES[name]], name)


TRACES = {name: _availability(name) for name in _TRACES}
USD = {"A_S": 6.443896666666667, "B_S": 4.348836666666666, "A_S+O": 8.4265, "B_S+O": 4.615586666666667}
"""What the artifact counts for each trace; its minutes: 203, 137, 210 and 27 on demand, 92 and 26 on demand."""
ON_DEMAND = {"A_S+O": (10, 11, 12), "B_S+O": (10, 11, 12)}
"""Our guess: the machines that come after a loss."""
ORDER = ("reparallelization", "rerouting", "spotserve")
MEAN_S = {
    "A_S": (32.045, 26.333, 23.518), "B_S": (27.068, 47.57, 23.315),
    "A_S+O": (32.663, 30.373, 23.416), "B_S+O": (31.915, 24.58, 20.724),
}  # fmt: skip
P99_S = {
    "A_S": (61.287, 51.008, 46.108), "B_S": (56.284, 99.115, 37.083),
    "A_S+O": (65.816, 50.732, 49.005), "B_S+O": (73.257, 43.239, 33.388),
}  # fmt: skip
ON_DEMAND_ONLY = {3: (141.482, 253.343), 4: (98.037, 175.346), 6: (29.146, 43.47), 8: (24.623, 34.45)}
"""Instances: mean and P99 seconds; the artifact's plot subtracts 4.5 and 9 s before it draws them."""
LATENCY_S = {
    "OPT-6.7B": (1, 4, 5.447), "GPT-20B": (3, 4, 14.373), "LLaMA-30B": (2, 8, 17.54),
}  # fmt: skip
"""Table 1: stages, tensor-parallel degree, seconds of a batch of one."""


def spec(name: str) -> ModelSpec:
    """Weights and KV of four bytes, as the artifact counts (12 x hidden² x 4 a layer)."""
    layers, width, heads = _SHAPES[name]
    return replace(
        model("opt-13b"), name=name.lower(), num_layers=layers, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, dtype="float32",
    )  # fmt: skip


def cluster(instances: int) -> Cluster:
    row = {"gpu": "T4", "count": GPUS, "nodes": instances}
    prices = {"usd_per_hour": ON_DEMAND_USD / GPUS, "usd_per_hour_spot": SPOT_USD / GPUS}
    return Cluster.of(nodes=[row | prices], links={"inter_node": {"gbps": NIC_GBPS}})


def problem(name: str, instances: int, rate_per_s: float | None = None) -> Problem:
    workload = Workload(rate_per_s=rate_per_s or RATES[name], lengths=((INPUT_TOKENS, OUTPUT_TOKENS),))
    return Problem(cluster=cluster(instances), model=spec(name), cost=PROFILES[name], workload=workload)


def system(name: str, instances: int, **options: Any) -> System:
    given: dict[str, Any] = {
        "need_per_s": NEEDS[name], "instances": instances, "max_tp": MAX_TP[name], "max_batch": MAX_BATCH,
        "least_gpus": LEAST_GPUS[name], "disk_bytes_per_s": DISK_BYTES_PER_S,
    }  # fmt: skip
    return SYSTEMS["spotserve"](**given | options)


def arrivals(rate_per_s: float, until_s: float, scale_ms: float = 6.0, seed: int = 0) -> list[Request]:
    """As the artifact draws them: gaps of a gamma distribution whose ``scale_ms`` it takes for the coefficient of
    variation (which is the root of ``scale_ms`` times the rate in 1/ms: 0.046 at 0.35 requests/s)."""
    mean_ms = 1000 / rate_per_s
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.gamma(mean_ms / scale_ms, scale_ms, round(until_s * rate_per_s * 1.5) + 20)) / 1000
    return [
        Request(id=number, arrival_s=float(at_s), input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
        for number, at_s in enumerate(times[times < until_s])
    ]


def bursty(rate_per_s: float, until_s: float, cv: float, seed: int = 0) -> list[Request]:
    """With the coefficient of variation that the paper states."""
    return arrivals(rate_per_s, until_s, cv**2 * 1000 / rate_per_s, seed)


def served(where: Problem, what: System, requests: Sequence[Request], trace: Availability | None = None) -> Result:
    events = () if trace is None else trace.events(where.cluster)
    return simulate(where, what, TraceSource(requests), events=events, predictor=TrueLength())
