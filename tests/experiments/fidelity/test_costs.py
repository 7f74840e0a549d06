"""Costs that unseen runs depend on: overlapped processor time, models from kernels, relatives of measured GPUs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.profile.file import profile_text, read_profile, shipped_profiles, write_profile
from calibrate.profile.relatives import RELATIVES, kernels_for
from calibrate.profile.scaling import scaled
from experiments.scenario.resolve import build_cost
from experiments.scenario.system import OverheadSpec
from sim.cluster import Cluster, gpu
from sim.cost import (
    AttentionTable,
    Fitted,
    GemmTable,
    Grid,
    Kernels,
    Overhead,
    Profile,
    StageCost,
    Table,
    advanced,
    collective_seconds,
    seconds,
)
from sim.cost.kernels import SMALL_KERNEL_S, SMALL_KERNELS
from sim.cost.step import Composed
from sim.model import ModelSpec, model
from sim.types import ConfigError, Stage, Work

KERNELS = read_profile(shipped_profiles()["vllm-0.19-kernels-rtx-pro-6000"])
LLAMA, EXPERTS = model("llama-3.1-8b"), model("qwen3-30b-a3b")


def bound(spec: ModelSpec = LLAMA, tp: int = 1, layers: tuple[int, int] | None = None, **options: Any) -> StageCost:
    cluster = Cluster.of(nodes=[{"gpu": "RTX-PRO-6000", "count": tp}])
    first, end = layers or (0, spec.num_layers)
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=first, end_layer=end)
    return Fitted(**{"profiles": [KERNELS], "overhead": Overhead(), **options}).bind(spec, stage, cluster)


# ---------------------------------------------------------------- asynchronous scheduling


def test_a_step_takes_the_longer_of_kernels_and_processor() -> None:
    work = Work((), 8, 8 * 500)
    kernels_s = seconds(bound(), work)
    for step_s, sequence_s in ((kernels_s / 2, 0.0), (2 * kernels_s, 0.0), (kernels_s, 1e-4)):
        part = Overhead(step_s=step_s, sequence_s=sequence_s)
        host_s = step_s + 8 * sequence_s
        both = bound(overhead=replace(part, overlapped=True))
        assert seconds(both, work) == pytest.approx(max(kernels_s, host_s))
        assert seconds(bound(overhead=part), work) == pytest.approx(kernels_s + host_s)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_slowdown_is_of_kernels_alone(overlapped: bool) -> None:
    work = Work(((64, 0),), 8, 8 * 500)
    host_s = 1e-6 if overlapped else 0.5
    slow = bound(overhead=Overhead(step_s=host_s, slowdown=1.25, overlapped=overlapped))
    beside_s = 0.0 if overlapped else host_s
    assert seconds(slow, work) == pytest.approx(1.25 * seconds(bound(), work) + beside_s, rel=1e-6)
    with pytest.raises(ConfigError, match="slowdown is 0"):
        Overhead(slowdown=0)


def test_only_the_first_stage_waits_for_the_processor() -> None:
    overhead = Overhead(step_s=1.0, overlapped=True)
    assert seconds(bound(overhead=overhead, layers=(0, 16)), Work((), 1, 10)) == 1.0
    assert seconds(bound(overhead=overhead, layers=(16, 32)), Work((), 1, 10)) < 0.1
    assert seconds(bound(overhead=overhead), Work((), 0, 0)) == 0.0


@given(
    step_s=st.floats(0, 0.05), seqs=st.integers(1, 64), context=st.integers(1, 8192), chunk=st.sampled_from([0, 5, 64])
)
def test_overlapped_lines_keep_the_law(step_s: float, seqs: int, context: int, chunk: int) -> None:
    cost = bound(overhead=Overhead(step_s=step_s, sequence_s=1e-5, overlapped=True))
    work = Work(((chunk, 100),) if chunk else (), seqs, seqs * context)
    line = cost.line(work)
    for i in {0, 1, min(line.iterations, 5000) // 2, min(line.iterations, 5000) - 1}:
        if i < line.iterations:
            later = cost.line(advanced(work, i))
            assert (later.first_ps, later.extrapolated) == (line.first_ps + i * line.slope_ps, line.extrapolated)


def test_a_line_ends_where_the_kernels_take_longer() -> None:
    """The processor's time lies between the fourth iteration's kernels and the fifth's."""
    work = Work((), 8, 8 * 5000)
    first_ps, slope_ps, *_ = bound().line(work)
    cost = bound(overhead=Overhead(step_s=(first_ps + 3.5 * slope_ps) / 1e12, overlapped=True))
    line = cost.line(work)
    assert (line.slope_ps, line.iterations) == (0, 4)
    assert cost.line(advanced(work, 4)).first_ps == first_ps + 4 * slope_ps > line.first_ps


