"""A replica that can never hold a request is no choice for it, under any router; it is refused only where none can."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sim import SYSTEMS, Plan, Result, System
from sim.policy import Router
from sim.routers import ByAttainment, ByShare, LeastLoadedPair, LeastRequests, RoundRobin
from sim.transfers import Whole
from sim.types import Role
from tests.lab import system
from tests.toys import cluster, problem, replica, request
from tests.toys import run as run_toy


def unequal(*roles: Role) -> Plan:
    """Two replicas of each role: on one GPU, where KV has little room, and on two."""
    specs = []
    for node, role in enumerate(roles):
        specs += [replica(f"{role}0", [f"n{node}.g0"], role), replica(f"{role}1", [f"n{node}.g1", f"n{node}.g2"], role)]
    return Plan(replicas=tuple(specs))


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """800 tokens on one GPU, 3,200 on two."""
    monkeypatch.setattr("sim.engine.setup.kv_blocks", lambda _, stages, *more, **named: 50 * len(stages[0].gpus) ** 2)


def replay(lab: System, plan: Plan) -> Result:
    """A third of the requests has 3,000 tokens, which small replicas can never hold."""
    long = [request(n, 0.1 * n, 3000 if n % 3 == 0 else 100, 20) for n in range(30)]
    return run_toy(lab, long, problem(cluster(gpus=3, nodes=2)), plan=plan)


ROUTERS: dict[str, tuple[Callable[[], Router], Plan]] = {
    "fewest requests": (LeastRequests, unequal("mixed")),
    "in turn": (RoundRobin, unequal("mixed")),
    "pairs": (LeastLoadedPair, unequal("prefill", "decode")),
    "shares": (ByShare, unequal("prefill", "decode")),
    "shares, drawn": (lambda: ByShare("random"), unequal("prefill", "decode")),
    "attainment": (lambda: ByAttainment(Whole()), unequal("prefill", "decode")),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_long_requests_go_where_they_fit_and_short_ones_anywhere(name: str) -> None:
    router, plan = ROUTERS[name]
    result = replay(system(router=router), plan)
    assert [row.outcome for row in result.rows.requests] == ["completed"] * 30
    for row in result.rows.requests:
        if row.request.input_tokens == 3000:
            assert {row.prefill_stage[-1], row.decode_stage[-1]} == {"1"}
    assert {row.decode_stage[-1] for row in result.rows.requests} == {"0", "1"}


@pytest.mark.parametrize("name", ["distserve", "tetriinfer", "splitwise"])
def test_systems_that_choose_the_decode_leg_late_choose_one_that_fits(name: str) -> None:
    pools = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
    result = replay(SYSTEMS[name](**pools), unequal("prefill", "decode"))
    assert [row.outcome for row in result.rows.requests] == ["completed"] * 30


def test_what_fits_nowhere_is_rejected_with_the_reason() -> None:
    result = run_toy(system(), [request(0, 0.0, 3500)], problem(cluster(gpus=3)), plan=unequal("mixed"))
    (row,) = result.rows.requests
    assert row.outcome == "rejected"
    assert "3509 tokens exceed the 800 that the KV cache of mixed0 holds" in row.reason
