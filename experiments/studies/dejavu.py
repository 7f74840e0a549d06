"""Deja Vu's figures beside ours: ``python -m experiments.studies.dejavu --out docs/studies/dejavu [--quick]``.

Liu et al., Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time (ICML 2023, arXiv 2310.17157).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrate.profile.file import read_profile, shipped_profiles
from experiments.plots.style import Drawing, guide, log_ticks, run_styles, save, styled
from experiments.studies.published import Comparison, row, write
from sim import SYSTEMS, Cluster, Problem, Workload, simulate
from sim.cost import Roofline, Sparse, Sparsity, StageCost, StepCost, seconds
from sim.metrics import summarise
from sim.model import model
from sim.types import Slo, Stage, Work
from traces import Fixed, TraceSource, generate

TITLE = "Deja Vu: published and simulated"
INTRO = """
Deja Vu predicts, token by token, which attention heads and MLP neurons a decode step needs, and computes those only.
The paper measures OPT-175B on eight A100-80G with one sequence at a time: a tenth of the neurons, 5 of 12 heads a GPU.
`deja-vu` scales the dense step of whatever latency model a scenario has, under any scheduler. Step times here are the
roofline's with default efficiencies and nothing tuned, but for the rows of table 4 that say *fit*: there the memory
bandwidth reached and the seconds of an all-reduce (which stand for all that is not bytes) are solved from the two
printed figures at 128 tokens (FasterTransformer's and Deja Vu's), and the other columns judge.

**Table 4.** The lookahead can be read in two ways: the text leaves open whether predictors, which read half as many
bytes as what they choose, are wholly hidden behind the all-reduces or share the memory bandwidth with the rest (*in
line*); both fit alike. A head that was not chosen for an earlier token has no KV of it and makes it from that token's
input. If tokens choose independently that costs 4 x (1 - density) x heads x d x d_head FLOPs a layer for every token of
context: 8.2 us a token here, of 8.6 printed; without it, 0.2. Whether the benchmark did so, over a context that was
decoded and not prefilled, we could not verify, and part of the agreement may be luck: FasterTransformer's own 3.2 us a
token is seven times what reading its KV takes, we do not know why, and whatever it is may be in Deja Vu's figures as
well. HuggingFace's rows (4.8x to 6.8x) would need a model of its launches and are left out.

**What batching does to the gain.** The paper stops at one sequence. A step of several needs what any of them needs: if
they choose independently, 1 - (1 - density)^b of a layer. The gain is largest with one sequence and falls from there.
Eight sequences of 128 tokens already take as long as dense ones if all missing KV is made again. If none is missing (a
long prompt, prefilled densely, has no gaps) they keep 1.3x, and from about 30 sequences on the gain *rises* again,
because heads that are not chosen save KV reads whoever shares the step. So throughput has no optimum inside: tokens per
second rise with the batch, sparse or dense; what has an optimum is the gain, and it is a batch of one. Above the batch
where it ends, a server should decode densely; `deja-vu` does not switch.

![union density, gain and throughput by batch](study_dejavu_batch.png)

*Left: the share of neurons and heads that a step needs. Middle: dense over sparse step time, contexts of 512 tokens.
Right: tokens per second. OPT-175B on 8 A100-80G, roofline.*

**Accuracy** is not simulated. The published setting skips 79 % of all parameters, more than the 75 % that the paper
found harmless; a run says so.

Regenerate with `python -m experiments.studies.dejavu --out docs/studies/dejavu`.
"""
GPUS = 8
A100 = Cluster.of([{"gpu": "A100-80G-SXM", "count": GPUS}])
OPT = model("opt-175b")
PEAK_BYTES_PER_S = GPUS * 1.5e12
"""The paper's: 12 TB/s (table 2)."""
CONTEXTS = (128, 256, 512, 1024)
TABLE_4_MS = {"FasterTransformer": (40.5, 40.9, 41.7, 43.4), "Deja Vu": (15.9, 17.1, 19.8, 23.6)}
BATCHES = tuple(range(1, 257))
CONTEXT = 512
NO_MISS = Sparsity(recompute_miss=0.0)


