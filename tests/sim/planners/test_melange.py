"""Melange's program: the released example, what must hold of any optimum, and the latency model's rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import ceil, inf
from typing import Any

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from experiments.studies.melange.study import toy
from experiments.studies.melange.world import ALLOCATIONS, PRICES, problem
from sim import SYSTEMS, Cluster, ConfigError, Limits, Problem, Workload
from sim.planners.melange import (
    Bucket,
    ClosedForm,
    Melange,
    Offer,
    alone,
    bucket_of,
    cheapest,
    histogram,
    least_usd_per_hour,
)
from sim.types import InfeasibleError, Slo
from tests.toys import TINY, ToyCost, replica

SIZES = [Bucket(25, 25), Bucket(100, 25), Bucket(2000, 500)]


@pytest.mark.parametrize(
    ("slices", "counts", "usd_per_hour"), [(1, (3, 1), 6.70), (2, (2, 1), 5.69), (8, (2, 1), 5.69)]
)
def test_the_released_example(slices: int, counts: tuple[int, int], usd_per_hour: float) -> None:
    """melange/config/example.json; its README prints 3 A10G and 1 A100 for 6.70 $/h."""
    mix = toy(slices)
    assert tuple(mix.counts.values()) == counts
    assert mix.usd_per_hour == pytest.approx(usd_per_hour)


# ------------------------------------------------------------ buckets


def test_a_request_counts_as_the_smallest_bucket_that_holds_it() -> None:
    assert bucket_of(25, 25) == (25, 25)
    assert bucket_of(26, 101) == (100, 250)
    assert bucket_of(16000, 2000) == (16000, 2000)
    assert bucket_of(16001, 8001) == (32000, 16000)
    assert histogram([(10, 10), (30, 10), (25, 1), (99, 25)]) == {(25, 25): 0.5, (100, 25): 0.5}


# ------------------------------------------------------------ the program


def offer(name: str, usd_per_hour: float, most: Sequence[float], available: int | None = None) -> Offer:
    return Offer(
        name=name,
        usd_per_hour=usd_per_hour,
        max_rates=dict(zip(SIZES, most, strict=True)),
        available=available,
    )


@st.composite
def markets(draw: st.DrawFn) -> tuple[dict[Bucket, float], list[Offer]]:
    """Up to three types, each bucket served by one of them at least."""
    rates = {bucket: draw(st.sampled_from([0.0, 0.5, 1.0, 3.3, 7.0])) for bucket in SIZES}
    rates[SIZES[0]] += 0.25
    kinds = draw(st.integers(1, 3))
    table = [[draw(st.sampled_from([0.0, 0.7, 1.0, 2.5, 6.0])) for _ in SIZES] for _ in range(kinds)]
    table[-1] = [value or 0.4 for value in table[-1]]
    prices = [draw(st.sampled_from([0.7, 1.01, 3.67, 7.516])) for _ in range(kinds)]
    return rates, [offer(f"g{at}", price, row) for at, (price, row) in enumerate(zip(prices, table, strict=True))]


def by_trying_all(rates: Mapping[Bucket, float], offers: Sequence[Offer], slices: int) -> float:
    """The cheapest of all ways to put the slices of every bucket on types."""
    kept = [bucket for bucket, rate in rates.items() if rate]
    ways = [parts for parts in product(range(slices + 1), repeat=len(offers)) if sum(parts) == slices]
    best = inf
    for choice in product(ways, repeat=len(kept)):
        rent = 0.0
        for at, one in enumerate(offers):
            load = 0.0
            for bucket, parts in zip(kept, choice, strict=True):
                if parts[at]:
                    load += parts[at] * rates[bucket] / slices / one.max_rates[bucket] if one.max_rates[bucket] else inf
            number = inf if load == inf else ceil(load - 1e-6)
            rent += inf if number > (inf if one.available is None else one.available) else number * one.usd_per_hour
        best = min(best, rent)
    return best


@settings(max_examples=60)
@given(market=markets(), slices=st.integers(1, 3), available=st.sampled_from([None, 1, 3]))
def test_it_finds_what_looking_at_everything_finds(
    market: tuple[dict[Bucket, float], list[Offer]], slices: int, available: int | None
) -> None:
    rates, offers = market
    offers[0] = replace(offers[0], available=available)
    least = by_trying_all(rates, offers, slices)
    if least == inf:
        with pytest.raises(InfeasibleError, match="more than the cluster serves"):
            cheapest(rates, offers, slices)
    else:
        mix = cheapest(rates, offers, slices)
        assert mix.usd_per_hour == pytest.approx(least)
        assert available is None or mix.counts["g0"] <= available


@settings(max_examples=60)
@given(market=markets(), slices=st.sampled_from([1, 2, 4]))
def test_what_holds_of_every_optimum(market: tuple[dict[Bucket, float], list[Offer]], slices: int) -> None:
    rates, offers = market
    mix = cheapest(rates, offers, slices)
    for one in offers:  # a: no type alone is cheaper
        number = alone(rates, one)
        assert number is None or mix.usd_per_hour <= number * one.usd_per_hour + 1e-9
    more = cheapest({bucket: 1.7 * rate for bucket, rate in rates.items()}, offers, slices)
    assert more.usd_per_hour >= mix.usd_per_hour - 1e-9  # b: rises with the rate
    finer = cheapest(rates, offers, 2 * slices)
    assert finer.usd_per_hour <= mix.usd_per_hour + 1e-9  # b: falls as slices are cut in two
    faster = [replace(one, max_rates={key: 1.5 * value for key, value in one.max_rates.items()}) for one in offers]
    assert cheapest(rates, faster, slices).usd_per_hour <= mix.usd_per_hour + 1e-9  # b: falls with a looser SLO
    wider = cheapest(rates, [*offers, offer("new", 2.0, (1, 2, 3))], slices)
    assert wider.usd_per_hour <= mix.usd_per_hour + 1e-9  # c: one more type never costs
    assert least_usd_per_hour(rates, offers) <= mix.usd_per_hour + 1e-9  # d
    twice = [replace(one, max_rates={key: 2 * value for key, value in one.max_rates.items()}) for one in offers]
    again = cheapest({bucket: 2 * rate for bucket, rate in rates.items()}, twice, slices)
    assert again.usd_per_hour == pytest.approx(mix.usd_per_hour)  # e
    for one in offers:  # h
        assert mix.loads[one.name] <= mix.counts[one.name] + 1e-5
    for bucket, rate in rates.items():
        parts = [mix.slices.get((one.name, bucket), 0) for one in offers]
        assert sum(parts) == (slices if rate else 0)
        assert all(one.max_rates[bucket] for one, part in zip(offers, parts, strict=True) if part)


def test_d_the_bound_is_the_relaxed_program_by_hand() -> None:
    rates = dict(zip(SIZES, (4.0, 3.0, 0.5), strict=True))
    offers = [offer("small", 1.0, (2, 1, 0)), offer("large", 4.0, (10, 2, 1))]
    assert least_usd_per_hour(rates, offers) == pytest.approx(4 * 0.4 + 3 * 1.0 + 0.5 * 4.0)


def test_f_a_bucket_that_nobody_serves_is_an_error() -> None:
    with pytest.raises(InfeasibleError, match="none of a, b serves requests of 2000x500 tokens"):
        cheapest(dict.fromkeys(SIZES, 1.0), [offer("a", 1.0, (1, 1, 0)), offer("b", 1.0, (1, 0, 0))])


@pytest.mark.parametrize("found", [True, False])
def test_where_time_is_up_the_gap_is_told(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    solve = scipy.optimize.milp

    def milp(*given: Any, **more: Any) -> OptimizeResult:
        solved = solve(*given, **more)
        return OptimizeResult(x=solved.x if found else None, status=1, mip_gap=0.1, message="Time limit reached")

    market = (dict.fromkeys(SIZES, 1.0), [offer("a", 1.0, (1, 1, 2))])
    assert cheapest(*market).gap == 0
    monkeypatch.setattr("scipy.optimize.milp", milp)
    if found:
        assert cheapest(*market).gap == 0.1
    else:
        with pytest.raises(ConfigError, match=r"set system\.slices to fewer"):
            cheapest(*market)


def test_the_printed_tables_are_consistent() -> None:
    """Every allocation's counts at the prices are its printed rent (tables 3 to 8)."""
    rows = [one for table in ALLOCATIONS.values() for one in table]
    assert len(rows) == 36
    for one in rows:
        rent = sum(number * price for number, price in zip(one.mix, PRICES.values(), strict=True))
        assert rent == pytest.approx(one.usd_per_hour, abs=0.006)


