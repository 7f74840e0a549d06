"""TetriInfer's figures beside ours.

``python -m experiments.studies.tetriinfer --out docs/studies/tetriinfer [--quick]``.

Hu et al., Inference without Interference: Disaggregate LLM Inference for Mixed Downstream Workloads (2024; arXiv
2401.11181v1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from sim import SYSTEMS, Cluster, Problem, Request, Result, Workload, simulate
from sim.cost import Roofline, seconds
from sim.model import model
from sim.policy import Predictor
from sim.types import Stage, Work
from traces import TraceSource

INTRO = """
TetriInfer (January 2024) prefills in chunks of one size on some instances and decodes on others. Of what it printed we
know its abstract (light prompts, heavy answers); figures marked *notes* are from notes of readers and not verified, so
only their direction is held against ours. Rates and numbers of requests are not known. Ours: OPT-13B on V100-32G, a
prefill and a decode instance of two GPUs each against one instance of vLLM (V0) of two GPUs, which gets requests
(Poisson) at twice the rate it serves when all come at once; lengths of ShareGPT's means (lognormals parted at 512
prompt and 128 output tokens into light and heavy ones); chunks of the size that saturates our V100. Step times are our
roofline's at its defaults. JCT is the time from arrival to the last token. Resource time is what instances spend
computing.

At rates that vLLM serves without a queue, a light prompt waits longer here than there: its chunk is padded and its
length predicted. Admission by predicted length and power-of-two dispatch gain nothing that holds over seeds.
Performance per dollar is left out: how the paper defines it is not known, nor do its figures follow from the others.

Regenerate with `python -m experiments.studies.tetriinfer --out docs/studies/tetriinfer`.
"""
HEAVY_PROMPT, HEAVY_ANSWER = 512, 128
MIXES: Mapping[str, tuple[bool | None, bool | None]] = {
    "LPLD": (False, False),
    "LPHD": (False, True),
    "HPLD": (True, False),
    "HPHD": (True, True),
    "Mixed": (None, None),
}
"""Heavy prompts, heavy answers; None: both kinds, half and half."""
NOTES: Mapping[str, tuple[str, str, str]] = {
    "LPLD": ("-44 %", "-40 %", ""),
    "LPHD": ("", "", ""),
    "HPLD": ("-9 %", "-23 %", "+43 %"),
    "HPHD": ("marginal", "marginal", ""),
    "Mixed": ("-85 %", "-50 %", "-21 %"),
}
ABSTRACT = (-97.0, -47.0, -38.0)
"""Light prompts, heavy answers. Changes of TTFT, JCT and resource time against vLLM, in %."""
PROMPT_MEAN, PROMPT_MEDIAN = 161, 90
ANSWER_MEAN, ANSWER_MEDIAN = 338, 220
LONGEST = 1024


LOAD, SHORT_LOAD = 2.0, 1.5
"""Of the rate that the baseline serves."""
SEEDS = 5
Floats = NDArray[np.float64]
FULL, QUICK = 512, 64
"""Requests of a run."""


def study(count: int, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    for mix in MIXES:
        yield from against_vllm(mix, count)
    yield from interference()
    yield from prefill(count)
    yield from decode(count)


def against_vllm(mix: str, count: int) -> Iterator[Comparison]:
    """The five workloads: TTFT, JCT and resource time."""
    requests = arriving(mix, count)
    ours, theirs = serve("tetriinfer", requests, chunk_tokens="auto", **PAIR), serve("vllm", requests, **ALONE)
    for number, (what, measure) in enumerate(MEASURES.items()):
        change = 100 * (measure(ours) / measure(theirs) - 1)
        printed = ABSTRACT[number] if mix == "LPHD" else None
        note = f"{measure(theirs):.3g} s with vLLM, {measure(ours):.3g} s with TetriInfer"
        where = "abstract" if printed else "mixes"
        yield row(where, f"{mix}: change of {what}", printed, change, "%", text=_noted(NOTES[mix][number]), note=note)


def _noted(text: str) -> str:
    return f"notes: {text}" if text else ""


def arriving(mix: str, count: int, load: float = LOAD, seed: int = 0) -> list[Request]:
    """The mix's requests at ``load`` times the rate at which the baseline serves them when all come at once."""
    requests = drawn(mix, count, seed)
    makespan_s = float(np.max(serve("vllm", requests, **ALONE).columns["e2e_s"]))
    gaps_s = np.random.default_rng(1 + seed).exponential(makespan_s / count / load, count)
    return [replace(one, arrival_s=float(at)) for one, at in zip(requests, np.cumsum(gaps_s), strict=True)]


