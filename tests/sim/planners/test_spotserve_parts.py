"""SpotServe's map of GPUs to positions, and what is fetched when they change: what must hold of any."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies.spotserve.world import (
    cluster,
    spec,
)
from sim import Cluster
from sim.memory import common_weight_bytes
from sim.planners.spotserve import Configuration
from sim.planners.spotserve.mapping import Context, Position, Worth, chunks, groups, in_order, matched, pipeline, shards
from sim.planners.spotserve.migration import OVERHEAD_S, Fetch, Migration, migration
from sim.types import Replica, Stage
from tests.toys import TINY

MODEL = replace(TINY, num_layers=12)


def layout(configuration: Configuration, gpus: list[str]) -> list[Replica]:
    flat = chunks(chunks(gpus[: configuration.gpus], configuration.tp), configuration.stages)
    return [pipeline(MODEL, f"p{d}", stages) for d, stages in enumerate(flat)]


# ------------------------------------------------------------ mapping


def test_groups_are_of_one_machine() -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 4, "nodes": 2}], links={"inter_node": {"gbps": 50}})
    left = [gpu for gpu in where.gpu_ids if gpu != "n0.g1"]
    assert groups(where, left, 2) == [("n0.g0", "n0.g2"), ("n1.g0", "n1.g1"), ("n1.g2", "n1.g3")]
    assert groups(where, left, 8) == [("n1.g0", "n1.g1", "n1.g2", "n1.g3")]


SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4]))


def reuse(configuration: Configuration, grid: list[tuple[tuple[str, ...], ...]], context: Context) -> float:
    worth = Worth(MODEL, configuration, context, [None] * configuration.pipelines)
    return sum(
        worth(gpu, Position(d, p, m))
        for d, stages in enumerate(grid)
        for p, gpus in enumerate(stages)
        for m, gpu in enumerate(gpus)
    )


@settings(max_examples=30)
@given(old=SHAPES, new=SHAPES, lost=st.sets(st.integers(0, 5), max_size=3), seed=st.integers(0, 99))
def test_no_map_reuses_more_than_the_matched_one(
    old: tuple[int, int, int], new: tuple[int, int, int], lost: set[int], seed: int
) -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 4, "nodes": 12}], links={"inter_node": {"gbps": 50}})
    before, after = Configuration(*old, 1), Configuration(*new, 1)
    replicas = layout(before, list(where.gpu_ids))
    here = [gpu for node in where.nodes if int(node.name[1:]) not in lost for gpu in node.gpu_ids]
    context = Context.of(replicas, shards(replicas))
    found = groups(where, here, after.tp)
    if len(here) < after.gpus:
        return
    best = reuse(after, matched(MODEL, after, found, context, [None] * after.pipelines), context)
    shuffled = [found[k] for k in np.random.default_rng(seed).permutation(len(found))]
    for other in (in_order(after, found), in_order(after, shuffled)):
        assert best >= reuse(after, other, context) - 1
    if old == new and not lost:
        assert best == pytest.approx(before.pipelines * MODEL.weight_bytes(0, 12), rel=0.1)


def test_single_gpus_are_matched_as_well_as_by_trying_all_ways() -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 1, "nodes": 5}], links={"inter_node": {"gbps": 50}})
    replicas = layout(Configuration(1, 3, 1, 1), list(where.gpu_ids))
    context = Context.of(replicas, shards(replicas))
    after = Configuration(2, 2, 1, 1)
    found = groups(where, where.gpu_ids, 1)
    ways = [in_order(after, list(order)) for order in permutations(found, 4)]
    best = matched(MODEL, after, found, context, [None, None])
    assert reuse(after, best, context) == max(reuse(after, way, context) for way in ways) > 0


def test_kv_decides_between_equal_weights() -> None:
    """Two pipelines hold the same; one of them has to go, and its unfinished requests stay where they are."""
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 1, "nodes": 2}], links={"inter_node": {"gbps": 50}})
    replicas = layout(Configuration(2, 1, 1, 1), list(where.gpu_ids))
    after = Configuration(1, 1, 1, 1)
    found = groups(where, where.gpu_ids, 1)
    for heir in ("p0", "p1"):
        context = Context.of(replicas, shards(replicas), {"p0": 50, "p1": 60})
        grid = matched(MODEL, after, found, context, [heir])
        assert grid == [((f"n{heir[1]}.g0",),)]


def test_much_kv_outweighs_weights() -> None:
    """n2 holds all weights of another time, n0 and n1 half of them each and the KV of 10 or 40,000 tokens."""
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 1, "nodes": 3}], links={"inter_node": {"gbps": 50}})
    replicas = layout(Configuration(1, 2, 1, 1), ["n0.g0", "n1.g0"])
    held = shards(replicas) | shards([pipeline(MODEL, "old", [("n2.g0",)])])
    found = groups(where, where.gpu_ids, 1)
    for tokens, gpus in ((10, {"n2.g0"}), (40_000, {"n0.g0", "n1.g0"})):
        context = Context.of(replicas, held, {"p0": tokens})
        (((gpu,),),) = matched(MODEL, Configuration(1, 1, 1, 1), found, context, ["p0"])
        assert gpu in gpus


def test_ranks_within_a_machine_follow_what_its_gpus_hold() -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 4, "nodes": 2}], links={"inter_node": {"gbps": 50}})
    backwards = [(*where.gpu_ids[7:3:-1], *where.gpu_ids[3::-1])]
    replicas = [pipeline(MODEL, "p0", backwards)]
    for heir in ("p0", None):
        context = Context.of(replicas, shards(replicas))
        grid = matched(MODEL, Configuration(1, 1, 8, 1), groups(where, where.gpu_ids, 8), context, [heir])
        assert grid == [(backwards[0],)]


@settings(max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_nothing_moves_when_nothing_changes(shape: tuple[int, int, int], seed: int) -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 4, "nodes": 12}], links={"inter_node": {"gbps": 50}})
    same = Configuration(*shape, 1)
    found = groups(where, where.gpu_ids, same.tp)
    shuffled = [found[k] for k in np.random.default_rng(seed).permutation(len(found))]
    replicas = [pipeline(MODEL, f"p{d}", stages) for d, stages in enumerate(in_order(same, shuffled))]
    context = Context.of(replicas, shards(replicas))
    grid = matched(MODEL, same, found, context, [one.name for one in replicas])
    assert grid == in_order(same, shuffled)
    found_migration = migration(where, MODEL, replicas, shards(replicas))
    assert found_migration.moved_bytes == 0
    assert found_migration.loads() == {one.name: () for one in replicas}
    assert found_migration.seconds() == OVERHEAD_S


# ------------------------------------------------------------ migration


def moved(
    old: tuple[int, int, int], new: tuple[int, int, int], lost: set[int], peers: bool = True
) -> tuple[Cluster, list[Replica], list[Replica], Migration] | None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 4, "nodes": 12}], links={"inter_node": {"gbps": 50}})
    before, after = Configuration(*old, 1), Configuration(*new, 1)
    replicas = layout(before, list(where.gpu_ids))
    here = [gpu for node in where.nodes if int(node.name[1:]) not in lost for gpu in node.gpu_ids]
    if len(here) < after.gpus:
        return None
    held = {gpu: shard for gpu, shard in shards(replicas).items() if gpu in here}
    context = Context.of(replicas, held)
    grid = matched(MODEL, after, groups(where, here, after.tp), context, [None] * after.pipelines)
    target = [pipeline(MODEL, f"q{d}", stages) for d, stages in enumerate(grid)]
    return where, replicas, target, migration(where, MODEL, target, held if peers else {})


@settings(max_examples=40)
@given(old=SHAPES, new=SHAPES, lost=st.sets(st.integers(0, 5), max_size=3), peers=st.booleans())
def test_what_is_fetched_and_what_is_held_is_what_is_needed(
    old: tuple[int, int, int], new: tuple[int, int, int], lost: set[int], peers: bool
) -> None:
    found = moved(old, new, lost, peers)
    if found is None:
        return
    where, replicas, target, change = found
    gone = {gpu for node in where.nodes if int(node.name[1:]) in lost for gpu in node.gpu_ids}
    held = {gpu: shard for gpu, shard in shards(replicas).items() if gpu not in gone}
    fetched = dict.fromkeys(where.gpu_ids, 0.0)
    for fetch in change.fetches:
        fetched[fetch.gpu] += fetch.size_bytes
        assert fetch.source is None or (peers and fetch.source in held and fetch.source != fetch.gpu)
        if fetch.source is not None:
            stage, _ = held[fetch.source]
            assert stage.first_layer <= fetch.layer < stage.end_layer
    for gpu, (stage, rank) in shards(target).items():
        needed = MODEL.weight_bytes(stage.first_layer, stage.end_layer, stage.tp) / stage.tp
        kept = common_weight_bytes(MODEL, held[gpu], (stage, rank)) if peers and gpu in held else 0.0
        assert fetched[gpu] + kept == pytest.approx(needed, abs=20)
    loads = [load for row in change.loads().values() for load in row]
    assert sum(load.size_bytes for load in loads) == pytest.approx(change.moved_bytes)


@settings(max_examples=30)
@given(old=SHAPES, new=SHAPES, lost=st.sets(st.integers(0, 5), max_size=3))
def test_the_first_stage_starts_no_later_than_the_last(
    old: tuple[int, int, int], new: tuple[int, int, int], lost: set[int]
) -> None:
    found = moved(old, new, lost)
    if found is None:
        return
    _, _, target, change = found
    ready = change.ready_s(change.order(1e9))
    assert set(ready) == {name for one in target for name in one.leg}
    assert 0 <= min(ready.values()) <= max(ready.values())
    assert change.seconds() <= max(ready.values()) + OVERHEAD_S + 1e-9


def test_a_source_on_the_own_machine_goes_first_and_machines_take_turns() -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 2, "nodes": 4}], links={"inter_node": {"gbps": 50}})
    whole = Stage(name="s", gpus=("x",), first_layer=0, end_layer=12)
    held = dict.fromkeys(("n0.g0", "n1.g0", "n2.g0"), (whole, 0))
    new = [pipeline(MODEL, name, [(gpu,)]) for name, gpu in (("near", "n0.g1"), ("a", "n3.g0"), ("b", "n3.g1"))]
    change = migration(where, MODEL, new, held)
    by_gpu: dict[str, dict[str | None, float]] = {}
    for fetch in change.fetches:
        row = by_gpu.setdefault(fetch.gpu, {})
        row[fetch.source] = row.get(fetch.source, 0.0) + fetch.size_bytes
    assert list(by_gpu["n0.g1"]) == ["n0.g0"]
    given_bytes = [by_gpu["n3.g0"].get(gpu, 0) + by_gpu["n3.g1"].get(gpu, 0) for gpu in held]
    assert sum(given_bytes) == pytest.approx(2 * sum(MODEL.weight_bytes(k, k + 1) for k in range(12)))
    assert max(given_bytes) < 1.6 * min(given_bytes)


def swap_of_halves() -> Migration:
    """Two machines; the first gives its later half away before it gets the other's first half, if it waits."""
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 1, "nodes": 2}], links={"inter_node": {"gbps": 50}})
    halves = layout(Configuration(1, 2, 1, 1), ["n0.g0", "n1.g0"])
    swapped = layout(Configuration(1, 2, 1, 1), ["n1.g0", "n0.g0"])
    return migration(where, replace(MODEL, vocab_size=8), swapped, shards(halves))


