"""Collectives over the catalogue's links: by hand, their laws, and against what was measured."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles
from calibrate.profile.relatives import kernels_for
from experiments.fidelity.cases import links
from sim.cluster import Cluster, Link, gpu
from sim.cost import Fitted, Overhead, Profile, Reached, Roofline, Table, collective_seconds
from sim.cost.links import REACHED
from sim.model import model
from sim.types import Stage

MIB = 2**20
NVLINK = Link(bytes_per_s=240e9, latency_s=8e-6, medium="nvlink")
HOPPER = Link(bytes_per_s=360e9, latency_s=8e-6, medium="nvlink")
PCIE = Link(bytes_per_s=25.6e9, latency_s=5e-6, medium="pcie")
ROUND = Reached(
    one_shot_s=5e-6,
    two_shot_s=10e-6,
    direct_share=0.5,
    ring_s=30e-6,
    ring_share=0.5,
    adding_share=1.0,
    pair_s=5e-6,
    pair_share=0.5,
    hop_s=2e-6,
    host_share=0.25,
)
LLAMA = model("llama-3.1-8b")


def test_eight_a100_reduce_64_mib_in_about_six_tenths_of_a_millisecond() -> None:
    """0.594 ms by NCCL 2.27 (aiconfigurator), 0.675 by the NCCL of 2024 (Vidur)."""
    cluster = Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 8}])
    link = cluster.collective_link(cluster.gpu_ids)
    assert collective_seconds("all_reduce", 64 * MIB, link, 8) == pytest.approx(0.6e-3, rel=0.05)


@pytest.mark.parametrize(
    ("link", "n", "size_bytes", "expected_s"),
    [
        (NVLINK, 4, 120_000, 5e-6 + 3 * 120_000 / 120e9),  # every GPU reads three vectors
        (NVLINK, 4, 4_800_000, 10e-6 + 1.5 * 4_800_000 / 120e9),  # a part of three, then three sums
        (NVLINK, 2, 4_800_000, 5e-6 + 4_800_000 / 120e9),
        (NVLINK, 4, 8 * MIB, 30e-6 + 1.5 * 8 * MIB / 120e9),  # NCCL's ring
        (NVLINK, 16, 1_000_000, 30e-6 + 1.875 * 1_000_000 / 120e9),
        (NVLINK, 8, 64 * MIB, 30e-6 + 1.75 * 64 * MIB / 120e9),
        (HOPPER, 8, 64 * MIB, 30e-6 + 1.75 * 64 * MIB / 360e9),  # the switch adds
        (HOPPER, 4, 64 * MIB, 30e-6 + 1.5 * 64 * MIB / 180e9),
        (PCIE, 2, 12_800_000, 5e-6 + 12_800_000 / 12.8e9),
        (PCIE, 4, 6_400_000, 12e-6 + 1.5 * 6_400_000 / 6.4e9),
        (PCIE, 8, 0, 28e-6),
    ],
)
def test_all_reduces_by_hand(link: Link, n: int, size_bytes: int, expected_s: float) -> None:
    assert collective_seconds("all_reduce", size_bytes, link, n, ROUND) == pytest.approx(expected_s)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_to_all"])
def test_half_a_ring(kind: Literal["all_gather", "reduce_scatter", "all_to_all"]) -> None:
    assert collective_seconds(kind, 4_800_000, NVLINK, 4, ROUND) == pytest.approx(15e-6 + 0.75 * 4_800_000 / 120e9)
    assert collective_seconds(kind, 6_400_000, PCIE, 4, ROUND) == pytest.approx(6e-6 + 0.75 * 6_400_000 / 6.4e9)


@given(
    kind=st.sampled_from(["all_reduce", "all_gather", "all_to_all", "send"]),
    name=st.sampled_from(["V100-32G", "A100-80G-SXM", "H100-SXM", "B200", "T4", "L40S", "RTX-PRO-6000"]),
    n=st.integers(2, 16),
    sizes=st.lists(st.integers(0, 1 << 30), min_size=2, max_size=6),
)
def test_larger_vectors_take_no_less(
    kind: Literal["all_reduce", "all_gather", "all_to_all", "send"], name: str, n: int, sizes: list[int]
) -> None:
    cluster = Cluster.of(nodes=[{"gpu": name, "count": n}])
    link = cluster.collective_link(cluster.gpu_ids)
    sizes = sorted({*sizes, 8 * MIB - 1, 8 * MIB})
    times = [collective_seconds(kind, size, link, n) for size in sizes]
    assert all(0 < a <= b for a, b in pairwise(times))


def test_stated_links_take_the_textbook_s_time() -> None:
    """Ring of four over 1 GB/s and 1 us: six hops, and three halves of the vector."""
    stated = {"intra_node": {"gbps": 8, "latency_us": 1}}
    cluster = Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 4}], links=stated)
    link = cluster.collective_link(cluster.gpu_ids)
    assert collective_seconds("all_reduce", 1e9, link, 4) == pytest.approx(1.5 + 6e-6)


# ---------------------------------------------------------------- where tables and formula meet


def collective_ps(cost: Fitted | Roofline, tokens: int, cluster: Cluster, tp: int, slow: float = 1.0) -> int:
    """All-reduces of sixteen layers."""
    stage = Stage(name="s", gpus=cluster.gpu_ids[:tp], first_layer=0, end_layer=16)
    bound = cost.bind(LLAMA, stage, cluster, slow)
    return bound.operators.collective(tokens)[0]  # type: ignore[attr-defined,no-any-return]


def test_a_group_over_two_machines_does_not_take_one_machine_s_table() -> None:
    h100 = Fitted(profiles=[read_profile(shipped_profiles()["vllm-0.19-h100-sxm"])], overhead=Overhead())
    near = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": 8}])
    far = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": 4, "nodes": 2}], links={"inter_node": {"gbps": 400}})
    table = h100.profiles[0].kernels[0].all_reduce[8]
    size = table.counts.index(8 * MIB)
    assert collective_ps(h100, 1024, near, 8) == pytest.approx(32 * table.seconds[size] * 1e12)
    assert collective_ps(h100, 1024, far, 8) == collective_ps(Roofline(), 1024, far, 8)
    assert collective_ps(h100, 1024, far, 8) > 5 * collective_ps(h100, 1024, near, 8)


def test_a_stated_link_goes_before_measured_tables() -> None:
    """What a scenario states of its machine's links is not what somebody else's machine had."""
    h100 = Fitted(profiles=[read_profile(shipped_profiles()["vllm-0.19-h100-sxm"])], overhead=Overhead())
    stated = Cluster.of(nodes=[{"gpu": "H100-SXM", "count": 8}], links={"intra_node": {"gbps": 400}})
    link = stated.collective_link(stated.gpu_ids)
    one_s = collective_seconds("all_reduce", 1024 * 8192, link, 8)
    assert collective_ps(h100, 1024, stated, 8) == pytest.approx(32 * one_s * 1e12)
    entry = h100.entry(LLAMA, Stage(name="s", gpus=stated.gpu_ids, first_layer=0, end_layer=32), stated)
    assert entry is not None
    assert entry.collective is None
    own = replace(h100, profiles=[_with_own_collective(h100, stated)])
    assert collective_ps(own, 1024, stated, 8) == collective_ps(h100, 1024, stated, 8)


def _with_own_collective(cost: Fitted, cluster: Cluster) -> Profile:
    """A model's own entry that has all-reduces of its own, of a second a layer."""
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=32)
    entry = cost.entry(LLAMA, stage, cluster)
    assert entry is not None
    slow = Table(counts=(1, 8192), seconds=(1.0, 2.0), per="layer")
    return replace(cost.profiles[0], kernels=(), entries=(replace(entry, collective=slow),))


