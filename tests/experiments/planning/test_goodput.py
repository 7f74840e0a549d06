"""Goodput: the bisection on attainments one can do in one's head, on a queue, on the simulator, and from the shell."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.jobs.workers import Here
from experiments.planning.goodput import Replay
from experiments.scenario.file import Scenario
from sim import ConfigError, Slo
from sim.goodput import (
    LEAST_REQUESTS,
    Goodput,
    attained,
    bisected_rate,
    bracketing,
    goodput,
    growing,
    halving,
    sustained,
    trial_requests,
)
from tests.command import call

SEARCH: dict[str, Any] = {"start": 1.0, "high": 1000.0, "tolerance": 0.01, "executor": Here()}


def up_to(capacity: float, rate: float, seed: int) -> float:
    """Every request is in time up to a capacity, and fewer beyond it."""
    return min(1.0, capacity * (1 + seed) / rate)


def test_the_highest_rate_at_which_the_target_is_reached() -> None:
    found = goodput(partial(up_to, 9.0), target=0.9, seeds=[0], **SEARCH)
    assert found.rate.mean == pytest.approx(10.0, rel=0.01)
    assert found.rate.mean <= 10.0
    assert found.by_seed == {0: found.rate.mean}
    assert [trial.rate_per_s for trial in found.trials[:5]] == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_every_seed_is_bisected_by_itself() -> None:
    found = goodput(partial(up_to, 9.0), target=0.9, seeds=[0, 1, 2], **SEARCH)
    assert list(found.by_seed.values()) == pytest.approx([10, 20, 30], rel=0.01)
    assert found.rate.mean == pytest.approx(20, rel=0.01)
    assert found.rate.half_width == pytest.approx(4.3027 * 10 / 3**0.5, rel=0.03)  # Student's t of two degrees


def test_a_rate_below_the_first_one_is_found_by_halving() -> None:
    found = goodput(partial(up_to, 0.009), target=0.9, seeds=[0], **SEARCH)
    assert found.rate.mean == pytest.approx(0.01, rel=0.01)
    nothing = goodput(lambda rate, seed: 0.0, target=0.9, seeds=[0], **SEARCH)
    assert nothing.rate.mean == 0.0
    assert min(trial.rate_per_s for trial in nothing.trials) == 1 / 4096


def test_what_passes_everywhere_ends_at_the_highest_rate() -> None:
    found = goodput(lambda rate, seed: 1.0, target=1.0, seeds=[0], **SEARCH)
    assert found.rate.mean == 1000.0
    assert found.trials[-1].rate_per_s == 1000.0


def test_published_grid() -> None:
    """DistServe's search: five halvings of 5 requests/s and GPU, so that results are multiples of 0.15625."""
    tried: list[float] = []
    assert bisected_rate(lambda rate: tried.append(rate) is None and rate < 1.6, halving(0, 5, 0.25)) == 1.5625
    assert tried == [2.5, 1.25, 1.875, 1.5625, 1.71875]


def passing(seed: int, share: float, rate: float) -> bool:
    """Noise: any rate may pass or not; a larger share passes wherever a smaller one does."""
    return bool(np.random.default_rng([seed, int(rate * 1e6)]).random() < share)


@given(seed=st.integers(0, 10**6), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), start=st.floats(0.1, 50))
def test_who_passes_wherever_another_does_is_never_rated_lower(
    seed: int, shares: tuple[float, float], start: float
) -> None:
    less, more = (bisected_rate(partial(passing, seed, s), bracketing(start, 100.0, 0.02)) for s in sorted(shares))
    assert less <= more


