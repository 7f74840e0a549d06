"""SARATHI's and Sarathi-Serve's figures beside ours: ``python -m experiments.study_sarathi --out docs [--quick]``.

Agrawal et al., SARATHI (arXiv 2308.16369), and Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve
(OSDI 2024, arXiv 2403.02310).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.progress import Log
from experiments.steady_batches import Batches, step_cost
from experiments.study import Comparison, write
from sim import SYSTEMS, Cluster, Problem, Request, Result, System, Workload, simulate
from sim.cost import Roofline, StageCost, seconds
from sim.model import ModelSpec, model
from sim.planners.provisioning import highest_rate
from sim.types import Work
from traces import Lognormal, TraceSource, generate

INTRO = """
SARATHI (2023) cuts prompts into chunks that fill the batches of running decodes; Sarathi-Serve (OSDI 2024) does so
online, under a token budget. No profile of these GPUs and engines is public, so all step times here are our
roofline's (its default efficiencies, medians of 2025 kernels), unless a row says arithmetic; nothing is tuned. Ratios
are what to compare.

The GPT-3 pipelines of SARATHI's figure 12 were simulated by its authors too. "Zipf, 1K to 4K" leaves open which
lengths occur, and under Orca it matters: while one of eight micro-batches holds a whole prompt, which takes ten times
as long as a decode step, the other seven queue up behind it. With whole thousands requests end together, so prompts
start together and the pipeline stays even; with all lengths they spread, and stages idle for two thirds of the time.
Both are shown. The bubble of a request is ours by the idle time of all stages over the requests; theirs is a median.
That definition, and the reading with whole thousands, were settled after the first results had been seen.
Regenerate with `python -m experiments.study_sarathi --out docs`.
"""
TILE = 128


class Scale(NamedTuple):
    """How much is run: requests of the bubble study and of the ablation, length of the traces of capacity searches."""

    bubble_requests: int
    requests: int
    duration_s: float


FULL = Scale(10_000, 128, 600.0)
QUICK = Scale(600, 64, 60.0)
LOWEST_RATE_PER_S = 0.1


def study(scale: Scale, log: Log) -> Iterator[Comparison]:
    yield from piggybacking()
    yield from balance()
    yield from chunk_loss()
    yield from bubbles(scale, log)
    yield from ablation(scale)
    yield from capacities(scale, log)
    yield from pipeline_arithmetic()


# ---------------------------------------------------------------- one batch, by the cost model


TABLE_4 = (
    ("llama-13b", "A6000", ((1024, 6, 50, 5.45, 1.33), (2048, 6, 50, 3.26, 1.26), (3072, 6, 50, 2.51, 1.22))),
    ("llama-30b", "A100-80G-SXM", ((1024, 10, 28, 3.83, 1.25), (2048, 5, 63, 4.25, 1.22), (3072, 3, 127, 3.51, 1.14))),
)
"""Model, GPU; tokens of a request, slots, P:D, decode speed-up, throughput gain."""


def piggybacking() -> Iterator[Comparison]:
    """SARATHI's tables 2 and 4: decodes that ride with a chunk of 256, slots included."""
    for name, gpu, rows in TABLE_4:
        for tokens, slots, ratio, faster, gain in rows:
            batch = Batches(step_cost(name, gpu), slots, tokens * ratio / (ratio + 1), tokens / (ratio + 1))
            chunk = 256 - (slots - 1)
            decode = batch.decode_s(slots) / slots / batch.riding_decode_s(chunk)
            setting = f"{name}, {gpu.split('-')[0]}, {tokens} tokens"
            yield _row("SARATHI Table 4", f"{setting}, decode speed-up", faster, decode, "x")
            yield _row(
                "SARATHI Table 4", f"{setting}, throughput", gain, batch.baseline_s() / batch.chunked_s(chunk), "x"
            )
    batch = Batches(step_cost("llama-13b", "A6000"), 4, 1024, 1)
    alone, riding = batch.decode_s(4) / 4 * 1e3, batch.riding_decode_s(1021) * 1e3
    yield _row("SARATHI Table 2", "llama-13b, A6000, decode of 4", 12.49, alone, "ms/token")
    yield _row("SARATHI Table 2", "llama-13b, A6000, decode riding with a prompt", 1.2, riding, "ms/token")


