"""Reports on profiles: errors, prices within the measured range, rates, one profile over another, and the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from calibrate.profile.file import read_profile, shipped_profiles, write_profile
from calibrate.profile.report import COUNTS, STEPS, errors, peaks, predictions, prices, rates, ratio_summary, ratios
from calibrate.profile.samples import Samples
from experiments.cli.calibrate import drawings, register
from experiments.pages.profiles_page import page
from experiments.plots.calibration import achieved_rates, fitted_prices, predicted_against_measured, prices_over
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import build_cost, resolve
from sim.cost import Device, Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.types import ConfigError

ENTRY = ProfileEntry(
    gpus=("L40S",),
    model="tiny",
    num_layers=10,
    tp=1,
    dtypes=("bfloat16",),
    linear=Table(counts=(2, 64), seconds=(1e-3, 8e-3), per="layer"),
    head=Table(counts=(1, 64), seconds=(1e-3, 1e-3), per="layer"),
    attention_prefill=Grid(counts=(1, 64), contexts=(0, 1024), seconds=((0.0, 1e-3), (6.4e-4, 2e-3)), per="layer"),
    attention_decode=Grid(counts=(1, 32), contexts=(512, 2048), seconds=((1e-4, 4e-4), (3.2e-3, 1.28e-2)), per="layer"),
    overhead_s=0.5,
    held_out={"linear": HeldOut(mape=0.02, largest=0.05, points=7)},
)
PROFILE = Profile(
    name="hand",
    provenance=Provenance(source="a", licence="b", date="c", tool="d", engine="e", method="f"),
    entries=(ENTRY,),
)
LINEAR = Samples(
    operator="linear",
    dtype="bfloat16",
    tp=1,
    axes={"tokens": (2, 16, 64)},
    seconds=((1e-3, 1.1e-3, 0.9e-3), (2e-3,), (8e-3,)),
    noise=(0.1, 0.02, 0.01),
    flops=(2e9, 16e9, 64e9),
    bytes=(1e9, 1e9, 2e9),
    predicted_s=(None, 2.2e-3, None),
)
GATHER = replace(LINEAR, operator="kv_gather", flops=None, predicted_s=(None, 1.9e-3, 8.8e-3))


def shipped(name: str) -> Profile:
    return read_profile(shipped_profiles()[name])


def test_a_row_per_operator_joins_samples_and_held_out_errors() -> None:
    table = errors(PROFILE, (LINEAR, GATHER)).set_index("operator")
    assert table.loc["linear", ["points", "noise", "mape", "largest", "held_out"]].tolist() == [3, 0.02, 0.02, 0.05, 7]
    assert table.loc["kv_gather", ["points", "held_out"]].tolist() == [3, 2]
    assert table.loc["kv_gather", ["mape", "largest"]].tolist() == pytest.approx([0.075, 0.1])


def test_unseen_points_alone_are_predictions() -> None:
    table = predictions((LINEAR, GATHER))
    assert table[table.operator == "linear"].to_dict("records") == [
        {"operator": "linear", "tp": 1, "measured_s": 2e-3, "predicted_s": 2.2e-3}
    ]
    assert len(table) == 3


def test_rates_are_of_the_median_run() -> None:
    table = rates((LINEAR, GATHER))
    assert table.operator.unique().tolist() == ["linear"], "the gather's arithmetic is unknown"
    assert table.iloc[0][["flops_per_byte", "flops_per_s", "bytes_per_s"]].tolist() == pytest.approx([2, 2e12, 1e12])


def test_the_roof_is_the_measured_one_or_the_data_sheets() -> None:
    sheet = peaks(PROFILE, "bfloat16")
    assert sheet is not None
    assert (sheet.bytes_per_s, sheet.source) == (864e9, "data sheet")
    device = Device(gpu="mine", description="a GPU", memory_bytes=1, bandwidth_bytes_per_s=5.0, flops={"bfloat16": 7.0})
    assert peaks(replace(PROFILE, device=device), "bfloat16") == (7.0, 5.0, "measured")
    assert peaks(replace(PROFILE, device=device), "float16") is None


def test_prices_stay_within_the_measured_range() -> None:
    table = prices(PROFILE).set_index(["operator", "number", "context"]).seconds
    assert table["linear"].index.get_level_values(0).tolist() == [n for n in COUNTS if 2 <= n <= 64]
    assert table["linear", 64, 0] == pytest.approx(0.080)
    assert table["head", 64, 0] == pytest.approx(0.001), "the head is charged once, whatever its per"
    assert table["attention_decode", 32, 2048] == pytest.approx(0.128)
    assert set(table["attention_decode"].index.get_level_values(1)) == {512, 2048}


def test_steps_sum_what_the_profile_has() -> None:
    table = prices(PROFILE).set_index(["operator", "number", "context"]).seconds
    assert table[STEPS[0], 64, 0] == pytest.approx(0.080 + 0.001 + 0.0064 + 0.5)
    assert table[STEPS[1], 32, 512] == pytest.approx(table["linear", 32, 0] + 0.001 + 0.032 + 0.5)
    assert (STEPS[1], 64, 512) not in table.index, "attention of 64 sequences is not known"


def test_a_profile_over_itself_is_one() -> None:
    table = ratios(shipped("helix-2025"), shipped("helix-2025"))
    assert (table.ratio == 1).all()
    assert {"linear", *STEPS} <= set(table.operator)


def test_a_slower_profile_is_more_than_one() -> None:
    slow = replace(ENTRY.linear, seconds=(2e-3, 16e-3))
    table = ratio_summary(ratios(replace(PROFILE, entries=(replace(ENTRY, linear=slow),)), PROFILE))
    found = table.set_index("operator")["median"]
    assert found["linear"] == pytest.approx(2)
    assert found["head"] == 1
    assert found[STEPS[0]] > 1


def test_kernel_tables_are_compared_with_an_entry_of_a_model() -> None:
    """Two measurements of one GPU by different projects: LLMServingSim's layers and aiconfigurator's kernels."""
    table = ratio_summary(ratios(shipped("vllm-0.19-rtx-pro-6000"), shipped("vllm-0.19-kernels-rtx-pro-6000")))
    steps = table[table.operator == STEPS[1]].set_index("model")
    assert set(steps.tp) == {1}, "the layers of TP2 come without all-reduces"
    assert steps.loc[["llama-3.1-8b", "qwen3-32b"], "median"].between(0.95, 1.05).all()


def test_operators_that_hold_different_things_are_not_compared() -> None:
    """Splitwise's linear holds collectives and overhead, those of kernels do not."""
    table = ratios(shipped("splitwise-2023"), shipped("vllm-0.14-a100-80g-sxm"))
    assert set(table.operator) == set(STEPS)
    assert set(table.gpu) == {"A100-80G-SXM"}, "both have it, so the H100 is left out"


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ConfigError, match="splitwise-2023 and helix-2025 share no model, TP degree and operator"):
        ratios(shipped("splitwise-2023"), shipped("helix-2025"))