def queue(service_s: float, bound_s: float, rate: float, seed: int) -> float:
    """Share of 2000 requests of an M/D/1 queue that leave it within a bound (Lindley's recursion)."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0, 2000)) / rate
    free_s, times = 0.0, []
    for arrival in arrivals.tolist():
        free_s = max(free_s, arrival) + service_s
        times.append(free_s - arrival)
    return float(np.mean(np.array(times) <= bound_s))


def queue_goodput(bound_s: float, target: float) -> Goodput:
    return goodput(partial(queue, 0.1, bound_s), target=target, seeds=[0, 1], start=1.0, high=100.0,
                   tolerance=0.05, executor=Here())  # fmt: skip


@settings(max_examples=15)
@given(
    bounds=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), targets=st.tuples(st.floats(0.5, 1), st.floats(0.5, 1))
)
def test_a_queue_serves_more_under_looser_bounds_and_lower_targets(
    bounds: tuple[float, float], targets: tuple[float, float]
) -> None:
    tight, loose = (queue_goodput(bound, max(targets)) for bound in sorted(bounds))
    low, high = (queue_goodput(min(bounds), target) for target in sorted(targets, reverse=True))
    assert all(tight.by_seed[seed] <= loose.by_seed[seed] for seed in (0, 1))
    assert all(low.by_seed[seed] <= high.by_seed[seed] for seed in (0, 1))


def test_an_executor_changes_nothing() -> None:
    at = partial(queue, 0.1, 0.3)
    more: dict[str, Any] = {"target": 0.9, "seeds": range(4), "start": 1.0, "high": 100.0, "tolerance": 0.05}
    with ThreadPoolExecutor(4) as pool:
        assert goodput(at, executor=pool, **more) == goodput(at, executor=Here(), **more)


@pytest.mark.parametrize(
    "more", [{"target": 0.0}, {"target": 1.1}, {"seeds": []}, {"tolerance": 0.0}, {"start": 2000.0}]
)
def test_settings_out_of_range(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"goodput: (target|start)"):
        goodput(lambda rate, seed: 1.0, **{"target": 0.9, "seeds": [0], **SEARCH, **more})


# ------------------------------------------------------------ what a trial must be like


def test_a_trial_is_long_against_what_a_request_may_take() -> None:
    """1 s and 20 more tokens of 0.1 s: 3 s, of which four times as long, at 50 requests/s."""
    assert trial_requests(Slo(ttft_s=1.0, tpot_s=0.1), 21.0, 50.0) == 600
    assert trial_requests(Slo(ttft_s=1.0, tpot_s=0.1, e2e_s=2.0), 21.0, 100.0) == 800
    assert trial_requests(Slo(ttft_s=1.0, e2e_s=30.0), 21.0, 50.0) == 6000  # TTFT says nothing of the answer
    assert trial_requests(Slo(ttft_s=1.0), 21.0, 0.1) == LEAST_REQUESTS
    assert trial_requests(Slo(classes={"a": Slo(ttft_s=5.0), "b": Slo(ttft_s=1.0)}), 21.0, 50.0) == 1000


def served(load: float, count: int, seed: int = 0) -> dict[str, Any]:
    """A server of ten requests/s, first come first served."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0, count)) / (10 * load)
    free_s, times = 0.0, []
    for arrival in arrivals.tolist():
        free_s = max(free_s, arrival) + 0.1
        times.append(free_s - arrival)
    table = columns(times, [0.0] * count)
    return {**table, "arrival_s": arrivals, "input_tokens": np.full(count, 9)}


def test_a_queue_that_grows_fails_whatever_the_share_within_the_slo() -> None:
    """At 1.13 times what is served 500 requests wait less than 7 s, and are all within a minute."""
    slo = Slo(ttft_s=60.0)
    assert attained(served(1.13, 500), slo) == 1.0
    assert growing(served(1.13, 500))
    assert sustained(served(1.13, 500), slo) == 0.0
    assert sustained(served(0.8, 500), slo) == 1.0


@pytest.mark.parametrize(("load", "least", "most"), [(0.5, 0, 1), (0.8, 0, 3), (1.1, 85, 100), (1.3, 100, 100)])
def test_how_often_growth_is_seen(load: float, least: int, most: int) -> None:
    """Of 100 seeds, 1,000 requests each: hardly ever below capacity, nearly always above."""
    assert least <= sum(growing(served(load, 1000, seed)) for seed in range(100)) <= most


def test_who_was_refused_is_gone() -> None:
    table = served(0.5, 400)
    table["outcome"] = np.where(np.arange(400) % 2, "rejected", table["outcome"])
    table["e2e_s"] = np.where(np.arange(400) % 2, np.nan, table["e2e_s"])
    assert not growing(table)
    assert not growing({name: values[:20] for name, values in served(2.0, 400).items()})  # too few to say


# ------------------------------------------------------------ joint and separate


def columns(ttft_s: list[float], tpot_s: list[float]) -> dict[str, Any]:
    count = len(ttft_s)
    return {
        "outcome": np.array(["completed"] * count, dtype=object),
        "output_tokens": np.full(count, 5),
        "ttft_s": np.array(ttft_s),
        "tpot_s": np.array(tpot_s),
        "e2e_s": np.array(ttft_s),
    }


def test_joint_counts_requests_separate_counts_each_bound() -> None:
    table = columns([9] + [1] * 9, [1] * 9 + [9])
    slo = Slo(ttft_s=2, tpot_s=2)
    assert attained(table, slo, "joint") == 0.8
    assert attained(table, slo, "separate") == 0.9
    assert attained(table, Slo(ttft_s=2), "joint") == 0.9
    with pytest.raises(ConfigError, match="bounds nothing"):
        attained(table, Slo())


@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=40))
def test_separate_is_never_stricter_and_means_both_percentiles(rows: list[tuple[float, float]]) -> None:
    table, slo = columns([row[0] for row in rows], [row[1] for row in rows]), Slo(ttft_s=2, tpot_s=2)
    separate = attained(table, slo, "separate")
    assert attained(table, slo, "joint") <= separate
    both = all(np.quantile(table[f"{name}_s"], 0.9, method="inverted_cdf") <= 2 for name in ("ttft", "tpot"))
    assert both == (separate >= 0.9)


# ------------------------------------------------------------ on the simulator