def test_layers_wait_that_would_fill_a_machine() -> None:
    change = swap_of_halves()
    layer_bytes = replace(MODEL, vocab_size=8).weight_bytes(3, 4)
    assert change.order(1e12) == list(range(12))
    assert change.peak_bytes(range(12)) == pytest.approx(6 * layer_bytes, rel=1e-3)
    tight = change.order(1.5 * layer_bytes)
    assert sorted(tight) == list(range(12))
    assert tight[:2] == [0, 6]
    assert change.peak_bytes(tight) <= 1.5 * layer_bytes


@given(
    comes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=2),
    goes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=2),
    limit=st.integers(0, 12),
)
def test_of_two_layers_the_order_within_the_limit_is_found(
    comes: list[tuple[int, int]], goes: list[tuple[int, int]], limit: int
) -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 1, "nodes": 2}], links={"inter_node": {"gbps": 50}})
    fetches = [Fetch(k, None, f"n{n}.g0", size) for k, row in enumerate(comes) for n, size in enumerate(row)]
    freed = {k: {f"n{n}": float(size) for n, size in enumerate(row)} for k, row in enumerate(goes)}
    change = Migration(where, (), tuple(fetches), freed)
    ours = change.peak_bytes(change.order(limit))
    best = min(change.peak_bytes(order) for order in permutations((0, 1)))
    assert ours >= best
    if best <= limit:
        assert ours <= limit


def test_a_disk_is_slower_than_a_host() -> None:
    where = cluster(2)
    new = [pipeline(spec("OPT-6.7B"), "a", [where.gpu_ids[:4]])]
    quick = migration(where, spec("OPT-6.7B"), new, {})
    slow = migration(where, spec("OPT-6.7B"), new, {}, disk_bytes_per_s=1e9)
    assert slow.seconds() - OVERHEAD_S == pytest.approx(slow.moved_bytes / 1e9, rel=1e-6)
    assert quick.seconds() - OVERHEAD_S == pytest.approx(quick.moved_bytes / 4 / 12.8e9, rel=1e-6)
    link = where.load_path(("n0.g0",)).bytes_per_s(where.capacity_bytes_per_s)
    (load, *_) = slow.loads()["a"]
    assert load.size_bytes / link == pytest.approx(slow.moved_bytes / 1e9, rel=1e-6)
