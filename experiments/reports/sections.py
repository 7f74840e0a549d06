"""What a report of each kind has: a headline in a sentence, then tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.plots.run.gallery import slo_of
from experiments.reports import charts
from experiments.reports.folder import Folder, Kind
from experiments.reports.tables import facts, table
from experiments.runs.rundir import Run
from experiments.runs.tables import METRICS, apart, engine_line, notes, winners
from experiments.sweeps.sweep import labelled
from sim.metrics import LATENCIES

SLOWEST = 20
PLAN = {
    "file": "plan",
    "found_by": "found by",
    "replicas": "replicas",
    "gpus": "GPUs",
    "idle_gpus": "idle",
    "simulated_attainment": "within SLO (%)",
    "predicted_attainment": "by the planner (%)",
    "goodput_per_s": "goodput (1/s)",
    "usd_per_hour": "$/h",
    "usd_per_million_tokens": "$/1M tokens",
    "requests_per_usd": "requests/$",
    "bottleneck": "bottleneck",
}
"""Columns of the table of plans, and what they are called there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """``parts``: Bokeh models, or SVG text. ``wide``: one part a row."""

    title: str
    parts: list[Any]
    text: str = ""
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    headline: str
    sections: list[Section]


def report(folder: Folder) -> Report:
    made = KINDS[folder.kind](folder)
    return Report(headline=made.headline, sections=[*made.sections, provenance(folder)])


# ---------------------------------------------------------------- runs


def _run(folder: Folder) -> Report:
    name, run = next(iter(folder.runs.items()))
    summary = run.summary
    rows = pd.DataFrame(
        {
            "latency": [_spoken(latency) for latency in LATENCIES],
            **{column: [summary[latency][column] for latency in LATENCIES] for column in
               ("mean", "p50", "p90", "p95", "p99", "max")},
        }
    )  # fmt: skip
    totals = [(metric.name, metric.text(metric.value(summary))) for metric in METRICS[6:]]
    sections = [
        Section(title="Latency", parts=[table(rows, name="latency")], text=_notes({name: summary}), wide=True),
        Section(title="Totals", parts=[facts(totals, name="totals")], wide=True),
        *_of_runs(folder),
        Section(title="The slowest requests", parts=[_slowest(run)], wide=True),
    ]
    return Report(headline=f"{summary['system']} on {_hardware(summary)}: {_kept(summary)}.", sections=sections)


def _comparison(folder: Folder) -> Report:
    summaries = {label: run.summary for label, run in folder.runs.items()}
    best = winners(summaries)
    columns = {
        label: [metric.text(metric.value(summary)) + (" *" if label in best[metric.name] else "") for metric in METRICS]
        for label, summary in summaries.items()
    }
    rows = pd.DataFrame({"metric": [metric.name for metric in METRICS], **columns})
    left_out = "".join(f" {label} is left out: {reason}." for label, reason in folder.summary["left_out"].items())
    others = "".join(f" {label}: {why}." for label, why in apart(summaries).items())
    metrics = Section(
        title="Side by side", parts=[table(rows, name="metrics")], wide=True,
        text="A star marks the best value of a row." + others + left_out + _notes(summaries),
    )  # fmt: skip
    return Report(headline=_winner(summaries), sections=[metrics, *_of_runs(folder)])


