"""What predictions rest on where nothing was measured: operators, steps and memory, their own tables left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.fidelity.cases import crossed, left_out, memory
from experiments.fidelity.table import judged


@pytest.mark.parametrize("study", [left_out.steps, left_out.older, memory.study])
def test_what_is_left_out_is_foretold_as_well_as_stated(study: Any) -> None:
    found = study(Path())
    assert [bar.name for bar in found.bars if not bar.reached] == []
    assert all(row.predicted > 0 for row in found.rows)


def test_cards_of_70_w_do_not_hold_their_peak() -> None:
    """Long prompts of LLaMA-2-70B on T4s, whose share of the data sheet's FLOP/s was fitted on LLaMA-30B."""
    rows = [row for row in judged(left_out.older(Path()).rows, "prefill") if row.case.startswith("T4, llama-2-70b")]
    long = [abs(row.error) for row in rows if int(row.case.rpartition(" ")[2]) >= 256]
    assert len(long) == 9
    assert max(long) < 0.15


def test_steps_are_summed_up_by_model_and_kind() -> None:
    found = left_out.steps(Path())
    assert len(found.rows) == 5 * 4 * 14
    assert [cells["steps"] for cells in found.summary] == ["prefill", "decode"] * 4
    assert sum(int(str(cells["points"])) for cells in found.summary) == len(found.rows)


@pytest.mark.parametrize("study", [crossed.models, crossed.gpus])
def test_cross_validation_states_what_it_reaches(study: Any) -> None:
    found = study(Path())
    assert [bar.name for bar in found.bars if not bar.reached] == []
    assert len(judged(found.rows, "linear")) == 20
