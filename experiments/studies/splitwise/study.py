"""Splitwise's figures beside ours.

``python -m experiments.studies.splitwise --out docs/studies/splitwise [--quick | --whole]``.

Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024 (arXiv 2311.18677v2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from experiments.studies.splitwise.clusters import clusters
from experiments.studies.splitwise.search import FULL, HALF, QUICK, Scale, Search, Verdicts
from experiments.studies.splitwise.world import MACHINE_BYTES, Letter, World, reference
from sim import SYSTEMS, Request, simulate
from sim.cost import seconds
from sim.planners.provisioning import Design, alone
from sim.types import Work
from traces import TraceSource

INTRO = f"""
Splitwise (ISCA 2024) splits prompt and token machines of eight GPUs. Rows marked splitwise-sim repeat, on purpose,
the defects of the authors' simulator (`compat=splitwise_sim`, {MACHINE_BYTES / 1e9:.0f} GB a machine); those marked
corrected are ours. Step times are the authors' own measurements (perf_model.csv). The paper does not name the model of
its cluster figures: BLOOM-176B is taken, as its context suggests. Traces are drawn anew from the quantiles of the
public Azure traces, input and output independently, as theirs were. Machine counts are what the search found; nothing
is tuned.

Clusters of equal power or cost have what 40 DGX-H100 have by table 1: 70 times the power of a DGX-A100, 1520 dollars an
hour. A cluster serves a rate if all nine slowdowns of table 6 are met on the trace; rates are multiples of 5 a second
at full size. A search replays the trace for one cluster and rate after another: it begins where the same search at a
fifth of the size ended, ends a replay once more requests exceed a limit than may, and asks every cluster that serves
the best rate for a step more.

Where machine counts differ: designs next to each other do nearly as well, because a machine of the other kind fills in
through the mixed pool; with 41 to 69 prompt machines, 70 DGX-A100 serve conversations at the same rate. At 70 coding
requests a second 27 + 3 machines (splitwise-sim) meet the limits of TTFT and miss those of TBT, 2.6 times at P90 for
1.5, since prompt machines that take decodes in pause them for prompts; 30 + 2 meet all. The corrected simulator needs
more token machines, since a batch of decodes costs what was measured, and so gains less over its baseline.

Regenerate with `python -m experiments.studies.splitwise --out docs/studies/splitwise --whole`.
"""


class Size(NamedTuple):
    """Scale of the clusters in splitwise-sim's model, and in the corrected one."""

    theirs: Scale
    ours: Scale