ALONE: Mapping[str, Any] = {"mode": "v0", "replicas": 1, "tp": 2}
PAIR: Mapping[str, Any] = {"prefill": {"replicas": 1, "tp": 2}, "decode": {"replicas": 1, "tp": 2}}


def drawn(mix: str, count: int, seed: int = 0) -> list[Request]:
    """Requests that arrive at once, of the mix's classes."""
    rng = np.random.default_rng((seed, *mix.encode()))
    heavy_prompt, heavy_answer = MIXES[mix]
    prompts = _lengths(rng, count, heavy_prompt, PROMPT_MEAN, PROMPT_MEDIAN, HEAVY_PROMPT)
    answers = _lengths(rng, count, heavy_answer, ANSWER_MEAN, ANSWER_MEDIAN, HEAVY_ANSWER)
    return [
        Request(id=number, arrival_s=0.0, input_tokens=prompt, output_tokens=answer)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def _lengths(
    rng: np.random.Generator, count: int, heavy: bool | None, mean: float, median: float, border: int
) -> list[int]:
    """A lognormal's values on one side of the border, up to ``LONGEST``; None: every second one from each side."""
    found: dict[bool, list[int]] = {False: [], True: []}
    sigma = np.sqrt(2 * np.log(mean / median))
    while min(map(len, found.values())) < count:
        for value in np.ceil(rng.lognormal(np.log(median), sigma, 10_000)).astype(int).tolist():
            if value <= LONGEST:
                found[value > border].append(value)
    if heavy is not None:
        return found[heavy][:count]
    sides = rng.integers(0, 2, count).astype(bool).tolist()
    return [found[side][number] for number, side in enumerate(sides)]


def serve(name: str, requests: list[Request], predictor: Predictor | None = None, **options: Any) -> Result:
    limits = {key: options.pop(key) for key in ("num_kv_blocks",) if key in options}
    system = SYSTEMS[name](**options)
    world = problem()
    return simulate(
        world, system.with_limits(replace(system.limits, **limits)), TraceSource(requests), predictor=predictor
    )


def problem() -> Problem:
    """OPT-13B on two servers of four V100, 200 Gbps (RoCE, as emulated by the authors) between them."""
    return Problem(
        cluster=Cluster.of(
            [{"gpu": "V100-32G", "count": 4, "nodes": 2}], links={"inter_node": {"gbps": 200, "latency_us": 10}}
        ),
        model=model("opt-13b"),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((PROMPT_MEAN, ANSWER_MEAN),)),
    )


def mean_ttft_s(result: Result) -> float:
    return float(np.mean(result.columns["ttft_s"]))


def mean_jct_s(result: Result) -> float:
    return float(np.mean(result.columns["e2e_s"]))


def resource_s(result: Result) -> float:
    return sum(replica.busy_s for replica in result.rows.replicas)


MEASURES = {"TTFT": mean_ttft_s, "JCT": mean_jct_s, "resource time": resource_s}


# ------------------------------------------------------------ interference (figures 3 to 5)