# ------------------------------------------------------------ rates by the latency model


def toy_world(bound_s: float | None = None, **limits: int) -> Problem:
    """Ten milliseconds a step and a hundredth a token: rates by hand."""
    cost = ToyCost(per_context_ps=0, per_pair_ps=0)
    given = {"num_kv_blocks": 1000, "max_num_batched_tokens": 1024, **limits}
    return Problem(
        cluster=Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 2}]),
        model=TINY,
        cost=cost,
        workload=Workload(rate_per_s=1.0, lengths=((100, 25),)),
        slo=Slo(tpot_s=bound_s),
        limits=Limits(**given),  # type: ignore[arg-type]
    )


def test_a_request_alone_by_hand() -> None:
    form = ClosedForm(toy_world(), replica("a", ["n0.g0"]))
    prompt_s, step_s = 0.010 + 100e-5, 0.010 + 1e-5
    assert form.latency_s(Bucket(100, 25), 1) == pytest.approx(prompt_s + 24 * step_s)


def test_prompts_in_chunks_beside_decodes_by_hand() -> None:
    """Ten requests; a prompt of 2000 is cut in 1014 and 986 beside nine decodes, and adds its tokens alone."""
    form = ClosedForm(toy_world(), replica("a", ["n0.g0"]))
    latency_s = form.latency_s(Bucket(2000, 100), 10)
    assert latency_s == pytest.approx(99 * (0.010 + 10e-5) + 10 * 2000e-5)