def study(requests: int) -> Iterator[Comparison]:
    yield from bytes_and_flops()
    yield from parameters()
    yield from untuned()
    yield from fitted()
    yield from kernels()
    yield from batching()
    yield from served(requests)


# ---------------------------------------------------------------- arithmetic


def bytes_and_flops() -> Iterator[Comparison]:
    """Tables 1 and 2: GB are GiB, a block's are of one layer, and 12 TB/s are divided as if they were TiB/s."""
    sizes = {gemm.name: gemm.n * gemm.k * 2 / 2**30 for gemm in OPT.gemms()}
    parts = {"attention": (1.12, 0.093), "MLP": (2.25, 0.1875)}
    ours = {"attention": sizes["qkv"] + sizes["o"], "MLP": sizes["gate_up"] + sizes["down"]}
    for part, (printed, printed_ms) in parts.items():
        yield exact("Table 2", f"{part}, bytes read a layer", printed, ours[part], "GiB")
        yield exact("Table 2", f"{part}, at 12 TB/s", printed_ms, ours[part] * 1e12 / PEAK_BYTES_PER_S, "ms")
    flops, size = OPT.num_layers * OPT.linear_flops_per_token_layer, OPT.num_layers * sum(sizes.values())
    note = "printed for 128 tokens: 44.6, hence 0.348 for one"
    yield exact("Table 1", "one token, FLOPs", 0.34, flops / 1e12, "TFLOP", note=note)
    yield exact("Table 1", "one token, bytes read", 324, size, "GiB")
    yield exact("Table 1", "128 tokens, FLOPs", 44.6, 128 * flops / 1e12, "TFLOP")
    yield exact("Table 1", "128 tokens, bytes read", 41, 128 * size / 1e3, "thousand GiB")
    yield exact("Table 1", "128 tokens, time", 3500, 128 * size / PEAK_BYTES_PER_S * 1e12, "ms")


def exact(where: str, what: str, printed: float, ours: float, unit: str, note: str = "") -> Comparison:
    return row(where, what, printed, ours, unit, "arithmetic", kind="exact", note=note)


def parameters() -> Iterator[Comparison]:
    """Figures 1 and 3: 80 % of the heads, 95 % of the neurons are not needed."""
    left = (0.2 * 4 + 0.05 * 8) / 12
    text = "85 % less, up to 7x fewer"
    note = "1/3 x 0.2 + 2/3 x 0.05 = 10 % left"
    yield row("Fig. 1, 3", "parameters left out", None, 100 * (1 - left), "%", "arithmetic",
              kind="direction", text=text, note=note)  # fmt: skip
    skipped = 100 * (1 - (5 / 12 * 4 + 0.1 * 8) / 12)
    yield row("Fig. 6", "parameters left out in table 4's setting", None, skipped, "%", "arithmetic",
              kind="direction", text="no loss up to 75 %", note="5 of 12 heads, a tenth of the neurons")  # fmt: skip


# ---------------------------------------------------------------- one sequence: table 4


def stage() -> Stage:
    return Stage(name="s", gpus=A100.gpu_ids, first_layer=0, end_layer=OPT.num_layers)


def bound(cost: StepCost, cluster: Cluster = A100) -> StageCost:
    return cost.bind(OPT, stage(), cluster)


def decode_ms(cost: StageCost, seqs: int, context: int) -> float:
    return 1e3 * seconds(cost, Work((), seqs, seqs * context))


