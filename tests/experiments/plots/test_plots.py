"""Figures: the numbers behind them, and that every one is written as PNG, SVG and CSV."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from experiments.plots.run.attainment import SCALES, attainment_by_scale
from experiments.plots.run.gallery import headline, save_all, slo_of
from experiments.plots.run.latency import latency_cdfs
from experiments.plots.run.occupancy import occupancy
from experiments.plots.run.overview import overview
from experiments.plots.run.timeline import busiest_window, gpu_timeline, timeline_table
from experiments.plots.style import save
from experiments.runs.rundir import Run
from sim import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1, attainment=0.9)


def run(name: str = "split", completed: int = 4) -> Run:
    """Four requests, prefilled on p0 second by second, moved, and decoded on d0."""
    numbers = range(4)
    outcomes = ["completed" if n < completed else "rejected" for n in numbers]
    served = [n < completed for n in numbers]
    requests = pd.DataFrame(
        {
            "outcome": outcomes,
            "output_tokens": 10,
            "ttft_s": [0.5 * (n + 1) if ok else None for n, ok in zip(numbers, served, strict=True)],
            "tpot_s": [0.05 if ok else None for ok in served],
            "e2e_s": [1.0 + n if ok else None for n, ok in zip(numbers, served, strict=True)],
        }
    ).astype({"ttft_s": float, "tpot_s": float, "e2e_s": float})
    steps = pd.DataFrame(
        [("p0", n, n + 0.5, 1, 100, 0, 0) for n in numbers]
        + [("d0", 0.7, 3.9, 50, 0, 2, 300), ("d0", 3.9, 4.2, 1, 20, 2, 300)],
        columns=["replica", "start_s", "end_s", "iterations", "prefill_tokens", "decode_seqs", "decode_context"],
    )
    links = pd.DataFrame(
        [(n, "p0", "d0", 1000, n + 0.5, n + 0.7) for n in numbers],
        columns=["request", "source", "target", "bytes", "start_s", "end_s"],
    )
    memory = pd.DataFrame(
        [("p0", 0.0, 5, 10, 3, 1), ("p0", 4.0, 0, 10, 0, 0), ("d0", 1.0, 2, 20, 0, 2), ("d0", 4.0, 0, 20, 0, 0)],
        columns=["replica", "time_s", "used_blocks", "total_blocks", "waiting", "running"],
    )
    replicas = pd.DataFrame(
        [("p0", "prefill", "H100-SXM", 4, 1, (2.0,)), ("d0", "decode", "A100-80G-SXM", 4, 2, (3.5, 1.75))],
        columns=["replica", "role", "gpu", "tp", "pp", "stage_busy_s"],
    )
    summary = {
        "name": name, "system": name, "model": "llama-2-70b", "gpus": {"H100-SXM": 4, "A100-80G-SXM": 8},
        "bytes_moved": 4000, "output_tokens_per_s": 10.0, "usd_per_million_tokens": None,
        "workload": {"rate_per_s": 1.0}, "makespan_s": 5.0,
        "slo": {"ttft_s": 1.0, "tpot_s": 0.1, "e2e_s": None, "target": 0.9, "attainment": 0.5, "goodput_per_s": 0.5},
    }  # fmt: skip
    return Run(
        name=name, summary=summary, requests=requests, steps=steps, links=links, memory=memory, replicas=replicas
    )


def test_latency_cdf_table_holds_the_quantiles(tmp_path: Path) -> None:
    drawing = latency_cdfs({"a": run()}, SLO)
    ttft = drawing.table[drawing.table["metric"] == "ttft_s"].set_index("share")["seconds"]
    assert (ttft[0.0], ttft[0.5], ttft[1.0]) == (0.5, 1.25, 2.0)
    assert [path.suffix for path in save(drawing, tmp_path, "cdf")] == [".png", ".svg", ".csv"]


def test_axes_carry_units() -> None:
    drawings = [
        latency_cdfs({"a": run()}, SLO), gpu_timeline(run()), occupancy({"a": run()}), overview({"a": run()}, SLO, "t"),
    ]  # fmt: skip
    for drawing in drawings:
        for axes in drawing.figure.axes:
            label = axes.get_xlabel()
            assert not label or "(s)" in label or "SLO scale" in label
    labels = {axes.get_ylabel() for drawing in drawings for axes in drawing.figure.axes}
    assert {"completed requests (%)", "KV blocks in use (%)", "requests waiting", "$ per 1M output tokens"} <= labels


def test_many_runs_get_a_row_each_best_first() -> None:
    runs = {f"s{n}": run(f"s{n}") for n in range(7)}
    for n, one in enumerate(runs.values()):
        one.summary["slo"] = one.summary["slo"] | {"goodput_per_s": float(n)}
        one.summary.update({"ttft_s": {"p50": 0.1, "p99": 1.0}, "tpot_s": {"p50": None, "p99": None}})
        one.summary.update({"usd_per_million_tokens": 3.0, "used_usd_per_million_tokens": 2.0})
    drawing = overview(runs, SLO, "t")
    assert drawing.table["run"].tolist() == [f"s{n}" for n in range(6, -1, -1)]
    titles = [axes.get_title(loc="left") for axes in drawing.figure.axes]
    assert titles == ["Time to first token", "Time per output token", "Within the SLO", "Goodput", "Cost"]
    assert all(axes.get_xlabel() for axes in drawing.figure.axes)
    assert [text.get_text() for text in drawing.figure.axes[0].get_yticklabels()] == drawing.table["run"].tolist()


def test_attainment_by_scale() -> None:
    table = attainment_by_scale({"a": run(), "b": run(completed=0)}, SLO).table
    shares = table[table["run"] == "a"].set_index("slo_scale")["attainment"]
    assert list(shares.index) == list(SCALES)
    assert (shares[0.125], shares[1.0], shares[8.0]) == (0.0, 0.5, 1.0)
    assert (table[table["run"] == "b"]["attainment"] == 0).all()


def test_timeline_tells_the_phases_apart() -> None:
    table = timeline_table(run(), (0.0, 10.0))
    assert table["kind"].value_counts().to_dict() == {"prefill": 4, "transfer": 4, "decode": 1, "mixed": 1}
    assert set(table[table["kind"] == "transfer"]["target"]) == {"d0"}
    assert timeline_table(run(), (2.6, 2.65))["kind"].tolist() == ["decode", "transfer"]


def test_busiest_window_has_the_most_prompt_tokens() -> None:
    late = run()
    late.steps.loc[0, "prefill_tokens"] = 1
    assert busiest_window(late, length_s=2.0) == (1.0, 3.0)


def test_occupancy_is_sampled_as_it_stands() -> None:
    table = occupancy({"a": run()}).table
    prefill = table[table["role"] == "prefill"].set_index("time_s")
    assert prefill.loc[0.0, "kv_use"] == 0.5
    assert prefill.loc[0.0, "waiting"] == 3
    assert prefill.loc[4.0, "kv_use"] == 0.0
    assert table[table["role"] == "decode"]["kv_use"].max() == 0.1


def test_the_gallery_writes_every_figure_and_equal_runs_give_equal_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        save_all({"vllm": run(), "Split wise": run()}, folder, name="x")
    first, second = ({path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in folders)
    assert first == second
    stems = {"overview", "latency-cdf", "slo-attainment", "kv-and-queue", "utilisation"}
    stems |= {f"{kind}-{run_name}" for kind in ("timeline", "links") for run_name in ("vllm", "split-wise")}
    assert set(first) == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg", "csv")}
    for name, data in first.items():
        if name.endswith(".png"):
            assert data.startswith(b"\x89PNG")
            assert len(data) > 10_000
        if name.endswith(".svg"):
            assert ElementTree.fromstring(data).tag.endswith("svg")


def test_runs_without_a_completed_request_can_be_drawn(tmp_path: Path) -> None:
    empty = run(completed=0)
    bare = Run(
        name="bare", summary=empty.summary, requests=empty.requests, steps=empty.steps.iloc[:0],
        links=empty.links.iloc[:0], memory=empty.memory.iloc[:0], replicas=empty.replicas,
    )  # fmt: skip
    assert len(save_all({"bare": bare}, tmp_path, name="x")) == 18


def test_titles_and_targets_come_from_the_summary() -> None:
    assert headline("x", run()) == "x: llama-2-70b on 4 H100-SXM + 8 A100-80G-SXM, 1 requests/s"
    assert slo_of(run()) == SLO


@pytest.mark.parametrize("window", [(0.0, 1.0), None])
def test_a_lane_per_replica(window: tuple[float, float] | None) -> None:
    axes = gpu_timeline(run(), window).figure.axes[0]
    lanes = [label.get_text() for label in axes.get_yticklabels()]
    assert lanes == ["p0\nH100-SXM TP4", "d0\nA100-80G-SXM TP4 PP2"]