def test_a_scenario_may_ask_for_it() -> None:
    cost = build_cost(None, OverheadSpec(step_s=1.0), overlapped=True)
    assert isinstance(cost, Fitted)
    assert cost.overhead == Overhead(step_s=1.0, overlapped=True)


@pytest.mark.parametrize("latency", [None, "roofline"])
def test_an_overhead_that_is_only_assumed_hides_as_well(latency: str | None) -> None:
    """2 ms a step, which no scenario states: behind the kernels if the engine decides ahead, else on top of them."""
    cluster = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": 1}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=LLAMA.num_layers)
    ahead, present = (build_cost(latency, overlapped=on).bind(LLAMA, stage, cluster) for on in (True, False))
    work = Work((), 8, 8 * 500)
    assert seconds(present, work) - seconds(ahead, work) == pytest.approx(0.002)


# ---------------------------------------------------------------- chunks of one step


def test_chunks_of_a_step_share_their_launch() -> None:
    """64 prompts of 16 tokens: one kernel, not 64 launches of 7 us in each of 32 layers."""
    cost = bound()
    assert isinstance(cost, Composed)
    alone_ps = cost.operators.chunk(16).segment(0, 16)[0]
    whole_ps = cost.line(Work(((16, 0),) * 64, 0, 0)).first_ps
    fixed_ps = sum(part(count)[0] for part, count in zip(_fixed(cost), (1024, 1024, 64), strict=True))
    assert whole_ps - fixed_ps == 64 * alone_ps - 63 * cost.operators.shared_ps
    assert 0.85 * alone_ps < cost.operators.shared_ps < alone_ps


def test_an_engine_may_launch_every_chunk_on_its_own(tmp_path: Path) -> None:
    """Our torch engine does: nothing is saved."""
    cpu = read_profile(shipped_profiles()["measured-cpu-llama-100m"])
    assert {entry.shared_launch for entry in cpu.entries} == {0.0}
    entry = KERNELS.kernels[0].entry(LLAMA, 1, gpu("RTX-PRO-6000"))
    assert entry is not None
    profiles = [replace(KERNELS, kernels=(), entries=(replace(entry, shared_launch=part),)) for part in (0.0, 0.9)]
    own, joint = (bound(profiles=[profile]) for profile in profiles)
    one, two = Work(((16, 0),), 0, 0), Work(((16, 0),) * 2, 0, 0)
    assert own.line(one) == joint.line(one)
    assert isinstance(joint, Composed)
    assert own.line(two).first_ps == joint.line(two).first_ps + joint.operators.shared_ps
    assert read_profile(_written(tmp_path, profiles[0])).entries[0].shared_launch == 0.0
    assert "shared_launch" not in _written(tmp_path, profiles[1]).read_text()


def _written(folder: Path, profile: Profile) -> Path:
    write_profile(profile, folder / "profile.json")
    return folder / "profile.json"


def _fixed(cost: Composed) -> tuple[Any, Any, Any]:
    return cost.operators.linear, cost.operators.embedding, cost.operators.head


def test_every_further_chunk_costs_something() -> None:
    cost = bound()
    prices = [cost.line(Work(((16, 0),) * count, 3, 300)).first_ps for count in range(1, 6)]
    assert all(a < b for a, b in pairwise(prices))


# ---------------------------------------------------------------- models from kernels


