"""``phasewise calibrate``: the fit, the profile, the command, and a small run on the CPU of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrate.bench.family import Measurement, Part, Point
from calibrate.bench.shapes import Shard
from calibrate.measure import Settings, check, finish, journal_path
from calibrate.measure import calibrate as measure_model
from calibrate.profile.file import read_profile, read_samples, shipped_profiles, write_profile
from calibrate.profile.samples import Samples
from sim.cluster import Cluster
from sim.cost import Fitted, HeldOut, seconds
from sim.model import ModelSpec, model
from sim.types import ConfigError, SimulationError, Stage, Work
from tests.calibrate.test_points import ROOT, SMALL, TINY, Law

# ---------------------------------------------------------------- the fit

GEMMS = ("qkv", "o", "gate_up", "down")


def chunk_s(tokens: int, context: int) -> float:
    return 1e-5 + 1e-8 * tokens * (context + tokens / 2)


def decode_s(sequences: int, context: int) -> float:
    return 2e-5 + 1e-9 * sequences * context


def sum_s(layers: int, tokens: int, sequences: int, context: int) -> float:
    """All operators of ``laws`` that a step runs; of few decodes beside a chunk, what they take alone."""
    rows, logits = tokens + sequences, sequences + (tokens > 0)
    attention_s = decode_s(sequences, context) * (1.5 if tokens and sequences >= 8 else 1.0)
    attention_s += chunk_s(tokens, 0) if tokens else 0.0
    layer_s = 4e-5 * (1 + rows / 100) + 1.8e-5 * (1 + rows / 10) + attention_s
    return layers * layer_s + 6e-6 * (1 + rows / 10) + 1.1e-4 * (1 + logits / 10)


def laws(scale: float = 1.0, **changes: object) -> Law:
    """Every operator's own: GEMMs and small kernels in tokens, attention in pairs; decodes half as dear again mixed."""
    small = {"norm": 1e-6, "residual": 2e-6, "rope": 3e-6, "activation": 4e-6, "kv_scatter": 5e-6, "embedding": 6e-6}
    by_name = {name: (lambda tokens, base=base: base * (1 + tokens / 10)) for name, base in small.items()}
    by_name |= {f"gemm.{name}": (lambda tokens: scale * 1e-5 * (1 + tokens / 100)) for name in GEMMS}
    heads = {"head": 1e-4, "sampler": 1e-5, "step_io": 2e-5}
    by_name |= {name: (lambda sequences, base=base: base * (1 + sequences / 10)) for name, base in heads.items()}
    by_name |= {
        "attention_prefill": chunk_s,
        "attention_decode": decode_s,
        "attention_decode_skewed": lambda sequences, context: 1.25 * decode_s(sequences, context),
        "attention_mixed": lambda tokens, sequences, context: chunk_s(tokens, 0) + 1.5 * decode_s(sequences, context),
        "step": sum_s,
        "launch_eager": lambda launches: 1e-6 * launches,
        "default": lambda **point: 1e-6 + 1e-9 * next(iter(point.values())),
    }
    return Law(0.01, **{**by_name, **changes})


@pytest.fixture
def one_thread() -> object:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(config: Path, **changes: object) -> Settings:
    return Settings(model=str(config), device="cpu", minutes=0.05, limits=SMALL, **changes)  # type: ignore[arg-type]


