"""What a trace looks like: lengths, load over time, burstiness and prefix reuse, from a ``traces.Survey``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import exp
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots.style import DASHES, RUN_COLOURS, Drawing, log_ticks, percent, styled
from traces import Survey
from traces.statistics import GAPS_PER_OCTAVE

INTERVALS = 120
"""Steps that can be told apart in a panel over time."""
LENGTH_POINTS = 400
TIME = "time since the first arrival (s)"


class Point(NamedTuple):
    """One point of one line; lengths in tokens, time and gaps in s, shares from 0 to 1."""

    panel: str
    series: str
    x: float
    y: float


def draw_trace(survey: Survey, name: str) -> Drawing:
    """Six panels, and the points in them."""
    points = [point for panel in PANELS.values() for point in panel.points(survey)]
    table = pd.DataFrame(points, columns=list(Point._fields))
    with styled():
        figure = Figure(figsize=(15, 7.5), layout="constrained")
        figure.suptitle(f"{name} (requests: {survey.gaps.requests:,}, duration: {survey.gaps.duration_s:,.6g} s)")
        for axes, (title, panel) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
            axes.set(title=title, xlabel=panel.x, ylabel=panel.y)
            rows = table[table["panel"] == title]
            if len(rows):
                panel.draw(axes, rows, survey)
            else:
                axes.text(0.5, 0.5, panel.empty, transform=axes.transAxes, ha="center", va="center", color="#555555")
                axes.set(xticks=[], yticks=[])
    return Drawing(figure, table)


# ---------------------------------------------------------------- the numbers


def length_points(survey: Survey) -> Iterator[Point]:
    """Share of the requests that have at most so many tokens."""
    for series, histogram in (("input", survey.inputs), ("output", survey.outputs)):
        for tokens, share in _shares(histogram):
            yield Point("Lengths", series, tokens, share)


def arrival_points(survey: Survey) -> Iterator[Point]:
    """Requests/s in each interval."""
    return _steps("Arrivals", "requests/s", survey, survey.timeline.requests)


def load_points(survey: Survey) -> Iterator[Point]:
    """Input tokens/s in each interval."""
    return _steps("Input load", "tokens/s", survey, survey.timeline.input_tokens)


def gap_points(survey: Survey) -> Iterator[Point]:
    """Share of the gaps that are longer than so many seconds, and the same for Poisson arrivals of this rate."""
    sizes = survey.gaps.sizes
    known = [size for size in sizes if size is not None]
    left = sum(sizes[size] for size in known)
    for size in range(min(known) - 1, max(known) + 2) if known and sizes.total() > 1 else ():
        start_s = 2 ** (size / GAPS_PER_OCTAVE)
        yield Point("Gaps", "trace", start_s, left / sizes.total())
        yield Point("Gaps", "Poisson", start_s, exp(-start_s / survey.gaps.mean_s))
        left -= sizes.get(size, 0)


def dispersion_points(survey: Survey) -> Iterator[Point]:
    """Variance over mean of the requests in a window."""
    for window_s, index in survey.timeline.dispersion():
        yield Point("Burstiness", "trace", window_s, index)


def reuse_points(survey: Survey) -> Iterator[Point]:
    """Share of the input tokens of each interval in leading blocks seen before."""
    if survey.reuse.any:
        timeline = survey.timeline
        yield from _steps("Prefix reuse", "trace", survey, timeline.reused_tokens, timeline.input_tokens)


def _shares(histogram: Counter[int]) -> Iterator[tuple[int, float]]:
    """From (least, 0) to (most, 1), where the share has grown enough to be seen."""
    total, below, shown = histogram.total(), 0, 0.0
    most = max(histogram)
    yield min(histogram), 0.0
    for tokens in sorted(histogram):
        below += histogram[tokens]
        if below / total - shown >= 1 / LENGTH_POINTS or tokens == most:
            shown = below / total
            yield tokens, shown


def _steps(
    panel: str, series: str, survey: Survey, column: list[float], of: list[float] | None = None
) -> Iterator[Point]:
    """A column per second, or per unit of another, in at most ``INTERVALS`` intervals and a stump."""
    width, width_s = -(-len(column) // INTERVALS), survey.timeline.width_s
    for place in range(0, len(column), width):
        start_s = place * width_s
        end_s = min(start_s + width * width_s, survey.gaps.duration_s)
        share = sum(of[place : place + width]) if of is not None else end_s - start_s
        if end_s - start_s >= width * width_s / 2 and share:
            value = sum(column[place : place + width]) / share
            yield Point(panel, series, start_s, value)
            yield Point(panel, series, end_s, value)


# ---------------------------------------------------------------- the panels


def draw_lengths(axes: Axes, rows: pd.DataFrame, survey: Survey) -> None:
    figures = survey.statistics
    for style, series in enumerate(("input", "output")):
        label = f"{series}, mean {figures[f'mean_{series}_tokens']:,.0f}"
        _line(axes, rows, style, series, label, steps=True)
    axes.set_xscale("log")
    log_ticks(axes)
    percent(axes)
    _key(axes)


def draw_over_time(axes: Axes, rows: pd.DataFrame, survey: Survey) -> None:
    del survey
    _line(axes, rows)
    axes.set_ylim(bottom=0)


def draw_gaps(axes: Axes, rows: pd.DataFrame, survey: Survey) -> None:
    variation = survey.gaps.variation
    known = "unknown" if variation is None else f"{variation:.3g}"
    _line(axes, rows, 0, "trace", f"trace: coefficient of variation {known}")
    _line(axes, rows, 1, "Poisson", "Poisson: 1")
    axes.set(xscale="log", yscale="log", ylim=(0.5 / survey.gaps.requests, 1.5))
    log_ticks(axes)
    log_ticks(axes, "y")
    _key(axes)


def draw_dispersion(axes: Axes, rows: pd.DataFrame, survey: Survey) -> None:
    del survey
    _line(axes, rows, 0, "trace", "trace", marker="o")
    axes.axhline(1, color=RUN_COLOURS[1], linestyle=DASHES[1], label="Poisson: 1 at every window")
    axes.set(xscale="log", yscale="log")
    axes.margins(0.1)
    log_ticks(axes)
    log_ticks(axes, "y")
    _key(axes)


def draw_reuse(axes: Axes, rows: pd.DataFrame, survey: Survey) -> None:
    reuse, sample = (survey.statistics[name] for name in ("prefix_reuse", "prefix_sample"))
    sampled = "" if sample == 1 else f", estimated from {sample:.3g} of the hashes"
    _line(axes, rows, 0, "trace", f"overall {reuse:.1%}{sampled}")
    percent(axes)
    _key(axes)


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    style: int = 0,
    series: str | None = None,
    label: str | None = None,
    *,
    steps: bool = False,
    marker: str = "",
) -> None:
    shown = rows if series is None else rows[rows["series"] == series]
    axes.plot(
        shown["x"], shown["y"], color=RUN_COLOURS[style], linestyle=DASHES[style], label=label, marker=marker,
        drawstyle="steps-post" if steps else "default",
    )  # fmt: skip


def _key(axes: Axes) -> None:
    """The legend above the panel, where no line can run through it."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, borderaxespad=0.3, columnspacing=1)


class Panel(NamedTuple):
    """What stands in a panel, and what it says where there is nothing to show."""

    x: str
    y: str
    points: Callable[[Survey], Iterator[Point]]
    draw: Callable[[Axes, pd.DataFrame, Survey], None]
    empty: str


AT_ONCE = "all requests arrive at once"
PANELS = {
    "Lengths": Panel("tokens", "requests with at most so many (%)", length_points, draw_lengths, "no requests"),
    "Arrivals": Panel(TIME, "requests/s", arrival_points, draw_over_time, AT_ONCE),
    "Input load": Panel(TIME, "input tokens/s", load_points, draw_over_time, AT_ONCE),
    "Gaps": Panel("gap between arrivals (s)", "gaps that are longer (share)", gap_points, draw_gaps, "too few gaps"),
    "Burstiness": Panel(
        "window (s)", "variance / mean of requests in a window", dispersion_points, draw_dispersion, "too few requests"
    ),
    "Prefix reuse": Panel(
        TIME, "input tokens seen before (%)", reuse_points, draw_reuse, "the trace has no prefix hashes"
    ),
}
