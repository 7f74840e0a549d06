"""The studies: what they compare, and that their commands write what they promise; vLLM's rows.

Exact oracles are asserted exactly; published ratios within the stated share, each test naming its table or figure.
SARATHI's and Splitwise's rows are in ``test_studies_sarathi.py`` and ``test_studies_splitwise.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import pytest

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, markdown, row, write
from experiments.studies.sarathi import study as study_sarathi
from experiments.studies.splitwise import study as study_splitwise
from experiments.studies.vllm import study as study_vllm
from experiments.studies.vllm.sharing import chats, prefixes, samples, saving, savings
from experiments.studies.vllm.world import (
    ALPACA,
    BASELINES,
    OPT_13B,
    SHAREGPT,
    Load,
    apart,
    latency_s,
    serve,
    translation,
)
from sim import SYSTEMS, Result
from traces import Fixed

ROWS = [
    row("Table 1", "slots", 1000.0, 1100.0, "", "arithmetic", kind="exact"),
    row("Fig. 2", "gain", 2.0, None, "x"),
]
QUIET = Log(quiet=True)


def test_a_study_writes_a_page_a_plot_and_the_numbers_behind_it(tmp_path: Path) -> None:
    paths = write(tmp_path, "study_x", "X", "What was run.", ROWS)
    assert sorted(path.name for path in paths) == ["study_x.csv", "study_x.md", "study_x.png", "study_x.svg"]
    assert sorted(paths) == sorted(tmp_path.iterdir())
    table = pd.read_csv(tmp_path / "study_x.csv")
    assert table.ratio[0] == pytest.approx(1.1)
    assert math.isnan(table.ratio[1])


def test_the_page_shows_what_was_not_found() -> None:
    text = markdown("study_x", "X", "What was run.", ROWS)
    assert "| Table 1 | slots | 1,000 | 1,100 | 1.10 | arithmetic |  |" in text
    assert "| Fig. 2 | gain | 2x | none found |  | roofline |  |" in text


@pytest.mark.parametrize(("given", "size"), [([], 7), (["--quick"], 1), (["--cache", "c.jsonl"], 7)])
def test_a_study_is_a_command_with_sizes(tmp_path: Path, given: list[str], size: int) -> None:
    asked = []

    def rows(size: int, log: Log, cache: Path | None) -> Iterable[Comparison]:
        asked.append((size, cache))
        return ROWS

    sizes = {"": (7, ""), "quick": (1, "small")}
    study = Study(name="study_x", title="X", intro="", sizes=sizes, rows=rows, cached=True)
    study.main(["--out", str(tmp_path), *given])
    assert asked == [(size, Path("c.jsonl") if "--cache" in given else None)]
    assert (tmp_path / "study_x.md").exists()


# ------------------------------------------------------------ vLLM: memory


def test_vllm_table_1_slots() -> None:
    assert [int(place.tokens) for place in study_vllm.PRINTED_SLOTS] == [15728, 9557, 60074]


def test_vllm_figure_2_blocks_waste_next_to_nothing() -> None:
    """Orca's three within 15 %, though free blocks that are apart are left out."""
    rows = list(study_vllm.shares())
    assert rows[0].ratio == pytest.approx(1, rel=0.03)
    assert [each.ratio for each in rows[1:]] == pytest.approx([1, 1, 1], rel=0.15)


def test_a_region_is_a_power_of_two_of_blocks() -> None:
    """100 + 60 tokens are 10 blocks of 16, so 16; 2048 are 128."""
    (request,) = Load("x", Fixed(tokens=100), Fixed(tokens=60)).requests(1.0, 1.0)[:1]
    assert study_vllm.region_blocks("oracle", request) == 16
    assert study_vllm.region_blocks("max", request) == 128


def test_vllm_figure_13_batched_requests() -> None:
    """ShareGPT, over Oracle, Pow2 and Max; Alpaca over Oracle."""
    rows = list(study_vllm.batched(60.0))
    assert [each.ratio for each in rows[:3]] == pytest.approx([1, 1, 1], rel=0.25)
    assert [each.published for each in rows[:3]] == pytest.approx([2.23, 3.10, 4.35], rel=0.01)


