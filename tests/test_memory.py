"""The KV ledger: blocks counted, shared by content, evicted in the order they were freed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Limits, SimulationError
from sim.cluster import Cluster
from sim.memory import Ledger, kv_blocks, kv_bytes_available
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
    assert ledger.blank_first == 6
    ledger.take(3)
    ledger.publish("a")
    ledger.give(0, "a")
    ledger.give(2)
    assert (ledger.free, ledger.blank_first) == (6, 3)
    assert Ledger(6, 16).blank_first == 6


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
    assert ledger.blank_first <= ledger.free
    ledger.take(total)
    assert not any(ledger.known_prefix([key]) for key in range(300))


# ------------------------------------------------------------ how many blocks there are


def stage(gpus: int = 1, first: int = 0, end: int = 2, name: str = "s") -> Stage:
    return Stage(name=name, gpus=tuple(f"n0.g{n}" for n in range(gpus)), first_layer=first, end_layer=end)


def test_what_is_left_after_weights_activations_and_runtime() -> None:
    where = problem()
    limits = Limits(max_num_batched_tokens=100, max_num_seqs=10, gpu_memory_utilization=0.5)
    tiny = where.model
    memory = where.cluster.gpu("n0.g0").memory_bytes * 0.5
    weights = tiny.weight_bytes(0, 2)
    activations = max(2 * 100 * (4 * 4096 + 3 * 11008), 38 * 10 * 32000)
    assert kv_bytes_available(where, stage(), limits) == pytest.approx(memory - weights - activations - 0.56 * 2**30)
    per_block = 16 * tiny.kv_bytes_per_token()
    assert kv_blocks(where, (stage(),), limits) == kv_bytes_available(where, stage(), limits) // per_block


def test_the_fullest_stage_decides() -> None:
    where = problem()
    parts = (stage(1, 0, 1, "a"), stage(1, 1, 2, "b"))
    alone = [kv_blocks(where, (part,), where.limits) for part in parts]
    assert kv_blocks(where, parts, where.limits) == min(alone)


@pytest.mark.parametrize(
    ("name", "gpu_type", "tp", "seqs", "measured_gib", "within"),
    [("llama-3.1-8b", "H100-SXM", 1, 1024, 51.38, 0.01), ("qwen3-32b", "H100-SXM", 1, 1024, 4.45, 0.05),
     ("qwen3-32b", "H100-SXM", 2, 1024, 33.66, 0.04), ("llama-3.1-8b", "RTX-4090", 1, 256, 5.05, 0.03)],
)  # fmt: skip
def test_real_servers_have_as_much_room(
    name: str, gpu_type: str, tp: int, seqs: int, measured_gib: float, within: float
) -> None:
    """GiB a GPU for KV that vLLM printed (the module says where)."""
    cluster = Cluster.of(nodes=[{"gpu": gpu_type, "count": tp}])
    where = replace(problem(), cluster=cluster, model=model(name))
    limits = Limits(max_num_batched_tokens=8192 if seqs == 1024 else 2048, max_num_seqs=seqs)
    whole = stage(tp, end=where.model.num_layers)
    assert kv_bytes_available(where, whole, limits) / 2**30 == pytest.approx(measured_gib, rel=within)


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
