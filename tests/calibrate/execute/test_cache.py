"""The real paged cache, its block tables, and the kernels over it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
import numpy as np  # noqa: E402
from torch.nn import functional  # noqa: E402

from calibrate import kernels  # noqa: E402
from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.cache import BlockTables, PagedKv, cache_bytes, slots_of  # noqa: E402
from calibrate.execute.model.layout import similar_lengths  # noqa: E402
from sim.types import SimulationError  # noqa: E402

torch.set_num_threads(1)  # more would only spin, at these sizes

ARCH = Architecture(
    name="small", num_layers=2, hidden_size=32, intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=11, dtype="float32",
)  # fmt: skip


def test_a_sequence_has_blocks_for_its_tokens() -> None:
    tables = BlockTables(4, block_size=16)
    tables.resize(7, 17)
    assert (tables.length(7), len(tables.table(7)), tables.free) == (17, 2, 2)
    tables.resize(7, 16)
    assert (len(tables.table(7)), tables.free) == (1, 3)
    tables.release(7)
    assert (tables.sequences, tables.length(7), tables.free) == ((), 0, 4)


def test_too_many_tokens_are_refused_with_the_numbers() -> None:
    tables = BlockTables(2, block_size=16)
    with pytest.raises(SimulationError, match="sequence 1 wants 3 KV blocks for 33 tokens; 2 are free"):
        tables.resize(1, 33)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=60))
def test_blocks_are_never_shared_nor_lost(actions: list[tuple[int, int]]) -> None:
    tables = BlockTables(30, block_size=4)
    for sequence, tokens in actions:
        if tokens == 0:
            tables.release(sequence)
        elif -(-tokens // 4) - -(-tables.length(sequence) // 4) <= tables.free:
            tables.resize(sequence, tokens)
        held = [block for known in tables.sequences for block in tables.table(known).tolist()]
        assert len(set(held)) == len(held) == 30 - tables.free
        assert 0 not in held
        for known in tables.sequences:
            assert len(tables.table(known)) == -(-tables.length(known) // 4)


def test_what_is_written_is_read_wherever_its_blocks_lie() -> None:
    cache = PagedKv(ARCH, 2, 9, 4, "cpu")
    kv = torch.randn(2, 2, 10, 16)
    cache.write(np.array([8, 1, 5]), kv)
    assert torch.equal(cache.read(np.array([8, 1, 5]), 10), kv)
    cache.write(np.array([2, 3, 4]), kv[1:] * 2, first_layer=1)
    assert torch.equal(cache.read(np.array([2, 3, 4]), 10)[1], kv[1] * 2)
    assert torch.equal(cache.read(np.array([8, 1, 5]), 10), kv)
    assert cache_bytes(ARCH, 2, 9, 4) == sum(t.nbytes for layer in cache.layers for t in layer)


def test_slots_follow_the_table() -> None:
    assert slots_of(np.array([3, 1]), np.arange(6), 4).tolist() == [12, 13, 14, 15, 4, 5]


@given(st.lists(st.integers(1, 70), max_size=20))
def test_padding_wastes_less_than_half(contexts: list[int]) -> None:
    rising = np.sort(np.array(contexts, dtype=np.int64))
    groups = similar_lengths(rising, 4)
    assert [row for start, end, _ in groups for row in range(start, end)] == list(range(len(contexts)))
    for start, end, blocks in groups:
        assert -(-rising[end - 1] // 4) == blocks < 2 * -(-rising[start] // 4) or blocks == -(-rising[start] // 4)


def plain_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of the last rows of a sequence, head by head, as the textbook has it."""
    new, length, share = len(query), len(keys), query.shape[1] // keys.shape[1]
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head // share].T / query.shape[2] ** 0.5
        heads.append(functional.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ values[:, head // share])
    return torch.stack(heads, 1)


@pytest.mark.parametrize("gather_bytes", [1, kernels.CPU_GATHER_BYTES])
def test_paged_attention_is_attention(gather_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_GATHER_BYTES", gather_bytes)  # one sequence at a time, or all together
    torch.manual_seed(0)
    lengths, size = [5, 8, 1], 4
    tables = BlockTables(8, size)
    keys, values = (torch.randn(9, size, 2, 8) for _ in range(2))  # what lies in nobody's blocks must not matter
    plain = []
    for number, length in enumerate(lengths):
        tables.resize(number, length)
        k, v = torch.randn(length, 2, 8), torch.randn(length, 2, 8)
        slots = torch.from_numpy(slots_of(tables.table(number), np.arange(length), size))
        kernels.scatter_kv(keys, slots, k)
        kernels.scatter_kv(values, slots, v)
        plain.append((k, v))
    query = torch.randn(3, 4, 8)
    found = kernels.decode_attention(
        query, keys, values, torch.from_numpy(tables.tables([0, 1, 2], 2)), torch.tensor(lengths)
    )
    for number, (k, v) in enumerate(plain):
        torch.testing.assert_close(found[number : number + 1], plain_attention(query[number : number + 1], k, v))
    chunk = torch.randn(3, 4, 8)
    over = kernels.paged_chunk_attention(chunk, keys, values, torch.from_numpy(tables.table(0)), 5)
    torch.testing.assert_close(over, plain_attention(chunk, *plain[0]))
    whole = torch.randn(8, 4, 8)
    torch.testing.assert_close(kernels.chunk_attention(whole, *plain[1]), plain_attention(whole, *plain[1]))


@given(st.integers(1, 5), st.sampled_from([1e-3, 1.0, 300.0]), st.integers(0, 5))
def test_four_bits_keep_each_value_to_half_a_step(rows: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 128, generator=generator) * spread + spread
    packed, scales = kernels.quantise_4bit(x)
    back = kernels.dequantise_4bit(packed, scales, torch.float32)
    grouped = x.view(rows, 2, 64)
    reach = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
    bound = reach / 30 + (reach + grouped.abs().amax(-1, keepdim=True)) * 2**-11 + 1e-6
    assert ((back.view_as(grouped) - grouped).abs() <= bound).all()
    assert packed.nbytes + scales.nbytes == 2 * x.numel() * 4 / 16 * 1.125


def test_equal_values_survive_four_bits() -> None:
    packed, scales = kernels.quantise_4bit(torch.full((2, 64), 0.5))
    assert torch.equal(kernels.dequantise_4bit(packed, scales, torch.float32), torch.full((2, 64), 0.5))


def test_experts_are_weighted_and_added() -> None:
    torch.manual_seed(1)
    x, gate_up, down = torch.randn(7, 12), torch.randn(5, 16, 12), torch.randn(5, 12, 8)
    weights, experts = kernels.route(torch.randn(7, 5), 2, normalise=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    expected = torch.zeros(7, 12)
    for token in range(7):
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            expected[token] += weight * (down[expert] @ kernels.swiglu(gate_up[expert] @ x[token]))
    torch.testing.assert_close(kernels.expert_mlp(x, weights, experts, gate_up, down), expected, atol=1e-4, rtol=1e-4)