def balance() -> Iterator[Comparison]:
    """SARATHI's figures 9 and 11: the gain over P:D peaks where chunks and decodes run out together."""
    slots, tokens = 18, 1024
    for size, best, gain in ((256, 14, 1.27), (512, 28, 1.23)):
        gains = {ratio: _gain(slots, tokens, ratio, size - (slots - 1)) for ratio in range(1, 101)}
        peak = max(gains, key=gains.__getitem__)
        where = f"llama-13b, A6000, chunk {size}, B 18"
        note = f"(C - (B - 1)) / (B - 1) = {(size - slots + 1) / (slots - 1):.1f}"
        yield _row("SARATHI Fig. 9", f"{where}, best P:D", best, peak, "", note=note, kind="exact")
        yield _row("SARATHI Fig. 9", f"{where}, gain there", gain, gains[peak], "x")
    whole = max(_gain(slots, tokens, ratio, tokens * ratio / (ratio + 1)) for ratio in range(1, 101))
    yield _row("SARATHI Fig. 11", "llama-13b, A6000, B 18, Orca's best case", 1.11, whole, "x")


def _gain(slots: int, tokens: int, ratio: float, chunk: float) -> float:
    batch = Batches(step_cost("llama-13b", "A6000"), slots, tokens * ratio / (ratio + 1), tokens / (ratio + 1))
    return batch.baseline_s() / batch.chunked_s(chunk)


def chunk_loss() -> Iterator[Comparison]:
    """What cutting costs a prompt: SARATHI's figure 13, Sarathi-Serve's figure 14."""
    for size, slower, text in ((64, 5.0, "about 5x"), (256, 1.2, "at most 1.2x"), (512, 1.1, "at most 1.1x")):
        ours = _cut_s(step_cost("llama-13b", "A6000"), 1024, size) / _cut_s(step_cost("llama-13b", "A6000"), 1024, 1024)
        yield _row(
            "SARATHI Fig. 13", f"llama-13b, A6000, prompt of 1024 in chunks of {size}", slower, ours, "x", text=text
        )
    cost = step_cost("yi-34b", "A100-80G-SXM", 2)
    for size, slower, text in ((512, 1.25, "about 1.25x"), (2048, 1.0, "about 1x")):
        ours = _cut_s(cost, 8192, size) / _cut_s(cost, 8192, 8192)
        yield _row(
            "Sarathi-Serve Fig. 14",
            f"yi-34b, 2 x A100, prompt of 8192 in chunks of {size}",
            slower,
            ours,
            "x",
            text=text,
        )


def _cut_s(cost: StageCost, prompt: int, size: int) -> float:
    return sum(seconds(cost, Work(((min(size, prompt - at), at),), 0, 0)) for at in range(0, prompt, size))


# ---------------------------------------------------------------- GPT-3 on 64 A100


def bubbles(scale: Scale, log: Log) -> Iterator[Comparison]:
    """SARATHI's figure 12, itself simulated: pipelines of 8 stages against 8 replicas, TP8 both; two readings of it."""
    for reading, step in (("lengths 1K, 2K, 3K, 4K", 1024), ("all lengths from 1K to 4K", 1)):
        requests = list(zipf_requests(scale.bubble_requests, step))
        sarathi = _gpt3("decode-maximal", 8, 1, 8 * 27, requests)
        orca = _gpt3("orca-best", 8, 1, 8 * 27, requests)
        replicas = _gpt3("orca-best", 1, 8, 11, requests)
        idle = f"stages idle {100 * idle_share(orca):.0f} % under Orca, {100 * idle_share(sarathi):.0f} % under SARATHI"
        log.say(f"GPT-3, {reading}: {idle}")
        where, note = "SARATHI Fig. 12", f"{len(requests)} requests"
        for what, printed, ours, more in (
            ("bubble of a request, Orca TP8-PP8 over SARATHI", 6.29, bubble_s(orca) / bubble_s(sarathi), f"; {idle}"),
            ("SARATHI over Orca, both TP8-PP8", 1.91, orca.makespan_s / sarathi.makespan_s, ""),
            ("SARATHI TP8-PP8 over TP8 x 8", 1.48, replicas.makespan_s / sarathi.makespan_s, ""),
            ("TP8 x 8 over Orca TP8-PP8", 1.28, orca.makespan_s / replicas.makespan_s, ""),
        ):
            yield _row(where, f"GPT-3, {reading}, {what}", printed, ours, "x", note=note + more)


