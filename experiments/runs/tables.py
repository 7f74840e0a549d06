"""Summaries as tables for people: one run, and several side by side with the winner of each metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sim.metrics import LATENCIES

Summary = Mapping[str, Any]
Better = Literal["lower", "higher"]


class Metric(NamedTuple):
    """A row of the comparison: where its value stands in a summary, how it is shown, which way is better."""

    name: str
    keys: tuple[str, ...]
    better: Better | None
    form: str = "{:,.3f}"
    factor: float = 1.0

    def value(self, summary: Summary) -> float | None:
        value: Any = summary
        for key in self.keys:
            value = value.get(key)  # results saved before there was such a figure lack it
        return None if value is None else float(value) * self.factor

    def text(self, value: float | None) -> str:
        return "-" if value is None else self.form.format(value)


METRICS = (
    Metric("TTFT p50 (s)", ("ttft_s", "p50"), "lower"),
    Metric("TTFT p99 (s)", ("ttft_s", "p99"), "lower"),
    Metric("TPOT p50 (s)", ("tpot_s", "p50"), "lower", "{:,.4f}"),
    Metric("TPOT p99 (s)", ("tpot_s", "p99"), "lower", "{:,.4f}"),
    Metric("E2E p50 (s)", ("e2e_s", "p50"), "lower", "{:,.2f}"),
    Metric("E2E p99 (s)", ("e2e_s", "p99"), "lower", "{:,.2f}"),
    Metric("SLO attainment (%)", ("slo", "attainment"), "higher", "{:.1f}", 100),
    Metric("goodput (requests/s)", ("slo", "goodput_per_s"), "higher", "{:,.2f}"),
    Metric("output tokens/s", ("output_tokens_per_s",), "higher", "{:,.0f}"),
    Metric("cost ($ per 1M output tokens)", ("usd_per_million_tokens",), "lower", "{:,.2f}"),
    Metric("the same, of GPUs that were used", ("used_usd_per_million_tokens",), "lower", "{:,.2f}"),
    Metric("energy, modelled (J per output token)", ("joules_per_token",), "lower", "{:,.2f}"),
    Metric("makespan (s)", ("makespan_s",), "lower", "{:,.1f}"),
    Metric("completed (requests)", ("completed",), "higher", "{:,.0f}"),
    Metric("rejected (requests)", ("rejected",), "lower", "{:,.0f}"),
    Metric("failed (requests)", ("failed",), "lower", "{:,.0f}"),
    Metric("preemptions", ("preemptions",), "lower", "{:,.0f}"),
    Metric("KV moved (GB)", ("bytes_moved",), None, "{:,.1f}", 1e-9),
)
SHORT = {
    "TTFT p50 (s)": "TTFT\np50 (s)", "TTFT p99 (s)": "TTFT\np99 (s)", "TPOT p50 (s)": "TPOT\np50 (s)",
    "TPOT p99 (s)": "TPOT\np99 (s)", "E2E p99 (s)": "E2E\np99 (s)", "SLO attainment (%)": "in SLO\n(%)",
    "goodput (requests/s)": "goodput\n(req/s)", "cost ($ per 1M output tokens)": "$ per 1M\ntokens",
    "the same, of GPUs that were used": "of GPUs\nused",
}  # fmt: skip
"""Metrics of a table with a row a system, and their headings there."""
MOST_COLUMNS = 6
LATENCY_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def apart(summaries: Mapping[str, Summary]) -> dict[str, str]:
    """Systems that served another set of requests than most, and what they served: theirs are other figures.

    The set is that of the most systems, the larger one among equals. Results saved before it was kept count as alike.
    """
    sets = {label: summary.get("served") for label, summary in summaries.items()}
    sums = [found["sum"] for found in sets.values() if found is not None]
    if len(set(sums)) < 2:
        return {}
    sizes = {found["sum"]: found["requests"] for found in sets.values() if found is not None}
    common = max(sizes, key=lambda one: (sums.count(one), sizes[one]))
    return {
        label: f"it served another set of requests ({found['requests']:,} of {summaries[label]['requests']:,}; "
        f"others {sizes[common]:,}), so its figures get no star"
        for label, found in sets.items()
        if found is not None and found["sum"] != common
    }


def winners(summaries: Mapping[str, Summary]) -> dict[str, list[str]]:
    """Metric name -> labels with the best value as shown; none where all are equal or nobody has one.

    Who served another set of requests (``apart``) is not looked at.
    """
    best: dict[str, list[str]] = {}
    others = apart(summaries)
    for metric in METRICS:
        shown = {label: _shown(metric, summary) for label, summary in summaries.items() if label not in others}
        known = [value for value in shown.values() if value is not None]
        if metric.better is None or len(known) < 1 or len(set(shown.values())) == 1:
            best[metric.name] = []
            continue
        record = min(known) if metric.better == "lower" else max(known)
        best[metric.name] = [label for label, value in shown.items() if value == record]
    return best


def comparison_json(summaries: Mapping[str, Summary], left_out: Mapping[str, str]) -> dict[str, Any]:
    return {
        "systems": dict(summaries),
        "winners": winners(summaries),
        "left_out": dict(left_out),
        "apart": apart(summaries),
    }


def print_comparison(summaries: Mapping[str, Summary], left_out: Mapping[str, str], *, title: str) -> None:
    """Metrics as rows, systems as columns, the other way round for many; the winner is bold and starred."""
    console = _console()
    best = winners(summaries)
    console.print(_heading(title, next(iter(summaries.values()))), style="bold", highlight=False, markup=False)
    if len(summaries) > MOST_COLUMNS:
        console.print(_by_system(summaries, best))
    else:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("metric")
        for label in summaries:
            table.add_column(label, justify="right", no_wrap=True)
        for metric in METRICS:
            table.add_row(metric.name, *(_cell(metric, label, summaries, best) for label in summaries))
        console.print(table)
    said: dict[str, list[str]] = {}
    for label, summary in summaries.items():
        for note in notes(summary):
            said.setdefault(note, []).append(label)
    for label, why in apart(summaries).items():
        console.print(f"{label}: {why}", highlight=False, markup=False)
    for note, labels in said.items():
        whose = "all" if len(labels) == len(summaries) else ", ".join(labels)
        console.print(f"{whose}: {note}", highlight=False, markup=False)
    for label, reason in left_out.items():
        console.print(f"{label} is left out: {reason}", highlight=False, markup=False)


def _by_system(summaries: Mapping[str, Summary], best: Mapping[str, list[str]]) -> Table:
    """A row a system, the metrics that have a short name."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("system")
    for short in SHORT.values():
        table.add_column(short, justify="right")
    metrics = [metric for metric in METRICS if metric.name in SHORT]
    for label in summaries:
        table.add_row(label, *(_cell(metric, label, summaries, best) for metric in metrics))
    return table