def test_vllm_figure_15_samples_within_a_tenth_and_beams_within_a_third() -> None:
    rows = list(savings())
    assert len(rows) == 10
    for each in rows:
        assert each.ratio == pytest.approx(1, rel=0.12 if "samples" in each.what else 1 / 3), each.what


def test_a_saving_by_hand() -> None:
    """A prompt of 32 tokens, two blocks, and 15 more: steps of 2 and of 3 blocks, of which two are shared."""
    load = Load("x", Fixed(tokens=32), Fixed(tokens=16))
    assert saving(load, 2, False, 1) == pytest.approx(1 - (2 + 15 * 4) / (4 + 15 * 6))


# ------------------------------------------------------------ vLLM: rates


def test_samples_of_a_baseline_are_requests_of_their_own() -> None:
    load = ALPACA._replace(samples=3)
    requests = load.requests(5.0, 2.0)
    alone = list(apart(requests))
    assert len(alone) == 3 * len(requests)
    assert [each.id for each in alone] == list(range(len(alone)))
    assert {(each.samples, each.prefix) for each in alone} == {(1, ())}


def test_a_group_is_as_late_as_its_last_sample() -> None:
    """Requests 0 to 3, in the order of their ends: 1, 3, 2 and 4 s for one token each."""
    columns = {
        "request": np.array([0, 2, 1, 3]),
        "outcome": np.array(["completed"] * 4, dtype=object),
        "e2e_s": np.array([1.0, 2.0, 3.0, 4.0]),
        "output_tokens": np.array([1, 1, 1, 1]),
    }
    result = cast("Result", SimpleNamespace(columns=columns))
    assert latency_s(result, 1) == 2.5
    assert latency_s(result, 2) == (3 + 4) / 2


def test_a_request_that_is_never_served_is_infinitely_late() -> None:
    load = Load("x", Fixed(tokens=3000), Fixed(tokens=10))
    assert latency_s(serve("vllm", OPT_13B, load, 1.0, 1.0), 1) == math.inf


def test_vllm_figure_14_the_gain_grows_with_what_beams_share() -> None:
    """1.3x to 2.3x from one sample to a width of 6; ours: beams gain more than as many samples."""
    gains = [each.ours or 0 for each in samples(3.0, 0.25, QUIET)]
    assert gains[2] > gains[1]
    assert min(gains) > 1.3


def test_vllm_figure_16_the_longer_the_shared_prefix_the_more_is_gained() -> None:
    """1.67x at 80 tokens, 3.58x at 341."""
    one, five = [each.ours or 0 for each in prefixes(3.0, 0.25, QUIET)]
    assert 1.3 < one < five
    assert five > 2.5


def test_a_shared_prefix_is_computed_once() -> None:
    result = serve("vllm", OPT_13B, translation(80), 5.0, 10.0)
    cached = result.columns["cached_tokens"]
    assert set(cached.tolist()) <= {0, 80}
    assert (cached == 80).mean() > 0.9


def test_vllm_figure_17_all_of_orcas_variants_serve_chats_alike() -> None:
    """A prompt of 1024 tokens and any output need the same region; vLLM serves more (printed: 2x)."""
    gains = [each.ours or 0 for each in chats(60.0, 0.25, QUIET)]
    assert gains[0] == gains[1] == gains[2] > 1


def test_every_baseline_is_one_a_user_can_name() -> None:
    assert {label.split()[0] for label in BASELINES} <= set(SYSTEMS)


def test_loads_have_the_printed_means() -> None:
    for load, means in ((SHAREGPT, (161, 338)), (ALPACA, (19, 58))):
        requests = load.requests(1.0, 20000.0)
        found = [
            sum(getattr(each, name) for each in requests) / len(requests) for name in ("input_tokens", "output_tokens")
        ]
        assert found == pytest.approx(means, rel=0.1)


# ------------------------------------------------------------ the commands


@pytest.mark.slow
@pytest.mark.parametrize("study", [study_sarathi.STUDY, study_splitwise.STUDY, study_vllm.STUDY])
def test_a_study_runs_in_quick_mode(study: Study, tmp_path: Path) -> None:
    study.main(["--out", str(tmp_path), "--quick"])
    (page,) = tmp_path.glob("study_*.md")
    table = pd.read_csv(page.with_suffix(".csv"))
    assert len(table) > 30
    assert table.ours.notna().mean() > 0.9