def test_the_bound_and_the_memory_limit_the_batch() -> None:
    a = replica("a", ["n0.g0"])
    bucket = Bucket(100, 100)
    assert ClosedForm(toy_world(num_kv_blocks=12), a)(bucket) == 0.0  # 192 tokens, and it needs 200
    one = ClosedForm(toy_world(num_kv_blocks=13), a)
    assert one.most(bucket) == 1
    assert one(bucket) == pytest.approx(1 / one.latency_s(bucket, 1))
    assert ClosedForm(toy_world(max_num_seqs=7), a).most(bucket) == 7
    assert ClosedForm(toy_world(bound_s=0.0099), a)(bucket) == 0.0
    rates = [ClosedForm(toy_world(bound_s=bound_s), a)(bucket) for bound_s in (0.0102, 0.011, 0.012, 0.02, 1.0)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[2]


# ------------------------------------------------------------ the planner


def test_it_rents_the_cheapest_of_the_clusters_gpus() -> None:
    """Short requests on the small GPUs; what is idle is not rented."""
    where = problem(0.12, Workload(rate_per_s=3.0, lengths=((200, 200),)), {"L4": 9, "A10G": 4, "A100": 2})
    found = Melange().solve(where)
    assert found.mix.usd_per_hour <= min(number * one.usd_per_hour for one in found.offers
                                         if (number := alone(found.rates, one)) is not None)  # fmt: skip
    rented = [where.cluster.gpu(one.gpus[0]).name for one in found.plan.replicas]
    assert {name: rented.count(name) for name in found.mix.counts} == dict(found.mix.counts)
    assert len(rented) < 15
    assert sum(where.cluster.gpu(one.gpus[0]).usd_per_hour or 0 for one in found.plan.replicas) == pytest.approx(
        found.mix.usd_per_hour
    )


def test_it_plans_for_more_than_the_rate() -> None:
    where = problem(0.12, Workload(rate_per_s=4.0, lengths=((200, 200), (20, 20))), {"A100": 2})
    rates = SYSTEMS["melange"](overprovision=0.5).planner.solve(where).rates  # type: ignore[attr-defined]
    assert rates == {(25, 25): 3.0, (250, 250): 3.0}


def test_it_says_what_binds() -> None:
    where = problem(0.12, Workload(rate_per_s=8.0, lengths=((200, 200),)), {"L4": 2, "A10G": 2, "A100": 2})
    text = "\n".join(Melange().explain(where))
    for part in ("cheapest mix for 8 requests/s", "only L4:", "the cluster has 2", "the mix saves", "least possible"):
        assert part in text
    long = problem(0.12, Workload(rate_per_s=0.2, lengths=((15900, 200),)), {"A10G": 2, "A100": 2})
    assert "only A10G: cannot serve requests of 16000x250 tokens within the SLO" in Melange().explain(long)[1]


def test_it_says_that_the_mix_may_not_be_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    where = problem(0.12, Workload(rate_per_s=1.0, lengths=((200, 200),)))
    monkeypatch.setattr("sim.planners.melange.cheapest", lambda *given: replace(cheapest(*given), gap=0.1))
    assert Melange().explain(where)[1] == "the solver's 60 s were up; another mix may cost up to 10.0% less"


def test_a_replica_is_as_many_gpus_as_hold_the_model() -> None:
    where = problem(0.5, Workload(rate_per_s=0.5, lengths=((200, 200),)), {"L4": 1})
    cluster = Cluster.of(nodes=[{"gpu": "L4", "count": 4, "usd_per_hour": 0.7}, {"gpu": "T4", "count": 1}])
    found = Melange().solve(replace(where, cluster=cluster, model=replace(where.model, num_layers=64)))
    assert [one.name for one in found.offers] == ["L4 TP 2"]  # 26 GB: not on one L4, and the T4 is alone
    assert found.offers[0].usd_per_hour == pytest.approx(1.4)
    assert found.offers[0].available == 2


def test_one_type_at_two_prices_is_two_offers() -> None:
    where = problem(0.12, Workload(rate_per_s=2.0, lengths=((200, 200),)))
    nodes = [{"gpu": "A10G", "count": 1, "nodes": 3, "usd_per_hour": usd} for usd in (1.5, 1.0)]
    found = Melange().solve(replace(where, cluster=Cluster.of(nodes=nodes)))
    assert [one.usd_per_hour for one in found.offers] == [1.5, 1.0]
    assert found.mix.counts[found.offers[0].name] == 0


@pytest.mark.parametrize(
    ("bound_s", "rate_per_s", "pattern"),
    [
        (0.001, 1.0, r"none of L4, A10G serves requests of 250x250 tokens within slo.tpot_s 0.001; it takes other"),
        (0.12, 900.0, r"900 requests/s are more than the cluster serves: 2 L4, 2 A10G within"),
    ],
)
def test_what_cannot_be_done_is_said(bound_s: float, rate_per_s: float, pattern: str) -> None:
    where = problem(bound_s, Workload(rate_per_s=rate_per_s, lengths=((200, 200),)), {"L4": 2, "A10G": 2})
    with pytest.raises(InfeasibleError, match=pattern):
        Melange().plan(where)


@pytest.mark.parametrize(
    ("tp", "layers", "pattern"),
    [
        (3, 32, r"no machine of the cluster has room for llama-2-7b with system.tp 3; .*, or leave tp out"),
        (
            None,
            320,
            r"no machine of the cluster has room for llama-2-7b; take larger GPUs, or more of them in a machine$",
        ),
    ],
)
def test_a_model_that_fits_nowhere_is_named(tp: int | None, layers: int, pattern: str) -> None:
    where = problem(0.5, Workload(rate_per_s=0.5, lengths=((200, 200),)), {"L4": 2})
    with pytest.raises(InfeasibleError, match=pattern):
        Melange(tp=tp).plan(replace(where, model=replace(where.model, num_layers=layers)))


def test_prices_must_be_known() -> None:
    where = problem(0.12, Workload(rate_per_s=1.0, lengths=((200, 200),)))
    with pytest.raises(ConfigError, match="no price is known of A10G; set usd_per_hour_spot on its nodes"):
        Melange(spot=True).plan(replace(where, cluster=Cluster.of(nodes=[{"gpu": "A10G", "count": 1}])))