def _winner(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Who keeps most within the SLO, and at what price."""
    shares = {label: summary["slo"]["attainment"] or 0.0 for label, summary in summaries.items()}
    order = sorted(shares, key=lambda label: shares[label], reverse=True)
    first, summary = order[0], summaries[order[0]]
    others = ", ".join(f"{label} {shares[label]:.1%}" for label in order[1:])
    beside = f" ({others})" if others else ""
    equal = [label for label in order if round(shares[label], 3) == round(shares[first], 3)]
    what = f"{first} keeps {shares[first]:.1%} of the requests within the SLO{beside}"
    if len(equal) > 1:
        what = f"{', '.join(equal)} keep {shares[first]:.1%} of the requests within the SLO"
    return f"{what}, on {_hardware(summary)}, {_price(summary)}."


def _of_runs(folder: Folder) -> list[Section]:
    runs = folder.runs
    slo = slo_of(next(iter(runs.values())))
    replicas = pd.concat([_replicas(label, run) for label, run in runs.items()], ignore_index=True)
    timelines = [charts.timeline(label, run) for label, run in runs.items() if len(run.steps)]
    return [
        Section(title="Latency distributions", parts=charts.latency(runs, slo), text="The SLO is dotted."),
        Section(title="SLO attainment, memory and queues",
                parts=[charts.attainment(runs, slo), *charts.occupancy(runs)]),
        Section(title="What the GPUs do", parts=timelines, wide=True,
                text="The busiest seconds of each run. Drag to zoom in; the arrow back resets."),
        Section(title="Replicas", parts=[table(replicas, name="replicas")], wide=True),
    ]  # fmt: skip


def _replicas(label: str, run: Run) -> pd.DataFrame:
    kept = pd.DataFrame(run.summary["replicas"])
    shares = {"busy (%)": 100 * kept["busy_share"], "MFU (%)": 100 * kept["mfu"].astype(float)}
    plain = kept[["replica", "role", "gpu", "tp", "pp"]]
    return plain.assign(**shares, **{"energy (kJ)": kept["joules"].astype(float) / 1e3}).assign(run=label)


def _slowest(run: Run) -> Any:
    columns = ["request", "arrival_s", "input_tokens", "output_tokens", "queue_s", "prefill_s", "transfer_s",
               "decode_s", "ttft_s", "tpot_s", "e2e_s", "preemptions", "prefill_stage", "decode_stage"]  # fmt: skip
    rows = run.requests.sort_values("e2e_s", ascending=False).head(SLOWEST)[columns].reset_index(drop=True)
    return table(rows, name="slowest")


def _kept(summary: Mapping[str, Any]) -> str:
    slo = summary["slo"]
    bounds = ", ".join(f"{name.upper()} {slo[f'{name}_s']:g} s" for name in ("ttft", "tpot", "e2e") if slo[f"{name}_s"])
    rate = f"{summary['workload']['rate_per_s']:.3g} requests/s"
    if not summary["completed"]:
        return f"no request completed at {rate}"
    if not bounds:
        ttft, tpot = summary["ttft_s"]["p50"], summary["tpot_s"]["p50"]
        pace = "" if tpot is None else f" and TPOT {tpot:.4f} s"
        return f"at {rate} the median TTFT is {ttft:.3f} s{pace}, {_price(summary)}"
    return (
        f"at {rate}, {slo['attainment']:.1%} of {summary['requests']:,} requests are within {bounds}, {_price(summary)}"
    )


def _price(summary: Mapping[str, Any]) -> str:
    usd = summary["usd_per_million_tokens"]
    return "at an unknown price" if usd is None else f"at ${usd:,.2f} per million output tokens"


def _hardware(summary: Mapping[str, Any]) -> str:
    gpus = " + ".join(f"{count} {gpu}" for gpu, count in summary["gpus"].items())
    return f"{gpus} with {summary['model']}"


def _notes(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    said: dict[str, list[str]] = {}
    for label, summary in summaries.items():
        for note in notes(summary):
            said.setdefault(note, []).append(label)
    return "".join(
        f" {note if len(labels) == len(summaries) else ', '.join(labels) + ': ' + note}."
        for note, labels in said.items()
    )


def _spoken(latency: str) -> str:
    name = latency.removesuffix("_s")
    return f"{name.upper() if name in ('ttft', 'tpot', 'e2e') else name.replace('_', ' ')} (s)"


# ---------------------------------------------------------------- sweeps, goodput, plans


def _sweep(folder: Folder) -> Report:
    fields = folder.summary.get("fields", [])
    means, best = labelled(folder.tables["means"], fields), folder.summary["best_rates"]
    wide = means.pivot_table(index=["system", "rate_per_s"], columns="metric", values="mean", sort=False).reset_index()
    target = best[0]["target"]
    return Report(
        headline=_most(best, "carries", target),
        sections=[
            Section(title="Highest rates", parts=[table(_rates(best), name="best")], wide=True),
            Section(title="By arrival rate", parts=charts.rates(means, target),
                    text="Bands are 95 % intervals over seeds."),
            Section(title="What can be had at once", parts=charts.pareto(means),
                    text="Circled: no other point is better in both."),
            Section(title="All means", parts=[table(wide, name="means")], wide=True),
        ],
    )  # fmt: skip


def _goodput(folder: Folder) -> Report:
    rows = folder.summary["goodput"]
    reasons = "".join(f" {row['system']}: {row['reason']}." for row in rows if row.get("reason"))
    parts = [charts.goodput(folder.tables["curve"], rows[0]["target"])] if "curve" in folder.tables else []
    return Report(
        headline=_most(rows, "carries", rows[0]["target"]),
        sections=[
            Section(title="Goodput", parts=[table(_rates(rows), name="goodput")], text=reasons, wide=True),
            Section(title="Around it", parts=parts, wide=True),
        ],
    )


def _most(rows: list[Mapping[str, Any]], does: str, target: float) -> str:
    known = [row for row in rows if row["rate_per_s"] is not None]
    if not known:
        return f"No system keeps {target:.0%} of the requests within the SLO at any rate tried."
    best = max(known, key=lambda row: row["rate_per_s"])
    others = ", ".join(f"{row['system']} {row['rate_per_s']:.3g}" for row in known if row is not best)
    money = best.get("requests_per_usd")
    price = "" if money is None else f", {money:,.0f} requests per dollar"
    beside = f" ({others})" if others else ""
    return (
        f"{best['system']} {does} {best['rate_per_s']:.3g} requests/s with {target:.0%} within the SLO{beside}{price}."
    )


def _rates(rows: list[Mapping[str, Any]]) -> pd.DataFrame:
    names = {"system": "system", "rate_per_s": "requests/s", "half_width_per_s": "± (95 %)",
             "rate_per_s_per_gpu": "per GPU", "requests_per_usd": "requests per $"}  # fmt: skip
    frame = pd.DataFrame(rows)
    kept = [name for name in names if name in frame.columns]
    numbers = {name: frame[name].astype(float) for name in kept if name != "system"}
    return frame[kept].assign(**numbers).rename(columns=names)


def _plan(folder: Folder) -> Report:
    """The planner's own sentence where it has one; colocated vLLM beside it."""
    summary, best = folder.summary, folder.summary["plans"][0]
    baselines = summary.get("baselines", [])
    parts: list[Any] = [picture] if (picture := folder.picture("cluster")) else []
    log = folder.tables.get("search")
    shares = ", ".join(
        f"{100 * best[key]:.1f} % of the requests within the SLO {how}"
        for key, how in (("simulated_attainment", "in the engine"), ("predicted_attainment", "by the planner"))
        if best[key] is not None
    )
    price = "" if best["usd_per_hour"] is None else f", ${best['usd_per_hour']:,.2f} an hour"
    plain = f"The best plan has {best['replicas']} replicas on {_counted(best['gpus'])}: {shares}{price}."
    found = [charts.search(log)] if log is not None and len(log) else []
    return Report(
        headline=summary.get("sentence") or plain,
        sections=[
            Section(title="Plans", parts=[table(_plans(summary["plans"]), name="plans")], wide=True),
            Section(title="Colocated vLLM beside it", wide=True,
                    parts=[table(_plans(baselines), name="baselines")] if baselines else []),
            Section(title="The best one on its cluster", parts=parts, wide=True),
            Section(title="How it was found", parts=found, wide=True),
        ],
    )  # fmt: skip


def _plans(rows: list[Mapping[str, Any]]) -> pd.DataFrame:
    """The columns that ``PLAN`` names, without those that say nothing of any row; shares in per cent."""
    frame = pd.DataFrame([{**row, "gpus": _counted(row["gpus"])} for row in rows])
    frame = frame[[name for name in PLAN if name in frame.columns and frame[name].notna().any()]]
    for name in ("simulated_attainment", "predicted_attainment"):
        if name in frame.columns:
            frame[name] = 100 * frame[name].astype(float)
    return frame.rename(columns=PLAN)


def _counted(gpus: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {gpu}" for gpu, count in gpus.items())


# ---------------------------------------------------------------- where it all comes from


def provenance(folder: Folder) -> Section:
    """Step times with their held-out errors, what was assumed, and versions."""
    rows = [
        {
            "run": label, "GPU": row["gpu"], "TP": row["tp"], "basis": row["basis"], "profile": row["profile"] or "-",
            "engine": row["engine"] or "-",
            "held-out error, mean (largest)": ", ".join(
                f"{operator} {held['mape']:.1%} ({held['largest']:.0%})" for operator, held in row["held_out"].items()
            ) or "-",
            "source": row["source"],
        }
        for label, run in folder.runs.items()
        for row in run.summary.get("step_times", [])
    ]  # fmt: skip
    packages = folder.environment.get("packages", {})
    versions = [("git commit", folder.environment.get("git_commit")), ("python", folder.environment.get("python")),
                ("platform", folder.environment.get("platform")), *packages.items()]  # fmt: skip
    engines = [(label, engine_line(run.summary)) for label, run in folder.runs.items() if run.summary.get("engine")]
    parts: list[Any] = [table(pd.DataFrame(rows), name="step-times")] if rows else []
    parts += [facts([*engines, *versions], name="versions")]
    return Section(title="Where the figures come from", parts=parts, wide=True)


KINDS: Mapping[Kind, Callable[[Folder], Report]] = {
    "run": _run,
    "comparison": _comparison,
    "sweep": _sweep,
    "goodput": _goodput,
    "plan": _plan,
}