def hand_made(**changes: Any) -> Kernels:
    """One key a nanosecond for one tile, launches of 10 us, one 8-head shape of one KV head."""
    lengths = (16, 1024, 4096)
    prefill = Table(counts=lengths, seconds=tuple(10e-6 + n * 1e-9 for n in lengths), per="layer")
    decode = Grid(counts=(1, 64), contexts=(1, 4096), seconds=((10e-6, 10e-6), (10e-6, 10e-6)), per="layer")
    attention = AttentionTable(heads=32, kv_heads=8, head_dim=128, prefill=prefill, decode=decode)
    widths = (1024, 65536)
    flat = tuple(tuple((1e-6, 2e-6) for _ in widths) for _ in widths)
    gemm = GemmTable(tokens=(1, 4096), n=widths, k=widths, seconds=flat)
    made = Kernels(gpus=("A100-80G-SXM",), dtypes=("bfloat16",), gemm=gemm, attention=(attention,))
    return replace(made, **changes)


def test_a_short_chunk_passes_along_its_whole_context() -> None:
    entry = hand_made().entry(LLAMA, 1, gpu("A100-80G-SXM"))
    assert entry is not None
    assert entry.attention_prefill is not None
    row = dict(zip(entry.attention_prefill.contexts, entry.attention_prefill.seconds[0], strict=True))
    assert row[4096] - row[0] == pytest.approx(4096e-9)


def test_decodes_read_their_kv_from_memory() -> None:
    """64 x 4096 tokens of 4 KiB at 0.8 of 2,039 GB/s after a launch of 10 us, though the table says 10 us."""
    entry = hand_made().entry(LLAMA, 1, gpu("A100-80G-SXM"))
    assert entry is not None
    assert entry.attention_decode is not None
    assert entry.attention_decode.seconds[-1][-1] == pytest.approx(10e-6 + 64 * 4096 * 4096 / (0.8 * 2039e9))


@pytest.mark.parametrize(("beside", "factor"), [(0.0, 1.0), (0.1, 1.0), (0.5, 2.0)])
def test_decodes_beside_chunks(beside: float, factor: float) -> None:
    """Four query heads a KV head: 0.5 of 4 is 2; and no less than one tile's way along the context."""
    entry = hand_made(beside_chunks=beside).entry(LLAMA, 1, gpu("A100-80G-SXM"))
    assert entry is not None
    assert entry.attention_decode is not None
    assert entry.attention_mixed is not None
    alone, mixed = entry.attention_decode.seconds, entry.attention_mixed.seconds
    assert mixed[-1][-1] == pytest.approx(alone[-1][-1] * factor)


def test_experts_cost_what_reading_them_costs_and_some_arithmetic() -> None:
    """Qwen3-30B-A3B, one token: 8 of 128 experts of 9.4 MB; 2,048 tokens: all of them."""
    one, many = (seconds(bound(EXPERTS), Work(((tokens, 0),), 0, 0)) for tokens in (1, 2048))
    reach_s = 48 * 8 * 3 * 2048 * 768 * 2 / 1792e9
    all_s = 48 * 128 * 3 * 2048 * 768 * 2 / 1792e9
    assert reach_s < one < 4 * reach_s
    assert all_s < many < 3 * all_s


def test_two_gpus_share_a_mixture_of_experts() -> None:
    """Faster at decodes, but never twice as fast: there are all-reduces over PCIe."""
    decodes, prompt = Work((), 64, 64_000), Work(((512, 0),), 0, 0)
    for work in (decodes, prompt):
        assert seconds(bound(EXPERTS), work) / 2 < seconds(bound(EXPERTS, tp=2), work)
    assert seconds(bound(EXPERTS, tp=2), decodes) < seconds(bound(EXPERTS), decodes)
    assert bound(EXPERTS, tp=2).measured


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_prices_of_experts_rise_and_add_up(tp: int) -> None:
    cost = bound(EXPERTS, tp=tp)
    for low, high in ((Work((), 1, 100), Work((), 2, 200)), (Work(((64, 0),), 0, 0), Work(((65, 0),), 0, 0))):
        assert cost.line(low).first_ps <= cost.line(high).first_ps
    work = Work(((256, 512),), 8, 8000)
    halves = [bound(EXPERTS, tp=tp, layers=part).line(work).first_ps for part in ((0, 24), (24, 48))]
    assert sum(halves) == pytest.approx(cost.line(work).first_ps, rel=1e-6)


