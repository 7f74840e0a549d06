"""The page of systems: every system, and its study's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.pages.systems_page import STUDIES, page
from sim import SYSTEMS

DOCS = Path(__file__).parents[3] / "docs"


def test_every_system_has_a_row_and_a_study(tmp_path: Path) -> None:
    rows = [line for line in page(tmp_path).splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(SYSTEMS)
    assert set(STUDIES) == set(SYSTEMS)
    assert all(row.endswith("| none |  |  |  |  |") for row in rows)


def test_figures_are_the_studys_own(tmp_path: Path) -> None:
    table = tmp_path / "studies" / "vllm" / "study_vllm.csv"
    table.parent.mkdir(parents=True)
    table.write_text("kind,ratio\nexact,1.001\nexact,0.9\nratio,1.1\nratio,2.0\nratio,0.95\nratio,\ndirection,\n")
    row = next(line for line in page(tmp_path).splitlines() if line.startswith("| `vllm`"))
    assert row.endswith("| [vllm](../studies/vllm/study_vllm.md) | 1 of 2 | 2 of 3 | 1.10 | 1 |")


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are not installed")
def test_the_page_is_current() -> None:
    assert (DOCS / "reference" / "systems.md").read_text(encoding="utf-8") == page(DOCS)
