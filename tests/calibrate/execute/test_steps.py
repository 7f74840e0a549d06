"""Steps of the real engine: however a scheduler cuts, mixes, moves or repeats the work, the tokens are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
import numpy as np  # noqa: E402

from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.graphs import _fill, _padding, bucket  # noqa: E402
from calibrate.execute.model.stage import Item, Stage, generate, in_rows  # noqa: E402
from sim.types import SimulationError  # noqa: E402

torch.set_num_threads(1)  # more would only spin, at these sizes

DENSE = Architecture(
    name="small", num_layers=3, hidden_size=48, intermediate_size=64, num_heads=6, num_kv_heads=2, head_dim=8,
    vocab_size=97, dtype="float32", qk_norm=True,
)  # fmt: skip
EXPERTS = replace(DENSE, name="experts", num_experts=4, experts_per_token=2)
OUTPUT = 6


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, int(rng.integers(2, 40))).tolist() for _ in range(count)]


def new_stage(arch: Architecture = DENSE, first: int = 0, end: int | None = None) -> Stage:
    return Stage(arch, first=first, end=end, blocks=120, block_size=4, seed=2)


def alone(arch: Architecture, all_prompts: list[list[int]]) -> list[list[int]]:
    stage = new_stage(arch)
    return [generate(stage, prompt, OUTPUT) for prompt in all_prompts]


def test_a_batch_gives_the_tokens_of_each_prompt_alone() -> None:
    texts = prompts(5)
    expected = alone(DENSE, texts)
    stage = new_stage()
    found, _ = stage.run([Item(number, 0, tuple(text), True) for number, text in enumerate(texts)])
    rows = [[found[number]] for number in range(5)]
    for step in range(OUTPUT - 1):
        items = [Item(n, len(text) + step, (rows[n][-1],), True) for n, text in enumerate(texts)]
        found, _ = stage.run(items)
        for number in range(5):
            rows[number].append(found[number])
    assert rows == expected


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([DENSE, EXPERTS]))
def test_no_schedule_changes_a_token(seed: int, arch: Architecture) -> None:
    """Chunks of any size, any mix of requests in a step, preemption (KV lost, all recomputed) at any time."""
    chance = np.random.default_rng(seed)
    texts = prompts(3, seed=4)
    expected = alone(arch, texts)
    stage = new_stage(arch)
    known = [list(text) for text in texts]
    computed = [0, 0, 0]
    while any(len(known[n]) < len(texts[n]) + OUTPUT for n in range(3)):
        items = []
        for n in range(3):
            left = len(known[n]) - computed[n]
            if len(known[n]) == len(texts[n]) + OUTPUT or chance.integers(5) == 0:
                continue
            if computed[n] and chance.integers(10) == 0:
                stage.release([n])
                computed[n] = 0
                continue
            count = int(chance.integers(1, left + 1))
            span = known[n][computed[n] : computed[n] + count]
            items.append(Item(n, computed[n], tuple(span), count == left))
            computed[n] += count
        found, _ = stage.run(items) if items else ({}, None)
        for n, token in found.items():
            known[n].append(token)
    assert [known[n][len(texts[n]) :] for n in range(3)] == expected


def test_layers_split_over_two_stages_give_the_same_tokens() -> None:
    texts = prompts(4, seed=1)
    front, back = new_stage(end=1), new_stage(first=1)
    items = [Item(number, 0, tuple(text), True) for number, text in enumerate(texts)]
    hidden = front.run(items)[1]
    found = back.run(items, hidden)[0]
    decode = [Item(number, len(text), (found[number],), True) for number, text in enumerate(texts)]
    then = back.run(decode, front.run(decode)[1])[0]
    assert [[found[n], then[n]] for n in range(4)] == [row[:2] for row in alone(DENSE, texts)]


@pytest.mark.parametrize("cuts", [((0, 3),), ((0, 1), (1, 3))])
def test_kv_moved_to_another_worker_gives_the_same_tokens(cuts: tuple[tuple[int, int], ...]) -> None:
    (text,) = prompts(1, seed=5)
    (expected,) = alone(DENSE, [text])
    source, target = new_stage(), new_stage()
    target.run([Item(9, 0, (1, 2, 3, 4, 5), False)])  # so that its blocks are others
    token = source.run([Item(0, 0, tuple(text), True)])[0][0]
    for first, end in cuts:
        target.put_in(0, len(text), first, end, source.take_out(0, first, end))
    tokens = [token]
    while len(tokens) < OUTPUT:
        position = len(text) + len(tokens) - 1
        tokens.append(target.run([Item(0, position, (tokens[-1],), True)])[0][0])
    assert tokens == expected


def test_kv_of_four_bits_moves_a_quarter_of_the_bytes_and_keeps_the_logits_near() -> None:
    """The stated error: each value within half a level, and on random weights a quarter of the logits' spread."""
    arch = replace(DENSE, head_dim=32, dtype="bfloat16")
    (text,) = prompts(1, seed=6)
    source, target = new_stage(arch), new_stage(arch)
    source.run([Item(0, 0, tuple(text), False)])
    parts = source.take_out(0, 0, 3, bits=4)
    (whole,) = source.take_out(0, 0, 3)
    assert sum(part.nbytes for part in parts) == whole.nbytes * 4 / 16 * 1.125
    target.put_in(0, len(text), 0, 3, parts)
    item = Item(0, len(text), (5,), True)
    logits = []
    for stage in (source, target):
        stage.tables.resize(0, len(text) + 1)
        logits.append(stage.forward(stage.batch([item]))[0])
    assert (logits[0] - logits[1]).std() < 0.25 * logits[0].std()
    assert not torch.equal(logits[0], logits[1])


def test_a_batch_padded_for_a_cuda_graph_gives_the_same_logits_and_harms_no_block() -> None:
    """What a graph replays, run here without one: the padded rows must neither count nor write anywhere."""
    texts = prompts(3, seed=8)
    stage = new_stage()
    stage.run([Item(number, 0, tuple(text), False) for number, text in enumerate(texts)])
    items = in_rows([Item(number, len(text), (number,), True) for number, text in enumerate(texts)])
    for item in items:
        stage.tables.resize(item.sequence, item.end)
    batch = stage.batch(items)
    static = _padding(bucket(3), bucket(16), "cpu")
    full = replace(batch, positions=batch.positions + 1, decodes=())  # what an earlier run has left behind
    for tensor in (static.tokens, static.positions, static.slots, static.decodes[0].contexts):
        tensor.copy_(torch.tensor([*full.positions.tolist(), 77]))
    _fill(static, batch, 3)
    expected = stage.decoder(batch, stage.cache)
    before = [cache[1:].clone() for layer in stage.cache.layers for cache in layer]
    torch.testing.assert_close(stage.decoder(static, stage.cache)[:3], expected)
    after = [cache[1:] for layer in stage.cache.layers for cache in layer]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sequence_that_starts_over_gives_its_blocks_to_others_of_the_same_step() -> None:
    stage = Stage(DENSE, blocks=10, block_size=4)
    stage.run([Item(5, 0, (1,) * 32, False)])
    stage.run([Item(1, 0, (2,) * 32, False), Item(5, 0, (1,) * 8, False)])
    assert (stage.tables.free, stage.tables.length(1), stage.tables.length(5)) == (0, 32, 8)


def test_tokens_that_were_skipped_are_an_error() -> None:
    with pytest.raises(SimulationError, match="skips tokens: the sequence has 0 of them here"):
        new_stage().run([Item(0, 3, (1,), True)])
