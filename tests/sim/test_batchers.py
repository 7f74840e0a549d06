"""Batchers one decision at a time, and the batch that says no to what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sim import PolicyError
from sim.batchers import PausingMixed, PrefillFirst, StallFree, TokenBudget, refuse_if_full
from sim.batchers.common import admit_prompts
from sim.engine.replica.job import Job
from sim.policy import Batch, Limits, RequestView
from tests.lab import ONE, SPLIT, Way, spied, system
from tests.toys import MS, cluster, problem, request, run


def test_a_token_budget_goes_to_running_requests_first() -> None:
    """vLLM v1: budget 64: the decode takes 1, the chunk under way its share, the newcomer what is left."""
    lab, fills = spied(system(max_num_batched_tokens=64))
    requests = [request(0, input_tokens=8), request(1, 0.001, input_tokens=100), request(2, 0.001, input_tokens=30)]
    run(lab, requests, plan=ONE, step_by_step=True)
    shapes = [(fill.chunks, fill.decodes) for fill in fills[:4]]
    assert shapes == [({0: 8}, []), ({1: 63}, [0]), ({1: 37, 2: 26}, [0]), ({2: 4}, [0, 1])]


def test_a_long_prompt_is_capped() -> None:
    lab, fills = spied(system(lambda: TokenBudget(long_prefill_token_threshold=40)))
    run(lab, [request(0, output_tokens=1), request(1, input_tokens=30, output_tokens=1)], plan=ONE, step_by_step=True)
    assert [fill.chunks for fill in fills] == [{0: 40, 1: 30}, {0: 40}, {0: 20}]


def test_whole_prompts_wait_for_budget_without_chunking() -> None:
    lab, fills = spied(system(lambda: TokenBudget(chunked_prefill=False), max_num_batched_tokens=150))
    run(lab, [request(0, output_tokens=2), request(1, output_tokens=1)], plan=ONE, step_by_step=True)
    assert [fill.chunks for fill in fills[:2]] == [{0: 100}, {1: 100}]


def test_without_chunking_what_might_not_fit_one_budget_is_refused() -> None:
    policy = TokenBudget(chunked_prefill=False)
    view: Any = Job(request(0, input_tokens=10), 1)
    reason = policy.refuse(view, 101, 1000, Limits(max_num_batched_tokens=100))
    assert reason == "101 tokens (all may have to be recomputed at once) exceed max_num_batched_tokens 100"
    assert policy.refuse(view, 100, 1000, Limits(max_num_batched_tokens=100)) is None


def test_more_decodes_than_budget_wait_for_their_elders() -> None:
    """v1 with a budget of 2 on the decode side: the third to arrive pauses, its KV kept, until there is room."""
    lab, fills = spied(system(max_num_batched_tokens=2, router=lambda: Way("p", "d")))
    requests = [request(number, input_tokens=1, output_tokens=6) for number in range(3)]
    result = run(lab, requests, problem(cluster(1, 2)), plan=SPLIT, step_by_step=True)
    assert [fill.left_out for fill in fills if fill.left_out] == [[2]] * 4
    assert all(fill.tokens <= 2 for fill in fills)
    assert sum(len(fill.decodes) for fill in fills) == 3 * 5
    assert [row.preemptions for row in result.rows.requests] == [0, 0, 0]


def test_prefill_first_batches_are_of_one_phase() -> None:
    lab, fills = spied(system(PrefillFirst, max_num_batched_tokens=150))
    run(lab, [request(n, 0.004 * n) for n in range(4)], plan=ONE, step_by_step=True)
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 100}, {1: 100}, {2: 100}, {3: 100}]
    assert not any(fill.chunks and fill.decodes for fill in fills)


def test_prefill_first_may_recompute_more_than_a_batch_holds_if_alone() -> None:
    """A preempted request of 40 + n tokens exceeds the limit of 40: it goes by itself."""
    lab, fills = spied(system(lambda: PrefillFirst(watermark=0), max_num_batched_tokens=40, num_kv_blocks=7))
    result = run(lab, [request(n, input_tokens=40, output_tokens=30) for n in range(2)], plan=ONE, step_by_step=True)
    longer = [fill.chunks for fill in fills if sum(fill.chunks.values()) > 40]
    assert longer
    assert all(list(chunks) == [1] for chunks in longer)
    assert result.rows.requests[1].preemptions == len(longer)


def test_swapped_requests_come_back_before_anybody_is_admitted() -> None:
    lab, fills = spied(system(lambda: PrefillFirst("swap", watermark=0), num_kv_blocks=7))
    requests = [request(n, 0.05 * n, input_tokens=40, output_tokens=40) for n in range(4)]
    run(lab, requests, plan=ONE, step_by_step=True)
    assert any(fill.swapped for fill in fills)
    assert all(not fill.admitted for fill in fills if fill.swapped)
    assert sorted(n for fill in fills for n in fill.swapped_in) == sorted(n for fill in fills for n in fill.preempted)


def test_a_request_may_be_swapped_out_twice() -> None:
    """It is swapped again, not recomputed: no prompt is computed a second time."""
    lab, fills = spied(system(lambda: PrefillFirst("swap", watermark=0), num_kv_blocks=20, max_num_seqs=9))
    shapes = [(1, 25), (26, 40), (42, 40), (121, 39)]
    result = run(lab, [request(n, 0.0, *shape) for n, shape in enumerate(shapes)], plan=ONE, step_by_step=True)
    assert max(row.preemptions for row in result.rows.requests) >= 2
    assert [fill.chunks for fill in fills if fill.chunks] == [{n: shape[0] for n, shape in enumerate(shapes)}]


def test_max_num_seqs_holds_back_swapped_arrived_and_waiting() -> None:
    lab, fills = spied(system(PrefillFirst, max_num_seqs=2, router=lambda: Way("p", "d")))
    run(lab, [request(n) for n in range(6)], problem(cluster(1, 2)), plan=SPLIT, step_by_step=True)
    assert max(fill.num_running for fill in fills) == 2
    assert max(len(fill.decodes) for fill in fills) == 2


def test_a_token_budget_preempts_the_latest_for_a_chunk() -> None:
    """Blocks are taken chunk by chunk, so an earlier prompt may take those of a later one, which starts over."""
    lab, fills = spied(system(lambda: TokenBudget(long_prefill_token_threshold=64), num_kv_blocks=11))
    requests = [request(0, input_tokens=150, output_tokens=2), request(1, input_tokens=60, output_tokens=9)]
    run(lab, requests, plan=ONE, step_by_step=True)
    assert [(fill.chunks, fill.preempted) for fill in fills[:3]] == [
        ({0: 64, 1: 60}, []),
        ({0: 64}, [1]),
        ({0: 22}, []),
    ]


def test_a_chunk_without_room_preempts_itself_in_the_end() -> None:
    lab, fills = spied(system(max_num_batched_tokens=64, num_kv_blocks=7))
    requests = [request(0, input_tokens=40, output_tokens=40), request(1, 0.02, input_tokens=100, output_tokens=2)]
    result = run(lab, requests, plan=ONE, step_by_step=True)
    assert any(fill.preempted == [1] and 0 in fill.decodes for fill in fills)
    assert [row.preemptions for row in result.rows.requests] == [0, sum(fill.preempted == [1] for fill in fills)]


def test_stall_free_admits_only_with_room_for_the_whole_prompt() -> None:
    """Sarathi-Serve: 7 blocks, one decode holds 3; a prompt of 5 blocks waits although its first chunk would fit."""
    lab, fills = spied(system(lambda: StallFree(32, watermark=0), num_kv_blocks=7))
    requests = [request(0, input_tokens=40, output_tokens=5), request(1, 0.001, input_tokens=80, output_tokens=2)]
    result = run(lab, requests, plan=ONE, step_by_step=True)
    assert result.rows.requests[1].scheduled_ps == result.rows.requests[0].finish_ps
    assert [fill.chunks[1] for fill in fills if 1 in fill.chunks] == [32, 32, 16]
    assert fills[-1].free_blocks == 7 - 6


def test_stall_free_never_drops_a_decode_for_its_budget() -> None:
    lab, fills = spied(system(lambda: StallFree(2)))
    run(lab, [request(n, input_tokens=1, output_tokens=9) for n in range(5)], plan=ONE, step_by_step=True)
    assert all(not fill.left_out for fill in fills)
    assert max(len(fill.decodes) for fill in fills) >= 2
    assert all(not fill.chunks for fill in fills if len(fill.decodes) >= 2)


def test_prompts_pause_decodes_at_most_so_often() -> None:
    """Splitwise's mixed machine of two seats: two decodes pause for prompts four times, then they are due."""
    lab, fills = spied(system(lambda: PausingMixed(max_pauses=4), max_num_seqs=2))
    first = [request(n, input_tokens=10, output_tokens=12) for n in range(2)]
    rush = [request(2 + n, 0.02, input_tokens=10, output_tokens=1) for n in range(20)]
    run(lab, [*first, *rush], plan=ONE, step_by_step=True)
    pauses = {n: sum(n in fill.left_out for fill in fills) for n in (0, 1)}
    assert pauses == {0: 4, 1: 4}
    assert all(len(fill.chunks) + len(fill.decodes) <= 2 for fill in fills)