def test_known_laws_come_back_from_the_fit(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    outcome = measure_model(settings(tiny), out, measure=laws())
    (entry,) = outcome.profile.entries
    tokens = 16
    layer_s = 4 * 1e-5 * 1.16 + (2 * 1e-6 + 2 * 2e-6 + 3e-6 + 4e-6 + 5e-6) * 2.6
    at = entry.linear.counts.index(tokens)
    assert entry.linear.seconds[at] == pytest.approx(2 * layer_s + 6e-6 * 2.6, rel=1e-3)
    assert entry.head is not None
    assert entry.head.seconds[0] == pytest.approx(1.3e-4 * 1.1, rel=1e-3)
    for grid, beside in ((entry.attention_decode, 1.0), (entry.attention_mixed, 1.5)):
        assert grid is not None
        for count, row in zip(grid.counts, grid.seconds, strict=True):
            factor = beside if count >= 8 else 1.0
            assert row == pytest.approx([factor * decode_s(count, context) for context in grid.contexts], rel=2e-3)
    assert entry.held_out["linear"].mape < 1e-3
    assert entry.held_out["attention_decode"].mape < 1e-3
    assert entry.held_out["attention_mixed"].mape < 1e-3
    assert 0 < entry.held_out["attention_prefill"].mape < 0.15
    assert outcome.profile.device is not None
    assert outcome.profile.device.gpu == "CPU"
    assert {"kv_gather", "kv_scatter", "kv_quantise", "launch_eager", "copy_d2d"} <= set(outcome.profile.tables)


def test_what_does_not_fit_into_memory_is_bridged_and_named(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    law = laws()

    def cramped(part: Part, point: Point) -> Measurement:
        if point.get("layers", 1) > 1 or point.get("sequences", 0) * point.get("context", 0) > 2000:
            return Measurement((), 0.0, "needs 9 GiB, 1 GiB are free")
        return law(part, point)

    outcome = measure_model(settings(tiny), tmp_path / "out.json", measure=cramped)
    (entry,) = outcome.profile.entries
    assert entry.attention_decode is not None
    longest = entry.attention_decode.seconds[entry.attention_decode.counts.index(8)]
    assert longest[-1] == pytest.approx(decode_s(8, 256), rel=2e-3)
    assert entry.attention_mixed is None
    assert any("needs 9 GiB" in reason for reason in outcome.skipped)
    assert "operators alone (too few whole steps fit into memory)" in outcome.profile.provenance.method
    with pytest.raises(ConfigError, match="no point of attention_decode fits"):
        measure_model(
            settings(tiny),
            tmp_path / "other.json",
            measure=lambda part, point: (
                Measurement((), 0.0, "full") if part.operator == "attention_decode" else law(part, point)
            ),
        )


def test_a_prediction_never_saw_its_point(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    outcome = measure_model(settings(tiny), tmp_path / "o.json", measure=laws())
    by_name = {part.operator: part for part in outcome.samples}
    entry = outcome.profile.entries[0]
    gemm = by_name["gemm.qkv"]
    guesses = list(zip(gemm.axes["tokens"], gemm.medians_s, gemm.predicted_s or (), strict=True))
    assert {tokens for tokens, _, guess in guesses if guess is None} == set(entry.linear.counts)
    assert [guess for _, _, guess in guesses if guess] == pytest.approx(
        [s for _, s, guess in guesses if guess], rel=1e-3
    )
    assert entry.held_out["linear"].points == sum(guess is not None for _, _, guess in guesses) > 0
    skewed = by_name["attention_decode_skewed"]
    assert np.array(skewed.predicted_s) * 1.25 == pytest.approx(np.array(skewed.medians_s), rel=1e-3)
    mixed = by_name["attention_mixed"]
    unseen = {point["tokens"] for point, guess in zip(mixed.points(), mixed.predicted_s or (), strict=True) if guess}
    assert unseen == {128}


def test_a_profile_with_samples_survives_its_file(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    outcome = measure_model(settings(tiny, tp=(1, 2)), out, measure=laws())
    write_profile(outcome.profile, out, outcome.samples)
    assert read_profile(out) == outcome.profile
    assert read_samples(out) == outcome.samples
    assert {entry.tp for entry in outcome.profile.entries} == {1, 2}
    assert outcome.profile.entries[0].collective is None
    assert outcome.profile.entries[1].collective is not None
    finish(out)
    assert not journal_path(out).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": [[1e-3], [-1.0]]}, r"samples\.0\.seconds\.1\.0 is -1\.0"),
        ({"noise": [0.1]}, "noise has 1 values, seconds has 2"),
        ({"axes": {"tokens": [1]}}, r"axes\.tokens has 1 values"),
        ({"seconds": [[1e-3], []]}, "every point needs repeats"),
        ({"colour": "red"}, r"samples\.0\.colour is not a field"),
    ],
)
def test_damaged_samples_are_refused_in_one_line(
    change: dict[str, object], message: str, tiny: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    profile = measure_model(settings(tiny), out, measure=laws()).profile
    part = Samples(operator="x", dtype="f", tp=1, axes={"tokens": (1, 2)}, seconds=((1.0,), (1.0,)), noise=(0.0, 0.0))
    write_profile(profile, out, (part,))
    data = json.loads(out.read_text())
    data["samples"][0] |= change
    out.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message) as caught:
        read_samples(out)
    assert str(caught.value).startswith(str(out))


def test_a_fit_worse_than_the_threshold_is_refused(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    profile = measure_model(settings(tiny), tmp_path / "out.json", measure=laws()).profile
    check(profile, 0.15)
    entry = replace(profile.entries[0], held_out={"linear": HeldOut(mape=0.2, largest=0.5, points=3)})
    bad = replace(profile, entries=(entry,))
    check(bad, 0.25)
    with pytest.raises(SimulationError, match=r"above --max-error 15%: linear \(tp 1\) 20\.0%; .* --force"):
        check(bad, 0.15)


def test_a_calibration_resumes_where_it_was_broken_off(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out, law = tmp_path / "out.json", laws()

    def interrupted(part: Part, point: Point) -> Measurement:
        if len(law.asked) == 20:
            raise KeyboardInterrupt
        return law(part, point)

    with pytest.raises(KeyboardInterrupt):
        measure_model(settings(tiny), out, measure=interrupted)
    rest = laws()
    assert measure_model(settings(tiny), out, measure=rest).profile.entries
    assert not {repr(row) for row in law.asked} & {repr(row) for row in rest.asked[:20]}
    with pytest.raises(ConfigError, match="was begun with tp 1, now it is 1,2"):
        measure_model(settings(tiny, tp=(1, 2)), out, measure=rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.0}, "--minutes: 0.0 must be a number > 0"),
        ({"max_error": float("nan")}, "--max-error"),
        ({"tp": (2, 2)}, r"--tp: \[2, 2\]"),
        ({"threads": 0}, "--threads: 0"),
        ({"gpu": "H1000"}, "did you mean"),
    ],
)
def test_settings_name_what_is_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(model="llama-2-7b", **change)  # type: ignore[arg-type]


def test_models_that_cannot_be_measured_are_refused() -> None:
    spec = model("llama-2-7b")
    with pytest.raises(ConfigError, match="--tp: 3 must divide the 32 heads"):
        Shard(spec=spec, tp=3)
    with pytest.raises(ConfigError, match="dtype: float8"):
        Shard(spec=replace(spec, dtype="float8"), tp=1)
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    with pytest.raises(ConfigError, match="latent attention"):
        Shard(spec=replace(spec, **latent), tp=1)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the command, and this machine

MIXTURE = {**TINY, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = {
    "model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 256, "max_position_embeddings": 512, "torch_dtype": "float16",
}  # fmt: skip


@pytest.mark.parametrize("config", [TINY, MIXTURE, OPT], ids=["llama", "qwen3-moe", "opt"])
@pytest.mark.parametrize("tp", [1, 4])
def test_every_operator_runs_at_the_ends_of_its_axes(config: dict[str, object], tp: int, one_thread: object) -> None:
    torch = pytest.importorskip("torch")
    from calibrate.bench import attention, cache, layer, step
    from calibrate.bench.device import Target
    from calibrate.bench.timer import measurer

    here = Target(torch.device("cpu"), cache_bytes=2**16)
    shard = Shard(spec=ModelSpec.from_config(config, name="small"), tp=tp)
    measure, operators = measurer(here, 0.0), set()
    steps = (step.step_family,) if step.refused(shard) is None else ()
    assert bool(steps) == (config is not OPT)
    for kind in (layer.linear_family, layer.head_family, attention.attention_families, cache.kv_family, *steps):
        found = kind(shard, here, SMALL)
        for one in found if isinstance(found, list) else [found]:
            grid = one.held if one.name == "attention_decode_skewed" else one.axes
            ends = [dict(zip(grid, corner, strict=True)) for corner in zip(*map(sorted, grid.values()), strict=False)]
            for each in one.parts:
                operators.add(each.operator)
                assert all(len(measure(each, point).seconds) >= 3 for point in (ends[0], ends[-1])), each.operator
    kinds = {"llama": "activation", "qwen3-moe": "experts", "opt": "activation"}
    assert kinds[{"qwen3_moe": "qwen3-moe"}.get(str(config["model_type"]), str(config["model_type"]))] in operators
    assert ("qk_norm" in operators) == (config is MIXTURE)


def test_collectives_are_measured_between_processes_and_a_dead_one_is_noticed() -> None:
    torch = pytest.importorskip("torch")
    from calibrate.bench.collectives import Group, can_group
    from calibrate.bench.device import Target

    assert can_group(Target(torch.device("cpu"), 2**16), 2)
    group = Group(2, cuda=False)
    try:
        for operator in ("all_reduce", "send_recv"):
            repeats = group.seconds(operator, "bfloat16", 4096, 0.1)
            assert len(repeats) >= 3
            assert 0 < min(repeats) < 10
        group._workers[1].kill()
        with pytest.raises(SimulationError, match=r"the process of rank . died"):
            group.seconds("all_reduce", "bfloat16", 4096, 0.1)
    finally:
        group.close()


def phasewise(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "calibrate", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def test_without_torch_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util, runpy, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "sys.argv = ['calibrate', '--model', 'llama-2-7b']; runpy.run_module('calibrate', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "phasewise: calibrate: torch is not installed; pip install 'phasewise[calibrate]'\n"


def test_the_command_loads_neither_torch_nor_pydantic_for_its_help() -> None:
    code = "import calibrate.cli, sys; print([name for name in ('torch', 'pydantic', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing"),
        (("--model", "lama-2-7b"), "did you mean 'llama-2-7b'"),
        (("--model", "llama-2-7b", "--tp", "two"), "--tp: 'two' must be whole numbers"),
        (("--model", "llama-2-7b", "--minutes", "-1"), "--minutes: -1.0 must be a number > 0"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = phasewise(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_small_model_is_measured_here_and_its_profile_runs_a_scenario(
    tiny: Path, tmp_path: Path, one_thread: object
) -> None:
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve

    out = tmp_path / "measured.json"
    outcome = measure_model(settings(tiny, threads=1), out)
    write_profile(outcome.profile, out, outcome.samples)
    (entry,) = outcome.profile.entries
    assert entry.linear.seconds[-1] > entry.linear.seconds[0]
    scenario = Scenario.model_validate(
        {
            "model": str(tiny),
            "cluster": {"nodes": [{"gpu": "cpu", "count": 1}]},
            "workload": {"generate": {"requests": 5, "input": {"fixed": 40}, "output": {"fixed": 6}}, "rate": 10},
            "system": {"name": "vllm", "tp": 1},
            "latency": str(out),
            "accept_error": 10.0,
        }
    )
    setup = resolve(scenario)
    summary = setup.summary(setup.run())
    assert summary["completed"] == 5


@pytest.mark.slow
def test_the_command_calibrates_a_two_layer_model_within_two_minutes(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "measured.json"
    start_s = time.monotonic()
    given = ("--model", str(tiny), "--device", "cpu", "--threads", "1", "--minutes", "0.5", "--out", str(out))
    done = phasewise(*given, "--force")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start_s < 120
    assert done.stdout.splitlines()[-1] == f"wrote {out}"
    assert {part.operator for part in read_samples(out)} >= {
        "gemm.qkv", "attention_mixed", "kv_gather", "launch_eager", "step"
    }  # fmt: skip
    assert not journal_path(out).exists()


def test_the_shipped_cpu_profile_is_small_accurate_and_prices_its_model() -> None:
    path = shipped_profiles()["measured-cpu-llama-100m"]
    profile = read_profile(path)
    assert path.stat().st_size < 300_000
    check(profile, 0.15)
    spec = model(str(ROOT / "calibrate" / "models" / "llama-100m.json"))
    cluster = Cluster.of([{"gpu": "CPU", "count": 1}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    cost = Fitted(profiles=[profile]).bind(spec, stage, cluster)
    assert cost.measured
    decode, more, prompt = (
        seconds(cost, work) for work in (Work((), 1, 64), Work((), 8, 512), Work(((256, 0),), 0, 0))
    )
    assert 0.001 < decode < more < prompt < 10
