"""Flows over shared links: max-min shares, cuts, latency; all times by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Cluster
from sim.engine.clock import Clock
from sim.engine.links import Flow, Links

S = 10**12
GB = 10**9


class Net:
    """Links with a diary: when each flow, named by its subject, had arrived."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.clock = Clock()
        self.links = Links(self.clock, cluster)
        self.arrived: dict[Any, int] = {}
        self.flows: dict[Any, Flow] = {}

    def send(self, name: Any, source: str, target: str, size_bytes: float, at_ps: int = 0) -> None:
        path = self.cluster.path((source,), (target,))

        def start(_: object) -> None:
            self.flows[name] = self.links.start(path, size_bytes, self._done, name)

        self.clock.at(at_ps, start)

    def _done(self, alarm: Any) -> None:
        self.arrived[alarm.subject] = self.clock.now_ps

    def at(self, at_ps: int, call: Any) -> None:
        self.clock.at(at_ps, lambda _: call())


def net(gbps: float = 80, latency_us: float = 0, nodes: int = 2, **nics: float) -> Net:
    """Machines of four A100s, network ports of ``gbps`` or as named; their PCIe carries 25 GB/s or more."""
    rows = [{"gpu": "A100-80G-SXM", "count": 4, "nic_gbps": nics.get(f"n{n}", gbps)} for n in range(nodes)]
    return Net(Cluster.of(rows, links={"inter_node": {"gbps": gbps, "latency_us": latency_us}}))


def test_a_lone_flow_takes_size_over_bandwidth_plus_latency() -> None:
    world = net(gbps=80, latency_us=3)
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.clock.run()
    assert world.arrived == {"a": S + 3 * 10**6}


