"""The KV ledger: blocks counted, shared by content, evicted in the order they were freed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.fidelity.cases import memory
from sim import Limits, SimulationError
from sim.cluster import Cluster
from sim.memory import Ledger, kv_blocks, kv_bytes_available, runtime
from sim.model import model
from sim.types import Stage
from tests.toys import problem


def test_blocks_are_taken_and_given_back() -> None:
    ledger = Ledger(10, 16)
    assert [ledger.blocks(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]
    ledger.take(4)
    assert (ledger.used, ledger.free) == (4, 6)
    ledger.give(4)
    assert ledger.used == 0


def test_more_than_is_free_is_never_handed_out() -> None:
    ledger = Ledger(3, 16)
    ledger.take(2)
    with pytest.raises(SimulationError, match="2 blocks wanted, 1 of 3 free"):
        ledger.take(2)


def test_content_is_found_shared_and_outlives_its_holder() -> None:
    ledger = Ledger(10, 16, prefix_caching=True)
    ledger.take(3)
    assert [ledger.publish(key) for key in "ab"] == [True, True]
    assert ledger.publish("a") is False  # known already
    assert ledger.known_prefix("abc") == 2
    assert ledger.known_prefix("bca") == 1
    assert ledger.idle_blocks("ab") == 0
    ledger.share("ab")
    assert ledger.used == 3  # no new block
    ledger.give(1, "ab")
    assert ledger.used == 2
    ledger.give(0, "ab")
    assert (ledger.used, ledger.known_prefix("ab"), ledger.idle_blocks("ab")) == (0, 2, 2)
    ledger.share("a")
    assert ledger.used == 1


def test_eviction_is_in_order_of_freeing_a_requests_last_block_first() -> None:
    """vLLM v1: blocks go to the queue's end in reverse; blank ones go before (they were freed first here)."""
    ledger = Ledger(4, 16, prefix_caching=True)
    ledger.take(4)
    for key in "abxy":
        ledger.publish(key)
    ledger.give(0, "ab")
    ledger.give(0, "xy")
    known = []
    for _ in range(4):
        ledger.take(1)
        known.append("".join(key for key in "abxy" if ledger.known_prefix(key)))
    assert known == ["axy", "xy", "x", ""]


def test_touching_content_saves_it_from_eviction() -> None:
    ledger = Ledger(2, 16, prefix_caching=True)
    ledger.take(2)
    for key in "ab":
        ledger.publish(key)
    ledger.give(0, "a")
    ledger.give(0, "b")
    ledger.share("a")
    ledger.give(0, "a")
    ledger.take(1)
    assert (ledger.known_prefix("a"), ledger.known_prefix("b")) == (1, 0)


def test_blank_blocks_before_the_first_content() -> None:
    ledger = Ledger(6, 16, prefix_caching=True)
    assert ledger.blank_first(()) == 6
    ledger.take(3)
    ledger.publish("a")
    ledger.give(0, "a")
    ledger.give(2)
    assert (ledger.free, ledger.blank_first(())) == (6, 3)
    assert Ledger(6, 16).blank_first(()) == 6


def test_without_caching_nothing_is_known() -> None:
    ledger = Ledger(6, 16)
    ledger.take(1)
    assert ledger.publish("a") is False
    assert ledger.known_prefix("a") == 0
    assert not ledger.prefix_caching


@dataclass
class Holder:
    blank: int = 0
    shared: list[int] = field(default_factory=list)


@settings(max_examples=150)
@given(st.data())
def test_used_and_free_always_add_up(data: st.DataObject) -> None:
    """Random admissions, publications and releases: counts agree with a list of who holds what."""
    total = data.draw(st.integers(1, 12))
    ledger = Ledger(total, 16, prefix_caching=True)
    holders: list[Holder] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if holders and data.draw(st.booleans()):
            gone = holders.pop(data.draw(st.integers(0, len(holders) - 1)))
            ledger.give(gone.blank, gone.shared)
        else:
            prompt = [data.draw(st.integers(0, 2)) * 100 + place for place in range(data.draw(st.integers(1, 4)))]
            known = prompt[: ledger.known_prefix(prompt)]
            need = len(prompt) - len(known)
            if need + ledger.idle_blocks(known) > ledger.free:
                continue
            ledger.share(known)
            ledger.take(need)
            holder = Holder(need, list(known))
            for key in prompt[len(known) :]:
                if ledger.publish(key):
                    holder.blank -= 1
                    holder.shared.append(key)
            holders.append(holder)
        held = {key for holder in holders for key in holder.shared}
        assert ledger.used == sum(holder.blank for holder in holders) + len(held)
        assert ledger.used + ledger.free == total
        assert all(ledger.known_prefix([key]) for key in held)
    for holder in holders:
        ledger.give(holder.blank, holder.shared)
    assert ledger.used == 0
    assert ledger.blank_first(()) <= ledger.free
    ledger.take(total)
    assert not any(ledger.known_prefix([key]) for key in range(300))


# ------------------------------------------------------------ how many blocks there are


def stage(gpus: int = 1, first: int = 0, end: int = 2, name: str = "s") -> Stage:
    return Stage(name=name, gpus=tuple(f"n0.g{n}" for n in range(gpus)), first_layer=first, end_layer=end)