def step_s(chunks: Sequence[int], decodes: int = 0, context_tokens: int = 0) -> float:
    """One iteration of prompts of these lengths and of decodes that attend to so many tokens in all, on two V100."""
    world = problem()
    stage = Stage(name="v", gpus=("n0.g0", "n0.g1"), first_layer=0, end_layer=world.model.num_layers)
    bound = world.cost.bind(world.model, stage, world.cluster)
    return seconds(bound, Work(tuple((tokens, 0) for tokens in chunks), decodes, context_tokens))


def interference() -> Iterator[Comparison]:
    """What running phases together costs, by the price of one iteration."""
    alone = step_s([18])
    for others, text in ((7, "2x"), (63, "8x")):
        ours = step_s([18] * (others + 1)) / alone
        yield noted("Fig. 3", f"an 18-token prompt with {others} others, latency over alone", ours, "x", text)
    yield noted("Fig. 3", "the same with one of 512 tokens", step_s([18, 512]) / alone, "x", "> 10x")
    ours = step_s([512], 8, 800) / step_s([], 8, 800)
    note = "8 decodes of 100 tokens"
    yield noted("Fig. 4", "an iteration of decodes with a 512-token prompt, over without", ours, "x", "5x", note)
    ours = 100 * (step_s([], 128, 64 * 64 + 64 * 320) / step_s([], 128, 128 * 64) - 1)
    note = "64 and 320 tokens of context"
    yield noted("Fig. 5", "latency of 128 decodes, half of them heavy, over light", ours, "%", "+23 %", note)


def noted(where: str, what: str, ours: float, unit: str, text: str, note: str = "") -> Comparison:
    return row(where, what, None, ours, unit, kind="direction", text=_noted(text), note=note)


# ------------------------------------------------------------ parts (figures 16 to 19)


def prefill(count: int) -> Iterator[Comparison]:
    """Order within a group, by the wait for the first token; all prompts come at once."""
    requests = [replace(one, output_tokens=1) for one in drawn("Mixed", min(count, 128))]

    def waiting_s(order: str, group: int) -> float:
        return mean_ttft_s(serve("tetriinfer", requests, order=order, group=group, chunk_tokens="auto", **PAIR))

    fcfs_s = waiting_s("fcfs", 16)
    for group, text in ((16, "-7.8 %"), (128, "more")):
        change = 100 * (waiting_s("sjf", group) / fcfs_s - 1)
        yield noted("Fig. 16", f"waiting, SJF in groups of {group} over FCFS", change, "%", text)


def decode(count: int) -> Iterator[Comparison]:
    """Admission and dispatch, where decode memory is short; means over seeds."""
    pools: Mapping[str, Any] = {"prefill": {"replicas": 2, "tp": 2}, "decode": {"replicas": 2, "tp": 2}}

    def jct_s(**options: Any) -> Floats:
        runs = [arriving("LPHD", count, SHORT_LOAD, seed) for seed in range(SEEDS)]
        served = [serve("tetriinfer", one, num_kv_blocks=600, chunk_tokens="auto", **options, **pools) for one in runs]
        return np.array([mean_jct_s(result) for result in served])

    dynamic = jct_s()
    others = (("Fig. 18", "greedy admission", {"admission": "greedy"}, "up to -10 %"),)
    for where, what, options, text in (*others, ("Fig. 19", "random dispatch", {"dispatch": "random"}, "lower")):
        changes = 100 * (dynamic / jct_s(**options) - 1)
        note = f"{changes.min():+.0f} to {changes.max():+.0f} % over {SEEDS} seeds; 600 blocks an instance"
        yield noted(where, f"JCT, reserve-dynamic and power-of-two over {what}", changes.mean(), "%", text, note)


STUDY = Study(
    name="study_tetriinfer",
    title="TetriInfer (2024): published and ours",
    intro=INTRO,
    sizes={"": (FULL, ""), "quick": (QUICK, "64 requests a run instead of 512")},
    rows=study,
)

if __name__ == "__main__":
    STUDY.main()
