"""Figures of sweeps, utilisation and link use: the tables behind them, on runs and means made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.plots.pareto import frontier, pareto
from experiments.plots.rates import PANELS, rate_curves
from experiments.plots.run.links import link_table, link_use
from experiments.plots.run.utilisation import utilisation, utilisation_table
from experiments.plots.style import Drawing, save
from experiments.runs.rundir import Run
from experiments.sweeps.sweep import means
from tests.experiments.plots.test_plots import run


def swept(seeds: int = 2) -> pd.DataFrame:
    """Two systems at three rates: b has twice a's latency and throughput."""
    rows = [
        {
            "system": system, "rate_per_s": rate, "seed": seed,
            "attainment": 1 - rate / 10, "good_requests_per_s": rate,
            **{name: factor * rate * (1 + seed / 10) for name in PANELS if name.startswith(("ttft", "tpot"))},
            "tokens_per_s_per_user": 100 / factor / rate, "tokens_per_s_per_gpu": 10 * factor * rate,
            "usd_per_million_tokens": 5.0 / rate,
        }
        for system, factor in (("a", 1.0), ("b", 2.0)) for rate in (1.0, 2.0, 4.0) for seed in range(seeds)
    ]  # fmt: skip
    return means(pd.DataFrame(rows))


def test_rate_curves_show_the_means_and_their_bands(tmp_path: Path) -> None:
    drawing = rate_curves(swept(), target=0.9)
    assert [path.suffix for path in save(drawing, tmp_path, "rates")] == [".png", ".svg", ".csv"]
    table = drawing.table.set_index(["system", "metric", "rate_per_s"])
    assert set(drawing.table["metric"]) == set(PANELS)
    assert table.loc[("b", "ttft_p50_s", 2.0), "mean"] == pytest.approx(4.2)  # 2 x 2, seeds 0 and 1
    assert table.loc[("b", "ttft_p50_s", 2.0), "low"] < 4.0 < 4.4 < table.loc[("b", "ttft_p50_s", 2.0), "high"]
    panel = drawing.figure.axes[0]
    assert panel.lines[1].get_ydata().tolist() == pytest.approx([2.1, 4.2, 8.4])
    assert len(panel.collections) == 2  # a band each


def test_one_seed_has_no_bands() -> None:
    drawing = rate_curves(swept(seeds=1), target=0.9)
    assert drawing.table[["low", "high"]].isna().all().all()
    assert drawing.figure.get_suptitle() == "one seed"


def test_latencies_that_spread_widely_get_a_logarithmic_axis() -> None:
    wide = swept()
    wide.loc[wide["metric"] == "ttft_p99_s", "mean"] *= [1, 10, 100, 1, 10, 100]
    scales = [axes.get_yscale() for axes in rate_curves(wide, target=0.9).figure.axes]
    assert scales == ["linear", "log", "linear", "linear", "linear", "linear"]


def test_pareto_tells_the_points_that_nobody_beats() -> None:
    table = pareto(swept()).table.set_index(["panel", "system", "rate_per_s"])
    pace = table.loc["Pace against throughput"]
    assert pace.loc[("a", 1.0), ["x", "y"]].tolist() == [100.0, 10.0]
    assert pace["on_frontier"].all()  # twice the pace of b, half its throughput
    cost = table.loc["Cost against goodput"]
    assert cost[cost["on_frontier"]].index.tolist() == [("a", 4.0), ("b", 4.0)]  # most goodput, and cheapest


def test_points_without_a_value_are_left_out() -> None:
    table = swept()
    dark = table[~((table["metric"] == "usd_per_million_tokens") & (table["system"] == "a"))]
    points = pareto(dark).table
    assert set(points[points["panel"] == "Cost against goodput"]["system"]) == {"b"}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_frontier_by_definition(points: list[tuple[int, int]]) -> None:
    x, y = [point[0] for point in points], [point[1] for point in points]
    beaten = [any(a >= p and b >= q and (a, b) != (p, q) for a, b in points) for p, q in points]
    assert frontier(x, y).tolist() == [not lost for lost in beaten]


