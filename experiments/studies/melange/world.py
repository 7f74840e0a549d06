"""The GPUs, prices, traffic and printed tables of Melange's evaluation (arXiv 2404.14527, section 6), for its study."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from sim import Cluster, Limits, Problem, Slo, Workload
from sim.cost import Roofline
from sim.model import model
from sim.planners.melange import INPUT_EDGES, OUTPUT_EDGES, Bucket, ClosedForm, Offer
from sim.types import Replica, Stage
from traces import Lengths, Lognormal, generate

GPUS = {"L4": "L4", "A10G": "A10G", "A100": "A100-80G-PCIe", "H100": "H100-SXM"}
"""By the paper's names; those of table 1 by their memory bandwidth."""
PRICES = {"L4": 0.7, "A10G": 1.01, "A100": 3.67, "H100": 7.516}
"""$/h (table 1; the H100 from 4.69 scaled by 3.67 over 2.29)."""
CONTEXT_TOKENS = 32768
"""Llama-2-7B's own 4,096 would end the figures' axes."""
SAMPLE = 4000
TODAY_S, OF_2023_S = 0.002, 0.02
"""What the engine adds to a step: the roofline's default, and the least of engines of 2023 (``sim.cost.Roofline``)."""
ARENA = (Lognormal(mean_tokens=69.5, median_tokens=30, max_tokens=8000),
         Lognormal(mean_tokens=214.5, median_tokens=140, max_tokens=2000))  # fmt: skip
"""Means of LMSYS-Chat-1M (arXiv 2309.11998, table 1); medians are our guess."""
PUBMED = (Lognormal(mean_tokens=4000, median_tokens=3400, max_tokens=15900),
          Lognormal(mean_tokens=270, median_tokens=255, max_tokens=1000))  # fmt: skip
"""Articles of 3,016 and abstracts of 203 words in the mean (arXiv 1804.05685, table 1) at 4/3 tokens a word; medians
are our guess."""
DATASETS = ("arena", "pubmed", "mixed")


class Allocation(NamedTuple):
    """A row of tables 3 to 8. Order of GPUs: L4, A10G, A100, H100; None: cannot serve."""

    rate_per_s: float
    mix: tuple[int, ...]
    usd_per_hour: float
    alone: tuple[int | None, ...]
    saved_percent: tuple[float | None, ...]