def test_figures_hold_their_tables() -> None:
    seen, achieved, table = predictions((LINEAR, GATHER)), rates((LINEAR,)), prices(PROFILE)
    roof = peaks(PROFILE, "bfloat16")
    assert predicted_against_measured("hand", seen).table is seen
    assert achieved_rates("hand", achieved, roof).table is achieved
    drawing = fitted_prices("hand", table)
    titles = [axes.get_title(loc="left") for axes in drawing.figure.axes if axes.get_visible()]
    assert titles == list(dict.fromkeys(table.operator))
    line = drawing.figure.axes[0].get_lines()[0]
    assert np.asarray(line.get_ydata())[-1] == pytest.approx(80.0)
    over = prices_over("a", "b", ratios(PROFILE, PROFILE))
    assert over.figure.axes[0].get_title(loc="left") == "tiny TP1, L40S over L40S"


APP = typer.Typer()
register(APP)
APP.callback()(lambda: None)


def test_the_command_draws_what_the_samples_allow(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "p.json", (LINEAR, GATHER))
    found = CliRunner().invoke(APP, ["report", str(tmp_path / "p.json"), "--out", str(tmp_path / "figures")])
    assert found.exit_code == 0, found.output
    assert "linear" in found.output
    assert "2.0%" in found.output
    assert "no samples" not in found.output
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {
        f"{stem}.{suffix}"
        for stem in ("predicted-measured", "rates-bfloat16", "fitted-times")
        for suffix in ("png", "svg", "csv")
    }