# ---------------------------------------------------------------- utilisation


def test_busy_time_is_split_by_phase() -> None:
    table = utilisation_table({"split": run()}).set_index(["replica", "phase"])["share"]
    assert table["p0", "prefill"] == pytest.approx(2.0 / 5.0)  # busy 2 of 5 s
    assert table["p0", "decode"] == table["p0", "mixed"] == 0
    busy = (3.5 + 1.75) / 2 / 5.0  # the mean of two stages
    assert table["d0", "decode"] == pytest.approx(busy * 3.2 / 3.5)
    assert table["d0", "mixed"] == pytest.approx(busy * 0.3 / 3.5)


def test_utilisation_of_a_run_in_which_nothing_ran() -> None:
    split = run()
    idle = replace(split, steps=split.steps.iloc[:0], summary={**split.summary, "makespan_s": 0.0})
    assert not utilisation_table({"idle": idle})["share"].any()
    assert utilisation({"idle": idle}).figure.axes[0].get_xlabel() == "share of the makespan (%)"


# ---------------------------------------------------------------- links


def moved(*rows: tuple[str, str, int, float, float]) -> Run:
    table = pd.DataFrame(rows, columns=["source", "target", "bytes", "start_s", "end_s"])
    return replace(run(), links=table.assign(request=range(len(rows))))


def test_bytes_are_spread_over_the_time_they_take() -> None:
    table = link_table(moved(("p", "d", 1000, 0.0, 2.0), ("p", "d", 300, 1.0, 4.0)), bins=4)
    assert table["pair"].unique().tolist() == ["p > d"]
    assert table["bytes"].tolist() == pytest.approx([500, 600, 100, 100])
    assert table["bytes_per_s"].tolist() == pytest.approx([500, 600, 100, 100])


def test_a_transfer_that_takes_no_time_is_not_lost() -> None:
    table = link_table(moved(("p", "d", 1000, 1.0, 1.0), ("p", "d", 1, 1.0, 4.0)), bins=4)
    assert table["bytes"].sum() == pytest.approx(1001)


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 10**9), st.floats(0, 9), st.floats(0, 9)), min_size=1))
def test_every_byte_is_in_the_table(shapes: list[tuple[str, int, float, float]]) -> None:
    rows = [(name, "d", size, start, start + length + 1e-3) for name, size, start, length in shapes]
    table = link_table(moved(*rows), bins=10)
    for name in {shape[0] for shape in shapes}:
        total = sum(shape[1] for shape in shapes if shape[0] == name)
        assert table[table["pair"] == f"{name} > d"]["bytes"].sum() == pytest.approx(total)


def test_only_the_busiest_pairs_are_drawn_all_are_in_the_table() -> None:
    drawing = link_use(moved(*((f"p{n:02}", "d", 1000 + n, 0.0, 1.0) for n in range(50))))
    labels = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    assert len(labels) == 40
    assert labels[0] == "p10 > d"
    assert "40 busiest of 50" in drawing.figure.axes[0].get_title(loc="left")
    assert drawing.table["pair"].nunique() == 50


def test_a_run_without_transfers_says_so() -> None:
    drawing = link_use(replace(run(), links=run().links.iloc[:0]))
    assert drawing.table.empty
    assert [text.get_text() for text in drawing.figure.axes[0].texts] == ["no KV was moved"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: rate_curves(swept(), 0.9),
        lambda: pareto(swept()),
        lambda: utilisation({"a": run()}),
        lambda: link_use(run()),
    ],
)
def test_every_axis_has_a_label_and_nothing_is_random(draw: Callable[[], Drawing], tmp_path: Path) -> None:
    first, second = (save(draw(), tmp_path, name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for axes in draw().figure.axes:
        shares = axes.get_shared_x_axes().get_siblings(axes)
        assert axes.get_ylabel()
        assert any(other.get_xlabel() for other in shares) or axes.get_label() == "<colorbar>"
    assert np.isfinite(pd.read_csv(first[2]).select_dtypes("number").to_numpy()).any()
