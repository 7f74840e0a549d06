"""ThunderServe and HexGen-2 as systems: their plan is run, KV goes compressed, shares are kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sim import SYSTEMS, ConfigError, Plan
from sim.batchers import Saturating
from sim.cost import Table
from sim.routers import ByShare
from sim.transfers import Quantized
from sim.types import InfeasibleError, Move, Reject, Replica, Route
from tests.lab import SPLIT, spied
from tests.lab import system as lab
from tests.toys import TINY, ToyCost, cluster, problem, request, run, with_limits

POOLS: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 2, "tp": 1}}


@pytest.mark.parametrize("name", ["thunderserve", "hexgen-2"])
def test_it_plans_and_serves(name: str) -> None:
    result = run(SYSTEMS[name](), [request(n, n * 0.2) for n in range(8)])
    assert set(result.columns["outcome"]) == {"completed"}
    assert (result.columns["bytes_moved"] > 0).all()


def test_a_stated_layout_is_taken_and_only_its_shares_are_planned() -> None:
    system = SYSTEMS["thunderserve"](**POOLS)
    plan = system.planner.plan(problem())
    assert [(replica.name, len(replica.gpus)) for replica in plan.replicas] == [
        ("prefill0", 1), ("decode0", 1), ("decode1", 1),
    ]  # fmt: skip
    assert sum(plan.shares.values()) == pytest.approx(1.0)
    assert {pair[0] for pair in plan.shares} == {"prefill0"}


def test_a_layout_without_room_for_the_longest_request_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="KV for the longest request"):
        SYSTEMS["thunderserve"](**POOLS).planner.plan(
            replace(problem(), limits=replace(problem().limits, num_kv_blocks=2))
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("thunderserve", {"bits": 0}, "bits is 0"),
        ("thunderserve", {"codec_bytes_per_s": 0.0}, "codec_bytes_per_s is 0.0"),
        ("thunderserve", {"n_neighbors": 0}, "n_neighbors is 0"),
        ("thunderserve", {"seconds": 0.0}, "seconds is 0.0"),
        ("thunderserve", {"routing": "best"}, "routing is 'best'"),
        ("hexgen-2", {"routing": "best"}, "routing is 'best'"),
        ("hexgen-2", {"period_s": 0.0}, "period_s is 0.0"),
        ("hexgen-2", {"patience": -1}, "patience is -1"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS[name](**options)


# ---------------------------------------------------------------- KV on the way


def test_four_bits_in_groups_of_64_send_nine_thirty_seconds_of_the_bytes() -> None:
    """4 bits and 32 bits a group of 64: 4.5 of 16. Here 100 tokens."""
    whole = 100 * TINY.kv_bytes_per_token()
    for bits, part in ((16, 1), (8, 8.5 / 16), (4, 4.5 / 16)):
        system = lab(Saturating, router=ByShare, transfer=lambda bits=bits: Quantized(bits))
        result = run(system, [request(0)], problem(cluster(nodes=2)), plan=SPLIT)
        assert result.columns["bytes_moved"].tolist() == [round(whole * part)]


def test_the_codec_takes_a_read_and_a_write_at_either_end_or_what_a_table_says() -> None:
    move = Move(0, 1000, 32_000_000, 2, "a", "b")
    assert Quantized(4, codec_bytes_per_s=1e9).overhead_s(move) == pytest.approx(2 * 0.032 * (1 + 4.5 / 16))
    assert Quantized(16, codec_bytes_per_s=1e9).overhead_s(move) == 0
    assert Quantized(4, codec=Table(counts=(500, 1500), seconds=(0.1, 0.3))).overhead_s(move) == pytest.approx(0.2)


# ---------------------------------------------------------------- shares


@dataclass
class Sight:
    plan: Plan
    up: tuple[Replica, ...]
    rng: np.random.Generator

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return self.up

    def with_role(self, *roles: str) -> list[Replica]:
        return [replica for replica in self.up if replica.role in roles]


def sight(shares: dict[tuple[str, str], float]) -> Sight:
    names = ["p0", "p1", "d0", "d1"]
    replicas = tuple(
        replace(SPLIT.replicas[0], name=name, role="prefill" if name[0] == "p" else "decode",
                stages=(replace(SPLIT.replicas[0].stages[0], name=name),))
        for name in names
    )  # fmt: skip
    return Sight(Plan(replicas=replicas, shares=shares), replicas, np.random.default_rng(0))


def routed(router: ByShare, view: Sight, count: int) -> Counter[tuple[str, str]]:
    routes = [router.route(None, view) for _ in range(count)]  # type: ignore[arg-type]
    assert all(isinstance(route, Route) for route in routes)
    return Counter((route[0][0], route[1][0]) for route in routes if isinstance(route, Route))


def test_the_round_robin_keeps_the_shares_exactly() -> None:
    shares = {("p0", "d0"): 0.45, ("p0", "d1"): 0.35, ("p1", "d0"): 0.05, ("p1", "d1"): 0.15}
    view = sight(shares)
    assert routed(ByShare(), view, 20) == {pair: pytest.approx(20 * share) for pair, share in shares.items()}
    drawn = routed(ByShare("random"), view, 2000)
    for pair, share in shares.items():
        assert drawn[pair] / 2000 == pytest.approx(share, abs=0.05)


def test_what_is_down_gives_its_share_to_the_others() -> None:
    view = sight({("p0", "d0"): 0.5, ("p1", "d0"): 0.25, ("p1", "d1"): 0.25})
    router = ByShare()
    routed(router, view, 3)
    view.up = tuple(replica for replica in view.up if replica.name != "p0")
    assert routed(router, view, 8) == {("p1", "d0"): 4, ("p1", "d1"): 4}
    view.up = view.up[:1]
    assert router.route(None, view) == Reject("no (prefill, decode) pair of the plan is up")  # type: ignore[arg-type]


def test_a_plan_without_shares_counts_every_pair_alike() -> None:
    assert routed(ByShare(), sight({}), 8) == {(p, d): 2 for p in ("p0", "p1") for d in ("d0", "d1")}


# ---------------------------------------------------------------- batches


def test_prompts_share_a_batch_while_that_saves_time() -> None:
    """A step costs 10 ms and 0.01 ms a token: of 100 tokens two take 12 ms, not 22; of 9000, 190 ms, not 200."""
    nodes = cluster(nodes=2)
    short, fills = spied(lab(Saturating, router=ByShare))
    run(short, [request(n) for n in range(3)], problem(nodes), plan=SPLIT)
    assert next(list(fill.chunks.values()) for fill in fills if fill.chunks) == [100, 100, 100]
    long, fills = spied(lab(Saturating, router=ByShare, max_model_len=20000))
    where = replace(problem(nodes, ToyCost(per_pair_ps=0)), model=replace(TINY, max_position_embeddings=20000))
    run(long, [request(n, input_tokens=9000) for n in range(3)], where, plan=SPLIT)
    assert [list(fill.chunks.values()) for fill in fills if fill.chunks] == [[9000]] * 3


def test_decodes_that_run_out_of_blocks_are_swapped_out() -> None:
    system = with_limits(SYSTEMS["thunderserve"](**{**POOLS, "decode": {"replicas": 1, "tp": 1}}), num_kv_blocks=24)
    result = run(system, [request(n, 0.0, 90, 60) for n in range(4)])
    assert set(result.columns["outcome"]) == {"completed"}
    assert result.columns["preemptions"].sum() > 0