def test_one_long_prompt_may_run_alone() -> None:
    lab, fills = spied(system(PausingMixed, max_num_batched_tokens=50))
    run(lab, [request(0, input_tokens=80), request(1, input_tokens=30), request(2, input_tokens=20)], plan=ONE)
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 80}, {1: 30, 2: 20}]


@pytest.mark.parametrize("policy", [PrefillFirst(), StallFree(), TokenBudget(), PausingMixed()])
def test_a_request_that_fits_not_even_alone_is_refused(policy: Any) -> None:
    view: Any = Job(request(0, input_tokens=10), 1)
    assert "tokens need 11 KV blocks" in policy.refuse(view, 161, 10, Limits())
    assert policy.refuse(view, 144, 10, Limits()) is None
    assert refuse_if_full(160, 10, 1, Limits()) == "160 tokens need 10 KV blocks and 1 are kept free; there are 10"


# ------------------------------------------------------------ prefix sharing


def shared(number: int, at_s: float, tokens: int = 64, same: int = 3, **more: object) -> Any:
    """A prompt whose first ``same`` blocks are everybody's, the others its own."""
    blocks = tuple(block if block < same else (number + 1) * 1000 + block for block in range(tokens // 16))
    return request(number, at_s, input_tokens=tokens, prefix=blocks, prefix_block_tokens=16, **more)


def test_a_known_prefix_is_not_computed_again() -> None:
    lab, fills = spied(system(prefix_caching=True))
    result = run(lab, [shared(0, 0.0, output_tokens=1), shared(1, 1.0, output_tokens=1)], plan=ONE)
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 64}, {1: 16}]
    assert [row.cached_tokens for row in result.rows.requests] == [0, 48]
    assert result.rows.requests[1].first_token_ps == 1000 * MS + 10 * MS + 16 * 10 * 10**6 + 3 * 16 * 48


