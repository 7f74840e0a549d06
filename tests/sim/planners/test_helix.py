"""Helix's placement: hand-computed flows, brute force on small networks, the invariants of its max-flow."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Problem
from sim.planners.helix import (
    END,
    Held,
    HelixPlacement,
    Machine,
    Network,
    Throughput,
    best_placement,
    max_flow,
    petals_placement,
    separate_placement,
    swarm_placement,
)
from sim.planners.helix.program import solve
from sim.types import ConfigError, InfeasibleError
from tests.toys import ToyCost, cluster, problem


def machine(name: str, most: int = 3, kind: str = "one", kv_tokens: int = 40_000, layer_s: float = 1e-3) -> Machine:
    return Machine(
        name=name, gpus=(name,), kind=kind, most_layers=most, fit_layers=most + 1, typical_layers=most,
        kv_tokens={k: kv_tokens // k for k in range(1, most + 2)},
        prompt_s=lambda tokens: layer_s * (1 + tokens / 1000), decode_s=lambda count: layer_s * (1 + count / 1000),
    )  # fmt: skip


def network(rates: list[list[float]], num_layers: int, link: float = inf) -> Network:
    """``rates``: of each node, tokens per second with one layer, two, ..."""
    count = len(rates)
    return Network(
        machines=tuple(machine(f"m{i}", most=len(row), kind=str(row)) for i, row in enumerate(rates)),
        num_layers=num_layers,
        node_tokens_per_s=tuple(dict(enumerate(row, start=1)) for row in rates),
        link_tokens_per_s={(i, j): link for i in range(count) for j in range(count) if i != j},
        end_tokens_per_s=(inf,) * count,
    )  # fmt: skip


def test_two_nodes_in_a_row_pass_what_the_slower_one_passes() -> None:
    flow, flows = max_flow(network([[10.0], [4.0]], 2), [Held(0, 1), Held(1, 2)])
    assert flow == pytest.approx(4.0)
    assert flows == pytest.approx({(None, 0): 4.0, (0, 1): 4.0, (1, None): 4.0})


def test_overlapping_ranges_share_a_layer() -> None:
    # node 1 holds both layers and helps node 0's requests with the second one only
    flow, _ = max_flow(network([[10.0], [9.0, 6.0], [3.0]], 2), [Held(0, 1), Held(0, 2), Held(1, 2)])
    assert flow == pytest.approx(9.0)  # 6 of node 1 and 3 of node 2 end in the last layer


def test_a_link_bounds_the_flow() -> None:
    assert max_flow(network([[10.0], [10.0]], 2, link=2.5), [Held(0, 1), Held(1, 2)])[0] == pytest.approx(2.5)


def test_a_hole_lets_nothing_through() -> None:
    assert max_flow(network([[10.0], [10.0]], 3), [Held(0, 1), Held(2, 3)])[0] == 0.0


RATES = st.lists(
    st.lists(st.integers(1, 20).map(float), min_size=1, max_size=3).map(lambda row: sorted(row, reverse=True)),
    min_size=2, max_size=3,
)  # fmt: skip


def every_placement(of: Network) -> list[list[Held | None]]:
    ranges = [
        [Held(first, first + k) for k in rates for first in range(of.num_layers - k + 1)]
        for rates in of.node_tokens_per_s
    ]
    return [list(held) for held in product(*ranges)]


@settings(max_examples=15, deadline=None)
@given(rates=RATES, layers=st.integers(3, 4), link=st.sampled_from([5.0, inf]))
def test_the_program_finds_what_brute_force_finds(rates: list[list[float]], layers: int, link: float) -> None:
    of = network(rates, layers, link)
    best = max(max_flow(of, held)[0] for held in every_placement(of))
    solved = solve(of, gap=1e-6)
    assert solved is not None
    assert max_flow(of, solved)[0] == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert best_placement(of, moves=0) is not None
    assert max_flow(of, best_placement(of, moves=0))[0] == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert best <= of.upper_bound + 1e-6


@settings(max_examples=30)
@given(rates=RATES, data=st.data())
def test_flow_is_conserved_and_grows_with_every_link(rates: list[list[float]], data: st.DataObject) -> None:
    of = network(rates, 3, link=4.0)
    held = data.draw(st.sampled_from(every_placement(of)))
    flow, flows = max_flow(of, held)
    for node in range(len(rates)):
        into = sum(value for (_, target), value in flows.items() if target == node)
        out = sum(value for (source, _), value in flows.items() if source == node)
        assert into == pytest.approx(out)
        mine = held[node]
        assert mine is not None
        assert into <= of.node_tokens_per_s[node][mine.end - mine.first] + 1e-6
    wider = replace(of, link_tokens_per_s={pair: rate * 2 for pair, rate in of.link_tokens_per_s.items()})
    assert max_flow(wider, held)[0] >= flow - 1e-6


def test_moves_never_lose_what_the_baselines_have() -> None:
    of = network([[40.0, 18.0, 10.0]] * 4 + [[9.0, 4.0]] * 6, 12)
    placed = max_flow(of, best_placement(of, moves=400))[0]
    assert placed > max(max_flow(of, petals_placement(of, seed))[0] for seed in range(4))
    assert placed >= max_flow(of, swarm_placement(of))[0]
    assert best_placement(of, moves=400) == best_placement(of, moves=400)


def test_swarm_puts_the_fastest_on_the_weakest_stage() -> None:
    of = network([[1.0, 1.0], [5.0, 5.0], [3.0, 3.0]], 4)
    assert swarm_placement(of) == [Held(2, 4), Held(0, 2), Held(2, 4)]


def test_separate_pipelines_are_of_one_kind() -> None:
    of = network([[5.0, 5.0], [5.0, 5.0], [1.0]], 4)
    assert separate_placement(of) == [Held(0, 2), Held(2, 4), None]


def test_throughput_falls_with_layers_and_grows_with_memory() -> None:
    machines = [machine("a"), machine("b", kind="two", layer_s=4e-3)]
    estimate = Throughput(machines, 6)
    rates = [estimate.tokens_per_s(machines[0], k) for k in (1, 2, 3)]
    assert rates == sorted(rates, reverse=True)
    assert estimate.tokens_per_s(replace(machines[0], kv_tokens=dict.fromkeys(range(1, 5), 400000)), 2) > rates[1]


@pytest.fixture
def artifact(shared_data: Path) -> Path:
    return shared_data / "measured" / "helix"


COUNTS = {"A100": 4, "L4": 8, "T4": 12}
MOST, OFTEN = {"A100": 12, "L4": 7, "T4": 4}, {"A100": 8, "L4": 4, "T4": 3}
FIRST_SPEED = {"A100": 32.0, "L4": 8.0, "T4": 5.0}
"""Relative speeds the ten rounds begin with: with these, flow and printed flow agree in all 17 digits."""


def shipped_table(folder: Path, kind: str, what: str) -> Callable[[int], float]:
    """Seconds of a layer of Llama-2-70B, between the lines of the artifact's table."""
    path = folder / "simulator" / "model_manager" / "llama2_70b" / kind.lower() / f"{what}_bs2time.csv"
    count, ms = np.loadtxt(path, delimiter=",").T
    return lambda n: float(np.interp(n, count, ms)) / 1e3


