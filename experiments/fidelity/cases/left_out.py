"""Whole steps on GPUs whose own tables are left out: what a run on a machine that nobody measured rests on.

``steps``: every GPU that has kernel tables, from those of its nearest relative and both specification sheets,
all-reduces by formula (as ``calibrate.profile.relatives`` does it). ``older``: GPUs of Helix's tables from
vLLM's kernels of a relative, else by roofline. Both compare kernels alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from calibrate.profile.relatives import kernels_for
from calibrate.profile.scaling import scaled
from experiments.fidelity.setup import shipped
from experiments.fidelity.table import Bar, Row, Study, Use, errors, judged, median_bar
from sim.cluster import Cluster, gpu
from sim.cost import Fitted, Overhead, Profile, StageCost, seconds
from sim.model import model
from sim.types import Stage, Work

STEPS, OLDER = "left-out-steps", "left-out-older"
NEAREST = {
    "A100-80G-SXM": "H100-SXM", "H100-SXM": "H200-SXM", "H200-SXM": "H100-SXM", "L40S": "RTX-PRO-6000",
    "RTX-PRO-6000": "L40S",
}  # fmt: skip
TABLES = {
    "A100-80G-SXM": "vllm-0.14-a100-80g-sxm", "L40S": "vllm-0.14-l40s", "H100-SXM": "vllm-0.19-h100-sxm",
    "H200-SXM": "vllm-0.19-h200-sxm", "RTX-PRO-6000": "vllm-0.19-kernels-rtx-pro-6000",
}  # fmt: skip
MODELS = (("llama-3.1-8b", 1), ("qwen3-32b", 2), ("llama-3.1-70b", 4), ("qwen3-30b-a3b", 1))
PROMPTS = ((128, 0), (512, 0), (2048, 0), (8192, 0), (512, 2048), (2048, 8192))
"""Tokens of a chunk, and its context."""
DECODES = ((1, 512), (1, 4096), (8, 1024), (32, 512), (64, 1024), (64, 4096), (128, 512), (256, 1024))
"""Sequences, and the context of each."""
OLD_PROMPTS, OLD_DECODES = (64, 128, 256, 512, 1024), (1, 4, 8, 16, 32)
OLD_CONTEXT = 500
POWERED = ("T4", "L4")
"""GPUs one of whose constants was fitted on LLaMA-30B's prompts."""


def steps(_measured: Path) -> Study:
    """The argument is there for all studies to be alike."""
    rows = tuple(row for target in NEAREST for name, tp in MODELS for row in _pair(target, name, tp))
    alone = [row for row in rows if " TP1" in row.case]
    return Study(
        title="Steps on a GPU whose own kernel tables are left out, from its nearest relative's",
        rows=rows,
        bars=(
            median_bar(STEPS, judged(alone, "prefill"), 0.15, 0.08),
            median_bar(STEPS, judged(alone, "decode"), 0.15, 0.08),
            *(replace(bar, name=f"{bar.name}, with all-reduces") for bar in _together(rows)),
        ),
        notes=(
            "both sides are kernels (no overhead): aiconfigurator's of the GPU, and of its relative by specification, "
            f"all-reduces by formula; relatives: {', '.join(f'{a} from {b}' for a, b in NEAREST.items())}",
            "beyond 20 %: prompts on four PCIe cards, whose rings differ sevenfold between machines (state "
            "links.intra_node), the L40S's chunks of 512 tokens, whose GEMMs fill its units another number of times "
            "over, and the A100's decodes with few heads a GPU",
            "a mixture's experts are a roofline on both sides, so that they cannot differ",
        ),
        summary=tuple(_summary(rows)),
    )


def _together(rows: Sequence[Row]) -> Iterator[Bar]:
    shared = [row for row in rows if " TP1" not in row.case]
    yield median_bar(STEPS, judged(shared, "prefill"), 0.20, 0.10)
    yield median_bar(STEPS, judged(shared, "decode"), 0.20, 0.10)


