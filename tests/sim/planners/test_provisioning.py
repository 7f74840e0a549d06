"""The search over prompt and token machines, on replays one can do in one's head, and once on the simulator."""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import SYSTEMS, ConfigError
from sim.cluster import Cluster
from sim.cost import PowerCapped, advanced
from sim.goodput import highest_rate
from sim.planners.provisioning import (
    Alone,
    Design,
    SlowdownLimits,
    Throughput,
    alone,
    fewest_machines,
    most_requests,
    slowdowns,
)
from sim.types import Stage, Work
from tests.toys import MS, TINY, ToyCost, cluster, problem, request, run

STAGE = Stage(name="s", gpus=("n0.g0",), first_layer=0, end_layer=TINY.num_layers)


def bottleneck(design: Design, rate_per_s: float) -> bool:
    """A prompt machine takes 2 requests/s, a token machine 10."""
    return rate_per_s <= min(2 * design.prompts, 10 * design.tokens)


def test_the_best_split_balances_the_two_pools() -> None:
    designs = [Design(prompts, 12 - prompts) for prompts in range(1, 12)]
    assert most_requests(bottleneck, designs, low=1, high=100, step=1) == Throughput(Design(10, 2), 20)


def test_the_fewest_machines_for_a_rate() -> None:
    assert fewest_machines(bottleneck, 20, lambda d: d.prompts + d.tokens, most=Design(40, 40)) == Design(10, 2)
    assert fewest_machines(bottleneck, 21, lambda d: d.prompts + 5 * d.tokens, most=Design(40, 40)) == Design(11, 3)
    assert fewest_machines(bottleneck, 81, lambda d: d.prompts + d.tokens, most=Design(40, 40)) is None


@given(prompt=st.floats(0.5, 9), token=st.floats(0.5, 9), machines=st.integers(2, 40), rate=st.floats(0.5, 60))
def test_the_searches_find_what_trying_everything_finds(
    prompt: float, token: float, machines: int, rate: float
) -> None:
    def feasible(design: Design, rate_per_s: float) -> bool:
        return rate_per_s <= min(prompt * design.prompts, token * design.tokens)

    def price(design: Design) -> float:
        return 3 * design.prompts + design.tokens

    designs = [Design(count, machines - count) for count in range(1, machines)]
    found = most_requests(feasible, designs, low=1, high=60, step=1)
    rates = [highest_rate(lambda r, d=design: feasible(d, r), 1, 60, 1) for design in designs]
    assert (found.rate_per_s if found else 0) == max(rates)
    everything = [Design(p, t) for p in range(1, 31) for t in range(1, 31) if feasible(Design(p, t), rate)]
    cheapest = fewest_machines(feasible, rate, price, most=Design(30, 30))
    assert (price(cheapest) if cheapest else inf) == min(map(price, everything), default=inf)


def test_the_highest_rate_is_found_in_few_trials() -> None:
    tried = []
    assert highest_rate(lambda rate: tried.append(rate) is None and rate <= 37, 1, 128, 1) == 37
    assert len(tried) <= 13
    assert max(tried) <= 2 * 37
    assert highest_rate(lambda rate: False, 1, 128, 1) == 0
    assert highest_rate(lambda rate: True, 1, 128, 1) == 128


