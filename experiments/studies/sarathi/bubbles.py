"""SARATHI's figure 12: GPT-3 on 64 A100s, pipelines of 8 stages against 8 replicas; simulated by its authors too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, row
from sim import SYSTEMS, Cluster, Problem, Request, Result, Workload, simulate
from sim.batchers import DecodeMaximal
from sim.batchers.common import longest
from sim.cost import Roofline, StepCost
from sim.model import model
from sim.policy import Batch
from traces import TraceSource

LONGEST_TOKENS = 4096
PIPELINE_SLOTS, REPLICA_SLOTS = 8 * 27, 11
"""Requests at once. Printed: 27 and 11; with a tenth of 80 GB kept free, KV of 4096 tokens and 8 micro-batches in
flight, (72 GB - 5.5 GB) / 302 MB / 8 = 27 a micro-batch, and (72 GB - 43.8 GB) / 2.42 GB = 11 with TP8 alone."""


class Reading(NamedTuple):
    """How far apart lengths are, and whether Orca takes several prompts into a batch."""

    name: str
    step: int
    any_prompts: bool


READINGS = (
    Reading("whole K, any prompts", 1024, True),
    Reading("whole K, one prompt", 1024, False),
    Reading("all lengths, any prompts", 1, True),
    Reading("all lengths, one prompt", 1, False),
)
"""Section 4.5 of the paper lets its Orca take any number of prompts in; section 5.2 calls one at a time Orca's best
case, and section 5.3 says that the best case was run. Of the lengths it says Zipf, exponent 0.4, 1K to 4K."""


class AnyPrompts(DecodeMaximal):
    """Orca on micro-batches: its decodes, and whole prompts in all slots that are free."""

    def fill(self, batch: Batch) -> None:
        whole = self._slots(batch.total_blocks, batch.limits)
        size = max(1, whole // self.micro_batches)
        decodes = batch.num_decodes
        if decodes:
            batch.decode(leave_out=batch.decoding[size:] if decodes > size else ())
        free = min(size - decodes, whole - batch.num_running)
        for request in islice(batch.waiting, max(0, free)):
            if not batch.admit(request, batch.tokens_wanted(request), reserve_tokens=longest(batch.limits)):
                break


def bubbles(count: int, log: Log) -> Iterator[Comparison]:
    """Four ratios in four readings of the setting."""
    for reading in READINGS:
        runs = Runs(list(zipf_requests(count, reading.step)), reading.any_prompts)
        idle = (
            f"stages idle {100 * idle_share(runs.orca):.0f} % (Orca), {100 * idle_share(runs.sarathi):.0f} % (SARATHI)"
        )
        log.say(f"GPT-3, {reading.name}: {idle}")
        printed = (
            ("bubble, Orca over SARATHI", 6.29, idle),
            ("SARATHI over Orca", 1.91, ""),
            ("SARATHI over TP8 x 8", 1.48, ""),
            ("TP8 x 8 over Orca", 1.28, ""),
        )
        for (what, theirs, note), ours in zip(printed, runs.ratios(), strict=True):
            yield row("SARATHI Fig. 12", f"GPT-3 ({reading.name}), {what}", theirs, ours, "x", note=note)


class Runs:
    """The three deployments on the same requests."""

    def __init__(self, requests: list[Request], any_prompts: bool, cost: StepCost | None = None) -> None:
        cost = cost or Roofline()
        self.sarathi = gpt3(requests, 8, 1, PIPELINE_SLOTS, cost)
        self.orca = gpt3(requests, 8, 1, PIPELINE_SLOTS, cost, whole_prompts=True, any_prompts=any_prompts)
        self.replicas = gpt3(requests, 1, 8, REPLICA_SLOTS, cost, whole_prompts=True, any_prompts=any_prompts)

    def ratios(self) -> tuple[float, float, float, float]:
        """Bubbles, then times: as the figure's four are printed."""
        sarathi_s, orca_s, replicas_s = (run.makespan_s for run in (self.sarathi, self.orca, self.replicas))
        bubbles = bubble_s(self.orca) / bubble_s(self.sarathi)
        return bubbles, orca_s / sarathi_s, replicas_s / sarathi_s, orca_s / replicas_s


def zipf_requests(count: int, step: int = 1, seed: int = 0) -> Iterator[Request]:
    """1K to 4K tokens by Zipf's law of exponent 0.4, ten prompt tokens to one of output, all there at the start.

    ``step``: lengths are this far apart, the shortest having rank 1.
    """
    tokens = np.arange(1024, LONGEST_TOKENS + 1, step)
    weights = np.arange(1, tokens.size + 1) ** -0.4
    drawn = np.random.default_rng(seed).choice(tokens, count, p=weights / weights.sum()).tolist()
    for number, total in enumerate(drawn):
        yield Request(id=number, arrival_s=0.0, input_tokens=total - total // 11, output_tokens=total // 11)


def gpt3(
    requests: list[Request],
    pp: int,
    replicas: int,
    slots: int,
    cost: StepCost,
    *,
    whole_prompts: bool = False,
    any_prompts: bool = False,
) -> Result:
    nodes = [{"gpu": "A100-80G-SXM", "count": 8, "nodes": 8, "nic_gbps": 1600}]
    cluster = Cluster.of(nodes=nodes, links={"inter_node": {"gbps": 1600, "latency_us": 10}})
    mode = "orca-best" if whole_prompts else "decode-maximal"
    system = SYSTEMS["sarathi"](mode=mode, tp=8, pp=pp, replicas=replicas)
    if any_prompts:
        system = replace(system, batcher=lambda role: AnyPrompts(composition="orca-best", micro_batches=pp))
    limits = replace(
        system.limits, max_model_len=LONGEST_TOKENS, max_num_seqs=slots, gpu_memory_utilization=1.0
    )  # slots are printed, so memory is not what bounds them
    problem = Problem(
        cluster=cluster,
        model=replace(model("gpt-3"), max_position_embeddings=LONGEST_TOKENS),
        cost=cost,
        workload=Workload(rate_per_s=1.0, lengths=tuple((r.input_tokens, r.output_tokens) for r in requests[:100])),
    )
    return simulate(problem, system.with_limits(limits), TraceSource(requests))


def idle_share(result: Result) -> float:
    """Of the stages' time, over the whole run."""
    busy = [stage_s for replica in result.rows.replicas for stage_s in replica.stage_busy_s]
    return 1 - float(np.mean(busy)) / result.makespan_s


def bubble_s(result: Result) -> float:
    """Median over the requests of the bubbles of all their micro-batches.

    With as many micro-batches as stages, whenever a stage idles a micro-batch waits for another stage: together both
    come to the same, and a request's share is the time it is served times the share of time that stages idle.
    """
    columns = result.columns
    return idle_share(result) * float(np.median(columns["e2e_s"] - columns["queue_s"]))