def untuned() -> Iterator[Comparison]:
    """Speed-ups by the roofline as it is."""
    dense, sparse = bound(Roofline()), bound(Sparse(inner=Roofline()))
    for context, theirs, gained in zip(CONTEXTS, *TABLE_4_MS.values(), strict=True):
        slow, fast = decode_ms(dense, 1, context), decode_ms(sparse, 1, context)
        what = f"context {context}, speed-up over FasterTransformer"
        yield row("Table 4", what, theirs / gained, slow / fast, "x", note=f"{slow:.1f} and {fast:.1f} ms a token")
    yield row("text", "speed-up over HuggingFace", None, None, "", kind="direction", text="4.8x to 6.8x")


class Fit(NamedTuple):
    """What reproduces both figures at 128 tokens: share of the peak bandwidth, seconds of an all-reduce's hop."""

    efficiency: float
    hop_s: float

    def costs(self, sparsity: Sparsity) -> tuple[StageCost, StageCost]:
        """Dense and sparse."""
        roofline = Roofline(
            memory_efficiency=self.efficiency, attention_memory_efficiency=self.efficiency, overhead_s=0.0
        )
        links = {"intra_node": {"gbps": 1e6, "latency_us": 1e6 * self.hop_s}}
        cluster = Cluster.of([{"gpu": "A100-80G-SXM", "count": GPUS}], links)
        return bound(roofline, cluster), bound(Sparse(inner=roofline, sparsity=sparsity), cluster)

    def all_reduces_ms(self) -> float:
        """Of a step: three hops of each (eight GPUs)."""
        return 1e3 * 2 * OPT.num_layers * 3 * self.hop_s


@cache
def fit(sparsity: Sparsity) -> Fit:
    """Bisection: more bandwidth, hence longer all-reduces in a dense step of 40.5 ms, and a longer sparse step."""
    dense_ms, sparse_ms = (values[0] for values in TABLE_4_MS.values())
    low, high = 0.5, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        found = Fit(middle, _hop_s(middle, dense_ms))
        low, high = (middle, high) if decode_ms(found.costs(sparsity)[1], 1, CONTEXTS[0]) < sparse_ms else (low, middle)
    return Fit(high, _hop_s(high, dense_ms))


def _hop_s(efficiency: float, dense_ms: float) -> float:
    none_ms, one_ms = (decode_ms(Fit(efficiency, hop_s).costs(NO_MISS)[0], 1, CONTEXTS[0]) for hop_s in (0.0, 1e-6))
    return max(0.0, (dense_ms - none_ms) / (one_ms - none_ms) * 1e-6)


READINGS: Mapping[str, Sparsity] = {
    "predictors hidden": Sparsity(),
    "predictors in line": Sparsity(lookahead=False),
}


def fitted() -> Iterator[Comparison]:
    """One reading row by row; of the other, which judges no worse, how far it is off."""
    first, other = READINGS.items()
    costs = dict(zip(TABLE_4_MS, fit(first[1]).costs(first[1]), strict=True))
    for (system, cost), printed in zip(costs.items(), TABLE_4_MS.values(), strict=True):
        ours = [decode_ms(cost, 1, context) for context in CONTEXTS]
        yield row("Table 4", f"{system}, context 128 (fitted)", None, ours[0], "ms", kind="direction",
                  text=f"{printed[0]} ms", note=f"{first[0]}: {said(fit(first[1]))}")  # fmt: skip
        for context, printed_ms, value in list(zip(CONTEXTS, printed, ours, strict=True))[1:]:
            yield row("Table 4", f"{system}, context {context} (fit at 128)", printed_ms, value, "ms")
    found = fit(other[1])
    errors = [
        decode_ms(cost, 1, context) / printed_ms - 1
        for cost, printed in zip(found.costs(other[1]), TABLE_4_MS.values(), strict=True)
        for context, printed_ms in zip(CONTEXTS, printed, strict=True)
    ]
    yield row("Table 4", f"{other[0]}: largest error in the other columns", None, 100 * max(map(abs, errors)), "%",
              kind="direction", text="as above", note=said(found))  # fmt: skip
    yield from growth()


