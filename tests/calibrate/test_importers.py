"""Importers of public profiles: small files of known content, and the shipped profiles made again from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.importers.aiconfigurator import all_reduce_tables, faster, gemm_table, import_aiconfigurator
from calibrate.importers.helix import fit_layer, import_helix, read_layer
from calibrate.importers.llmservingsim import import_llmservingsim, read_attention
from calibrate.profile.file import profile_text, read_profile, shipped_profiles, write_profile
from calibrate.profile.scaling import scaled
from sim.cluster import Cluster, gpu
from sim.cost import (
    AttentionTable,
    Fitted,
    GemmTable,
    Grid,
    Kernels,
    Overhead,
    Profile,
    Provenance,
    Table,
    advanced,
    seconds,
)
from sim.model import model
from sim.types import ConfigError, Stage, Work

LLAMA = model("llama-3.1-8b")
US = 1e-6
KERNELS = ("qkv_proj", "o_proj", "gate_up_proj", "act_fn", "down_proj", "layernorm", "rotary_emb")


def bind(profiles: list[Profile], gpu_name: str = "H100-SXM", tp: int = 1, **options: Any) -> Any:
    cluster = Cluster.of(nodes=[{"gpu": gpu_name, "count": tp}])
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=LLAMA.num_layers)
    return Fitted(profiles=profiles, overhead=Overhead(), **options).bind(LLAMA, stage, cluster)


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Every kernel takes 1 us and 1 us a token; attention 10 us a chunk token and 2 us a decode, 5 beside chunks."""
    variant = tmp_path / "RTX4090" / "meta-llama" / "Llama-3.1-8B" / "bf16"
    (variant / "tp1").mkdir(parents=True)
    (variant / "meta.yaml").write_text(
        "hardware: RTX4090\nmodel: meta-llama/Llama-3.1-8B\nvariant: bf16\n"
        "vllm_version: 0.19.0\nprofiled_at: '2026-01-02'\n"
    )
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    dense = [(name, n, 1.0 + n) for name in (*KERNELS, "embedding", "final_layernorm") for n in tokens]
    pd.DataFrame(dense, columns=["layer", "tokens", "time_us"]).to_csv(variant / "tp1/dense.csv", index=False)
    head = [(name, n, 3.0 * n) for name in ("lm_head", "sampler") for n in tokens]
    pd.DataFrame(head, columns=["layer", "sequences", "time_us"]).to_csv(variant / "tp1/per_sequence.csv", index=False)
    grid = [
        (chunk, before if chunk else 0, seqs, context if seqs else 0, 10.0 * chunk + seqs * (5.0 if chunk else 2.0))
        for chunk in (0, 16, 32, 64)
        for before in (0, 16)
        for seqs in (0, 1, 2, 4)
        for context in (16, 32)
        if chunk or seqs
    ]
    columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"]
    pd.DataFrame(grid, columns=columns).drop_duplicates().to_csv(variant / "tp1/attention.csv", index=False)
    return tmp_path / "RTX4090"


def test_layer_times_become_a_step(layers: Path) -> None:
    cost = bind([import_llmservingsim(layers)], "RTX-4090")
    linear_us = 32 * (len(KERNELS) + 1) * (1 + 4) + 2 * (
        1 + 4
    )  # norms run twice a layer; embedding and final norm once
    assert seconds(cost, Work((), 4, 4 * 16)) == pytest.approx((linear_us + 2 * 3 * 4 + 32 * 4 * 2) * US, rel=1e-9)


def test_decodes_beside_chunks_cost_what_the_mixed_kernel_adds(layers: Path) -> None:
    cost = bind([import_llmservingsim(layers)], "RTX-4090")
    chunk, both = Work(((16, 0),), 0, 0), Work(((16, 0),), 2, 32)
    tokens_us = 8 * (32 * (len(KERNELS) + 1) + 2)  # the graph of 24 tokens, not of 16, in every kernel but attention
    assert seconds(cost, both) - seconds(cost, chunk) == pytest.approx(
        (tokens_us + 2 * 3 * 2 + 32 * 2 * 5) * US, rel=1e-9
    )