def _cell(metric: Metric, label: str, summaries: Mapping[str, Summary], best: Mapping[str, list[str]]) -> str:
    text = metric.text(metric.value(summaries[label]))
    return f"[bold]{text} *[/bold]" if label in best[metric.name] else f"{text}  "


def print_run(summary: Summary) -> None:
    """Latency distributions, then the totals."""
    console = _console()
    heading = _heading(f"{summary['name']}: {summary['system']}", summary)
    console.print(heading, style="bold", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("latency")
    for column in LATENCY_COLUMNS:
        table.add_column(column, justify="right")
    for name in LATENCIES:
        cells = [summary[name][column] for column in LATENCY_COLUMNS]
        label = name.removesuffix("_s")
        shown = label.upper() if label in ("ttft", "tpot", "e2e") else label
        table.add_row(f"{shown} (s)", *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    console.print(table)
    if summary["classes"]:
        console.print(_class_table(summary))
    totals = Table(box=None, show_header=False)
    for metric in METRICS[6:]:
        totals.add_row(metric.name, metric.text(metric.value(summary)))
    console.print(totals)
    if summary.get("engine"):
        console.print(engine_line(summary), highlight=False, markup=False, soft_wrap=True)
    for note in notes(summary):
        console.print(note, highlight=False, markup=False)


def engine_line(summary: Summary) -> str:
    """Whom the scheduler mirrors, and the settings that held: those that a release or a default filled in as well."""
    shown = [f"{name} {str(value).lower() if isinstance(value, bool) else value}"
             for name, value in summary["engine"].items() if value is not None and name != "release"]  # fmt: skip
    return f"engine: {summary['mirrors']}; {', '.join(shown)}"


def _class_table(summary: Summary) -> Table:
    """Each class of requests against its own SLO."""
    metrics = [metric for metric in METRICS if metric.keys[0] in ("ttft_s", "tpot_s", "e2e_s")]
    metrics += [metric for metric in METRICS if metric.keys == ("slo", "attainment")]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class")
    for column in ("requests", *(metric.name for metric in metrics)):
        table.add_column(column, justify="right")
    for name, part in summary["classes"].items():
        cells = (metric.text(metric.value(part)) for metric in metrics)
        table.add_row(Text(name), f"{part['requests']:,}", *cells)
    return table


def notes(summary: Summary) -> list[str]:
    """What a reader must know before trusting the figures."""
    said = [f"{count:,} not served: {reason}" for reason, count in summary["reasons"].items()]
    if not summary["completed"]:
        said.append("no request completed, so there are no latencies")
    long = summary["workload"]["too_long"]
    if long["rule"] == "truncate" and long["requests"]:
        said.append(f"{long['requests']:,} requests truncated to the context of {long['max_model_len']:,} tokens")
    if summary["workload"]["skipped"]:
        said.append(f"{summary['workload']['skipped']:,} requests of the trace have no tokens and were left out")
    if summary["unmeasured_gpus"]:
        predicted = summary.get("predicted_gpus", [])  # results saved before there were any lack it
        known = ", ".join(predicted)
        if predicted:
            said.append(f"step times of {known} are predicted: kernels of a related GPU, scaled by specification")
        names = ", ".join(name for name in summary["unmeasured_gpus"] if name not in predicted)
        if names:
            said.append(f"step times of {names} are a roofline estimate: no profile for this model, TP and dtype")
    if summary["extrapolated_share"]:
        said.append(f"{summary['extrapolated_share']:.1%} of the iterations lie outside the measured range")
    return [*said, *summary.get("remarks", [])]  # results saved before there were any lack it


def _heading(title: str, summary: Summary) -> str:
    price = summary["cluster_usd_per_hour"]
    cost = "price unknown" if price is None else f"${price:,.2f}/h"
    bounds = [f"{name.upper()} {summary['slo'][f'{name}_s']:g} s" for name in ("ttft", "tpot", "e2e")
              if summary["slo"][f"{name}_s"] is not None]  # fmt: skip
    slo = f"; SLO {', '.join(bounds)}" if bounds else ""
    return f"{title} ({summary['requests']:,} requests; cluster {cost}{slo})"


def _shown(metric: Metric, summary: Summary) -> float | None:
    value = metric.value(summary)
    return None if value is None else float(metric.text(value).replace(",", ""))


def _console() -> Console:
    """Wide enough for its tables where stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
