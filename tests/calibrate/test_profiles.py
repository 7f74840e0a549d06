"""Profile files, the fit behind them, and the shipped Splitwise profile against the measurements."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from calibrate import fit
from calibrate.importers.splitwise import import_splitwise, main
from calibrate.profile.file import profile_text, read_profile, shipped_profiles, write_profile
from sim.cluster import Cluster
from sim.cost import Fitted, Profile, seconds
from sim.model import model
from sim.types import ConfigError, Stage, Work

SPLITWISE = "splitwise-2023"


def test_a_shipped_profile_prices_steps() -> None:
    profile = read_profile(shipped_profiles()[SPLITWISE])
    cluster = Cluster.of([{"gpu": "H100-SXM", "count": 8}])
    llama = model("llama-2-70b")
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=llama.num_layers)
    cost = Fitted(profiles=[profile]).bind(llama, stage, cluster)
    assert cost.measured
    assert seconds(cost, Work(((2048, 0),), 0, 0)) == pytest.approx(0.137, rel=0.01)


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return read_profile(shipped_profiles()[SPLITWISE])


def price(profile: Profile, name: str, gpu: str, tp: int, work: Work) -> float:
    cluster = Cluster.of([{"gpu": gpu, "count": tp}])
    spec = model(name, "float16")
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    cost = Fitted(profiles=[profile]).bind(spec, stage, cluster)
    assert cost.measured
    return seconds(cost, work)


# ---------------------------------------------------------------- Splitwise

SETUPS = [
    ("llama-2-70b", "llama2-70b", "A100-80G-SXM", "a100-80gb", 2),
    ("llama-2-70b", "llama2-70b", "A100-80G-SXM", "a100-80gb", 4),
    ("llama-2-70b", "llama2-70b", "A100-80G-SXM", "a100-80gb", 8),
    ("llama-2-70b", "llama2-70b", "H100-SXM", "h100-80gb", 4),
    ("llama-2-70b", "llama2-70b", "H100-SXM", "h100-80gb", 8),
    ("bloom-176b", "bloom-176b", "A100-80G-SXM", "a100-80gb", 8),
]


@pytest.fixture(scope="module")
def measured(shared_data: Path) -> pd.DataFrame:
    return pd.read_csv(shared_data / "measured" / "splitwise" / "perf_model.csv")


@pytest.mark.parametrize(("name", "csv_name", "gpu", "csv_gpu", "tp"), SETUPS)
def test_the_medians_of_the_file_come_back(
    shipped: Profile, measured: pd.DataFrame, name: str, csv_name: str, gpu: str, csv_gpu: str, tp: int
) -> None:
    """Single prompts within 2 %, decodes within 3 % (5 % at TP2): batch 1 is one price for 13 scattered shapes."""
    rows = measured[(measured.model == csv_name) & (measured.hardware == csv_gpu) & (measured.tensor_parallel == tp)]
    for tokens in (512, 1024, 2048, 4096, 8192):
        median = rows[(rows.prompt_size == tokens) & (rows.batch_size == 1)].prompt_time.median() / 1e3
        assert price(shipped, name, gpu, tp, Work(((tokens, 0),), 0, 0)) == pytest.approx(median, rel=0.02)
    for batch in (1, 32 if tp == 2 else 64):
        chosen = rows[(rows.prompt_size == 512) & (rows.batch_size == batch) & (rows.token_size == 128)]
        step = price(shipped, name, gpu, tp, Work((), batch, 576 * batch))
        assert step == pytest.approx(chosen.token_time.median() / 1e3, rel=0.05 if tp == 2 else 0.03)


def test_the_published_points_of_the_spec(shipped: Profile) -> None:
    """Llama2-70B, A100, TP8: prompts of 512 and 2,048 tokens, decode at batch 1 and 64 (medians of the file, ms)."""
    points = {
        Work(((512, 0),), 0, 0): 93.0,
        Work(((2048, 0),), 0, 0): 274.2,
        Work(((4096, 0),), 0, 0): 661.2,
        Work((), 1, 576): 45.0,
        Work((), 64, 64 * 576): 71.6,
    }
    for work, milliseconds in points.items():
        assert price(shipped, "llama-2-70b", "A100-80G-SXM", 8, work) * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_claim_splitwise_figure_5b_a_batch_of_64_decodes_takes_twice_as_long(shipped: Profile) -> None:
    one, many = (price(shipped, "bloom-176b", "A100-80G-SXM", 8, Work((), b, 576 * b)) for b in (1, 64))
    assert many / one == pytest.approx(2, abs=0.1)


def test_held_out_error_is_at_most_3_percent(shipped: Profile) -> None:
    """Splitwise section 5.2: under 3 % on a random 20 %. Ours, on rows without their repeats.

    H100 prefill, taken alone, stays above: repeats of one shape scatter by up to 25 % (322 to 419 ms), and their
    medians miss the very rows they come from by 2.5 % (TP4) and 3.4 % (TP8). So do TP2 decodes (3.4 %).
    """
    for kind in ("prefill", "decode"):
        held = [entry.held_out[kind] for entry in shipped.entries]
        assert len(held) == len(SETUPS)
        points = sum(part.points for part in held)
        assert points >= 6 * 10 * 13
        assert sum(part.mape * part.points for part in held) / points <= 0.03
        assert max(part.mape for part in held) <= 0.05


def test_the_importer_makes_the_shipped_file_again(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "measured" / "splitwise" / "perf_model.csv"
    out = tmp_path / "again.json"
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(source), "--out", str(out)])
    assert result.exit_code == 0
    assert out.read_bytes() == shipped_profiles()[SPLITWISE].read_bytes()


def test_the_importer_names_what_is_amiss(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(ConfigError, match=r"x\.csv: cannot be read"):
        import_splitwise(path)
    path.write_text("model,hardware\nllama2-70b,a100-80gb\n")
    with pytest.raises(ConfigError, match="column 'batch_size' is missing"):
        import_splitwise(path)
    header = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time,tensor_parallel\n"
    path.write_text(header + "llama2-70b,a100-80gb,512,1,128,0,50,7000,8\n")
    with pytest.raises(ConfigError, match="not > 0"):
        import_splitwise(path)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", shipped_profiles())
def test_a_shipped_profile_passes_the_check_it_is_spared(name: str, tmp_path: Path) -> None:
    path = shipped_profiles()[name]
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert read_profile(copy) == read_profile(path)


def test_a_profile_survives_its_file(shipped: Profile, tmp_path: Path) -> None:
    path = tmp_path / "copy.json"
    write_profile(shipped, path)
    assert read_profile(path) == shipped
    assert path.read_text() == profile_text(shipped)
    assert [file.name for file in tmp_path.iterdir()] == ["copy.json"], "no temporary file stays"


def test_a_profile_that_cannot_be_written_leaves_nothing(shipped: Profile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(shipped, tmp_path / "absent" / "p.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(shipped, tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def damaged(change: str) -> bytes:
    """The shipped file, with one fault."""
    raw = shipped_profiles()[SPLITWISE].read_bytes()
    data = json.loads(raw)
    entry = data["entries"][0]
    linear = entry["operators"]["linear"]
    match change:
        case "cut":
            return raw[: len(raw) // 2]
        case "binary":
            return b"\xff\xfe\x00" + raw
        case "list":
            return b"[1, 2]"
        case "foreign":
            return b'{"schema": "other", "version": 1}'
        case "version":
            data["version"] = 2
        case "missing":
            del entry["tp"]
        case "extra":
            entry["colour"] = "red"
        case "text":
            linear["seconds"][0] = "soon"
        case "negative":
            linear["seconds"][0] = -1.0
        case "nan":
            linear["seconds"][0] = float("nan")
        case "falling":
            linear["seconds"][-1] = 0.001
        case "short":
            linear["counts"].pop()
        case "twice":
            entry["included"].append("head")
        case "empty":
            data["entries"] = []
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", "damaged or cut short"),
        ("binary", "not a text file"),
        ("list", "not a profile"),
        ("foreign", '"schema": "phasewise-profile"'),
        ("version", "version is 2, this release reads 1"),
        ("missing", r"entries\.0\.tp is missing; add it"),
        ("extra", r"entries\.0\.colour is not a field"),
        ("text", r"entries\.0\.operators\.linear\.seconds\.0 is 'soon'"),
        ("negative", r"seconds\.0 is -1\.0"),
        ("nan", r"seconds\.0 is nan"),
        ("falling", r"entries\.0\.operators\.linear: seconds fall"),
        ("short", "14 values; it needs 13"),
        ("twice", r"entries\.0.*head is given and included"),
        ("empty", "entries"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(damaged(change))
    with pytest.raises(ConfigError, match=message) as caught:
        read_profile(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_profile_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot be read: .*; give a file, or one of: .*{SPLITWISE}"):
        read_profile(tmp_path / "none.json")


# ---------------------------------------------------------------- fitting


def test_repeats_become_medians_and_falls_are_pooled() -> None:
    counts, middle, repeats = fit.medians([2, 1, 2, 2], [5.0, 7.0, 4.0, 90.0])
    assert counts.tolist() == [1, 2]
    assert middle.tolist() == [7, 5]
    assert fit.rising(middle, repeats).tolist() == [5.5, 5.5]
    with pytest.raises(ConfigError, match="1 counts and 0 seconds"):
        fit.medians([1], [])


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30), st.floats(0.001, 0.5))
def test_thinning_misses_no_point_by_more_than_its_tolerance(values: list[float], tolerance: float) -> None:
    x = np.arange(len(values)) ** 2
    kept_x, kept_y = fit.thinned(x, values, tolerance)
    assert np.max(np.abs(np.interp(x, kept_x, kept_y) - values) / values) <= tolerance + 1e-12
    assert {0, x[-1]} <= set(kept_x)


def test_a_straight_line_needs_its_ends_only() -> None:
    assert fit.thinned([0, 1, 2, 3], [1, 2, 3, 4], 0.001)[0].tolist() == [0, 3]


def test_splits_test_a_fifth_and_never_what_they_train_on() -> None:
    for train, test in fit.splits(50, share=0.2, repeats=3, seed=1):
        assert len(test) == 10
        assert sorted([*train, *test]) == list(range(50))
    first, second = (next(fit.splits(50, share=0.2, repeats=1, seed=seed))[1].tolist() for seed in (1, 2))
    assert first != second
    assert [test.tolist() for _, test in fit.left_out(["a", "b", "a"])] == [[0, 2], [1]]


def test_held_out_errors_by_hand() -> None:
    held = fit.validated(
        lambda _train, test: fit.errors(np.full(len(test), 1.1), np.ones(len(test))), iter([([], [0, 1])])
    )  # type: ignore[list-item]
    assert (held.mape, held.largest, held.points) == (0.1, 0.1, 2)
    with pytest.raises(ConfigError, match="no measurement was left out"):
        fit.held_out([])
