"""The bench under ``phasewise calibrate``: the order of points, the journal, the timer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.bench.family import Family, Measurement, Part, Point, Runs, points
from calibrate.bench.grid import middle, refinement
from calibrate.bench.journal import Journal
from calibrate.bench.runner import run
from calibrate.bench.shapes import Limits
from sim.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512,
    "torch_dtype": "float32",
}  # fmt: skip
SETTINGS = {"model": "tiny", "device": "test"}
SMALL = Limits(tokens=128, sequences=64, context_tokens=256)


def never(_point: Point) -> Runs:
    raise AssertionError("the timer is injected")


def part(operator: str, times: int = 1) -> Part:
    return Part(operator=operator, prepare=never, need_bytes=lambda _: 0, times=times)


def family(name: str = "gemm", refined: tuple[str, ...] = ("tokens",), **axes: tuple[int, ...]) -> Family:
    return Family(name=name, tp=1, dtype="float32", axes=axes, parts=(part(name),), refined=refined)


class Law:
    """A timer with known laws: seconds by operator and point, and what each measurement takes of the budget."""

    def __init__(self, spent_s: float = 1.0, **laws: object) -> None:
        self.laws = laws
        self.spent_s = spent_s
        self.asked: list[tuple[str, Point]] = []

    def __call__(self, part: Part, point: Point) -> Measurement:
        self.asked.append((part.operator, dict(point)))
        law = self.laws.get(part.operator, self.laws.get("default"))
        seconds = law(**point)  # type: ignore[operator]
        return Measurement((seconds, seconds, seconds), self.spent_s)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "out.json.journal", SETTINGS)


def kinked(tokens: int) -> float:
    """Flat to 64 tokens, then linear: what a GEMM does."""
    return 1e-3 * max(1.0, tokens / 64)


# ---------------------------------------------------------------- the order of points


def test_the_grid_grows_where_the_curve_bends(journal: Journal) -> None:
    measured = run([family(tokens=(1, 8, 512))], Law(gemm=kinked), journal, budget_s=13)
    axis = measured.axes["gemm 1 float32"]["tokens"]
    assert axis[0] == 1
    assert axis[-1] == 512
    assert min(abs(value - 64) for value in axis) < 10
    assert sum(value > 8 for value in axis[1:-1]) >= 3


def test_a_straight_line_gets_no_more_points(journal: Journal) -> None:
    law = Law(gemm=lambda tokens: 1e-3 + 1e-5 * tokens)
    measured = run([family(tokens=(1, 8, 64, 512))], law, journal, budget_s=1e9)
    assert measured.axes["gemm 1 float32"]["tokens"] == (1, 8, 64, 512)
    assert len(law.asked) == 4


def test_a_short_budget_still_gives_every_family_its_coarse_grid(journal: Journal) -> None:
    law = Law(default=lambda tokens: kinked(tokens))
    families = [family(name, tokens=(1, 8, 64)) for name in ("a", "b")]
    assert len(run(families, law, journal, budget_s=0.1).by_key) == 6
    assert [operator for operator, _ in law.asked] == ["a"] * 3 + ["b"] * 3


def test_points_to_check_the_fit_are_none_of_its_own(journal: Journal) -> None:
    shape = replace(family(tokens=(1, 8, 64, 512)), checks=2, held={"tokens": (1000,)})
    measured = run([shape], Law(gemm=kinked), journal, budget_s=12)
    held = {key.point[0][1] for key in measured.held}
    assert len(held) == 3
    assert 1000 in held
    assert not held & set(measured.axes["gemm 1 float32"]["tokens"])
    assert measured.held < set(measured.by_key)


def test_the_budget_ends_a_run_and_families_share_it(journal: Journal) -> None:
    law = Law(default=lambda tokens: kinked(tokens))
    families = [family(name, tokens=(1, 8, 512)) for name in ("a", "b")]
    run(families, law, journal, budget_s=26)
    counts = [sum(operator == name for operator, _ in law.asked) for name in ("a", "b")]
    assert 18 <= sum(counts) <= 26
    assert abs(counts[0] - counts[1]) <= 3


def test_time_that_is_left_goes_to_what_noise_may_have_hidden(tmp_path: Path) -> None:
    """First a curve beyond its noise, then second looks at what is noisy, then curves within it; and again the same."""
    asked: list[str] = []

    def measure(part: Part, point: Point) -> Measurement:
        asked.append(part.operator)
        law_s = 1e-5 * point["tokens"] if part.operator == "straight" else kinked(point["tokens"])
        spread = (1.0,) * 3 if part.operator == "calm" else (0.1, 1.0, 9.1)
        return Measurement(tuple(law_s * factor for factor in spread), 1.0)

    families = [family(name, tokens=(1, 8, 64, 512)) for name in ("straight", "bent", "calm")]
    path = tmp_path / "journal"
    whole = run(families, measure, Journal(path, SETTINGS), budget_s=100)
    second_at = asked.index("straight", 4)
    assert set(asked[12:second_at]) == {"calm"}
    assert asked[second_at : second_at + 8] == ["straight"] * 4 + ["bent"] * 4
    assert asked.count("straight") == 8
    assert len(whole.axes["bent 1 float32"]["tokens"]) > 4
    asked.clear()
    assert run(families, measure, Journal(path, SETTINGS), budget_s=100) == whole
    assert not asked


def test_of_two_looks_the_quicker_one_counts(journal: Journal) -> None:
    law = Law(gemm=lambda tokens: 1e-3 * tokens)
    first = True

    def disturbed(part: Part, point: Point) -> Measurement:
        nonlocal first
        found = law(part, point)
        if point["tokens"] == 8 and first:
            first = False
            return Measurement((0.1, 0.1, 0.1), 1.0)
        return found

    measured = run([family(tokens=(1, 8, 64))], disturbed, journal, budget_s=20)
    assert measured.axes["gemm 1 float32"]["tokens"] == (1, 8, 64)
    assert [found.median_s for found in measured.by_key.values()] == pytest.approx([1e-3, 8e-3, 64e-3])


def test_a_grid_grows_by_whole_lines(journal: Journal) -> None:
    law = Law(attention=lambda tokens, context: 1e-6 * tokens * (tokens + context) + 1e-4)
    shape = family("attention", ("tokens", "context"), tokens=(16, 128, 1024), context=(0, 512, 2048))
    measured = run([shape], law, journal, budget_s=60)
    axes = measured.axes["attention 1 float32"]
    assert len(axes["tokens"]) > 3
    assert {key.point for key in measured.by_key} == {tuple(point.items()) for point in points(axes)}


def test_points_that_do_not_fit_are_left_out_and_the_rest_goes_on(journal: Journal) -> None:
    def measure(_part: Part, point: Point) -> Measurement:
        return Measurement((), 0.0, "needs 9 GiB") if point["tokens"] > 100 else Measurement((1e-3,) * 3, 1.0)

    measured = run([family(tokens=(1, 8, 64, 512))], measure, journal, budget_s=9)
    assert [found.skipped for found in measured.by_key.values()] == [None, None, None, "needs 9 GiB"]


axes_of_counts = st.lists(st.integers(0, 10_000), min_size=2, max_size=12, unique=True).map(sorted)


@given(axes_of_counts, st.randoms(use_true_random=False))
def test_a_refinement_lies_inside_an_interval_and_is_new(axis: list[int], random: object) -> None:
    seconds = np.array([[random.uniform(1e-6, 1.0)] for _ in axis])  # type: ignore[attr-defined]
    found = refinement(axis, seconds, np.zeros_like(seconds))
    if found is not None:
        assert axis[0] < found.value < axis[-1]
        assert found.value not in axis
        assert found.error >= 0


@given(axes_of_counts, st.floats(1e-9, 1e-3), st.floats(0, 1e-3))
def test_a_line_has_no_error_wherever_it_is_measured(axis: list[int], start_s: float, slope_s: float) -> None:
    seconds = start_s + slope_s * np.array(axis, float)[:, None]
    found = refinement(axis, seconds, np.zeros_like(seconds))
    assert len(axis) < 3 or found is None or found.error == pytest.approx(0, abs=1e-9)


def test_refinement_ends_when_intervals_are_narrow() -> None:
    axis = [1, 2, 3]
    assert refinement(axis, np.ones((3, 1)), np.zeros((3, 1))) is None
    assert middle(0, 100) == 9


def test_a_jump_between_neighbours_gets_no_more_points() -> None:
    jump = np.array([[1.0], [2.0], [2.0 + 4 * 127 / 1023], [6.0]])
    found = refinement([0, 1, 128, 1024], jump, np.zeros((4, 1)))
    assert found is not None
    assert found.error == pytest.approx(0, abs=1e-9)
    bent = refinement([0, 2, 128, 1024], jump, np.zeros((4, 1)))
    assert bent is not None
    assert bent.error > 0.1


def test_noise_is_no_curve() -> None:
    seconds = np.array([[1.0], [1.4], [1.0]])
    seen = refinement([1, 32, 1000], seconds, np.zeros((3, 1)))
    assert seen is not None
    assert seen.error > 0.05
    calm = refinement([1, 32, 1000], seconds, np.full((3, 1), 0.5))
    assert calm is not None
    assert calm.error == 0


# ---------------------------------------------------------------- the journal


def test_an_interrupted_run_resumes_and_loses_nothing(tmp_path: Path) -> None:
    shape, path = [family(tokens=(1, 8, 512))], tmp_path / "journal"
    whole = run(shape, Law(gemm=kinked), Journal(tmp_path / "other", SETTINGS), budget_s=20)
    law = Law(gemm=kinked)

    def interrupted(part: Part, point: Point) -> Measurement:
        if len(law.asked) == 7:
            raise KeyboardInterrupt
        return law(part, point)

    with pytest.raises(KeyboardInterrupt):
        run(shape, interrupted, Journal(path, SETTINGS), budget_s=20)
    with path.open("a") as file:
        file.write('{"operator": "gemm", "tp": 1, "dty')
    rest = Law(gemm=kinked)
    assert run(shape, rest, Journal(path, SETTINGS), budget_s=20) == whole
    again = Law(gemm=kinked)
    assert run(shape, again, Journal(path, SETTINGS), budget_s=20) == whole
    assert not again.asked
    assert len(law.asked) + len(rest.asked) == len(path.read_text().splitlines()) - 1


def test_every_point_is_on_disk_when_the_next_begins(tmp_path: Path) -> None:
    path, lines = tmp_path / "journal", []

    def measure(_part: Part, _point: Point) -> Measurement:
        lines.append(len(path.read_text().splitlines()))
        return Measurement((1e-3,) * 3, 1.0)

    run([family(tokens=(1, 2, 3))], measure, Journal(path, SETTINGS), budget_s=3)
    assert lines == [1, 2, 3]


def test_other_settings_are_refused_unless_restarted(journal: Journal) -> None:
    run([family(tokens=(1, 8))], Law(gemm=kinked), journal, budget_s=2)
    with pytest.raises(
        ConfigError, match=r"out\.json\.journal: was begun with device test, now it is H100; .*--restart"
    ):
        Journal(journal.path, {**SETTINGS, "device": "H100"})
    assert not Journal(journal.path, {**SETTINGS, "device": "H100"}, restart=True).done


@pytest.mark.parametrize(
    "text", ["hello\n", "[1]\n", '{"format": "other"}\n', "\x00\n", '{"format": "phasewise-calibration-1"}\n']
)
def test_a_foreign_journal_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line 1 is not of a calibration journal; --restart"):
        Journal(path, SETTINGS)


def test_a_damaged_line_is_named(journal: Journal) -> None:
    run([family(tokens=(1, 8))], Law(gemm=kinked), journal, budget_s=2)
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        Journal(journal.path, SETTINGS)


# ---------------------------------------------------------------- the timer


def test_repeats_end_when_the_median_stands_still_or_the_time_is_over() -> None:
    timer = pytest.importorskip("calibrate.bench.timer", reason="needs torch")
    sample = timer.Sample
    assert len(timer.repeated(lambda _: sample(1e-3), 1e9)) == 2 * timer.FEWEST_REPEATS
    noisy = iter([1.0, 2.0] * 100)
    assert len(timer.repeated(lambda _: sample(next(noisy)), 1e9)) == timer.MOST_REPEATS
    ticks = iter(range(100))
    assert len(timer.repeated(lambda _: sample(1.0), 0.5, clock=lambda: next(ticks))) == timer.FEWEST_REPEATS


def test_short_runs_are_timed_many_at_once_and_disturbed_ones_dropped() -> None:
    timer = pytest.importorskip("calibrate.bench.timer", reason="needs torch")
    asked: list[int] = []

    def sample(count: int) -> object:
        asked.append(count)
        return timer.Sample(9.0 if len(asked) % 2 else 1e-5, disturbed=bool(len(asked) % 2))

    assert set(timer.repeated(lambda count: sample(count) if asked else sample(1), 1e9)) == {1e-5}
    assert timer.repeated(lambda _: timer.Sample(3.0, disturbed=True), 0.0) == (3.0,) * timer.FEWEST_REPEATS
    counts: list[int] = []
    timer.repeated(lambda count: counts.append(count) or timer.Sample(1e-5), 1e9)  # type: ignore[func-returns-value]
    assert counts[0] == 1
    assert set(counts[1:]) == {20}


def test_an_operator_that_leaves_its_output_unwritten_is_caught() -> None:
    torch = pytest.importorskip("torch")
    from calibrate.bench.device import target
    from calibrate.bench.timer import BadKernelError, timed

    here, out = target("cpu"), torch.zeros(4)
    assert timed(Runs(lambda _: out.fill_(1.0), outputs=(out,)), here, 0.01)
    with pytest.raises(BadKernelError, match="unwritten"):
        timed(Runs(lambda _: out, outputs=(out,)), here, 0.01)


def test_random_buffers_exceed_the_cache_and_do_not_overlap() -> None:
    torch = pytest.importorskip("torch")
    from calibrate.bench.device import Target

    here = Target(torch.device("cpu"), cache_bytes=2**16)
    here.begin()
    sets = here.sets(2**12)
    buffers = here.random(torch.float32, 32, 32, sets=sets) + here.random(torch.float32, 5, 7)
    assert sets * 2**12 == 2 * 2**16
    starts = sorted((x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in buffers)
    assert all(end <= start for (_, end), (start, _) in pairwise(starts))
    assert 0.03 < float(torch.cat([x.flatten() for x in buffers]).std()) < 0.07


def test_a_point_larger_than_the_memory_is_skipped_with_the_reason() -> None:
    torch = pytest.importorskip("torch")
    from calibrate.bench.device import Target
    from calibrate.bench.timer import measurer

    measure = measurer(Target(torch.device("cpu"), cache_bytes=2**16), 0.01)
    huge = Part(operator="gemm", prepare=never, need_bytes=lambda _: 2**50)
    found = measure(huge, {"tokens": 1})
    assert found.skipped is not None
    assert found.skipped.startswith("needs 1048576.00 GiB")


@pytest.mark.parametrize(
    ("driver", "ours"),
    [
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(driver: str, ours: str) -> None:
    pytest.importorskip("torch")
    from calibrate.bench.device import catalogue_name
    from sim.cluster import gpu

    assert gpu(catalogue_name(driver)).name == ours


def test_an_unknown_gpu_asks_for_its_name() -> None:
    pytest.importorskip("torch")
    from calibrate.bench.device import catalogue_name

    with pytest.raises(ConfigError, match=r"'NVIDIA GTX 480'.*give --gpu NAME"):
        catalogue_name("NVIDIA GTX 480")