def zipf_requests(count: int, step: int = 1, seed: int = 0) -> Iterator[Request]:
    """1K to 4K tokens by Zipf's law of exponent 0.4, ten prompt tokens to one of output, all there at the start.

    ``step``: lengths are this far apart, the shortest having rank 1.
    """
    tokens = np.arange(1024, 4097, step)
    weights = np.arange(1, tokens.size + 1) ** -0.4
    drawn = np.random.default_rng(seed).choice(tokens, count, p=weights / weights.sum()).tolist()
    for number, total in enumerate(drawn):
        yield Request(id=number, arrival_s=0.0, input_tokens=total - total // 11, output_tokens=total // 11)


def _gpt3(mode: str, pp: int, replicas: int, slots: int, requests: list[Request]) -> Result:
    nodes = [{"gpu": "A100-80G-SXM", "count": 8, "nodes": 8, "nic_gbps": 1600}]
    cluster = Cluster.of(nodes=nodes, links={"inter_node": {"gbps": 1600, "latency_us": 10}})
    system = SYSTEMS["sarathi"](mode=mode, tp=8, pp=pp, replicas=replicas)
    limits = replace(system.limits, max_model_len=4096, max_num_seqs=slots, gpu_memory_utilization=1.0)
    return _simulated(
        cluster, replace(model("gpt-3"), max_position_embeddings=4096), system.with_limits(limits), requests
    )


def idle_share(result: Result) -> float:
    """Of the stages' time, over the whole run."""
    busy = [stage_s for row in result.rows.replicas for stage_s in row.stage_busy_s]
    return 1 - float(np.mean(busy)) / result.makespan_s


def bubble_s(result: Result) -> float:
    """Seconds for which stages idle, per request and stage."""
    return result.makespan_s * idle_share(result) / len(result.rows.requests)


# ---------------------------------------------------------------- online

SHAREGPT = (
    Lognormal(mean_tokens=2048, median_tokens=1730, max_tokens=8000),
    Lognormal(mean_tokens=470, median_tokens=415, max_tokens=1000),
)
ARXIV = (
    Lognormal(mean_tokens=7700, median_tokens=7059, max_tokens=16000),
    Lognormal(mean_tokens=240, median_tokens=208, max_tokens=1000),
)
"""Lognormals with the medians of Sarathi-Serve's table 2; means by its 90th percentiles where those allow."""
LONGEST_TOKENS = 16384


class Server(NamedTuple):
    name: str
    gpu: str
    tp: int
    pp: int = 1

    def serve(self, system: System, trace: Any, rate_per_s: float, count: int) -> Result:
        requests = list(generate(count, rate_per_s, input=trace[0], output=trace[1], seed=0))
        cluster = Cluster.of(nodes=[{"gpu": self.gpu, "count": self.tp * self.pp}])
        spec = replace(model(self.name), max_position_embeddings=LONGEST_TOKENS, sliding_window=None)
        limits = replace(system.limits, max_model_len=LONGEST_TOKENS)
        return _simulated(cluster, spec, system.with_limits(limits), requests)


YI = Server("yi-34b", "A100-80G-SXM", 2)


def ablation(scale: Scale) -> Iterator[Comparison]:
    """Sarathi-Serve's table 4: what chunks and hybrid batches do apart; rates are ours, none is printed."""
    printed = {
        "sharegpt4": (
            SHAREGPT,
            0.7,
            {"hybrid-only": (0.53, 0.68), "chunked-only": (1.04, 0.17), "stall-free": (0.76, 0.14)},
        ),
        "arxiv": (ARXIV, 0.3, {"hybrid-only": (3.78, 1.38), "chunked-only": (5.38, 0.20), "stall-free": (3.90, 0.17)}),
    }
    for label, (trace, rate, figures) in printed.items():
        for mode, (ttft, tbt) in figures.items():
            budget = {} if mode == "hybrid-only" else {"token_budget": 1024}
            result = YI.serve(
                SYSTEMS["sarathi-serve"](mode=mode, tp=2, replicas=1, **budget), trace, rate, scale.requests
            )
            where, note = "Sarathi-Serve Table 4", f"{rate}/s"
            yield _row(
                where,
                f"yi-34b, {label}, {mode}, P50 TTFT",
                ttft,
                float(np.median(result.columns["ttft_s"])),
                "s",
                note=note,
            )
            yield _row(
                where,
                f"yi-34b, {label}, {mode}, P99 TBT",
                tbt,
                float(np.percentile(result.itl_s(), 99)),
                "s",
                note=note,
            )


def capacities(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Sarathi-Serve's figures 10 and 11: highest rates with P99 TBT in bounds and a median queueing of at most 2 s."""
    cases = (
        (YI, 0.2, "Fig. 10", 3.7, 4.0),
        (Server("mistral-7b", "A100-80G-SXM", 1), 0.1, "abstract", 2.6, None),
        (Server("llama-2-70b", "A40", 4, 2), 1.0, "Fig. 11", 4.3, 6.3),
    )
    for server, tbt_s, where, over_vllm, over_orca in cases:
        layout = {"tp": server.tp, "pp": server.pp, "replicas": 1}
        systems = {
            "sarathi-serve": SYSTEMS["sarathi-serve"](token_budget=512, **layout),
            "vllm": SYSTEMS["vllm"](mode="v0", **layout),
            "orca": SYSTEMS["orca"](**layout),
        }
        rates = {name: capacity(server, system, tbt_s, scale) for name, system in systems.items()}
        log.say(f"{server.name}: {rates}")
        for other, printed in (("vllm", over_vllm), ("orca", over_orca)):
            if printed is None:
                continue
            ours = rates["sarathi-serve"] / rates[other] if rates[other] else None
            note = f"{rates['sarathi-serve']:.2f} and {rates[other]:.2f} req/s" + (
                "" if ours else ": not met at any rate tried"
            )
            what = f"{server.name}, P99 TBT {tbt_s} s, capacity over {other}"
            yield _row(f"Sarathi-Serve {where}", what, printed, ours, "x", note=note)


def capacity(server: Server, system: System, tbt_s: float, scale: Scale) -> float:
    """Requests/s up to which the targets are met, to 5 %; 0 if they are missed at the lowest rate tried.

    Rates rise by a quarter until one fails: past saturation prompts crowd decodes out, and token gaps look short again.
    """

    def met(rate_per_s: float) -> bool:
        result = server.serve(system, SHAREGPT, rate_per_s, max(50, ceil(rate_per_s * scale.duration_s)))
        completed = bool((result.columns["outcome"] == "completed").all())
        in_time = float(np.median(result.columns["queue_s"])) <= 2.0
        return completed and in_time and float(np.percentile(result.itl_s(), 99)) <= tbt_s

    good = LOWEST_RATE_PER_S
    if not met(good):
        return 0.0
    while met(good * 1.25):
        good *= 1.25
    return highest_rate(met, good, good * 1.2, good * 0.05)


def pipeline_arithmetic() -> Iterator[Comparison]:
    """Sarathi-Serve, section 3.3: a prompt among decodes leaves its difference as a bubble."""
    yield _row(
        "Sarathi-Serve Sec. 3.3",
        "falcon-180b, bubble: 1150 ms of prompt, 200 ms of decodes",
        950,
        1150 - 200,
        "ms",
        basis="arithmetic",
        kind="exact",
    )
    cost = step_cost("falcon-180b", "A100-80G-SXM", 4, (0, 40))
    prompt, decode = seconds(cost, Work(((4096, 0),), 0, 0)), seconds(cost, Work((), 32, 32 * 4096))
    where, note = "Sarathi-Serve Sec. 3.3", "one of two stages of 4 A100"
    yield _row(where, "falcon-180b, TP4-PP2, prompt of 4096", 1150, 1e3 * prompt, "ms", note=note)
    yield _row(where, "falcon-180b, TP4-PP2, decode of 32", 200, 1e3 * decode, "ms", note=f"{note}, contexts of 4096")


# ---------------------------------------------------------------- running and rows


def _simulated(cluster: Cluster, spec: ModelSpec, system: System, requests: list[Request]) -> Result:
    workload = Workload(rate_per_s=1.0, lengths=tuple((r.input_tokens, r.output_tokens) for r in requests[:100]))
    problem = Problem(cluster=cluster, model=spec, cost=Roofline(), workload=workload)
    return simulate(problem, system, TraceSource(requests))


def _row(where: str, what: str, published: float, ours: float | None, unit: str, *, kind: Any = "ratio",
         basis: Any = "roofline", text: str = "", note: str = "") -> Comparison:  # fmt: skip
    return Comparison(
        where=where, what=what, unit=unit, kind=kind, basis=basis, published=published, ours=ours, text=text, note=note
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_sarathi.md, .csv, .png and .svg")
    parser.add_argument("--quick", action="store_true", help="fewer requests, for half a minute")
    given = parser.parse_args(arguments)
    rows = list(study(QUICK if given.quick else FULL, Log()))
    write(given.out, "study_sarathi", "SARATHI and Sarathi-Serve: published and simulated", INTRO, rows)


if __name__ == "__main__":
    main()