def _pair(target: str, name: str, tp: int) -> Iterator[Row]:
    source = NEAREST[target]
    made = scaled(shipped(TABLES[source]), gpu(source), gpu(target))
    made = replace(made, kernels=tuple(replace(part, all_reduce={}) for part in made.kernels))
    costs = [_bound(profile, target, name, tp) for profile in (shipped(TABLES[target]), made)]
    for metric, work, size in _works():
        measured_s, predicted_s = (seconds(cost, work) for cost in costs)
        yield Row(
            study=STEPS, case=f"{target}, {name} TP{tp}: {size}", metric=metric, unit="ms", measured=measured_s * 1e3,
            predicted=predicted_s * 1e3, load=None,
        )  # fmt: skip


def _works() -> Iterator[tuple[str, Work, str]]:
    for tokens, context in PROMPTS:
        yield "prefill", Work(((tokens, context),), 0, 0), f"{tokens} x {context}"
    for count, context in DECODES:
        yield "decode", Work((), count, count * context), f"{count} x {context}"


def _bound(profile: Profile, kind: str, name: str, tp: int, overhead: Overhead | None = None) -> StageCost:
    cluster = Cluster.of(nodes=[{"gpu": kind, "count": tp}])
    spec = model(name)
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    return Fitted(profiles=(profile,), overhead=overhead or Overhead()).bind(spec, stage, cluster)


def _summary(rows: Sequence[Row]) -> Iterator[dict[str, object]]:
    """By model and kind of step: over all GPUs and sizes; the worst cell."""
    for name, tp in MODELS:
        for metric in ("prefill", "decode"):
            mine = [row for row in rows if f" {name} TP{tp}:" in row.case and row.metric == metric]
            worst = max(mine, key=lambda row: abs(row.error))
            yield {
                "model": f"{name} TP{tp}",
                "steps": metric,
                "points": len(mine),
                "bias": f"{np.median([row.error for row in mine]) * 100:+.0f} %",
                "median error": f"{np.median(errors(mine)) * 100:.0f} %",
                "beyond 20 %": f"{np.mean(np.array(errors(mine)) > 0.2) * 100:.0f} %",
                "largest": f"{worst.error * 100:+.0f} % ({worst.case.replace(f', {name} TP{tp}', '')})",
            }


def older(_measured: Path) -> Study:
    """GPUs that only Helix's tables have."""
    rows = tuple(_older_rows())
    return Study(
        title="Older GPUs without their own tables, against Helix's steps",
        rows=rows,
        bars=(
            median_bar(OLDER, judged(rows, "prefill"), 0.25, 0.15),
            median_bar(OLDER, judged(rows, "decode"), 0.20, 0.10),
        ),
        notes=(
            "measured: Helix's profile (LLaMA-30B and LLaMA-2-70B, vLLM of 2024, its own attention kernels); "
            "predicted: kernels of the L40S and A100 by specification, T4 and V100 by roofline; 2 ms a step",
            "fitted: what 70 W hold of the data sheet's FLOP/s on T4 and L4, on LLaMA-30B's prompts; those of "
            "LLaMA-2-70B judge",
            "beyond 20 %: decodes of 32 sequences, over 16 thousand tokens of which Helix's engine takes 1.3 times as "
            "long on every GPU, and prompts of up to 256 tokens, whose times the source rounds to whole ms",
        ),
    )


def _older_rows() -> Iterator[Row]:
    truth = shipped("helix-2025")
    for entry in truth.entries:
        kind = entry.gpus[0]
        guess = kernels_for(gpu(kind)) or replace(truth, entries=())
        true = _bound(truth, kind, entry.model, entry.tp)
        made = _bound(guess, kind, entry.model, entry.tp, Overhead(step_s=0.002))
        prompts = [("prefill", tokens, Work(((tokens, 0),), 0, 0)) for tokens in OLD_PROMPTS]
        decodes = [("decode", count, Work((), count, count * OLD_CONTEXT)) for count in OLD_DECODES]
        for metric, size, work in (*prompts, *decodes):
            use: Use = "fitted" if kind in POWERED and metric == "prefill" and entry.model == "llama-30b" else "judged"
            yield Row(
                study=OLDER, case=f"{kind}, {entry.model} TP{entry.tp}: {size}", metric=metric, unit="ms",
                measured=seconds(true, work) * 1e3, predicted=seconds(made, work) * 1e3, load=None, use=use,
            )  # fmt: skip