def test_latent_attention_has_no_kernels() -> None:
    spec = replace(LLAMA, first_dense_layers=1)
    assert hand_made().entry(spec, 1, gpu("A100-80G-SXM")) is None


def test_heads_without_a_table_come_from_fewer_with_more_sequences() -> None:
    """16 heads of 8 KV heads: a decode costs what two did of the table's 8 of 4, prompts what 16 heads do."""
    lengths, contexts = (16, 1024), (1, 4096)
    shapes = {(8, 4): 1e-6, (16, 4): 3e-6}
    tables = []
    for (heads, kv_heads), unit_s in shapes.items():
        prefill = Table(counts=lengths, seconds=(unit_s, 9 * unit_s))
        rows = tuple((count * unit_s, 2 * count * unit_s) for count in (1, 2, 4))
        decode = Grid(counts=(1, 2, 4), contexts=contexts, seconds=rows)
        tables.append(AttentionTable(heads=heads, kv_heads=kv_heads, head_dim=128, prefill=prefill, decode=decode))
    spec = replace(LLAMA, num_attention_heads=16, num_key_value_heads=8)
    fast = replace(gpu("A100-80G-SXM"), bandwidth_bytes_per_s=1e18)
    entry = hand_made(attention=tuple(tables)).entry(spec, 1, fast)
    assert entry is not None
    assert entry.attention_decode is not None
    assert sum(entry.attention_decode.seconds, ()) == pytest.approx((2e-6, 4e-6, 4e-6, 8e-6, 8e-6, 16e-6))
    assert entry.attention_prefill is not None
    assert entry.attention_prefill.seconds[0][0] == pytest.approx(3e-6)
    wider = hand_made(attention=tuple(tables)).entry(
        replace(spec, num_attention_heads=64, num_key_value_heads=32), 1, fast
    )
    assert wider is not None
    assert wider.attention_prefill is not None
    assert wider.attention_prefill.seconds[0][0] == pytest.approx(4 * 3e-6)


def test_eight_bits_halve_weights_and_cache() -> None:
    """By the scaled 16-bit table: bound by weights, half of its time over ``NARROW_EFFICIENCY``; a cache likewise."""
    spec = replace(LLAMA, dtype="float8")
    wide, narrow = (hand_made().entry(each, 1, gpu("A100-80G-SXM")) for each in (LLAMA, spec))
    assert wide is not None
    assert narrow is not None
    small_s = SMALL_KERNELS * SMALL_KERNEL_S
    assert (narrow.linear.seconds[0] - small_s) / (wide.linear.seconds[0] - small_s) == pytest.approx(
        0.5 / 0.8, rel=0.05
    )
    cached = hand_made().entry(replace(LLAMA, kv_dtype="float8"), 1, gpu("A100-80G-SXM"))
    assert cached is not None
    assert cached.attention_decode is not None
    assert cached.attention_decode.seconds[-1][-1] == pytest.approx(10e-6 + 64 * 4096 * 2048 / (0.8 * 2039e9))