ALLOCATIONS = {
    ("arena", 120): (
        Allocation(1, (1, 1, 0, 0), 1.71, (3, 2, 1, 1), (18.57, 15.35, 53.41, 77.25)),
        Allocation(2, (2, 1, 0, 0), 2.41, (5, 3, 1, 1), (31.14, 20.46, 34.33, 67.94)),
        Allocation(4, (1, 0, 1, 0), 4.37, (9, 6, 2, 1), (30.63, 27.89, 40.46, 41.86)),
        Allocation(8, (1, 3, 1, 0), 7.4, (17, 11, 3, 2), (37.82, 33.39, 32.79, 50.77)),
        Allocation(16, (2, 2, 3, 0), 14.43, (33, 20, 6, 4), (37.53, 28.56, 34.47, 52.0)),
        Allocation(32, (2, 6, 5, 0), 25.81, (65, 39, 9, 8), (43.27, 34.48, 21.86, 57.07)),
    ),
    ("arena", 40): (
        Allocation(1, (2, 1, 0, 0), 2.41, (5, 3, 1, 1), (31.14, 20.46, 34.33, 67.94)),
        Allocation(2, (0, 0, 1, 0), 3.67, (9, 5, 1, 1), (41.75, 27.33, 0.0, 51.17)),
        Allocation(4, (1, 1, 1, 0), 5.38, (17, 10, 2, 1), (54.79, 46.73, 26.7, 28.42)),
        Allocation(8, (1, 1, 2, 0), 9.05, (34, 16, 3, 2), (61.97, 44.0, 17.8, 39.8)),
        Allocation(16, (0, 6, 3, 0), 17.07, (68, 40, 6, 4), (64.14, 57.75, 22.48, 43.22)),
        Allocation(32, (0, 8, 6, 0), 30.1, (135, 80, 9, 7), (68.15, 62.75, 8.87, 42.79)),
    ),
    ("pubmed", 120): (
        Allocation(1, (0, 0, 1, 1), 11.186, (None, None, 4, 2), (None, None, 23.8, 25.59)),
        Allocation(2, (0, 3, 1, 2), 21.732, (None, None, 7, 4), (None, None, 15.41, 27.71)),
        Allocation(4, (0, 3, 4, 3), 40.258, (None, None, 14, 8), (None, None, 21.65, 33.05)),
        Allocation(8, (0, 0, 7, 7), 78.302, (None, None, 27, 14), (None, None, 20.98, 25.59)),
        Allocation(16, (0, 0, 12, 15), 156.78, (None, None, 53, 28), (None, None, 19.4, 25.5)),
        Allocation(32, (1, 1, 20, 32), 315.622, (None, None, 106, 55), (None, None, 18.87, 23.65)),
    ),
    ("pubmed", 40): (
        Allocation(1, (0, 0, 4, 0), 14.68, (None, None, 4, 2), (None, None, 0.0, 2.34)),
        Allocation(2, (0, 0, 1, 3), 26.218, (None, None, 9, 4), (None, None, 20.62, 12.79)),
        Allocation(4, (0, 0, 3, 5), 48.59, (None, None, 17, 7), (None, None, 22.12, 7.64)),
        Allocation(8, (0, 0, 3, 12), 101.202, (None, None, 34, 14), (None, None, 18.9, 3.82)),
        Allocation(16, (0, 0, 11, 21), 198.206, (None, None, 67, 28), (None, None, 19.39, 5.82)),
        Allocation(32, (0, 0, 24, 40), 388.72, (None, None, 133, 56), (None, None, 20.36, 7.64)),
    ),
    ("mixed", 120): (
        Allocation(1, (0, 0, 1, 0), 3.67, (None, None, 1, 1), (None, None, 0.0, 51.17)),
        Allocation(2, (1, 0, 1, 0), 4.37, (None, None, 2, 1), (None, None, 40.46, 41.86)),
        Allocation(4, (0, 2, 0, 1), 9.536, (None, None, 3, 2), (None, None, 13.39, 36.56)),
        Allocation(8, (1, 2, 1, 1), 13.906, (None, None, 5, 3), (None, None, 24.22, 38.33)),
        Allocation(16, (1, 2, 3, 2), 28.762, (None, None, 10, 6), (None, None, 21.63, 36.22)),
        Allocation(32, (1, 5, 6, 4), 57.834, (None, None, 20, 12), (None, None, 21.21, 35.88)),
    ),
    ("mixed", 40): (
        Allocation(1, (0, 0, 1, 0), 3.67, (None, None, 1, 1), (None, None, 0.0, 51.17)),
        Allocation(2, (1, 1, 1, 0), 5.38, (None, None, 2, 1), (None, None, 26.7, 28.42)),
        Allocation(4, (0, 3, 0, 1), 10.546, (None, None, 3, 2), (None, None, 4.21, 29.84)),
        Allocation(8, (1, 3, 2, 1), 18.586, (None, None, 6, 4), (None, None, 15.59, 38.18)),
        Allocation(16, (2, 7, 2, 3), 38.358, (None, None, 12, 7), (None, None, 12.9, 27.09)),
        Allocation(32, (0, 15, 6, 5), 74.75, (None, None, 24, 13), (None, None, 15.13, 23.5)),
    ),
}
WINNERS = {
    25: "L4 9,A10G 12,A10G 19,A10G 17,A10G 13,A10G 11,A100 32,A100 7,H100 13,H100 23",
    100: "A10G 12,A10G 19,A10G 15,A10G 1,A100 1,A100 4,A100 21,H100 24,H100 29,H100 39",
    250: "A10G 20,A10G 11,A10G 2,A10G 1,A100 8,A100 13,A100 6,H100 34,H100 37,H100 34",
    500: "A10G 12,A10G 2,A10G 1,A100 4,A100 17,A100 17,A100 6,H100 28,H100 54,H100 99",
    1000: "A100 6,A100 10,A100 11,A100 11,A100 18,A100 20,A100 7,H100 35,H100 90,H100 99",
    2000: "A100 8,A100 10,A100 13,A100 17,A100 18,A100 38,H100 1,H100 46,H100 86,H100 99",
}
BY_SIZE = {
    25: (72, 52, 20, 17, 13, 11),
    100: (52, 25, 15, 1, -1, -4),
    250: (28, 11, 2, 1, -8, -13),
    500: (12, 2, 1, -4, -17, -21),
    1000: (-6, -10, -11, -11, -18, -20),
    2000: (-8, -10, -13, -17, -18, -38),
}
BOUNDS_MS = (40, 60, 80, 100, 120, 140, 160)
BY_BOUND = {
    25: (-119, -11, 5, 27, 32, 44, 42),
    64: (-97, -11, 6, 21, 38, 46, 41),
    100: (-99, -8, 14, 20, 20, 19, 19),
    250: (-91, -22, -26, -24, -24, -24, -24),
    500: (-109, -60, -61, -61, -61, -61, -61),
}