def said(found: Fit) -> str:
    terabytes = found.efficiency * A100.gpu(A100.gpu_ids[0]).bandwidth_bytes_per_s / 1e12
    return f"{terabytes:.2f} TB/s a GPU, {found.all_reduces_ms():.1f} ms of all-reduces"


def growth() -> Iterator[Comparison]:
    """Microseconds a token of context, from 128 to 1024."""
    dense, sparse = fit(Sparsity()).costs(Sparsity())
    _, complete = fit(NO_MISS).costs(NO_MISS)
    span = CONTEXTS[-1] - CONTEXTS[0]

    def us(cost: StageCost) -> float:
        return 1e3 * (decode_ms(cost, 1, CONTEXTS[-1]) - decode_ms(cost, 1, CONTEXTS[0])) / span

    note = f"{us(complete):.2f} if no KV is missing"
    for system, cost, more in zip(TABLE_4_MS, (dense, sparse), ("", note), strict=True):
        printed = TABLE_4_MS[system]
        theirs = 1e3 * (printed[-1] - printed[0]) / span
        yield row("Table 4", f"{system}: growth with the context", theirs, us(cost), "us/token", note=more)


def kernels() -> Iterator[Comparison]:
    """Figures 9 and 10, beside what ``phasewise calibrate`` found for gathered rows on a processor."""
    table = read_profile(shipped_profiles()["measured-cpu-llama-100m"]).tables["gemv_density"]
    shares = np.array(table.seconds, dtype=float) / table.seconds[-1]
    note = "rows copied, then multiplied, by torch on one processor core; theirs is one fused kernel on an A100"
    for density in (10, 50):
        ours = 100 * float(np.interp(density, table.counts, shares))
        yield row("Fig. 9, 10", f"{density} % of the rows: time, of that of all", None, ours, "%", "measured profile",
                  kind="direction", text="less than dense up to 80 % of the rows", note=note)  # fmt: skip


# ---------------------------------------------------------------- several sequences


CURVES: Mapping[str, Sparsity] = {
    "independent, missing KV made again": Sparsity(),
    "independent, no KV missing": NO_MISS,
    "half shared, no KV missing": replace(NO_MISS, overlap=0.5),
    "all shared, no KV missing": replace(NO_MISS, overlap=1.0),
}


@cache
def by_batch() -> pd.DataFrame:
    """Union densities, step times and tokens per second of each curve."""
    dense = bound(Roofline())
    frames = []
    for name, sparsity in CURVES.items():
        cost = bound(Sparse(inner=Roofline(), sparsity=sparsity))
        frames.append(
            pd.DataFrame(
                {
                    "curve": name,
                    "batch": BATCHES,
                    "neurons": [sparsity.union(4992 / 49152, batch) for batch in BATCHES],
                    "heads": [sparsity.union(5 / 12, batch) for batch in BATCHES],
                    "dense_ms": [decode_ms(dense, batch, CONTEXT) for batch in BATCHES],
                    "sparse_ms": [decode_ms(cost, batch, CONTEXT) for batch in BATCHES],
                }
            )
        )
    found = pd.concat(frames, ignore_index=True)
    found["gain"] = found["dense_ms"] / found["sparse_ms"]
    found["tokens_per_s"] = 1e3 * found["batch"] / found["sparse_ms"]
    return found.round(5)


def batching() -> Iterator[Comparison]:
    """Ours alone: the paper has one sequence."""
    for name, curve in by_batch().groupby("curve", sort=False):
        gains = dict(zip(curve["batch"], curve["gain"], strict=True))
        ends = next((f"gone at {batch}" for batch, gain in gains.items() if gain <= 1), "never gone up to 256")
        least = min(gains, key=gains.__getitem__)
        best = BATCHES[int(np.argmax(curve["tokens_per_s"].to_numpy()))]
        note = f"{gains[1]:.2f}x with one, {gains[32]:.2f}x with 32; {ends}, least at {least}; most tokens/s at {best}"
        yield row("ours", f"context {CONTEXT}, {name}: gain with 8 sequences", None, gains[8], "x",
                  kind="direction", text="one sequence only", note=note)  # fmt: skip