def test_running_requests_share_blocks() -> None:
    result = run(system(prefix_caching=True), [shared(0, 0.0), shared(1, 0.02)], plan=ONE)
    assert max(row.used_blocks for row in result.rows.memory) == 4 + 1 + 1 + 1  # own tails and decode blocks
    apart = run(system(), [shared(0, 0.0), shared(1, 0.02)], plan=ONE)
    assert max(row.used_blocks for row in apart.rows.memory) == 10


def test_at_least_one_token_is_computed() -> None:
    """vLLM v1: a prompt known to its last token computes its last block again, to have something to sample from."""
    result = run(system(prefix_caching=True), [shared(0, 0.0, same=4), shared(1, 1.0, same=4)], plan=ONE)
    assert [row.cached_tokens for row in result.rows.requests] == [0, 48]


def test_memory_pressure_evicts_what_was_freed_first() -> None:
    requests = [
        shared(0, 0.0, same=0, output_tokens=1),
        shared(1, 1.0, same=0, output_tokens=1),
        shared(2, 2.0, same=0, output_tokens=1),  # of ten blocks: two are blank, two are the tail of 0
        request(3, 3.0, input_tokens=64, prefix=requests_prefix(0), prefix_block_tokens=16, output_tokens=1),
        request(4, 4.0, input_tokens=64, prefix=requests_prefix(1), prefix_block_tokens=16, output_tokens=1),
    ]
    result = run(system(prefix_caching=True, num_kv_blocks=10), requests, plan=ONE)
    assert [row.cached_tokens for row in result.rows.requests] == [0, 0, 0, 32, 32]