SCENARIO = """
model: llama-3.1-8b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 2}]
workload:
  rate: 20.0
  generate: {requests: 60, input: {mean: 900, median: 700, max: 3000}, output: {fixed: 8}}
system: {name: vllm, tp: 2}
latency: roofline
slo: {ttft_s: 0.15, tpot_s: 0.03, attainment: 0.9}
seed: 5
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


def test_a_looser_slo_or_target_never_lowers_a_simulated_goodput(scenario: Path) -> None:
    def rates(*changes: str, target: float = 0.9) -> float:
        replay = Replay(scenario=Scenario.load(scenario, changes), criterion="joint")
        return goodput(
            replay, target=target, seeds=[5], start=10.0, high=160.0, tolerance=0.1, executor=Here()
        ).rate.mean

    plain = rates()
    assert 0 < rates("slo.ttft_s=0.1") <= plain <= rates("slo.ttft_s=0.3") <= rates("slo.ttft_s=0.3", target=0.7)
    assert rates("slo.ttft_s=0.1") < rates("slo.ttft_s=0.3")


def test_the_command_writes_tables_curve_and_scenario(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("goodput", scenario, "--seeds", 2, "--tolerance", 0.2, "--jobs", 1, "--json", "--out", "out")
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    [row] = shown["goodput"]
    assert row["rate_per_s"] == pytest.approx(2 * row["rate_per_s_per_gpu"])
    assert row["requests_per_usd"] > 0
    assert row["half_width_per_s"] is not None
    names = ["curve.csv", "curve.png", "curve.svg", "environment.json", "goodput.csv", "journal.jsonl", "runs.csv"]
    assert sorted(p.name for p in Path("out").iterdir()) == [*names, "scenario.yaml", "summary.json", "trials.csv"]
    trials = pd.read_csv("out/trials.csv")
    for seed, group in trials.groupby("seed"):
        best = group[group["attainment"] >= 0.9]["rate_per_s"].max()
        worst = group[group["attainment"] < 0.9]["rate_per_s"].min()
        assert best < worst <= 1.2 * best + 1e-9, seed
    around = pd.read_csv("out/runs.csv")
    assert len(around) == 16
    assert (around["attainment"] <= around[["ttft_attainment", "tpot_attainment"]].min(axis=1)).all()
    assert around.groupby("rate_per_s")["attainment"].mean().iloc[[0, -1]].diff().iloc[-1] < 0


def test_systems_side_by_side_as_a_table(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("goodput", scenario, "--systems", "vllm,sarathi-serve", "--seeds", 1, "--tolerance", 0.5, "--jobs", 1,
                "--criterion", "separate")  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "separate" in text
    assert "sarathi-serve" in text
    assert "requests per $" in text


def test_a_short_workload_goes_on_and_says_so(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("goodput", scenario, "--seeds", 1, "--tolerance", 0.2, "--jobs", 1, "--json",
                "--set", "workload.generate.requests=3")  # fmt: skip
    [row] = json.loads(capsys.readouterr().out)["goodput"]
    assert code == 0
    assert re.fullmatch("trials had up to [0-9]+ requests, .*; the workload's 3 were drawn on", row["remark"])
    assert row["rate_per_s"] > 1


def test_a_recording_begins_anew(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("three.csv").write_text("arrival_s,input_tokens,output_tokens\n0,700,8\n1,800,8\n2,1200,8\n")
    code = call("goodput", scenario, "--seeds", 1, "--tolerance", 0.2, "--jobs", 1,
                "--set", "workload={trace: three.csv, rate: 20}")  # fmt: skip
    assert code == 0
    assert "the workload's 3 were begun anew 100.0 times" in " ".join(capsys.readouterr().out.split())


def test_a_rate_limit_that_is_reached_says_at_least(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("goodput", scenario, "--max-rate", 2, "--seeds", 1, "--jobs", 1) == 0
    assert "at least 2" in capsys.readouterr().out


def test_what_cannot_be_reached_says_what_requests_need(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("goodput", scenario, "--seeds", 1, "--jobs", 1, "--set", "slo.ttft_s=0.001")
    text = " ".join(capsys.readouterr().out.split())
    assert code == 1
    assert "not reached even at" in text
    assert "90% of the requests keep TTFT 0.0" in text
    assert "(SLO 0.001 s), TPOT 0.0" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "slo={}"], "bounds nothing, so there is no goodput; set slo.ttft_s, tpot_s or e2e_s"),
        (["--set", "workload.end_s=2"], "workload: start_s and end_s leave [0-9]+ requests at [0-9.]+ requests/s"),
        (["--target", "1.5"], "--target 1.5: must be greater than 0 and at most 1"),
        (["--tolerance", "0"], "--tolerance 0 --seeds 1: give a share between 0 and 1"),
        (["--criterion", "both"], "--criterion both: must be joint or separate"),
    ],
)
def test_bad_input_is_one_line(
    scenario: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("goodput", scenario, "--seeds", 1, "--jobs", 1, *options) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert re.search(message, text), text