def served(requests: int) -> Iterator[Comparison]:
    """Through the engine: requests of 128 + 128 tokens at three rates, batches as vLLM V1 makes them."""
    answers = Sparsity().recompute_miss * 64 / 192
    for rate_per_s in (0.1, 1.0, 4.0):
        mean_s = [
            _tpot_s(name, options, rate_per_s, requests)
            for name, options in (
                ("vllm", {}),
                ("deja-vu", {"recompute_miss": answers}),
                ("deja-vu", {"recompute_miss": 0.0}),
            )
        ]
        gains = [mean_s[0] / value for value in mean_s[1:]]
        note = f"{1e3 * mean_s[0]:.0f} ms dense; {gains[1]:.2f}x if no KV is missing"
        yield row("ours", f"served at {rate_per_s:g}/s: gain in mean TPOT", None, gains[0], "x",
                  kind="direction", text="one sequence only", note=note)  # fmt: skip


def _tpot_s(name: str, options: Mapping[str, Any], rate_per_s: float, requests: int) -> float:
    problem = Problem(
        cluster=A100, model=OPT, cost=Roofline(), workload=Workload(rate_per_s=rate_per_s, lengths=((128, 128),))
    )
    source = TraceSource(generate(requests, rate_per_s, input=Fixed(tokens=128), output=Fixed(tokens=128)))
    result = simulate(problem, SYSTEMS[name](tp=GPUS, **options), source)
    return float(summarise(result, Slo())["tpot_s"]["mean"])


# ---------------------------------------------------------------- the figure


def drawn() -> Drawing:
    """Union density, gain, throughput by batch."""
    found = by_batch()
    styles = run_styles(CURVES)
    with styled():
        figure = Figure(figsize=(11.5, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _densities(left, found)
        for name, curve in found.groupby("curve", sort=False):
            middle.plot(curve["batch"], curve["gain"], **styles[str(name)])
            right.plot(curve["batch"], curve["tokens_per_s"], **styles[str(name)])
        dense = found[found["curve"] == next(iter(CURVES))]
        right.plot(dense["batch"], 1e3 * dense["batch"] / dense["dense_ms"], color="#009E73", label="dense")
        guide(middle, y=1, text="as dense")
        _axes(left, "needed by a step (% of a layer)", "Union density")
        _axes(middle, "dense over sparse step time", "Gain")
        _axes(right, "tokens per second", "Throughput")
        for axes in (middle, right):
            axes.set_yscale("log")
            log_ticks(axes, "y")
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return Drawing(figure, found)


def _densities(axes: Axes, found: pd.DataFrame) -> None:
    for part, (name, overlap) in product(("heads", "neurons"), (("independent", 0), ("half shared", 0.5))):
        curve = found[found["curve"] == list(CURVES)[1 if not overlap else 2]]
        colour = "#0072B2" if part == "heads" else "#D55E00"
        axes.plot(
            curve["batch"], 100 * curve[part], color=colour, linestyle="--" if overlap else "-", label=f"{part}, {name}"
        )
    axes.set_ylim(0, 103)
    axes.legend(fontsize=8, loc="lower right")


def _axes(axes: Axes, label: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    axes.set_xlabel("sequences in a decode step")
    axes.set_ylabel(label)
    axes.set_title(title)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_dejavu.md, .csv, .png, .svg and more")
    parser.add_argument("--quick", action="store_true", help="fewer requests, for half a minute")
    given = parser.parse_args(arguments)
    write(given.out, "study_dejavu", TITLE, INTRO, list(study(40 if given.quick else 400)))
    save(drawn(), given.out, "study_dejavu_batch")


if __name__ == "__main__":
    main()
