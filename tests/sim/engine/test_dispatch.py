"""Routers that choose where a request decodes once its prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sim import Limits, Plan, PolicyError, Result, StalledError
from sim.batchers import TokenBudget
from sim.policy import RequestView, View
from sim.types import Route
from tests.lab import SPLIT, Way, system
from tests.sim.engine.test_faults import TWO_DECODES, event, outcomes, where
from tests.toys import MS, request, run


class Late:
    """Prefills on the first replica; answers its n-th question with the n-th answer, a name or seconds to wait."""

    def __init__(self, *answers: str | float) -> None:
        self.answers: Sequence[str | float] = answers
        self.asked: list[float] = []

    def route(self, request: RequestView, view: View) -> Route:
        return Route(view.replicas[0].leg, None)

    def finished(self, request: RequestView) -> None:
        pass

    def dispatch(self, request: RequestView, view: View) -> tuple[str, ...] | float:
        self.asked.append(view.now_s)
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return view.replica(answer).leg if isinstance(answer, str) else answer


def late(router: Late, requests: Any = None, plan: Plan = TWO_DECODES, **more: Any) -> Result:
    return run(system(router=lambda: router), requests or [request(0, output_tokens=3)], where(), plan=plan, **more)


@pytest.mark.parametrize("step_by_step", [False, True])
def test_it_is_asked_one_tick_after_the_first_token(step_by_step: bool) -> None:
    router = Late("e")
    row = late(router, step_by_step=step_by_step).rows.requests[0]
    assert router.asked == [pytest.approx(0.011)]
    assert (row.first_token_ps, row.prefill_stage, row.decode_stage) == (11 * MS, "p", "e")
    early = run(system(router=lambda: Way("p", "e")), [request(0, output_tokens=3)], where(), plan=TWO_DECODES)
    assert row.finish_ps == (early.rows.requests[0].finish_ps or 0) + 1  # the question takes a tick


def test_it_may_put_off_its_choice() -> None:
    router = Late(0.1, 0.05, "d")
    row = late(router).rows.requests[0]
    assert router.asked == pytest.approx([0.011, 0.111, 0.161])
    assert row.transfer_ps > 150 * MS
    assert row.decode_stage == "d"


def test_a_request_may_stay_where_its_prompt_was_computed() -> None:
    result = late(Late("p"))
    row = result.rows.requests[0]
    assert (row.outcome, row.bytes_moved, row.decode_stage) == ("completed", 0, "p")
    assert not result.rows.links


def test_who_ends_with_its_first_token_is_never_asked_about() -> None:
    router = Late("d")
    assert outcomes(late(router, [request(0, output_tokens=1)])) == ["completed"]
    assert router.asked == []


def test_kv_that_waits_for_a_choice_is_lost_with_its_replica() -> None:
    """It starts over, and the question that was put off is not asked again."""
    router = Late(0.1, "d")
    result = late(router, plan=SPLIT, events=[event("gpu_lost", "n0.g0", 0.02)])
    assert (outcomes(result), len(router.asked)) == (["completed"], 2)
    assert router.asked[1] == pytest.approx(0.02 + 0.01 + 101 * 1e-5)
    assert result.rows.requests[0].prefill_stage == "d"


class Refusing(TokenBudget):
    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        return f"{total_tokens} tokens are too many" if total_tokens > 110 else None


def test_a_request_that_the_chosen_replica_refuses_fails_and_frees_its_blocks() -> None:
    """The engine raises if blocks are left at the end."""
    batchers = iter([TokenBudget(), Refusing(), TokenBudget()])
    strict = system(lambda: next(batchers), router=lambda: Late("d"))
    result = run(strict, [request(0, output_tokens=50), request(1)], where(), plan=TWO_DECODES)
    assert sorted((row.request.id, row.outcome, row.reason) for row in result.rows.requests) == [
        (0, "failed", "d: 149 tokens are too many"), (1, "completed", ""),
    ]  # fmt: skip


def test_a_choice_that_is_never_made_stalls_the_run() -> None:
    with pytest.raises(StalledError, match="1 requests are unfinished"):
        late(Late(0.5))


def test_waiting_no_time_is_illegal() -> None:
    with pytest.raises(PolicyError, match=r"Late asks to be asked again about request 0 in 0\.0 s"):
        late(Late(0.0))


def test_unknown_stages_are_illegal() -> None:
    router = Late("d")
    router.dispatch = lambda request, view: ("x.0",)  # type: ignore[method-assign]
    with pytest.raises(PolicyError, match=r"Late routes request 0 over \('x.0',\), which is not the stages"):
        late(router)
