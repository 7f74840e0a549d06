"""A split with prefix caches at both ends: only blocks that the decode side does not have are moved."""

from __future__ import annotations

import pytest

from sim import Request, Result
from tests.lab import SPLIT, Way, system
from tests.toys import TINY, cluster, problem, run

BLOCK_BYTES = 16 * TINY.kv_bytes_per_token()


def prompt(number: int, arrival_s: float, tokens: int, *hashes: int, answer: int = 5) -> Request:
    return Request(
        id=number, arrival_s=arrival_s, input_tokens=tokens, output_tokens=answer,
        prefix=hashes, prefix_block_tokens=16,
    )  # fmt: skip


def replay(*requests: Request, **limits: object) -> Result:
    lab = system(router=lambda: Way("p", "d"), **{"num_kv_blocks": 40, "prefix_caching": True} | limits)
    return run(lab, requests, problem(cluster(gpus=1, nodes=2)), plan=SPLIT)


def moved_blocks(result: Result) -> list[float]:
    return [row.bytes_moved / BLOCK_BYTES for row in sorted(result.rows.requests, key=lambda row: row.request.id)]


def test_what_the_decode_side_has_does_not_move_again() -> None:
    """The second prompt of five blocks begins with three of the first one's four; the third is the first one again."""
    result = replay(prompt(0, 0.0, 64, 1, 2, 3, 4), prompt(1, 1.0, 80, 1, 2, 3, 7, 8), prompt(2, 2.0, 64, 1, 2, 3, 4))
    assert moved_blocks(result) == [4, 2, 0]
    assert [row.bytes for row in result.rows.links] == [4 * BLOCK_BYTES, 2 * BLOCK_BYTES, 0]


def test_without_hashes_or_caching_all_of_it_moves() -> None:
    plain = [Request(id=n, arrival_s=float(n), input_tokens=64, output_tokens=5) for n in range(2)]
    assert moved_blocks(replay(*plain)) == [4, 4]
    hashed = [prompt(n, float(n), 64, 1, 2, 3, 4) for n in range(2)]
    assert moved_blocks(replay(*hashed, prefix_caching=False)) == [4, 4]


def test_answers_of_the_decode_side_do_not_move_to_it_with_the_next_turn() -> None:
    """48 tokens of prompt and 32 of answer; the next turn repeats both and says 16 more."""
    result = replay(prompt(0, 0.0, 48, 1, 2, 3, 4, 5, answer=33), prompt(1, 2.0, 96, 1, 2, 3, 4, 5, 6))
    first, second = sorted(result.rows.requests, key=lambda row: row.request.id)
    assert moved_blocks(result) == [3, 1]
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)  # the prefill side never saw the answer


@pytest.mark.parametrize(("blocks", "again"), [(12, 3), (20, 0)])
def test_what_was_evicted_there_moves_again(blocks: int, again: int) -> None:
    """Between two equal prompts of four blocks another one needs eleven; of twelve, three were the first one's."""
    other = Request(id=1, arrival_s=1.0, input_tokens=160, output_tokens=5)
    result = replay(prompt(0, 0.0, 64, 1, 2, 3, 4), other, prompt(2, 2.0, 64, 1, 2, 3, 4), num_kv_blocks=blocks)
    assert moved_blocks(result) == [4, 10, again]