def test_attention_is_split_in_three(layers: Path) -> None:
    attention = read_attention(next(layers.rglob("attention.csv")))
    assert attention.prefill.loc[32, 0] == pytest.approx(320 * US)
    assert attention.decode.loc[4, 32] == pytest.approx(8 * US)
    assert attention.mixed.loc[4, 32] == pytest.approx(20 * US)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: next(folder.rglob("meta.yaml")).unlink(), "no meta.yaml"),
        (lambda folder: _edit(folder, "meta.yaml", "RTX4090", "RTX9090"), "hardware is 'RTX9090'"),
        (lambda folder: _edit(folder, "dense.csv", "tokens", "token"), "column 'tokens' is missing"),
        (lambda folder: _edit(folder, "dense.csv", "act_fn", "gelu"), "'gelu' is unknown"),
        (lambda folder: _edit(folder, "per_sequence.csv", "sampler", "dice"), "'sampler' has no times"),
        (lambda folder: _edit(folder, "attention.csv", "160.0", "-1"), "time_us must be"),
    ],
)
def test_a_damaged_folder_is_named(layers: Path, change: Callable[[Path], None], message: str) -> None:
    change(layers)
    with pytest.raises(ConfigError, match=message):
        import_llmservingsim(layers)


def _edit(folder: Path, name: str, old: str, new: str) -> None:
    path = next(folder.rglob(name))
    path.write_text(path.read_text().replace(old, new))


# ---------------------------------------------------------------- kernel tables


def power_law(n_power: float = 1.0, k_power: float = 1.0) -> GemmTable:
    """Seconds = tokens * n**a * k**b, in picoseconds."""
    tokens, n, k = (1, 16), (1024, 4096, 16384), (1024, 8192)
    cube = tuple(tuple(tuple(t * x**n_power * y**k_power * 1e-12 for t in tokens) for y in k) for x in n)
    return GemmTable(tokens=tokens, n=n, k=k, seconds=cube)


def test_unseen_shapes_lie_geometrically_between() -> None:
    table = power_law(0.7, 0.9)
    assert table.row(6144, 4096) == pytest.approx([t * 6144**0.7 * 4096**0.9 * 1e-12 for t in (1, 16)])
    assert table.row(4 * 16384, 8192)[0] == pytest.approx(4 * table.row(16384, 8192)[0])  # beyond: in proportion


@pytest.mark.parametrize(
    "change", [{"tokens": (16, 1)}, {"n": (1024, 4096)}, {"seconds": power_law().seconds[:2]}, {"k": (1024,)}]
)
def test_a_gemm_table_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(power_law(), **change)


def kernels() -> Profile:
    provenance = Provenance(source="a", licence="b", date="c", tool="d", engine="e", method="f")
    part = Kernels(gpus=("H100-SXM",), dtypes=("bfloat16",), gemm=power_law(), attention=())
    return Profile(name="hand", provenance=provenance, kernels=(part,))


def test_a_model_is_put_together_from_kernels() -> None:
    entry = kernels().kernels[0].entry(LLAMA, 1, gpu("H100-SXM"))
    assert entry is not None
    assert entry.linear.per == "layer"
    assert entry.attention_decode is None
    gemms_s = 16 * sum(gemm.n * gemm.k for gemm in LLAMA.gemms()) * 1e-12
    assert gemms_s < entry.linear.seconds[1] < gemms_s + 40e-6  # norms, rope and activation
    assert entry.head is not None
    assert entry.head.seconds[0] > LLAMA.vocab_size * LLAMA.hidden_size * 1e-12


def test_kernels_survive_their_file(tmp_path: Path) -> None:
    write_profile(kernels(), tmp_path / "k.json")
    assert read_profile(tmp_path / "k.json") == kernels()


def test_an_empty_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    write_profile(kernels(), path)
    text = path.read_text()
    path.write_text(text[: text.index(' "kernels"')].rstrip().rstrip(",") + "\n}\n")
    with pytest.raises(ConfigError, match="entries or kernels"):
        read_profile(path)


def test_overhead_is_charged_by_step_and_sequence() -> None:
    cluster = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": 1}])
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=LLAMA.num_layers)
    with_, without = (
        Fitted(profiles=(kernels(),), overhead=overhead).bind(LLAMA, stage, cluster)
        for overhead in (Overhead(step_s=1e-3, sequence_s=1e-5), Overhead())
    )
    work = Work(((8, 0),), 3, 300)
    assert seconds(with_, work) - seconds(without, work) == pytest.approx(1e-3 + 4e-5)


@pytest.mark.parametrize("name", ["step_s", "sequence_s"])
def test_overhead_is_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Overhead(**{name: -1.0})


