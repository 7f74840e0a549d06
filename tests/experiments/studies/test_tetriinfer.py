"""TetriInfer's study: the signs of what it claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.studies import tetriinfer as study
from experiments.studies.published import Comparison


@pytest.fixture(scope="module")
def changes() -> dict[str, Comparison]:
    return {row.what: row for mix in study.MIXES for row in study.against_vllm(mix, study.FULL)}


def test_requests_are_of_the_mixs_classes() -> None:
    for mix, kinds in study.MIXES.items():
        requests = study.drawn(mix, 50)
        for kind, lengths in zip(
            kinds, ([(r.input_tokens, 512) for r in requests], [(r.output_tokens, 128) for r in requests]), strict=True
        ):
            assert {value > border for value, border in lengths} == ({True, False} if kind is None else {kind})


@pytest.mark.parametrize("mix", ["LPLD", "LPHD", "HPLD", "Mixed"])
def test_ttft_and_jct_fall_in_every_mix(changes: dict[str, Comparison], mix: str) -> None:
    """Abstract: light prompts, heavy answers; the others by readers' notes. Heavy prompts and answers: marginal."""
    for what in ("TTFT", "JCT"):
        assert (changes[f"{mix}: change of {what}"].ours or 0) < 0


def test_heavy_prompts_with_light_answers_cost_more_resource_time(changes: dict[str, Comparison]) -> None:
    assert (changes["HPLD: change of resource time"].ours or 0) > 0


def test_phases_that_run_together_slow_each_other_down() -> None:
    """Figures 3 to 5 by their notes: more than alone, in each case; a long prompt more than seven short ones."""
    rows = {row.what: row.ours or 0 for row in study.interference()}
    seven, many, long, decodes, heavy = rows.values()
    assert 1 < seven < many
    assert long > seven
    assert decodes > 1
    assert heavy > 0


def test_shortest_first_shortens_the_wait_more_in_larger_groups() -> None:
    """Figure 16 by its notes."""
    small, large = study.prefill(128)
    assert (large.ours or 0) < (small.ours or 0) < 0


def test_the_command_writes_its_page(tmp_path: Path) -> None:
    study.STUDY.main(["--out", str(tmp_path), "--quick"])
    page = (tmp_path / "study_tetriinfer.md").read_text()
    assert "| abstract | LPHD: change of TTFT | -97 % |" in page
    assert "notes: -44 %" in page
    assert (tmp_path / "study_tetriinfer.png").stat().st_size > 1000
