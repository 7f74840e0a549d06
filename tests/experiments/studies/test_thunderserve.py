"""ThunderServe's studies: what they run on, and that splitting gains what its link allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.runs.progress import Log
from experiments.studies.thunderserve import study
from experiments.studies.thunderserve.world import (
    QUICK,
    best,
    cloud,
    colocated,
    in_house,
    problem,
    thunderserve,
    two_kinds,
)
from sim.metrics import attainment

TINY = QUICK._replace(requests=60, tolerance=0.3, steps=2, rounds=1)


def test_the_cloud_costs_what_the_abstract_says() -> None:
    """Abstract: $13.54 an hour; 32 GPUs, on which memory allows 12 copies of LLaMA-30B."""
    assert len(cloud().gpu_ids) == 32
    assert cloud().usd_per_hour() == pytest.approx(13.54)
    assert study.most_replicas() == 12


def test_the_slo_is_a_multiple_of_what_two_a100_take() -> None:
    one, ten = (problem(in_house(), "conversation", scale).slo for scale in (1.0, 10.0))
    assert one.ttft_s is not None
    assert ten.ttft_s == pytest.approx(10 * one.ttft_s)
    flops = 2 * 32.5e9 * problem(in_house(), "conversation").workload.mean_input_tokens
    assert flops / (2 * 312e12) < one.ttft_s < 3 * flops / (2 * 312e12)


@pytest.mark.slow
def test_splitting_gains_and_gains_more_over_the_faster_link() -> None:
    """Public summaries: 2.04 times at 40 Gbps, 1.36 times at 5 Gbps; here by direction."""
    size = QUICK._replace(steps=4 * QUICK.steps, rounds=2)
    fast, slow = (problem(two_kinds(gbps), "conversation") for gbps in (40.0, 5.0))
    plain = best(fast, colocated("v1"), 1.0, size).rate_per_s
    gains = [best(where, [thunderserve(size)], plain, size).rate_per_s / plain for where in (slow, fast)]
    assert 1 < gains[0] < gains[1]


@pytest.mark.slow
def test_sixteen_bits_over_the_slow_link_serve_less_than_four() -> None:
    where = problem(two_kinds(5.0), "conversation")
    rates = [best(where, [thunderserve(TINY, bits=bits)], 2.0, TINY).rate_per_s for bits in (16, 4)]
    assert rates[0] < rates[1]


def test_deadlines_are_found_on_the_reference() -> None:
    served = best(problem(in_house(), "coding"), colocated("v1"), 4.0, TINY)
    scale = served.deadline_scale(2.0, TINY)
    columns = served.columns(2.0, TINY)
    reference = problem(in_house(), "coding", 1.0).slo
    shares = [attainment(columns, reference, factor)["attainment"] or 0.0 for factor in (scale, 0.9 * scale)]
    assert shares[0] >= 0.9 > shares[1]


def test_attainment_over_time_is_by_arrival() -> None:
    table = study.over_time(np.array([1.0, 2.0, 11.0]), np.array([True, False, True]))
    assert table["arrival_s"].tolist() == [0.0, 10.0]
    assert table["attainment"].tolist() == [0.5, 1.0]


@pytest.mark.slow
def test_a_part_is_written_with_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "QUICK", TINY)
    study.main(["--out", str(tmp_path), "--part", "b", "--quick"])
    page = tmp_path.joinpath("study_thunderserve.md").read_text()
    assert "40 Gbps, 4 bits, over vLLM V1 | 2.04x" in page
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".png", ".svg"}


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    curves: list[pd.DataFrame] = []
    rows = study.rows_of(study.PARTS, TINY, Log(quiet=True), curves)
    assert len(curves) == 3
    assert {row.published for row in rows} >= {1.7, 2.1, 1.5, 2.5, 12, 2.04, 1.36, 1.3, 4.0}