@pytest.mark.parametrize("name", ["vllm-0.19-rtx-4090", "vllm-0.19-h100-sxm", "vllm-0.14-l40s"])
@pytest.mark.parametrize("work", [Work(((64, 100),), 5, 700), Work(((512, 0), (16, 40)), 0, 0), Work((), 33, 9000)])
def test_shipped_profiles_keep_the_law(name: str, work: Work) -> None:
    """Prices along a run of steps are what the line says, with the mixed kernel too."""
    profile = read_profile(shipped_profiles()[name])
    parts = [*profile.entries, *profile.kernels]
    cost = bind([profile], parts[0].gpus[0])
    line = cost.line(work)
    for step in {0, min(7, line.iterations - 1), min(line.iterations, 2000) - 1}:
        assert cost.line(advanced(work, step)).first_ps == line.first_ps + step * line.slope_ps


# ---------------------------------------------------------------- scaling


def test_scaling_keeps_efficiency() -> None:
    source = gpu("H100-SXM")
    half = replace(source, name="half", bandwidth_bytes_per_s=source.bandwidth_bytes_per_s / 2)
    table = scaled(kernels(), source, half).kernels[0].gemm
    assert table.row(4096, 8192)[0] == pytest.approx(2 * power_law().row(4096, 8192)[0])  # 1 token: memory-bound
    slow = replace(source, name="slow", flops={**source.flops, "bfloat16": source.flops["bfloat16"] / 3})
    long = replace(kernels().kernels[0], gemm=replace(power_law(), tokens=(1, 100_000)))
    profile = replace(kernels(), kernels=(long,))
    row = scaled(profile, source, slow).kernels[0].gemm.row(4096, 8192)
    assert row == pytest.approx([long.gemm.row(4096, 8192)[0], 3 * long.gemm.row(4096, 8192)[1]])
    assert scaled(profile, source, slow).kernels[0].gpus == ("slow",)


def test_scaled_attention_follows_flops_in_prompts_and_bandwidth_in_decodes() -> None:
    source = gpu("H100-SXM")
    target = replace(source, name="H100-t", bandwidth_bytes_per_s=source.bandwidth_bytes_per_s / 5)
    target = replace(target, flops={**source.flops, "bfloat16": source.flops["bfloat16"] / 3})
    prefill = Table(counts=(16, 32), seconds=(1e-5, 2e-5), per="layer")
    decode = Grid(counts=(1, 2), contexts=(1, 64), seconds=((1e-6, 2e-6), (2e-6, 4e-6)), per="layer")
    table = AttentionTable(heads=32, kv_heads=8, head_dim=128, prefill=prefill, decode=decode)
    profile = replace(kernels(), kernels=(replace(kernels().kernels[0], attention=(table,)),))
    found = scaled(profile, source, target).kernels[0].attention[0]
    assert found.prefill.seconds == pytest.approx((1e-5, 4e-5))  # the shortest is a launch, which stays
    assert found.decode.seconds[1] == pytest.approx((6e-6, 16e-6))
    note = scaled(profile, source, target).provenance.method
    assert "predicted" in note


# ---------------------------------------------------------------- Helix


@pytest.fixture
def helix(tmp_path: Path) -> Path:
    """A T4: prompts take 1 ms per 100 tokens; a decode 2 ms and 0.1 ms a request."""
    folder = tmp_path / "model_manager" / "llama2_70b" / "t4"
    folder.mkdir(parents=True)
    prompts = "\n".join(f"{n},{n / 100}" for n in (0, 200, 400, 600, 800, 1000))
    decodes = "\n".join(f"{n},{2 + n / 10 if n else 0}" for n in (0, 2, 10, 50, 100, 300))
    (folder / "prompt_bs2time.csv").write_text(prompts)
    (folder / "decode_bs2time.csv").write_text(decodes)
    return tmp_path / "model_manager"


def test_helix_layers_are_priced_as_measured(helix: Path) -> None:
    spec = model("llama-2-70b", dtype="float16")
    cluster = Cluster.of(nodes=[{"gpu": "T4", "count": 1}])
    inner = Stage(name="inner", gpus=cluster.gpu_ids, first_layer=10, end_layer=20)
    cost = Fitted(profiles=[import_helix(helix)], overhead=Overhead()).bind(spec, inner, cluster)
    assert seconds(cost, Work(((400, 0),), 0, 0)) == pytest.approx(10 * 4e-3)
    assert seconds(cost, Work((), 300, 300 * 50)) == pytest.approx(10 * 32e-3)
    assert seconds(cost, Work((), 2, 200)) == pytest.approx(10 * 2e-3, rel=0.11)  # prompts bound it from above


def test_helix_linear_never_falls(helix: Path) -> None:
    tokens, linear_s, _, extra_s = fit_layer(read_layer(helix / "llama2_70b" / "t4"))
    assert (np.diff(tokens) > 0).all()
    assert (np.diff(linear_s) >= 0).all()
    assert (np.diff(extra_s) >= 0).all()


