"""Every system on one cluster, trace and price list.

``python -m experiments.studies.side_by_side --out docs/studies/side_by_side``.

Runs ``side_by_side.yaml`` at several arrival rates and writes side_by_side.md with two figures: the share of requests
within the SLO by rate, and all that one working point shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.plots.heat import heat
from experiments.plots.ranking import ranking, ranking_table
from experiments.plots.run.gallery import headline, slo_of
from experiments.plots.style import save
from experiments.runs.comparison import run_all, variants
from experiments.runs.progress import Log
from experiments.runs.rundir import Run
from experiments.scenario.file import Scenario
from traces.write import replacing

SCENARIO = Path(__file__).with_name("side_by_side.yaml")
RATES_PER_S = (2.0, 4.0, 5.5, 7.0, 8.5, 10.0, 12.0, 14.0)
SHOWN_PER_S = 7.0
"""Of the working point that is shown in full."""
NAME = "side_by_side"
INTRODUCTION = """\
# Every system side by side

One model, one cluster of 20 GPUs of three kinds, one trace of 2,500 conversations, one price list, one pair of latency
targets (TTFT 2 s, TPOT 0.1 s): `experiments/studies/side_by_side/side_by_side.yaml`. Each system is laid out as its
own planner would at that rate; those without one take four GPUs a replica, split systems three replicas for prompts
and two for decodes. Nothing is tuned, so a layout by hand could do better; step times are predicted (`phasewise
profiles`), not measured on this cluster. It is one question put to all of them, not the one that each paper asked:
Melange rents no more than it needs, ExeGPT's schedules are for the H100s alone, AlpaServe was made for many models,
Deja Vu's sparsity is assumed; SpotServe, made for machines that go away, runs each batch to its end, so that requests
wait for the one before.

The share of requests within both targets, by arrival rate (requests/s); "no plan": its planner says that the cluster
cannot serve this rate within the targets.

![attainment by rate](side_by_side.png)
"""


def attainments(runs: Mapping[float, Mapping[str, Run]], labels: Sequence[str]) -> pd.DataFrame:
    """Rows system, the one that keeps most over all rates first; columns rate; empty where there is no plan."""
    shares = {rate: {label: run.summary["slo"]["attainment"] for label, run in at.items()} for rate, at in runs.items()}
    table = pd.DataFrame(shares, index=pd.Index(labels, name="system"), dtype=float)
    order = table.fillna(0).mean(axis=1).sort_values(ascending=False, kind="stable").index
    return table.loc[order]


def markdown(shown: pd.DataFrame, left_out: Mapping[str, str], rate_per_s: float) -> str:
    """The page, with the working point as a table."""
    lines = [
        INTRODUCTION,
        f"At {rate_per_s:g} requests/s, the highest goodput first. Costs are per million output tokens, of the whole",
        "cluster and of the GPUs on which replicas were up:",
        "",
        "![one working point](side_by_side_point.png)",
        "",
        "| System | TTFT p50 / p99 (s) | TPOT p50 / p99 (s) | Within the SLO | Goodput (requests/s) | Cluster | Used |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in shown.iterrows():
        cells = (
            f"`{row['run']}`",
            f"{row['ttft_p50_s']:.3f} / {row['ttft_p99_s']:,.2f}",
            f"{row['tpot_p50_s']:.4f} / {row['tpot_p99_s']:.4f}",
            f"{row['attainment']:.1%}",
            f"{row['goodput_per_s']:.2f}",
            f"${row['usd_per_million_tokens']:.2f}",
            f"${row['used_usd_per_million_tokens']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"`{label}` is left out: {reason}" for label, reason in left_out.items())]
    lines += [
        "Regenerate with `python -m experiments.studies.side_by_side --out docs/studies/side_by_side` "
        "(about fifteen minutes on one core)."
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {NAME}.md and its figures")
    parser.add_argument("--limit", type=int, help="only so many requests of the trace")
    given = parser.parse_args(arguments)
    log = Log()
    scenario = Scenario.load(SCENARIO, [] if given.limit is None else [f"workload.limit={given.limit}"])
    runs: dict[float, dict[str, Run]] = {}
    left_out: dict[str, str] = {}
    for rate in RATES_PER_S:
        log.say(f"{rate:g} requests/s")
        chosen = {label: one.at(rate_per_s=rate, seed=scenario.seed) for label, one in variants(scenario).items()}
        runs[rate], reasons = run_all(chosen, log)
        left_out = reasons if rate == SHOWN_PER_S else left_out
    point = runs[SHOWN_PER_S]
    some = next(iter(point.values()))
    given.out.mkdir(parents=True, exist_ok=True)
    table = attainments(runs, list(variants(scenario)))
    save(heat(table, "Requests within the SLO", "arrivals (requests/s)"), given.out, NAME)
    save(ranking(point, slo_of(some), headline("one working point", some)), given.out, f"{NAME}_point")
    with replacing(given.out / f"{NAME}.md") as partial:
        partial.write_text(markdown(ranking_table(point), left_out, SHOWN_PER_S), encoding="utf-8")
