"""The fidelity study: its arithmetic on made-up rows, and on real runs the bars that must hold."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from typer import Typer
from typer.testing import CliRunner

from experiments.fidelity import __main__ as command
from experiments.fidelity import report
from experiments.fidelity.cases import decode_steps, kv_bound, placements, served, tables
from experiments.fidelity.constants import FRONT_END_S, HAND_OFF_S, SYNCHRONOUS
from experiments.fidelity.table import Bar, Row, Study, judged, largest_bar, mean_bar, median_bar
from sim import Limits, Plan
from sim.systems.schedulers.vllm import vllm
from tests.toys import replica, request, run


def row(measured: float, predicted: float, use: str = "judged", metric: str = "TPOT") -> Row:
    return Row(
        study="made-up", case="c", metric=metric, unit="ms", measured=measured, predicted=predicted, load=0.5, use=use
    )  # type: ignore[arg-type]


ROWS = (row(10, 11), row(10, 8), row(10, 10.5), row(10, 90, "fitted"))


def test_an_error_is_signed_and_a_share() -> None:
    assert row(10, 11).error == pytest.approx(0.1)
    assert row(10, 8).error == pytest.approx(-0.2)


def test_bars_leave_fitted_rows_out() -> None:
    kept = judged(ROWS, "TPOT")
    assert [bar("made-up", kept, 0.1, 0.05).value for bar in (median_bar, mean_bar, largest_bar)] == pytest.approx(
        [0.1, 0.35 / 3, 0.2]
    )
    assert median_bar("made-up", kept, 0.1001, 0.05).points == 3


@pytest.mark.parametrize(("value", "floor", "reached", "aimed"), [(0.04, False, True, True), (0.07, False, True, False),
    (0.2, False, False, False), (0.96, True, True, True), (0.02, True, False, False)])  # fmt: skip
def test_a_bar_knows_its_verdict(value: float, floor: bool, reached: bool, aimed: bool) -> None:
    must, aim = (0.9, 0.95) if floor else (0.1, 0.05)
    bar = Bar(study="s", name="n", value=value, must=must, aim=aim, points=1, floor=floor)
    assert (bar.reached, bar.aimed) == (reached, aimed)


def made_up() -> Study:
    bars = (
        median_bar("made-up", judged(ROWS, "TPOT"), 0.2, 0.15),
        largest_bar("made-up", judged(ROWS, "TPOT"), 0.1, 0.05),
    )
    return Study(title="Made up", rows=ROWS, bars=bars, notes=("a note",))


def test_the_page_shows_load_beside_every_row() -> None:
    text = report.markdown([made_up()])
    assert "| c | TPOT | ms | 10 | 8.0 | -20.0 | 0.5 | judged |" in text
    assert "- a note" in text
    assert "| missed |" in text
    assert "| aim |" in text


def test_everything_is_saved(tmp_path: Path) -> None:
    written = report.save([made_up()], tmp_path / "out")
    assert {path.name for path in written} == {
        "bars.csv", "rows.csv", "fidelity.md", "made-up-tpot.png", "made-up-tpot.svg"
    }  # fmt: skip
    assert list(pd.read_csv(tmp_path / "out/rows.csv").error_percent) == [10.0, -20.0, 5.0, 800.0]


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    app = Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "has no folder measured" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("whole", "waits"), [(False, False), (True, True)])
def test_a_prompt_may_have_to_wait_for_room_for_all_of_it(whole: bool, waits: bool) -> None:
    """Ten blocks of 16 tokens: 96 tokens run when a prompt of 100 comes, of which the step's budget takes 31."""
    limits = Limits(num_kv_blocks=10, max_num_batched_tokens=32)
    system = vllm(reserve_full_prompt=whole).with_limits(limits)
    plan = Plan(replicas=(replica("a", ["n0.g0"]),))
    rows = run(system, [request(0, 0.0, 90, 20), request(1, 0.05, 100, 2)], plan=plan).requests.set_index("request")
    assert (rows.queue_s[1] > rows.decode_s[0] / 2) == waits
    assert list(rows.outcome) == ["completed", "completed"]


# ---------------------------------------------------------------- real runs


def test_the_kv_bound_run_is_foretold_better_than_upstream(shared_data: Path) -> None:
    """Upstream prints its errors in tenths of a percent: ours are compared as finely."""
    study = kv_bound.study(shared_data / "measured")
    assert len(study.bars) == 7
    assert [bar.name for bar in study.bars if round(bar.value, 3) > bar.aim] == []


def test_the_kv_bound_run_is_equal_step_by_step(shared_data: Path) -> None:
    """The law on a real trace: preemption, prefix sharing and prompts admitted only when they fit whole."""
    folder = shared_data / "measured" / kv_bound.FOLDER
    assert kv_bound.simulate_run(folder).log() == kv_bound.simulate_run(folder, step_by_step=True).log()


@pytest.mark.slow
def test_decode_steps(shared_data: Path) -> None:
    study = decode_steps.study(shared_data / "measured")
    kept = judged(study.rows, "TPOT")
    assert len(kept) == 14
    assert [row.case for row in kept if abs(row.error) > 0.10] == ["batch 800, 400 output tokens"]
    assert study.bars[1].reached


@pytest.mark.slow
def test_placements(shared_data: Path) -> None:
    study = placements.study(shared_data / "measured")
    assert {bar.name: bar.reached for bar in study.bars} == {
        "TPOT, median error": True,
        "TTFT, median error": True,
        "order of the placements by TTFT": True,
        "order of the placements by E2E": False,
    }


@pytest.mark.slow
def test_served_points(shared_data: Path) -> None:
    study = served.study(shared_data / "measured")
    assert [bar.aimed for bar in study.bars] == [True, True]
    assert set(served.by_degree(study.rows)) == {"TP1", "TP2", "TP4", "TP8"}


@pytest.mark.slow
def test_step_tables(shared_data: Path) -> None:
    for study in (tables.splitwise, tables.helix):
        assert all(bar.reached for bar in study(shared_data / "measured").bars)


@pytest.mark.slow
def test_constants_are_what_their_cells_give(shared_data: Path) -> None:
    measured = shared_data / "measured"
    overhead = decode_steps.fitted_overhead(measured)
    assert (overhead.step_s, overhead.sequence_s) == pytest.approx(
        (SYNCHRONOUS.step_s, SYNCHRONOUS.sequence_s), rel=0.01
    )
    assert placements.fitted_constants(measured) == pytest.approx((FRONT_END_S, HAND_OFF_S), rel=0.01)
