"""How fast the planners are: seconds of a plan and of a lightweight re-plan, and evaluations per second.

``python -m experiments.benchmarks.bench_plan`` plans LLaMA-30B on 32 mixed GPUs of four types and with ``--large`` on
128; ``--quality`` says how good plans are (``quality.py``). Times are of one run on whatever else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from experiments.benchmarks.quality import report
from sim import Cluster, Problem, Slo, Workload
from sim.cost import Roofline
from sim.model import model
from sim.planners.hexgen2 import HexGen2
from sim.planners.thunderserve import Search, TabuSearch

MACHINES = (("A6000", 4, 2), ("A5000", 4, 2), ("A40", 8, 1), ("RTX-3090-Ti", 4, 2))
"""(GPU, a machine, machines): 32 GPUs, a mix of four types as on a marketplace."""
RATE_PER_S = 8.0
"""Of 32 GPUs."""


def mixed(times: int = 1, seed: int = 0) -> Problem:
    """So many times 32 GPUs, and as many times the rate; prompts around 600 tokens, answers around 100."""
    rng = np.random.default_rng(seed)
    inputs = np.clip(rng.lognormal(6.3, 0.7, 1000), 16, 1700).astype(int)
    outputs = np.clip(rng.lognormal(4.5, 0.8, 1000), 2, 300).astype(int)
    return Problem(
        cluster=Cluster.of(
            [{"gpu": gpu, "count": count, "nodes": nodes * times} for gpu, count, nodes in MACHINES],
            links={"inter_node": {"gbps": 10, "latency_us": 50}},
        ),
        model=model("llama-30b"),
        cost=Roofline(),
        workload=Workload(
            rate_per_s=RATE_PER_S * times, lengths=tuple(zip(inputs.tolist(), outputs.tolist(), strict=True))
        ),
        slo=Slo(ttft_s=2.0, tpot_s=0.15, e2e_s=30.0),
        seed=seed,
    )


def measured(what: str, search: Callable[[], Search]) -> Search:
    """Run it and print its line."""
    cpu_s = time.process_time()
    found = search()
    cpu_s = time.process_time() - cpu_s
    best, plans = found.best, len(found.log)
    print(
        f"{what:<34} {found.elapsed_s:7.2f} s, of the processor {cpu_s:7.2f} s: {plans} plans, "
        f"{found.evaluations_per_s:.1f} a second, {plans / cpu_s:.1f} a processor second; attainment "
        f"{best.attainment:.3f}, {len(best.plan.replicas)} replicas, {best.bottleneck}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--large", action="store_true", help="also 128 GPUs (minutes)")
    parser.add_argument("--steps", type=int, default=100, help="tabu steps of a full search (default 100)")
    parser.add_argument(
        "--quality", action="store_true", help="goodput of plans beside bounds and simple layouts (minutes)"
    )
    parser.add_argument("--only", action="append", default=[], help="with --quality: cases with this in their names")
    options = parser.parse_args()
    if options.quality:
        report(options.only)
        return
    tabu = TabuSearch(n_steps=options.steps)
    for times in (1, 4) if options.large else (1,):
        where = mixed(times)
        gpus = len(where.cluster.gpu_ids)
        full = measured(f"thunderserve, {gpus} GPUs", partial(tabu.search, where))
        plan = full.best.plan
        lost = plan.replicas[-1].gpus[:4]
        measured(f"  flips only, {len(lost)} GPUs lost", partial(tabu.replan, where, plan, lost=lost))
        measured(f"hexgen-2, {gpus} GPUs", partial(HexGen2().search, where))


if __name__ == "__main__":
    main()
