"""Splitwise's tables and figures beside ours: ``python -m experiments.study_splitwise --out docs [--quick | --whole]``.

Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024 (arXiv 2311.18677v2).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.progress import Log
from experiments.splitwise_world import (
    MACHINE_BYTES,
    Letter,
    World,
    reference,
)
from experiments.study import Comparison, write
from sim import SYSTEMS, Request, simulate
from sim.cost import seconds
from sim.planners.provisioning import Design, alone, fewest_machines, most_requests
from sim.types import Work
from traces import TraceSource

INTRO = f"""
Splitwise (ISCA 2024) splits prompt and token machines of eight GPUs. Rows marked splitwise-sim repeat, on purpose,
the defects of the authors' simulator (`compat=splitwise_sim`, {MACHINE_BYTES / 1e9:.0f} GB a machine); those marked
corrected are ours. Step times are the authors' own measurements (perf_model.csv). The paper does not name the model of
its cluster figures: BLOOM-176B is taken, as its context suggests. Traces are drawn anew from the quantiles of the
public Azure traces, input and output independently, as theirs were. Machine counts are what the search found; nothing
is tuned.

Where machine counts differ: designs next to each other do nearly as well, because a machine of the other kind fills in
through the mixed pool. At 70 coding requests a second 27 + 3 machines (splitwise-sim) meet the limits of TTFT and miss
those of TBT, 2.6 times at P90 for 1.5, since prompt machines that take decodes in pause them for prompts; 30 + 2 meet
all. The corrected simulator needs more token machines, since a batch of decodes costs what was measured, and so gains
less over its baseline.

Regenerate with `python -m experiments.study_splitwise --out docs`.
"""
RATE_STEP_PER_S = 5.0


class Scale(NamedTuple):
    """How much of the evaluation is run: share of the machines (and of the rates), seconds of the trace."""

    machines: float
    duration_s: float

    def count(self, machines: int) -> int:
        return max(2, round(machines * self.machines))


FULL, HALF, QUICK = Scale(1.0, 120.0), Scale(0.5, 60.0), Scale(0.15, 30.0)


def study(scale: Scale, log: Log, split_scale: Scale | None = None) -> Iterator[Comparison]:
    """``split_scale``: of the searches for the best split, the long ones; default: as everything else."""
    yield from latencies()
    yield from batching()
    yield from transfers()
    yield from active_tokens(scale)
    yield from cheapest(scale, log)
    yield from splits(split_scale or scale, log)


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
            yield _row("Table 4", what, theirs * 1e3, ours * 1e3, "ms", "measured profile", note="median lengths")


def batching() -> Iterator[Comparison]:
    """Figure 5b, section 3.3, and what splitwise-sim makes of both."""
    for letter, name in (("A", "A100"), ("H", "H100")):
        cost = reference("bloom-176b", False, letter)
        one, many = (seconds(cost, Work((), n, 576 * n)) for n in (1, 64))
        yield _row("Fig. 5b", f"BLOOM, {name}, TBT at batch 64 over batch 1", 2.0, many / one, "x", "measured profile")
    cost = reference("bloom-176b", False, "H")
    prompt = seconds(cost, Work(((1500, 0),), 0, 0))
    tokens = prompt / seconds(cost, Work((), 1, 1501))
    note = "the printed 6 is rounded, its GPU not named"
    yield _row(
        "Sec. 3.3", "BLOOM, output tokens in the time of 1500 of prompt", 6.0, tokens, "", "measured profile", note=note
    )


def transfers() -> Iterator[Comparison]:
    """Figures 14 and 15: what stays visible of a KV transfer between two machines, one request at a time."""
    request = Request(id=0, arrival_s=0.0, input_tokens=1500, output_tokens=13)
    for letter, printed in (("A", 8.0), ("H", 5.0)):
        visible = _pair(letter, "per-layer", request)["transfer_s"]  # type: ignore[arg-type]
        note = "fitted to this figure (sync_s), plus the last layer"
        yield _row(
            "Fig. 14",
            f"visible per-layer transfer, {letter}100 pair",
            printed,
            visible * 1e3,
            "ms",
            "measured profile",
            note=note,
        )
    for how, second, whole in (("per-layer", 16.5, 0.8), ("serial", 64.0, 3.0)):
        split, base = _pair("H", how, request), alone(reference("bloom-176b", False, "H"), 1500, 13)
        step = base.tpot_s
        yield _row(
            "Fig. 15",
            f"{how}, second token later by",
            second,
            100 * split["transfer_s"] / step,
            "%",
            "measured profile",
        )
        ours = 100 * (split["e2e_s"] / base.e2e_s - 1)
        text = "up to 3 %" if how == "serial" else ""
        yield _row("Fig. 15", f"{how}, E2E longer by", whole, ours, "%", "measured profile", text=text)


def _pair(letter: Letter, how: str, request: Request) -> Mapping[str, float]:
    world = World(prompt=letter, token=letter, trace="coding", compat=False)
    pools = {"prefill": {"replicas": 1, "tp": 8}, "decode": {"replicas": 1, "tp": 8}}
    problem = world.problem(Design(1, 1), 1.0)
    result = simulate(problem, SYSTEMS["splitwise"](transfer=how, **pools), TraceSource([request]))
    return {name: float(column[0]) for name, column in result.columns.items() if name.endswith("_s")}


def active_tokens(scale: Scale) -> Iterator[Comparison]:
    """Figure 4: how long a lone machine has few tokens active."""
    world = World(
        prompt="H", token=None, trace="conversation", model="llama-2-70b", compat=False, duration_s=5 * scale.duration_s
    )
    steps = world.replay(Design(1, 0), 2.0).rows.steps
    busy = sum(step.end_ps - step.start_ps for step in steps)
    few = sum(step.end_ps - step.start_ps for step in steps if step.prefill_tokens + step.decode_seqs <= 20)
    note = "baseline, H100, Llama-2-70B; 65 stands for the middle"
    yield _row("Fig. 4", "conversation, 2 req/s: busy time with at most 20 tokens active", 65.0, 100 * few / busy, "%",
               "measured profile", text="60-70 %", note=note)  # fmt: skip


# ---------------------------------------------------------------- clusters


def cheapest(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Figure 12: the cheapest Splitwise-HH for coding at 70 requests/s."""
    rate = 70.0 * scale.machines
    most = Design(scale.count(45), scale.count(12))
    for world in _both(World(prompt="H", token="H", trace="coding", duration_s=scale.duration_s)):
        found = fewest_machines(world.feasible, rate, lambda d: d.prompts + d.tokens, most=most)
        log.say(f"{_label(world)} at {rate:g} req/s: {found}")
        prompts, tokens = (found.prompts, found.tokens) if found else (None, None)
        note = _scaled(scale)
        yield _row(
            "Fig. 12",
            f"{_label(world)}, coding 70 req/s, prompt machines",
            27 * scale.machines,
            prompts,
            "",
            _basis(world),
            kind="aim",
            note=note,
        )
        yield _row(
            "Fig. 12",
            f"{_label(world)}, coding 70 req/s, token machines",
            3 * scale.machines,
            tokens,
            "",
            _basis(world),
            kind="aim",
            note=note,
        )