@pytest.mark.parametrize("name", ["vllm-0.19-h100-sxm", "vllm-0.14-l40s"])
def test_eight_bits_are_faster_than_sixteen_and_no_more_than_twice(name: str) -> None:
    profile = read_profile(shipped_profiles()[name])
    kind = profile.kernels[0].gpus[0]
    assert (profile.kernels[0].gemm8 is not None) == (kind == "H100-SXM")
    cluster = Cluster.of(nodes=[{"gpu": kind, "count": 1}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=32)
    both = [replace(LLAMA, dtype=dtype) for dtype in ("bfloat16", "float8")]
    wide, narrow = (Fitted(profiles=[profile], overhead=Overhead()).bind(spec, stage, cluster) for spec in both)
    for work in (Work((), 1, 100), Work((), 64, 64_000), Work(((8192, 0),), 0, 0)):
        assert 0.5 < seconds(narrow, work) / seconds(wide, work) < 1


# ---------------------------------------------------------------- relatives


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_prices_models_on_its_gpu_and_says_that_it_predicts(name: str) -> None:
    profile = kernels_for(gpu(name))
    assert profile is not None
    assert profile.kernels[0].gpus == (name,)
    assert "predicted" in profile.provenance.method
    assert not profile.kernels[0].all_reduce


def test_a_relative_is_the_default_of_its_gpu_and_no_measurement() -> None:
    cluster = Cluster.of(nodes=[{"gpu": "A40", "count": 1}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=32)
    cost = build_cost(None, kinds=[gpu("A40")])
    assert isinstance(cost, Fitted)
    entry = cost.entry(LLAMA, stage, cluster)
    assert entry is not None
    assert entry.predicted
    assert not cost.bind(LLAMA, stage, cluster).measured
    named = build_cost("vllm-0.14-l40s", kinds=[gpu("A40")])
    assert isinstance(named, Fitted)
    assert named.entry(LLAMA, stage, cluster) is None


def test_shards_without_an_all_reduce_table_gather_logits_over_their_link() -> None:
    """64 rows of 128,256 logits of 2 bytes from two A40; one GPU gathers nothing."""
    profile = kernels_for(gpu("A40"))
    assert profile is not None
    beyond_s = {}
    for tp in (1, 2):
        cluster = Cluster.of(nodes=[{"gpu": "A40", "count": tp}])
        stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=32)
        cost = Fitted(profiles=[profile], overhead=Overhead()).bind(LLAMA, stage, cluster)
        entry = profile.kernels[0].entry(LLAMA, tp, gpu("A40"))
        assert isinstance(cost, Composed)
        assert entry is not None
        assert entry.head is not None
        shard_s = dict(zip(entry.head.counts, entry.head.seconds, strict=True))[64]
        beyond_s[tp] = cost.operators.head(64)[0] * 1e-12 - shard_s
    link = cluster.collective_link(cluster.gpu_ids)
    assert beyond_s[1] == pytest.approx(0, abs=1e-11)
    assert beyond_s[2] == pytest.approx(collective_seconds("all_gather", 64 * 128_256 * 2, link, 2), rel=1e-6)


def test_flash_attention_3_is_a_generation_of_its_own() -> None:
    """Prompts from an A100 to an H100: by their rates, and 1.3 times as fast again; decodes beside chunks pack."""
    names = ("A100-80G-SXM", "H100-SXM", "A40")
    source, hopper, ampere = map(gpu, names)
    profile = read_profile(shipped_profiles()["vllm-0.14-a100-80g-sxm"])
    table = profile.kernels[0].attention[0].prefill.seconds
    for target, gain, beside in ((hopper, 1.3, 0.0), (ampere, 1.0, 0.35)):
        made = scaled(profile, source, target).kernels[0]
        rate = source.flops_for("bfloat16") / target.flops_for("bfloat16") / gain
        assert made.attention[0].prefill.seconds[-1] == pytest.approx(table[0] + (table[-1] - table[0]) * rate)
        assert made.beside_chunks == beside


def test_measured_gpus_have_no_relative() -> None:
    assert kernels_for(gpu("H100-SXM")) is None


def test_a_launch_does_not_scale() -> None:
    """A relative with a third of the bandwidth: one short decode still takes a launch."""
    relative = kernels_for(gpu("L4"))
    source = read_profile(shipped_profiles()["vllm-0.14-l40s"])
    assert relative is not None
    ours, theirs = (part.kernels[0].attention[0].decode.seconds for part in (relative, source))
    assert ours[0][0] == theirs[0][0]
    assert ours[-1][-1] == pytest.approx(theirs[-1][-1] * 864 / 300, rel=0.01)


def test_beside_chunks_survives_its_file(tmp_path: Any) -> None:
    profile = Profile(name="hand", provenance=KERNELS.provenance, kernels=(hand_made(beside_chunks=0.5),))
    path = tmp_path / "k.json"
    path.write_text(profile_text(profile))
    assert read_profile(path) == profile