def test_what_is_left_after_weights_activations_and_runtime() -> None:
    where = problem()
    limits = Limits(max_num_batched_tokens=100, max_num_seqs=10, gpu_memory_utilization=0.5)
    tiny = where.model
    memory_bytes = (where.cluster.gpu("n0.g0").memory_bytes - 0.47 * 2**30) * 0.5
    weights = tiny.weight_bytes(0, 2)
    activations = max(2 * 100 * (4 * 4096 + 3 * 11008), 15.4 * 10 * 32000)
    assert kv_bytes_available(where, stage(), limits) == pytest.approx(
        memory_bytes - weights - activations - 0.25 * 2**30
    )
    per_block = 16 * tiny.kv_bytes_per_token()
    assert kv_blocks(where, (stage(),), limits) == kv_bytes_available(where, stage(), limits) // per_block


def test_the_fullest_stage_decides() -> None:
    where = problem()
    parts = (stage(1, 0, 1, "a"), stage(1, 1, 2, "b"))
    alone = [kv_blocks(where, (part,), where.limits) for part in parts]
    assert kv_blocks(where, parts, where.limits) == min(alone)


@pytest.mark.parametrize(
    ("version", "kept_gib"), [((0, 16, 1), 0.13), ((0, 18), 0.25), ((0, 20), 0.25), ((0, 21), 1.09), ((1, 0), 1.09)]
)
def test_what_vllm_keeps_depends_on_its_release(version: tuple[int, ...], kept_gib: float) -> None:
    kept = runtime(version)
    assert (kept.own_bytes + kept.graphs_bytes) / 2**30 == pytest.approx(kept_gib)
    assert kept.logit_bytes == (38 if version < (0, 17) else 15.4)


@pytest.mark.parametrize(("gpu_type", "more_gib"), [("H100-SXM", 1.85), ("H100-PCIe", 0.42), ("A100-80G-SXM", 0.42)])
def test_fused_all_reduces_take_memory(gpu_type: str, more_gib: float) -> None:
    """Two GPUs that hold half the weights each keep that much more than they would alone."""
    cluster = Cluster.of(nodes=[{"gpu": gpu_type, "count": 2}])
    where = replace(problem(), cluster=cluster)
    limits = Limits(max_num_batched_tokens=1, max_num_seqs=2048)  # the sampler decides, which is not divided
    alone, both = (kv_bytes_available(where, stage(count), limits) for count in (1, 2))
    assert (alone + where.model.weight_bytes(0, 2) / 2 - both) / 2**30 == pytest.approx(more_gib)


def test_experts_keep_their_workspace_beside_the_sampler() -> None:
    """Qwen3-30B-A3B: 8 of 8,192 tokens' experts, 2 x 768 gate and up in the room of 2,048, and 768 of their product."""
    where = replace(problem(), model=model("qwen3-30b-a3b"))
    whole = stage(end=where.model.num_layers)
    limits = Limits(max_num_batched_tokens=8192, max_num_seqs=1024)
    with_it = kv_bytes_available(where, whole, replace(limits, release=(0, 17)))
    without = kv_bytes_available(where, whole, replace(limits, release=(0, 16)))  # and 38 bytes a logit, not 15.4
    logits = (38 - 15.4) * 1024 * where.model.vocab_size
    assert without - with_it == pytest.approx(8192 * 8 * (2048 + 768) * 2 - logits, abs=1)


def test_a_release_has_its_own_memory_in_the_ledger() -> None:
    """0.21 sets 0.84 GiB aside for CUDA graphs, which 0.20 does not."""
    where, limits = problem(), Limits(max_num_batched_tokens=1)
    room = [kv_bytes_available(where, stage(), replace(limits, release=name)) for name in ((0, 20), (0, 21))]
    assert (room[0] - room[1]) / 2**30 == pytest.approx(0.84)
    assert kv_bytes_available(where, stage(), limits) == room[0]


@pytest.mark.parametrize("server", [*memory.servers()], ids=lambda server: f"{server.spec.name}-{server.gpu.name}")
def test_real_servers_have_as_much_room(server: memory.Server) -> None:
    """GiB a GPU for KV that vLLM printed (experiments/fidelity/cases/memory.py says where)."""
    within = 0.09 if server.gpu.name == "RTX-4090" else 0.05
    assert memory.predicted_gib(server) == pytest.approx(server.kv_gib, rel=within)


def test_stated_blocks_go_first_and_none_is_never_negative() -> None:
    where = problem()
    assert kv_blocks(where, (stage(),), Limits(num_kv_blocks=7)) == 7
    assert kv_blocks(where, (stage(),), Limits(gpu_memory_utilization=0.001)) == 0


@pytest.mark.parametrize(
    ("name", "kv_gib", "slots", "printed"),
    [("opt-13b", 12, 15_728, 15_700), ("opt-66b", 21, 9_557, 9_700), ("opt-175b", 264, 60_074, 60_100)],
)
def test_vllm_table_1_kv_slots(name: str, kv_gib: int, slots: int, printed: int) -> None:
    """SOSP 2023, table 1: GB for KV and the token slots in it. (66B: its 21 GB is rounded, so within 2 %.)"""
    per_token = model(name).kv_bytes_per_token()
    assert kv_gib * 2**30 // per_token == slots
    assert slots == pytest.approx(printed, rel=0.02)