@pytest.mark.parametrize(("text", "message"), [("0,0\n2,1\n4,-1\n", "ms > 0"), ("0,0\na,b\n", "cannot be read")])
def test_helix_faults_are_named(helix: Path, text: str, message: str) -> None:
    (helix / "llama2_70b" / "t4" / "decode_bs2time.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_helix(helix)


def test_helix_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama1_30b"):
        import_helix(tmp_path)


# ---------------------------------------------------------------- the shipped files


SOURCES = {
    "vllm-0.19-rtx-4090": (import_llmservingsim, "llmservingsim/profiles/RTX4090"),
    "vllm-0.19-rtx-pro-6000": (import_llmservingsim, "llmservingsim/profiles/RTXPRO6000"),
    "vllm-0.14-a100-80g-sxm": (import_aiconfigurator, "aiconfigurator/data/a100_sxm"),
    "vllm-0.14-l40s": (import_aiconfigurator, "aiconfigurator/data/l40s"),
    "vllm-0.19-h100-sxm": (import_aiconfigurator, "aiconfigurator/data/h100_sxm"),
    "vllm-0.19-h200-sxm": (import_aiconfigurator, "aiconfigurator/data/h200_sxm"),
    "vllm-0.19-kernels-rtx-pro-6000": (import_aiconfigurator, "aiconfigurator/data/rtx_pro_6000_server"),
    "helix-2025": (import_helix, "helix/simulator/model_manager"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_shipped_file_is_made_again(name: str, shared_data: Path) -> None:
    importer, folder = SOURCES[name]
    assert profile_text(importer(shared_data / "measured" / folder)) == shipped_profiles()[name].read_text()


@pytest.mark.parametrize("name", SOURCES)
def test_shipped_files_are_small_and_state_their_error(name: str) -> None:
    path = shipped_profiles()[name]
    assert path.stat().st_size < 300_000
    profile = read_profile(path)
    for part in (*profile.entries, *profile.kernels):
        assert part.held_out
        assert all(0 <= held.mape < 0.2 for held in part.held_out.values())


def test_an_unknown_system_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="h100_sxm"):
        import_aiconfigurator(tmp_path)


def test_the_faster_all_reduce_counts() -> None:
    """vLLM's where it is faster, or at sizes that NCCL's table lacks; NCCL's where vLLM's was not measured."""
    ours = Table(counts=(8, 64, 1024), seconds=(1e-6, 9e-6, 10e-6))
    nccl = Table(counts=(16, 256), seconds=(2e-6, 4e-6))
    found = faster({2: ours}, {2: nccl, 4: nccl})
    assert found == {2: replace(ours, seconds=(1e-6, 2.4e-6, 10e-6)), 4: nccl}


def test_all_reduces_are_by_bytes_of_16_bit_values() -> None:
    """The file counts values. 256 of them take 9 ms in it, 512 take 2: they can be padded."""
    rows = pd.DataFrame(
        [(2, size, s) for size, s in ((128, 1e-3), (256, 9e-3), (512, 2e-3))], columns=["num_gpus", "message_size", "s"]
    )
    found = all_reduce_tables(rows.assign(kernel_source="vLLM_custom_graph"))
    assert found == {2: Table(counts=(256, 512, 1024), seconds=(1e-3, 2e-3, 2e-3))}


def test_outliers_are_lowered_to_larger_shapes() -> None:
    """128 x 128 for 8 tokens takes 9 ms in the file, but 512 x 512 takes 2: it can be padded."""
    shapes = [(n, k, m) for n in (128, 512) for k in (128, 512) for m in (1, 8)]
    rows = pd.DataFrame(
        [(*shape, 9e-3 if shape == (128, 128, 8) else 2e-3) for shape in shapes], columns=["n", "k", "m", "s"]
    )
    assert gemm_table(rows.assign(gemm_dtype="bfloat16")).seconds[0][0] == (2e-3, 2e-3)


def test_repeated_gemms_are_their_median() -> None:
    shapes = [(n, k, m) for n in (128, 256, 512) for k in (128, 256, 512) for m in (1, 8)]
    rows = pd.DataFrame(
        [(*shape, 1e-3 * repeat) for shape in shapes for repeat in (1, 2, 9)], columns=["n", "k", "m", "s"]
    )
    rows = rows[(rows.n < 512) | (rows.k < 512)].assign(gemm_dtype="bfloat16")
    table = gemm_table(rows)
    assert table.seconds[0][0][0] == pytest.approx(2e-3)
    assert math.isfinite(table.seconds[2][2][0])  # the hole