SPLITS: tuple[tuple[Letter, str, int, int], ...] = (
    ("A", "coding", 70, 55), ("H", "coding", 40, 35), ("H", "conversation", 40, 25),
)  # fmt: skip
"""Section 6.2: machine type, trace, machines of equal power, how many of them are for prompts."""


def splits(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Section 6.2 and figure 18a: the best split of 70 DGX-A100 or 40 DGX-H100, and what it serves."""
    best: dict[tuple[str, str, bool], float] = {}
    for letter, trace, machines, prompts in SPLITS:
        for world in _both(World(prompt=letter, token=letter, trace=trace, duration_s=scale.duration_s)):
            found = _most(world, scale, machines)
            log.say(f"{_label(world)}, {trace}: {found}")
            ours = found.design.prompts if found else None
            note = _scaled(scale) + (f"{found.rate_per_s:g} req/s" if found else "")
            what = f"{_label(world)}, {trace}, prompt machines of {machines}"
            yield _row("Sec. 6.2", what, prompts * scale.machines, ours, "", _basis(world), kind="aim", note=note)
            best[letter, trace, world.compat] = found.rate_per_s if found else 0.0
    yield from _against_baselines(scale, log)


def _against_baselines(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Figure 18a: conversation at equal power and, for AA, equal cost."""
    for world in _both(World(prompt="A", token="A", trace="conversation", duration_s=scale.duration_s)):
        split = _most(world, scale, 70)
        base = _most(replace(world, token=None), scale, 70)
        log.say(f"{_label(world)} {split}, baseline {base}")
        ratio = split.rate_per_s / base.rate_per_s if split and base else None
        note = _scaled(scale) + (f"{split.rate_per_s:g} and {base.rate_per_s:g} req/s" if split and base else "")
        what = f"{_label(world)} over Baseline-A100, conversation, equal power"
        yield _row("Fig. 18a", what, 2.15, ratio, "x", _basis(world), note=note)


def _most(world: World, scale: Scale, machines: int) -> Any:
    count = scale.count(machines)
    designs = [Design(prompts, count - prompts) for prompts in range(1, count)] if world.token else [Design(count, 0)]
    step = max(1.0, RATE_STEP_PER_S * scale.machines)
    return most_requests(world.feasible, designs, low=step, high=step * 100, step=step)


# ---------------------------------------------------------------- rows


def _both(world: World) -> Iterator[World]:
    yield world
    yield replace(world, compat=False)


def _label(world: World) -> str:
    return f"{world.name} ({'splitwise-sim' if world.compat else 'corrected'})"


def _basis(world: World) -> Any:
    return "splitwise-sim's model" if world.compat else "measured profile"


def _scaled(scale: Scale) -> str:
    return "" if scale == FULL else f"{scale.machines:g} of the machines and rate, {scale.duration_s:g} s; "


def _row(
    where: str, what: str, published: float, ours: float | None, unit: str, basis: Any,
    *, kind: Any = "ratio", text: str = "", note: str = "",
) -> Comparison:  # fmt: skip
    return Comparison(
        where=where,
        what=what,
        unit=unit,
        kind=kind,
        basis=basis,
        published=published,
        ours=ours,
        text=text,
        note=note.strip("; "),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_splitwise.md, .csv, .png and .svg")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a sixth of the machines, for half a minute")
    size.add_argument("--whole", action="store_true", help="best splits of whole clusters too (an hour or two)")
    given = parser.parse_args(arguments)
    whole = study(FULL, Log()) if given.whole else study(FULL, Log(), HALF)
    rows = list(study(QUICK, Log()) if given.quick else whole)
    write(given.out, "study_splitwise", "Splitwise: published and simulated", INTRO, rows)


if __name__ == "__main__":
    main()