def requests_prefix(number: int) -> tuple[int, ...]:
    return tuple((number + 1) * 1000 + block for block in range(4))


def test_caching_off_computes_everything() -> None:
    result = run(system(), [shared(0, 0.0), shared(1, 1.0)], plan=ONE)
    assert [row.cached_tokens for row in result.rows.requests] == [0, 0]


# ------------------------------------------------------------ what makes no sense


class Odd(TokenBudget):
    """Does as v1, and once, when it can, something that it must not."""

    def __init__(self, deed: Callable[[Batch], object]) -> None:
        super().__init__()
        self.deed = deed

    def fill(self, batch: Batch) -> None:
        self.deed(batch)
        super().fill(batch)


def _first(requests: Any) -> RequestView | None:
    return next(iter(requests), None)


def _on(what: str, act: Callable[[Batch, RequestView], object]) -> Callable[[Batch], object]:
    """Acts on the first request of that list once there is one."""

    def deed(batch: Batch) -> object:
        request = _first(getattr(batch, what))
        return act(batch, request) if request is not None else None

    return deed


def _twice(batch: Batch) -> None:
    if batch.num_decodes:
        batch.decode()


def _late(batch: Batch, request: RequestView) -> None:
    batch.decode()
    batch.welcome(request)


def _prefill_twice(batch: Batch, request: RequestView) -> None:
    batch.prefill(request, 1)
    batch.prefill(request, 1)


def _swap_unfinished(batch: Batch, request: RequestView) -> None:
    batch.preempt(request, "swap")


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (_on("waiting", lambda batch, r: batch.admit(r, 0)), "admits request 0 with 0 tokens; it wants 100"),
        (_on("waiting", lambda batch, r: batch.admit(r, 101)), "admits request 0 with 101 tokens; it wants 100"),
        (_on("decoding", lambda batch, r: batch.admit(r, 1)), "admits request 0, which is not waiting here"),
        (_on("waiting", lambda batch, r: batch.preempt(r)), "preempts request 0, which is not running here"),
        (_on("prefilling", _swap_unfinished), r"swaps out request 0, whose prompt is not finished \(40 tokens left\)"),
        (_on("decoding", lambda batch, r: batch.prefill(r, 1)), "prefills request 0, which has no unfinished prompt"),
        (
            _on("prefilling", lambda batch, r: batch.prefill(r, 41)),
            "prefills 41 tokens of request 0, which has 40 left",
        ),
        (_on("prefilling", _prefill_twice), "prefills 1 tokens of request 0, which has 40 left"),
        (_on("decoding", lambda batch, r: batch.welcome(r)), "welcomes request 0, which is not newly arrived"),
        (_on("decoding", lambda batch, r: batch.swap_in(r)), "swaps in request 0, which is not swapped out here"),
        (_twice, "calls decode twice for one batch"),
        (_on("waiting", lambda batch, r: batch.decode([r])), "leaves out request 0, which is not decoding here"),
        (lambda batch: batch.repeat_at_most(0), "repeats a batch at most 0 times; it must be >= 1"),
    ],
)
def test_an_illegal_action_names_policy_replica_request_and_numbers(
    deed: Callable[[Batch], object], message: str
) -> None:
    lab = system(lambda: Odd(deed), max_num_batched_tokens=60)
    with pytest.raises(PolicyError, match=f"Odd on a: {message}"):
        run(lab, [request(0)], plan=ONE)


