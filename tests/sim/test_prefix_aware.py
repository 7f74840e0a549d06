"""Routing by what the prefix caches have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sim import SYSTEMS, ConfigError, Request, Result
from sim.policy import View
from sim.routers import LeastRequests, PrefixAware
from sim.types import Route
from tests.lab import TWO, system
from tests.toys import cluster, problem, run


def prompt(number: int, arrival_s: float, first: int, blocks: int = 6) -> Request:
    return Request(
        id=number, arrival_s=arrival_s, input_tokens=16 * blocks + 4, output_tokens=5,
        prefix=tuple(range(first, first + blocks)), prefix_block_tokens=16,
    )  # fmt: skip


def places(result: Result) -> list[str]:
    return [row.prefill_stage for row in sorted(result.rows.requests, key=lambda row: row.request.id)]


def replay(router: Any, *requests: Request, **limits: Any) -> Result:
    lab = system(router=router, **{"num_kv_blocks": 100, "prefix_caching": True} | limits)
    return run(lab, requests, problem(cluster(gpus=1, nodes=2)), plan=TWO)


def test_a_prompt_goes_where_its_beginning_is() -> None:
    """Two conversations at once, then each again: 96 of 100 tokens are found; by fewest requests both go to a."""
    talk = [prompt(0, 0.0, 0), prompt(1, 0.0, 50), prompt(2, 1.0, 50), prompt(3, 2.0, 0)]
    result = replay(PrefixAware, *talk)
    assert places(result) == ["a", "b", "b", "a"]
    assert sum(row.cached_tokens for row in result.rows.requests) == 2 * 96
    assert places(replay(LeastRequests, *talk)) == ["a", "b", "a", "a"]


def test_load_outweighs_a_short_match() -> None:
    """One block of six is at a, where five prompts of 100 tokens are still to be computed."""
    first = prompt(0, 0.0, 0)
    crowd = [prompt(number, 1.0, 100 * number) for number in range(1, 11)]
    late = Request(id=11, arrival_s=1.0, input_tokens=100, output_tokens=5, prefix=(0, 7), prefix_block_tokens=16)
    where = places(replay(PrefixAware, first, *crowd, late))
    assert where[0] == "a"
    assert {where[1:11].count(name) for name in "ab"} == {5}


@dataclass
class Reading:
    """Writes down what each replica is said to have of a prompt, by an index of some age."""

    max_age_s: float
    seen: list[list[int]] = field(default_factory=list)

    def route(self, request: Any, view: View) -> Route:
        self.seen.append([one.matched_tokens(request, self.max_age_s) for one in view.replicas])
        return Route(view.replicas[0].leg, view.replicas[0].leg)

    def finished(self, request: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("max_age_s", "seen"),
    [(0.0, [[0, 0], [96, 0], [96, 0]]), (1.5, [[0, 0], [0, 0], [96, 0]]), (9.0, [[0, 0], [0, 0], [0, 0]])],
)
def test_an_index_is_as_old_as_it_may_be(max_age_s: float, seen: list[list[int]]) -> None:
    """Asked at 0, 1 and 2 s; what may be 1.5 s old is made at 0 and at 2 s."""
    reading = Reading(max_age_s)
    replay(lambda: reading, *[prompt(n, float(n), 0) for n in range(3)])
    assert reading.seen == seen


def test_one_token_at_least_is_computed_and_nothing_is_known_without_caching() -> None:
    reading = Reading(0.0)
    whole = [
        Request(id=n, arrival_s=float(n), input_tokens=96, output_tokens=5, prefix=(1, 2, 3, 4, 5, 6),
                prefix_block_tokens=16) for n in range(2)
    ]  # fmt: skip
    replay(lambda: reading, *whole)
    assert reading.seen == [[0, 0], [80, 0]]
    reading = Reading(0.0)
    replay(lambda: reading, *whole, prefix_caching=False)
    assert reading.seen == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "prefix"}, "system.routing is 'prefix'; vllm has least_requests and prefix_aware"),
        ({"index_age_s": 1.0}, "system.index_age_s is 1.0; it must be >= 0, and needs routing: prefix_aware"),
        ({"routing": "prefix_aware", "index_age_s": -1.0}, "system.index_age_s is -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["vllm"](tp=1, **options)