def test_a_request_alone_takes_its_prompt_and_its_steps() -> None:
    """10 ms and 10 us a token for the prompt; a step 10.01 ms and 1 ns per token attended to, twice that beyond 103."""
    cost = ToyCost(knot=103).bind(TINY, STAGE, cluster())
    ttft_ps = 10 * MS + 100 * MS // 100
    contexts = [101, 102, 103, 104]
    steps_ps = [10 * MS + MS // 100 + 1000 * (c + max(0, c - 103)) for c in contexts]
    found = alone(cost, 100, 5)
    assert found.ttft_s == ttft_ps / 1e12
    assert found.tpot_s == pytest.approx(sum(steps_ps) / 4 / 1e12, rel=1e-12)
    assert found.e2e_s == pytest.approx((ttft_ps + sum(steps_ps)) / 1e12, rel=1e-12)
    assert isnan(alone(cost, 100, 1).tpot_s)


def test_alone_is_what_the_engine_takes_for_one_request() -> None:
    result = run(SYSTEMS["vllm"](mode="v0", replicas=1, tp=1), [request(0, 0.0, 100, 20)])
    found = alone(ToyCost().bind(TINY, STAGE, cluster()), 100, 20)
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert result.columns[name][0] == pytest.approx(getattr(found, name), rel=1e-9)


def test_slowdowns_and_the_nine_limits() -> None:
    columns = {
        "outcome": np.array(["completed", "completed"], dtype=object),
        "ttft_s": np.array([1.0, 4.0]),
        "tpot_s": np.array([0.1, np.nan]),
        "e2e_s": np.array([2.0, 4.0]),
    }
    reference = [Alone(1.0, 0.1, 2.0), Alone(2.0, float("nan"), 4.0)]
    measured = slowdowns(columns, reference)
    assert measured == {"ttft": (2.0, 2.0, 2.0), "tpot": (1.0, 1.0, 1.0), "e2e": (1.0, 1.0, 1.0)}
    assert SlowdownLimits().met(measured)
    assert not SlowdownLimits(ttft=(1.9, 3, 6)).met(measured)
    columns["outcome"][1] = "rejected"
    assert slowdowns(columns, reference)["e2e"] == (inf, inf, inf)
    with pytest.raises(ConfigError, match="e2e"):
        SlowdownLimits(e2e=(1.0, 2.0, 0.0))


def test_a_power_cap_slows_steps_with_prompts_only() -> None:
    where: Cluster = cluster(gpus=1, nodes=2)
    capped = PowerCapped(inner=ToyCost(), nodes=frozenset({"n1"}), prompt_factor=1.5)
    on = [
        capped.bind(TINY, Stage(name="s", gpus=(f"n{n}.g0",), first_layer=0, end_layer=TINY.num_layers), where)
        for n in (0, 1)
    ]
    prompt, decode, both = Work(((100, 0),), 0, 0), Work((), 4, 400), Work(((100, 0),), 4, 400)
    assert [cost.line(prompt).first_ps for cost in on] == [11 * MS, 16.5 * MS]
    assert on[0].line(decode) == on[1].line(decode)
    line = on[1].line(both)
    assert on[1].line(advanced(both, 3)).first_ps == line.first_ps + 3 * line.slope_ps
    with pytest.raises(ConfigError, match="power_capped"):
        PowerCapped(inner=ToyCost(), nodes=frozenset({"n7"}), prompt_factor=1.5).bind(TINY, STAGE, where)


def test_a_cap_on_the_token_machine_changes_nothing_while_it_sees_no_prompt() -> None:
    where = problem(cluster(gpus=1, nodes=2))
    requests = [request(number, 0.2 * number) for number in range(20)]
    pools = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
    plain, token, prompt = (
        run(SYSTEMS["splitwise"](power_capped=nodes, **pools), requests, where) for nodes in ([], ["n1"], ["n0"])
    )
    assert plain.log() == token.log()
    assert prompt.columns["ttft_s"][0] == pytest.approx(1.3 * plain.columns["ttft_s"][0])


def test_as_splitwise_sim_decodes_are_free_in_a_batch() -> None:
    """And mixed steps cost 1.1 times the prompt table, whatever the context."""
    cost = SYSTEMS["splitwise"](compat="splitwise_sim").cost(ToyCost()).bind(TINY, STAGE, cluster())
    assert cost.line(Work((), 1, 500)).first_ps == cost.line(Work((), 64, 64000)).first_ps
    alone_ps = cost.line(Work(((100, 0),), 0, 0)).first_ps
    mixed = cost.line(Work(((90, 50),), 10, 5000))
    assert mixed.first_ps == pytest.approx(1.1 * alone_ps)
    assert mixed.slope_ps == 0


def test_a_machine_that_stays_mixed_changes_its_role() -> None:
    """Prompts come far too fast for one machine: two thirds of the token machines' time goes into prompts."""
    from dataclasses import replace

    from sim.systems.split.splitwise import Repurpose

    system = SYSTEMS["splitwise"](prompt_queue_tokens=100, prefill={"replicas": 1}, decode={"replicas": 3})
    eager = replace(system, rescheduler=lambda: Repurpose(window_s=1.0, interval_s=0.1))
    requests = [request(number, 0.02 * number, 3000, 2) for number in range(200)]
    where = problem(cluster(gpus=1, nodes=4))
    assert not [note for note in run(system, requests, where).rows.notes if note.kind == "change"]
    notes = [note.text for note in run(eager, requests, where).rows.notes if note.kind == "change"]
    assert notes
    assert all("becomes a prefill machine" in text for text in notes)
    assert len(notes) <= 2


@pytest.mark.parametrize(("gpu", "sync_s"), [("A100-80G-SXM", 0.008), ("H100-SXM", 0.005)])
def test_synchronisation_is_the_senders(gpu: str, sync_s: float) -> None:
    where = problem(Cluster.of(nodes=[{"gpu": gpu, "count": 1, "nodes": 2}], links={"inter_node": {"gbps": 1e6}}))
    pools = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
    requests = [request(0, 0.0, 600, 5)]
    measured = run(SYSTEMS["splitwise"](**pools), requests, where).columns["transfer_s"][0]
    without = run(SYSTEMS["splitwise"](sync_s=0.0, **pools), requests, where).columns["transfer_s"][0]
    assert measured - without == pytest.approx(sync_s)