def shipped_placement(folder: Path, which: str) -> tuple[Network, list[Held | None]]:
    """Cluster A with a placement of Llama-2-70B, its links, and KV memory of each number of layers held in it."""
    layout = folder / "artifact_evaluation" / "single_cluster" / "layout_llama70b"
    solution, nodes, kv_tokens = ConfigParser(), ConfigParser(), defaultdict[str, dict[int, int]](dict)
    solution.read(layout / which / f"{which}_sol.ini")
    held: list[Held | None] = []
    kinds = []
    for one in ("ilp", "swarm"):
        placed = ConfigParser()
        placed.read(layout / one / f"{one}_sol.ini")
        nodes.read(layout / one / "simulator_cluster.ini")
        for name, text in placed["Solution"].items():
            layers, kind = json.loads(text), nodes[name]["machine_type"].strip('"')
            kv_tokens[kind][len(layers)] = int(nodes[name]["kv_cache_capacity"]) // len(layers)
            if one == which:
                held.append(Held(layers[0], layers[-1] + 1))
                kinds.append(kind)
    machines = tuple(
        Machine(
            name=f"m{i}", gpus=(f"m{i}",), kind=kind, most_layers=MOST[kind], fit_layers=MOST[kind],
            typical_layers=OFTEN[kind], kv_tokens=kv_tokens[kind],
            prompt_s=shipped_table(folder, kind, "prompt"), decode_s=shipped_table(folder, kind, "decode"),
        )
        for i, kind in enumerate(kinds)
    )  # fmt: skip
    estimate = Throughput(machines, 80, first_layer_s={kind: 1 / speed for kind, speed in FIRST_SPEED.items()})
    link = 1e9 / (2 + 2 * 8192)
    return Network(
        machines=machines, num_layers=80,
        node_tokens_per_s=tuple({k: estimate.tokens_per_s(m, k) for k in kv_tokens[m.kind]} for m in machines),
        link_tokens_per_s={pair: link for pair in product(range(24), repeat=2) if pair[0] != pair[1]},
        end_tokens_per_s=(1e9 / 2,) * 24,
    ), held  # fmt: skip


@pytest.mark.parametrize(("which", "printed"), [("ilp", 1289.5557702751464), ("swarm", 757.853)])
def test_the_artifacts_placements_pass_what_it_says(artifact: Path, which: str, printed: float) -> None:
    of, held = shipped_placement(artifact, which)
    assert Counter(machine.kind for machine in of.machines) == COUNTS
    assert max_flow(of, held)[0] == pytest.approx(printed, rel=1e-12 if which == "ilp" else 1e-6)


def test_typical_are_two_thirds_of_the_layers_where_machines_abound() -> None:
    few, many = (HelixPlacement(weight_share=0.9).network(problem(cluster(1, nodes=n), ToyCost())) for n in (1, 4))
    assert few.machines[0].typical_layers == few.machines[0].most_layers == 2
    assert many.machines[0].typical_layers == 1


def toy() -> Problem:
    return problem(cluster(gpus=1, nodes=3), ToyCost())


def test_a_problem_becomes_a_plan_of_nodes_with_flows() -> None:
    plan = HelixPlacement(moves=50).plan(toy())
    assert {replica.name for replica in plan.replicas} == {"n0", "n1", "n2"}
    assert sum(flow for (source, _), flow in plan.flows.items() if source == END) > 0
    assert HelixPlacement(tp=1, moves=50).plan(problem(cluster(gpus=2, nodes=2), ToyCost())).replicas[0].name == "n0-0"


def test_what_cannot_be_placed_is_said() -> None:
    with pytest.raises(ConfigError, match="helix, petals, swarm, separate"):
        HelixPlacement(placement="best")  # type: ignore[arg-type]
    with pytest.raises(InfeasibleError, match="use larger GPUs"):
        HelixPlacement(weight_share=1e-6).plan(toy())