def test_decoding_without_blocks_is_illegal() -> None:
    class Reckless(PrefillFirst):
        def fill(self, batch: Batch) -> None:
            if not admit_prompts(batch, 0, 0) and batch.num_decodes:
                batch.decode()

    with pytest.raises(PolicyError, match="Reckless on a: decodes 2 requests: 2 blocks wanted, 1 free"):
        run(
            system(lambda: Reckless(watermark=0), num_kv_blocks=3),
            [request(n, input_tokens=16) for n in range(2)], plan=ONE,
        )  # fmt: skip


def test_an_arrived_request_cannot_join_after_the_decodes() -> None:
    lab = system(lambda: Odd(_on("arrived", _late)), router=lambda: Way("p", "d"))
    with pytest.raises(PolicyError, match="Odd on d: welcomes request 0, which is not newly arrived, or after decode"):
        run(lab, [request(0)], problem(cluster(1, 2)), plan=SPLIT)


def test_a_batch_that_may_change_its_mind_says_for_how_long() -> None:
    class Restless(TokenBudget):
        def fill(self, batch: Batch) -> None:
            super().fill(batch)
            batch.repeat_at_most(5)
            batch.repeat_at_most(3)
            batch.repeat_at_most(9)

    result = run(system(Restless), [request(0, output_tokens=10)], plan=ONE)
    assert [step.iterations for step in result.rows.steps] == [1, 3, 3, 3]
    assert result.log() == run(system(), [request(0, output_tokens=10)], plan=ONE).log()


def test_without_chunking_a_cap_below_the_budget_still_cuts_prompts() -> None:
    """The capped length is compared with the budget, as in vLLM V1: a prompt longer than that is served in parts."""
    lab, fills = spied(
        system(lambda: TokenBudget(chunked_prefill=False, long_prefill_token_threshold=100), max_num_batched_tokens=150)
    )
    result = run(lab, [request(0, 0.0, 230, 2)], plan=ONE, step_by_step=True)
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 100}, {0: 100}, {0: 30}]
    assert result.rows.requests[0].outcome == "completed"


def test_a_prompt_that_was_admitted_before_a_decode_has_its_chunk_first() -> None:
    """Three tokens a batch, two of a prompt at most: the second's decodes get what the first's chunks leave, one token.

    The third, admitted before there were more decodes than that, waits for the first's prompt to end.
    """
    lab, fills = spied(system(lambda: TokenBudget(long_prefill_token_threshold=2), max_num_batched_tokens=3))
    requests = [request(0, 0.0, 10, 2), request(1, 0.0, 1, 4), request(2, 0.0, 1, 4)]
    run(lab, requests, plan=ONE, step_by_step=True)
    chunks = [(fill.chunks, fill.decodes, fill.left_out) for fill in fills]
    assert chunks[:3] == [({0: 2, 1: 1}, [], []), ({0: 2}, [1], []), ({0: 2}, [1], [])]
    assert all(sum(fill.chunks.values()) + len(fill.decodes) <= 3 for fill in fills)


def test_decodes_behind_a_chunk_pause_when_the_budget_ends() -> None:
    """Four tokens a batch, three of a prompt: two short prompts decode behind a long one, which leaves one token."""
    lab, fills = spied(system(lambda: TokenBudget(long_prefill_token_threshold=3), max_num_batched_tokens=4))
    requests = [request(0, 0.0, 9, 1), request(1, 0.0, 1, 3), request(2, 0.015, 1, 3)]
    run(lab, requests, plan=ONE, step_by_step=True)
    assert [(fill.chunks, fill.decodes) for fill in fills[:3]] == [({0: 3, 1: 1}, []), ({0: 3}, [1]), ({0: 3}, [1])]