def test_a_slow_gpu_slows_its_collectives() -> None:
    cluster = Cluster.of(nodes=[{"gpu": "V100-32G", "count": 8}])
    healthy, slow = (collective_ps(Roofline(), 64, cluster, 8, slow=factor) for factor in (1.0, 2.0))
    assert slow == pytest.approx(2 * healthy, abs=1)


def test_measured_shards_get_the_collectives_of_their_gpu() -> None:
    """LLMServingSim's TP2 files lack them: all-reduces of 512 KiB for 64 tokens, and 64 x 128,256 logits."""
    names = ("vllm-0.19-rtx-pro-6000", "vllm-0.19-kernels-rtx-pro-6000")
    shards, kernels = (read_profile(shipped_profiles()[name]) for name in names)
    cluster = Cluster.of(nodes=[{"gpu": "RTX-PRO-6000", "count": 2}])
    stage = Stage(name="s", gpus=cluster.gpu_ids, first_layer=0, end_layer=32)
    own = next(entry for entry in shards.entries if (entry.model, entry.tp) == (LLAMA.name, 2))
    found = Fitted(profiles=[shards, kernels]).entry(LLAMA, stage, cluster)
    assert found is not None
    assert found.linear == own.linear
    table = kernels.kernels[0].all_reduce[2]
    reduced_s = table.seconds[table.counts.index(64 * 4096 * 2)]
    assert _at(found.collective, 64) == pytest.approx(2 * reduced_s)
    gathered_s = _at(found.head, 64) - _at(own.head, 64)
    assert 0.4 * 64 * 128_256 * 2 / 64e9 < gathered_s < 64 * 128_256 * 2 / 25e9
    assert Fitted(profiles=[shards]).entry(LLAMA, stage, cluster) == own


def _at(table: Table | None, count: int) -> float:
    assert table is not None
    return table.seconds[table.counts.index(count)]


def test_relatives_take_the_formula() -> None:
    profile = kernels_for(gpu("RTX-4090"))
    assert profile is not None
    cost = Fitted(profiles=[profile], overhead=Overhead())
    cluster = Cluster.of(nodes=[{"gpu": "RTX-4090", "count": 8}])
    for tp in (2, 8):
        assert collective_ps(cost, 128, cluster, tp) == pytest.approx(collective_ps(Roofline(), 128, cluster, tp))


# ---------------------------------------------------------------- against what was measured


def test_constants_are_what_their_cells_give(shared_data: Path) -> None:
    found = list(links.cells(shared_data / "measured"))
    assert astuple(links.fitted(found)) == pytest.approx(astuple(REACHED), rel=0.01)


def test_links(shared_data: Path) -> None:
    study = links.study(shared_data / "measured")
    assert {bar.name.removesuffix(", median error"): bar.reached for bar in study.bars} == {
        "all-reduce by formula, NVLink": True,
        "all-reduce by formula, two PCIe cards": True,
        "all-reduce by formula, more PCIe cards": True,
        "all-reduce by table": True,
        "send, NVLink": False,
    }
    judged = [row for row in study.rows if row.use == "judged"]
    assert sum(int(str(line["points"])) for line in study.summary) == len(judged) < len(study.rows)


def test_tables_hold_bytes(shared_data: Path) -> None:
    """Eight H100, 128 MiB: APEX+ measured as much as aiconfigurator, which counts 16-bit values."""
    cells = links.cells(shared_data / "measured")
    same = [cell for cell in cells if (cell.gpu, cell.count, cell.size_bytes) == (gpu("H100-SXM"), 8, 128 * MIB)]
    times = {cell.source: cell.measured_s for cell in same if not cell.send}
    assert times[links.APEX] == pytest.approx(times[links.AICONFIGURATOR], rel=0.1)
