"""Routers, one choice at a time, over replicas that are nothing but numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sim.routers import LeastLoadedPair, LeastRequests, RoundRobin
from sim.types import Reject, Role, Route
from tests.lab import SPLIT, TWO, system
from tests.toys import cluster, problem, request, run


@dataclass
class Machine:
    name: str
    role: Role = "mixed"
    num_waiting: int = 0
    num_running: int = 0
    pending_prefill_tokens: int = 0

    @property
    def leg(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass
class Sight:
    replicas: list[Machine] = field(default_factory=list)

    def with_role(self, *roles: Role) -> list[Machine]:
        return [machine for machine in self.replicas if machine.role in roles]


@dataclass
class Asking:
    id: int


def route(router: Any, view: Sight, number: int = 0) -> Any:
    return router.route(Asking(number), view)


def test_the_fewest_outstanding_requests_win_and_the_first_of_equals() -> None:
    view = Sight([Machine("a", num_waiting=1, num_running=2), Machine("b", num_running=2), Machine("c", num_waiting=2)])
    assert route(LeastRequests(), view) == Route(("b",), ("b",))


def test_replicas_in_turn() -> None:
    view = Sight([Machine("a"), Machine("b")])
    router = RoundRobin()
    assert [route(router, view, n).prefill[0] for n in range(5)] == ["a", "b", "a", "b", "a"]
    router.finished(Asking(0))  # type: ignore[arg-type]


def test_a_pair_is_chosen_by_tokens_pending_and_by_requests_assigned() -> None:
    view = Sight(
        [
            Machine("p", "prefill", pending_prefill_tokens=50),
            Machine("q", "prefill", pending_prefill_tokens=40),
            Machine("d", "decode", num_running=9),
            Machine("e", "decode"),
        ]
    )
    router = LeastLoadedPair()
    assert [route(router, view, n) for n in range(3)] == [
        Route(("q",), ("d",)),
        Route(("q",), ("e",)),
        Route(("q",), ("d",)),
    ]
    router.finished(Asking(0))  # type: ignore[arg-type]
    router.finished(Asking(2))  # type: ignore[arg-type]
    assert route(router, view, 3).decode == ("d",)


def test_mixed_replicas_serve_either_leg() -> None:
    view = Sight([Machine("p", "prefill", pending_prefill_tokens=9), Machine("m"), Machine("d", "decode")])
    assert route(LeastLoadedPair(), view) == Route(("m",), ("m",))


@pytest.mark.parametrize("router", [LeastRequests(), RoundRobin()])
def test_nobody_up_is_a_refusal(router: Any) -> None:
    assert route(router, Sight()) == Reject("no replica is up")


def test_a_missing_side_is_a_refusal_that_names_it() -> None:
    assert route(LeastLoadedPair(), Sight([Machine("d", "decode")])) == Reject("no prefill replica is up")
    assert route(LeastLoadedPair(), Sight([Machine("p", "prefill")])) == Reject("no decode replica is up")


def test_in_a_run_every_place_is_given_back() -> None:
    router = LeastLoadedPair()
    run(system(router=lambda: router), [request(n, 0.01 * n) for n in range(20)], problem(cluster(1, 2)), plan=SPLIT)
    assert set(router._assigned.values()) == {0}
    assert not router._place


def test_round_robin_in_a_run() -> None:
    result = run(system(router=RoundRobin), [request(n) for n in range(4)], problem(cluster(1, 2)), plan=TWO)
    assert [row.prefill_stage for row in result.rows.requests] == ["a", "b", "a", "b"]