def study(size: Size, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    yield from latencies()
    yield from batching()
    yield from transfers()
    yield from active_tokens(size.ours.duration_s)
    verdicts = Verdicts(cache)
    yield from clusters(Search(size.theirs, log, verdicts), Search(size.ours, log, verdicts))


# ---------------------------------------------------------------- single requests


def latencies() -> Iterator[Comparison]:
    """Table 4: the median request alone, Llama-2-70B."""
    printed: dict[tuple[str, Letter], tuple[float, float, float]] = {
        ("coding", "A"): (0.185, 0.052, 0.856), ("coding", "H"): (0.095, 0.031, 0.493),
        ("conversation", "A"): (0.155, 0.040, 4.957), ("conversation", "H"): (0.084, 0.028, 3.387),
    }  # fmt: skip
    medians = {"coding": (1500, 13), "conversation": (1020, 129)}
    for (trace, letter), figures in printed.items():
        found = alone(reference("llama-2-70b", False, letter), *medians[trace])
        for metric, theirs, ours in zip(("TTFT", "TBT", "E2E"), figures, found, strict=True):
            what = f"{trace}, {'A100' if letter == 'A' else 'H100'}, {metric}"
            yield row("Table 4", what, theirs * 1e3, ours * 1e3, "ms", "measured profile", note="median lengths")


def batching() -> Iterator[Comparison]:
    """Figure 5b, section 3.3, and what splitwise-sim makes of both."""
    for letter, name in (("A", "A100"), ("H", "H100")):
        cost = reference("bloom-176b", False, letter)
        one, many = (seconds(cost, Work((), n, 576 * n)) for n in (1, 64))
        yield row("Fig. 5b", f"BLOOM, {name}, TBT at batch 64 over batch 1", 2.0, many / one, "x", "measured profile")
    cost = reference("bloom-176b", False, "H")
    prompt = seconds(cost, Work(((1500, 0),), 0, 0))
    tokens = prompt / seconds(cost, Work((), 1, 1501))
    note = "the printed 6 is rounded, its GPU not named"
    yield row(
        "Sec. 3.3", "BLOOM, output tokens in the time of 1500 of prompt", 6.0, tokens, "", "measured profile", note=note
    )


def transfers() -> Iterator[Comparison]:
    """Figures 14 and 15: what stays visible of a KV transfer between two machines, one request at a time."""
    request = Request(id=0, arrival_s=0.0, input_tokens=1500, output_tokens=13)
    printed: dict[Letter, float] = {"A": 8.0, "H": 5.0}
    for letter, theirs in printed.items():
        visible = _pair(letter, "per-layer", request)["transfer_s"]
        note = "fitted to this figure (sync_s), plus the last layer"
        yield row(
            "Fig. 14",
            f"visible per-layer transfer, {letter}100 pair",
            theirs,
            visible * 1e3,
            "ms",
            "measured profile",
            note=note,
        )
    for how, second, whole in (("per-layer", 16.5, 0.8), ("serial", 64.0, 3.0)):
        split, base = _pair("H", how, request), alone(reference("bloom-176b", False, "H"), 1500, 13)
        step = base.tpot_s
        yield row(
            "Fig. 15",
            f"{how}, second token later by",
            second,
            100 * split["transfer_s"] / step,
            "%",
            "measured profile",
        )
        ours = 100 * (split["e2e_s"] / base.e2e_s - 1)
        text = "up to 3 %" if how == "serial" else ""
        yield row("Fig. 15", f"{how}, E2E longer by", whole, ours, "%", "measured profile", text=text)


def _pair(letter: Letter, how: str, request: Request) -> Mapping[str, float]:
    world = World(prompt=letter, token=letter, trace="coding", compat=False)
    pools = {"prefill": {"replicas": 1, "tp": 8}, "decode": {"replicas": 1, "tp": 8}}
    problem = world.problem(Design(1, 1), 1.0)
    result = simulate(problem, SYSTEMS["splitwise"](transfer=how, **pools), TraceSource([request]))
    return {name: float(column[0]) for name, column in result.columns.items() if name.endswith("_s")}


def active_tokens(duration_s: float) -> Iterator[Comparison]:
    """Figure 4: how long a lone machine has few tokens active."""
    world = World(
        prompt="H", token=None, trace="conversation", model="llama-2-70b", compat=False, duration_s=5 * duration_s
    )
    steps = world.replay(Design(1, 0), 2.0).rows.steps
    busy = sum(step.end_ps - step.start_ps for step in steps)
    few = sum(step.end_ps - step.start_ps for step in steps if step.prefill_tokens + step.decode_seqs <= 20)
    note = "baseline, H100, Llama-2-70B; 65 stands for the middle"
    yield row("Fig. 4", "conversation, 2 req/s: busy time with at most 20 tokens active", 65.0, 100 * few / busy, "%",
               "measured profile", text="60-70 %", note=note)  # fmt: skip


STUDY = Study(
    name="study_splitwise",
    title="Splitwise: published and simulated",
    intro=INTRO,
    sizes={
        "": (Size(HALF, HALF), ""),
        "quick": (Size(QUICK, QUICK), "a sixth of the machines, for half a minute"),
        "whole": (Size(FULL, HALF), "clusters of full size, two minutes of trace, in splitwise-sim's model (an hour)"),
        "whole-both": (Size(FULL, FULL), "so in the corrected model too (some hours)"),
    },
    rows=study,
    cached=True,
)