def lengths(dataset: str) -> tuple[tuple[int, int], ...]:
    """Prompts and answers of ``SAMPLE`` requests; mixed: four fifths of the one, one fifth of the other."""
    if dataset == "mixed":
        part = SAMPLE // 5
        both = np.random.default_rng(0).permutation([*lengths("arena")[: SAMPLE - part], *lengths("pubmed")[:part]])
        return tuple((int(one), int(other)) for one, other in both)
    pair: tuple[Lengths, Lengths] = ARENA if dataset == "arena" else PUBMED
    drawn = generate(SAMPLE, 1.0, input=pair[0], output=pair[1], seed=0)
    return tuple((one.input_tokens, one.output_tokens) for one in drawn)


def problem(
    bound_s: float | None, workload: Workload, counts: dict[str, int] | None = None, step_s: float = TODAY_S
) -> Problem:
    """Llama-2-7B on so many GPUs of each type, each a machine of its own; the engine adds ``step_s`` to each step."""
    numbers = counts or dict.fromkeys(GPUS, 1)
    nodes = [
        {"gpu": GPUS[name], "count": 1, "nodes": number, "name": name.lower(), "usd_per_hour": PRICES[name]}
        for name, number in numbers.items()
        if number
    ]
    spec = model("llama-2-7b")
    return Problem(
        cluster=Cluster.of(nodes=nodes, links={"inter_node": {"gbps": 10}}),
        model=replace(spec, max_position_embeddings=CONTEXT_TOKENS),
        cost=Roofline(overhead_s=step_s),
        workload=workload,
        slo=Slo(tpot_s=bound_s),
        limits=Limits(),
    )


@cache
def profile(gpu: str, bound_s: float, step_s: float) -> ClosedForm:
    """Of one GPU by the paper's name."""
    where = problem(bound_s, Workload(rate_per_s=1.0, lengths=((100, 100),)), {gpu: 1}, step_s)
    stage = Stage(name="s", gpus=where.cluster.gpu_ids, first_layer=0, end_layer=where.model.num_layers)
    return ClosedForm(where, Replica(name="r", stages=(stage,)))


@cache
def rate(gpu: str, bucket: Bucket, bound_s: float, step_s: float = TODAY_S) -> float:
    """Requests/s within the SLO."""
    return profile(gpu, bound_s, step_s)(bucket)


def tokens_per_usd(gpu: str, bucket: Bucket, bound_s: float, step_s: float = TODAY_S) -> float:
    """Input and output tokens for a dollar at saturation within the SLO."""
    return rate(gpu, bucket, bound_s, step_s) * sum(bucket) * 3600 / PRICES[gpu]


def offers(buckets: Iterable[Bucket], bound_s: float, step_s: float = TODAY_S) -> list[Offer]:
    """Any number of each GPU."""
    sizes = list(buckets)
    return [
        Offer(name=name, usd_per_hour=PRICES[name], max_rates={one: rate(name, one, bound_s, step_s) for one in sizes})
        for name in GPUS
    ]


def all_buckets() -> list[Bucket]:
    return [Bucket(prompt, answer) for prompt in INPUT_EDGES for answer in OUTPUT_EDGES]