def test_a_profile_without_samples_says_so() -> None:
    found = CliRunner().invoke(APP, ["report", "distserve-a100", "--against", "distserve-a100-vllm"])
    assert found.exit_code == 0, found.output
    assert "carries no samples" in found.output
    assert "opt-66b  4 A100-80G-SXM A100-80G-SXM step: one prompt     15" in found.output
    assert [name for name, _ in drawings(PROFILE, (), "hand", ratios(PROFILE, PROFILE))] == ["fitted-times", "ratios"]


def test_json_has_the_same_tables() -> None:
    found = CliRunner().invoke(APP, ["report", "vllm-0.19-rtx-4090", "--json"])
    data = json.loads(found.output)
    assert data["samples"] is False
    assert {row["operator"]: row["mape"] for row in data["errors"]}["attention_prefill"] == 0.10371


@pytest.mark.parametrize(("name", "message"), [("vllm-0.19-rtx-4080", "vllm-0.19-rtx-4090"), ("no.json", "path of a")])
def test_an_unknown_profile_is_named(name: str, message: str) -> None:
    found = CliRunner().invoke(APP, ["report", name])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


# ---------------------------------------------------------------- profiles in scenarios, and the page about them


def test_the_page_is_current() -> None:
    file = Path(__file__).parents[2] / "docs" / "reference" / "profiles.md"
    assert file.read_text(encoding="utf-8") == page(), (
        "write it anew: phasewise profiles --markdown > docs/reference/profiles.md"
    )


def test_every_gpu_type_is_on_the_page_once() -> None:
    """The last section names the GPU types that take kernels of a relative, then those that take the roofline."""
    named, without = page().split("## GPU types without a profile")
    assert "| L4 | llama-2-70b | 2 |" in named
    relatives, roofline = without.split("The roofline")
    assert "A40 (from vllm-0.14-l40s)" in relatives
    assert "A40" not in roofline
    assert "V100-32G" in roofline
    assert "L40S" not in without


def test_a_scenario_refuses_a_profile_that_is_far_off_unless_told_to_accept_it(tmp_path: Path) -> None:
    held = {"attention_decode": HeldOut(mape=0.42, largest=0.9, points=7)}
    path = tmp_path / "far-off.json"
    write_profile(replace(PROFILE, entries=(replace(ENTRY, held_out=held),)), path)
    data = {
        "model": "llama-3.1-8b",
        "cluster": {"nodes": [{"gpu": "L40S", "count": 1}]},
        "workload": {"generate": {"requests": 1, "input": {"fixed": 8}, "output": {"fixed": 2}}, "rate": 1},
        "system": {"name": "vllm"},
        "latency": str(path),
    }
    with pytest.raises(ConfigError, match=r"attention_decode is 42% off .* over accept_error, 30%"):
        resolve(Scenario.of(data))
    assert resolve(Scenario.of({**data, "accept_error": 0.5})).problem.cost.name == "fitted"
    assert build_cost(None, accept_error=1e-6).name == "fitted", "the shipped ones are tested, not refused"


def test_a_closed_form_drives_a_scenario() -> None:
    """OPT-13B by DistServe's own fit: unloaded, the first token comes after the published prefill time."""
    data = {
        "model": "opt-13b",
        "cluster": {"nodes": [{"gpu": "A100-80G-SXM", "count": 1}]},
        "workload": {"generate": {"requests": 1, "input": {"fixed": 1000}, "output": {"fixed": 3}}, "rate": 1},
        "system": {"name": "vllm", "engine": {"max_num_batched_tokens": 2048, "async_scheduling": False}},
        "latency": {"A100-80G-SXM": "distserve-a100"},
    }
    setup = resolve(Scenario.of(data))
    summary = setup.summary(setup.run())
    expected_ms = 18.1025 + 101.912 + 7.1223 + 1 + 2 + 0.1
    assert summary["ttft_s"]["mean"] * 1e3 == pytest.approx(expected_ms, rel=1e-3)
    assert (summary["measured"], summary["extrapolated_share"]) == (True, 0)
