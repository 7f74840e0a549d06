"""Deja Vu's study: its arithmetic, table 4 by the fit at 128 tokens, and what its page says of batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.studies import dejavu as study
from sim.cost import Roofline, Sparse


def test_paper_tables_1_and_2_exactly() -> None:
    """To what was printed; one token's 0.34 TFLOP is a cut-off 0.348 (44.6 for 128)."""
    for each in study.bytes_and_flops():
        cut_off = each.what == "one token, FLOPs"
        assert each.ratio == pytest.approx(1, rel=0.025 if cut_off else 0.015), each.what


@pytest.mark.parametrize("reading", study.READINGS)
def test_paper_table_4_other_columns_judge_the_fit(reading: str) -> None:
    """Both figures at 128 tokens exactly, by a bandwidth below the peak; the other six within 6 %."""
    found = study.fit(study.READINGS[reading])
    assert 0.5 < found.efficiency < 0.75
    for cost, printed in zip(found.costs(study.READINGS[reading]), study.TABLE_4_MS.values(), strict=True):
        ours = [study.decode_ms(cost, 1, context) for context in study.CONTEXTS]
        assert ours[0] == pytest.approx(printed[0], abs=1e-3)
        assert ours[1:] == pytest.approx(printed[1:], rel=0.06)


def test_paper_table_4_speed_ups_without_any_fit() -> None:
    ratios = [each.ratio for each in study.untuned() if each.published]
    assert len(ratios) == 4
    assert ratios == pytest.approx([1] * 4, rel=0.15)


def test_missing_kv_accounts_for_the_growth_with_the_context() -> None:
    dense, sparse = study.growth()
    assert sparse.ratio == pytest.approx(1, rel=0.1)
    assert dense.ratio is not None
    assert dense.ratio < 0.2, "what the page says we cannot explain"
    assert sparse.note == "0.17 if no KV is missing"


def test_what_the_page_says_of_batches() -> None:
    found = study.by_batch().set_index("batch")
    gains = {str(name): curve["gain"] for name, curve in found.groupby("curve")}
    again, none = gains["independent, missing KV made again"], gains["independent, no KV missing"]
    assert again.is_monotonic_decreasing
    assert again.idxmax() == 1
    assert none.min() > 1
    assert none.idxmin() in range(25, 36)
    assert none[8] == pytest.approx(1.3, abs=0.05)
    dense, sparse = (study.bound(cost) for cost in (Roofline(), Sparse(inner=Roofline())))
    assert study.decode_ms(dense, 8, 128) / study.decode_ms(sparse, 8, 128) == pytest.approx(1, abs=0.05)
    for _, curve in found.groupby("curve"):
        assert curve["tokens_per_s"].is_monotonic_increasing


def test_served_gains_fall_with_the_rate() -> None:
    gains = [each.ours or 0 for each in study.served(40)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.8


def test_the_command_writes_its_files(tmp_path: Path) -> None:
    study.main(["--out", str(tmp_path), "--quick"])
    names = {f"study_dejavu{part}.{kind}" for part in ("", "_batch") for kind in ("csv", "png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"study_dejavu.md"}
