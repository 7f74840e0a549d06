"""Charts that zoom, in colours that are read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from bokeh.models import ColumnDataSource, HoverTool, Legend, NumeralTickFormatter, Span
from bokeh.plotting import figure

from experiments.plots.pareto import PANELS as PARETO_PANELS
from experiments.plots.pareto import pareto_table
from experiments.plots.run.attainment import attainment_table
from experiments.plots.run.latency import METRICS, cdf_table
from experiments.plots.run.occupancy import PANELS as OCCUPANCY_PANELS
from experiments.plots.run.occupancy import occupancy_table
from experiments.plots.run.timeline import busiest_window, lane_name, timeline_table
from experiments.plots.style import PHASE_COLOURS
from experiments.runs.rundir import Run
from sim.types import Slo

Chart = Any
"""A Bokeh figure; its type is made at run time."""
COLOURS = ("#3b8fd9", "#e0703a", "#c678b8", "#8f9b2d", "#1fa37a", "#d9a21b", "#7a7fe0", "#b06a4f")
DASHES = ("solid", "dashed", "dotted", "dotdash")
INK = "#8a8a8a"
HEIGHT_PX = 340
LEGEND_LETTERS = 44
"""Of one row of a legend, in the narrowest card."""
MOST_SPANS = 5000
"""Boxes of one timeline; with more a shorter window is shown."""
RATE_PANELS = {
    "attainment": "requests within the SLO",
    "ttft_p99_s": "TTFT p99 (s)",
    "tpot_p99_s": "TPOT p99 (s)",
    "output_tokens_per_s": "output tokens/s",
}


def colours(names: Iterable[str]) -> dict[str, str]:
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def blank(title: str, x: str, y: str, **more: Any) -> Chart:
    """An empty chart: transparent, with the tools to zoom and to go back."""
    options = {"height": HEIGHT_PX, "sizing_mode": "stretch_width", "min_width": 260, **more}
    made = figure(
        title=title, x_axis_label=x, y_axis_label=y, tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom", toolbar_location="above", background_fill_alpha=0, border_fill_alpha=0,
        outline_line_color=None, **options,
    )  # fmt: skip
    made.toolbar.logo = None
    made.title.text_color = INK
    for axis in made.axis:
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = INK
        axis.axis_label_text_font_style = "normal"
    if "SLO" in y or y.endswith("requests"):
        made.yaxis.formatter = NumeralTickFormatter(format="0%")
    made.grid.grid_line_color, made.grid.grid_line_alpha = INK, 0.25
    return made


def lines(
    made: Chart, table: pd.DataFrame, *, group: str, x: str, y: str, tips: list[tuple[str, str]], marks: bool = False
) -> None:
    """A line a group, a legend below that hides and shows them, and what a line says under the pointer."""
    items = []
    for place, (name, colour) in enumerate(colours(dict.fromkeys(table[group])).items()):
        source = _source(table[table[group] == name])
        line = made.line(x, y, source=source, color=colour, line_width=2, line_dash=DASHES[place % len(DASHES)])
        shown = [line]
        if {"low", "high"} <= set(table.columns):
            shown.append(made.varea(x, "low", "high", source=source, fill_color=colour, fill_alpha=0.1))
        if marks:
            shown.append(made.scatter(x, y, source=source, color=colour, size=7))
        made.add_tools(HoverTool(renderers=[shown[-1] if marks else line], tooltips=[(group, str(name)), *tips]))
        items.append((str(name), shown))
    made.add_layout(_legend(items), "below")


def _legend(items: list[tuple[str, list[Any]]]) -> Legend:
    return Legend(
        items=items, orientation="horizontal", click_policy="hide", background_fill_alpha=0, border_line_color=None,
        label_text_color=INK, label_text_font_size="12px",
        ncols=max(1, LEGEND_LETTERS // (5 + max((len(name) for name, _ in items), default=1))),
    )  # fmt: skip


def _source(rows: pd.DataFrame) -> ColumnDataSource:
    return ColumnDataSource({str(name): rows[name].to_numpy() for name in rows.columns})


def guide(made: Chart, *, x: float | None = None, y: float | None = None) -> None:
    at, dimension = (x, "height") if x is not None else (y, "width")
    if at is not None:
        made.add_layout(Span(location=at, dimension=dimension, line_color=INK, line_dash="dotted", line_width=1.5))


# ---------------------------------------------------------------- runs


def latency(runs: Mapping[str, Run], slo: Slo) -> list[Chart]:
    """The distributions of TTFT, TPOT and E2E, a chart each; the SLO dotted."""
    table = cdf_table(runs)
    made = []
    for metric, (title, label) in METRICS.items():
        rows = table[(table["metric"] == metric) & (table["seconds"] > 0)]
        chart = blank(title, label, "completed requests", x_axis_type="log", y_range=(0, 1.02), name=f"cdf-{metric}")
        lines(
            chart,
            rows,
            group="run",
            x="seconds",
            y="share",
            tips=[("share", "@share{0.0%}"), ("s", "@seconds{0.0000}")],
        )
        guide(chart, x=getattr(slo, metric))
        made.append(chart)
    return made


def attainment(runs: Mapping[str, Run], slo: Slo) -> Chart:
    """What share is within the SLO as all its bounds are scaled."""
    chart = blank(
        "SLO attainment by SLO scale", "SLO scale (1: as stated)", "requests within the SLO", x_axis_type="log",
        y_range=(0, 1.02), name="attainment",
    )  # fmt: skip
    chart.xaxis.ticker = [0.125, 0.25, 0.5, 1, 2, 4, 8]
    tips = [("scale", "@slo_scale{0.00}"), ("within", "@attainment{0.0%}")]
    lines(chart, attainment_table(runs, slo), group="run", x="slo_scale", y="attainment", tips=tips)
    guide(chart, x=1.0)
    guide(chart, y=slo.attainment)
    return chart


def occupancy(runs: Mapping[str, Run]) -> list[Chart]:
    """KV in use and requests waiting over time, a line a run and role; the band is the range over replicas."""
    table = occupancy_table(runs)
    table["run"] = table["run"].astype(str) + ", " + table["role"].astype(str)
    made: list[Chart] = []
    for panel, label in OCCUPANCY_PANELS.items():
        rows = table.rename(columns={f"{panel}_least": "low", f"{panel}_most": "high"})
        rows = rows[["run", "time_s", panel, "low", "high"]]
        if panel == "kv_use":
            rows = rows.assign(**{name: rows[name] * 100 for name in (panel, "low", "high")})
        shared = {"x_range": made[0].x_range} if made else {}
        chart = blank(label, "simulated time (s)", label, name=f"occupancy-{panel}", **shared)
        tips = [("s", "@time_s{0.0}"), (label, f"@{panel}{{0.0}}")]
        lines(chart, rows, group="run", x="time_s", y=panel, tips=tips)
        made.append(chart)
    return made


def timeline(name: str, run: Run) -> Chart:
    """What every replica does in the busiest seconds, by phase, and KV on its way between them."""
    window = busiest_window(run)
    table = timeline_table(run, window)
    while len(table) > MOST_SPANS:
        window = (window[0], window[0] + (window[1] - window[0]) / 2)
        table = timeline_table(run, window)
    lanes = {str(row.replica): place for place, row in enumerate(run.replicas.itertuples())}
    chart = blank(
        f"{name}: GPUs from {window[0]:.1f} to {window[1]:.1f} s", "simulated time (s)", "", x_range=window,
        y_range=(len(lanes) - 0.4, -0.6), height=130 + 34 * len(lanes), name=f"timeline-{name}",
    )  # fmt: skip
    chart.yaxis.ticker = list(lanes.values())
    chart.yaxis.major_label_overrides = {
        lanes[str(row.replica)]: lane_name(row).replace("\n", " ") for row in run.replicas.itertuples()
    }
    items = [(kind, [_boxes(chart, table, kind, lanes)]) for kind in PHASE_COLOURS if (table["kind"] == kind).any()]
    if (table["kind"] == "transfer").any():
        items.append(("KV transfer", [_moves(chart, table, lanes)]))
    chart.add_layout(_legend(items), "below")
    return chart


def _boxes(chart: Chart, table: pd.DataFrame, kind: str, lanes: Mapping[str, int]) -> Any:
    """The steps of one phase, a box each."""
    rows = table[table["kind"] == kind]
    names = {"left": "start_s", "right": "end_s", "iterations": "iterations", "prompt": "prefill_tokens",
             "decodes": "decode_seqs"}  # fmt: skip
    columns = {name: rows[column].to_numpy(dtype=float) for name, column in names.items()}
    columns["y"] = rows["replica"].astype(str).map(lanes).to_numpy(dtype=float)
    boxes = chart.hbar(
        y="y", left="left", right="right", height=0.62, source=ColumnDataSource(columns), color=PHASE_COLOURS[kind],
        line_width=0,
    )  # fmt: skip
    tips = [(kind, "@left{0.0000} to @right{0.0000} s"), ("iterations", "@iterations"), ("prompt tokens", "@prompt"),
            ("decodes", "@decodes")]  # fmt: skip
    chart.add_tools(HoverTool(renderers=[boxes], tooltips=tips))
    return boxes


def _moves(chart: Chart, table: pd.DataFrame, lanes: Mapping[str, int]) -> Any:
    """KV transfers, from the sender's lane when they start to the receiver's when they end."""
    known = table["target"].isin(list(lanes)) & table["replica"].isin(list(lanes))
    rows = table[(table["kind"] == "transfer") & known]
    columns = {
        "x0": rows["start_s"].to_numpy(dtype=float),
        "x1": rows["end_s"].to_numpy(dtype=float),
        "y0": rows["replica"].astype(str).map(lanes).to_numpy(dtype=float),
        "y1": rows["target"].astype(str).map(lanes).to_numpy(dtype=float),
        "request": rows["request"].to_numpy(dtype=float),
        "gb": rows["bytes"].to_numpy(dtype=float) / 1e9,
    }
    drawn = chart.segment("x0", "y0", "x1", "y1", source=ColumnDataSource(columns), color=INK, line_width=1.2)
    tips = [("KV of request", "@request"), ("GB", "@gb{0.000}"), ("from, to (s)", "@x0{0.0000}, @x1{0.0000}")]
    chart.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    return drawn


# ---------------------------------------------------------------- sweeps, goodput, plans


def rates(means: pd.DataFrame, target: float) -> list[Chart]:
    """Attainment, latencies and throughput against the arrival rate; the band is the interval over seeds."""
    made = []
    for metric, label in RATE_PANELS.items():
        rows = means[means["metric"] == metric].dropna(subset=["mean"]).sort_values(["system", "rate_per_s"])
        if rows.empty:
            continue
        rows = _banded(rows, most=1.0 if metric == "attainment" else None)
        chart = blank(label, "arrival rate (requests/s)", label, name=f"rates-{metric}")
        tips = [("requests/s", "@rate_per_s{0.00}"), (label, "@mean{0.0000}")]
        lines(chart, rows, group="system", x="rate_per_s", y="mean", tips=tips, marks=True)
        if metric == "attainment":
            guide(chart, y=target)
        made.append(chart)
    return made


def pareto(means: pd.DataFrame) -> list[Chart]:
    """Pace against throughput and cost against goodput, a point a rate; large points: nothing is better in both."""
    table = pareto_table(means)
    made = []
    for panel in PARETO_PANELS:
        rows = table[table["panel"] == panel.title].sort_values(["system", "rate_per_s"])
        if rows.empty:
            continue
        chart = blank(panel.title, panel.x_label, panel.y_label, name=f"pareto-{panel.x}")
        lines(chart, rows, group="system", x="x", y="y", tips=[("requests/s", "@rate_per_s{0.00}")], marks=True)
        best = _source(rows[rows["on_frontier"]])
        chart.scatter("x", "y", source=best, size=14, fill_alpha=0, line_color=INK, line_width=2)
        made.append(chart)
    return made


def _banded(rows: pd.DataFrame, *, most: float | None) -> pd.DataFrame:
    """Bounds within what the metric can be; a point without any has none."""
    low, high = rows["low"].fillna(rows["mean"]), rows["high"].fillna(rows["mean"])
    return rows.assign(low=low.clip(lower=0), high=high.clip(upper=most))


def goodput(means: pd.DataFrame, target: float) -> Chart:
    """Attainment around each system's goodput."""
    rows = means[means["metric"] == "judged"].sort_values(["system", "rate_per_s"])
    rows = _banded(rows, most=1.0)
    chart = blank("Attainment by rate", "arrival rate (requests/s)", "requests within the SLO", name="goodput")
    tips = [("requests/s", "@rate_per_s{0.00}"), ("within", "@mean{0.0%}")]
    lines(chart, rows, group="system", x="rate_per_s", y="mean", tips=tips, marks=True)
    guide(chart, y=target)
    return chart


def search(log: pd.DataFrame) -> Chart:
    """How a planner's search went: the best value so far by time (columns elapsed_s, best)."""
    chart = blank("The search", "seconds", "best value so far", name="search")
    tips = [("s", "@elapsed_s{0.0}"), ("best", "@best{0.000}")]
    lines(chart, log.assign(search="best so far"), group="search", x="elapsed_s", y="best", tips=tips)
    return chart