def test_two_flows_on_one_port_have_half_each_then_all() -> None:
    world = net()
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.send("b", "n0.g1", "n1.g1", 10 * GB, at_ps=S // 2)
    world.clock.run()
    assert world.arrived == {"a": S * 3 // 2 + 1, "b": 2 * S + 1}  # a has 5 GB left at 0.5 s, as b has at 1.5 s


def test_three_flows_with_different_bottlenecks() -> None:
    """a and c share n1's 4 GB/s; b has what a leaves of n0's 12 GB/s, until a is done."""
    world = net(nodes=4, n0=96, n1=32, n2=96, n3=96)
    world.send("a", "n0.g0", "n1.g0", 2 * GB)
    world.send("b", "n0.g1", "n2.g0", 16 * GB)
    world.send("c", "n3.g0", "n1.g1", 4 * GB)
    world.clock.at(1, lambda _: None)
    world.clock.run(S // 2)
    assert {name: flow.bytes_per_s for name, flow in world.flows.items()} == {"a": 2 * GB, "b": 10 * GB, "c": 2 * GB}
    world.clock.run()
    assert world.arrived["a"] == S + 1
    assert world.arrived["b"] == S + S // 2 + 1  # 10 GB in the first second, 6 GB at 12 GB/s
    assert world.arrived["c"] == S + S // 2 + 1  # 2 GB in the first second, 2 GB at 4 GB/s


def test_flows_on_other_links_do_not_feel_each_other() -> None:
    world = net(nodes=4)
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.send("b", "n2.g0", "n3.g0", 10 * GB)
    world.send("back", "n1.g0", "n0.g0", 10 * GB)  # links are full duplex
    world.clock.run()
    assert set(world.arrived.values()) == {S + 1}


def test_a_group_spreads_over_its_gpus() -> None:
    """Two GPUs send to one: both halves enter by the one GPU's port."""
    cluster = Cluster.of([{"gpu": "A100-80G-SXM", "count": 4}], links={"intra_node": {"gbps": 80}})
    world = Net(cluster)
    world.links.start(cluster.path(("n0.g0", "n0.g1"), ("n0.g2",)), 10 * GB, world._done, "2 to 1")
    world.clock.run()
    world.links.start(cluster.path(("n0.g0", "n0.g1"), ("n0.g2", "n0.g3")), 10 * GB, world._done, "2 to 2")
    world.clock.run()
    assert world.arrived["2 to 1"] == S + 1
    assert world.arrived["2 to 2"] == S + 1 + S // 2 + 1


def test_a_link_slowed_cut_and_restored() -> None:
    world = net()
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.at(S // 2, lambda: world.links.scale("nic:n0:out", 0.5))  # 5 GB left, at 5 GB/s
    world.at(S, lambda: world.links.scale("nic:n0:out", 0))  # 2.5 GB left
    world.at(5 * S, lambda: world.links.scale("nic:n0:out", 1))
    world.clock.run()
    assert world.arrived == {"a": 5 * S + S // 4 + 1}


def test_a_flow_on_a_cut_link_never_arrives_and_starts_no_sooner() -> None:
    world = net()
    world.links.scale("nic:n1:in", 0)
    world.send("a", "n0.g0", "n1.g0", GB)
    world.clock.run()
    assert world.arrived == {}


def test_cancelled_flows_free_their_share_and_are_not_heard_of() -> None:
    world = net(latency_us=1000)
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.send("b", "n0.g1", "n1.g1", 10 * GB)
    world.at(S, lambda: world.links.cancel(world.flows["a"]))
    world.clock.run()
    assert world.arrived == {"b": S + S // 2 + 10**9}


def test_a_flow_cancelled_in_its_last_hop_is_not_heard_of() -> None:
    world = net(latency_us=1000)
    world.send("a", "n0.g0", "n1.g0", 10 * GB)
    world.at(S + 5 * 10**8, lambda: world.links.cancel(world.flows["a"]))
    world.clock.run()
    assert world.arrived == {}


def test_what_stays_on_a_gpu_or_is_empty_takes_a_tick_and_the_latency() -> None:
    world = net(latency_us=2)
    world.send("here", "n0.g0", "n0.g0", GB)
    world.send("nothing", "n0.g0", "n1.g0", 0)
    world.clock.run()
    assert world.arrived == {"here": 1, "nothing": 2 * 10**6}


@settings(max_examples=60)
@given(
    flows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=8
    )
)
def test_shares_are_max_min_fair_and_bytes_are_conserved(flows: list[tuple[int, int, int, int]]) -> None:
    """No port is over-full; every flow meets a full port where no other flow is faster; all bytes arrive."""
    world = net(nodes=4, n0=96, n1=32, n2=64, n3=16)
    for number, (source, target, size, half_s) in enumerate(flows):
        world.send(number, f"n{source}.g0", f"n{target}.g1", size * GB, at_ps=half_s * S // 2)

    def check() -> None:
        moving = [flow for name, flow in world.flows.items() if name not in world.arrived and flow.usage]
        capacity = world.cluster.capacity_bytes_per_s
        load = {name: sum(f.bytes_per_s * u for f in moving for r, u in f.usage if r == name) for name in capacity}
        assert all(load[name] <= capacity[name] * (1 + 1e-9) for name in capacity)
        for flow in moving:
            full = [r for r, _ in flow.usage if load[r] >= capacity[r] * (1 - 1e-9)]
            rivals = [[f.bytes_per_s for f in moving if r in dict(f.usage)] for r in full]
            assert any(flow.bytes_per_s >= max(rates) * (1 - 1e-9) for rates in rivals)

    for tick in range(1, 5):
        world.at(tick * S // 2 - S // 8, check)
    world.clock.run()
    assert set(world.arrived) == set(range(len(flows)))
    port_s = [0.0] * 4
    for source, target, size, _ in flows:
        if source != target:
            port_s[source] += size / (12, 4, 8, 2)[source]
    assert max(world.arrived.values()) >= max(port_s) * S * (1 - 1e-9)


def test_a_clock_run_to_now_does_nothing() -> None:
    clock = Clock()
    rung: list[int] = []
    clock.at(0, lambda _: rung.append(1))
    clock.run(0)
    assert rung == []
    clock.run()
    assert rung == [1]


def test_alarms_ring_in_order_of_time_then_priority_then_setting() -> None:
    clock = Clock()
    rung: list[str] = []
    for name, at_ps, priority in (("c", 5, 3), ("b", 5, 2), ("a", 4, 9), ("d", 5, 3)):
        clock.at(at_ps, lambda alarm: rung.append(alarm.subject), name, priority)
    clock.at(5, lambda _: pytest.fail("was cancelled")).cancel()
    clock.run()
    assert rung == ["a", "b", "c", "d"]
