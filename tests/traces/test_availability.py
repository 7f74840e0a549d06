"""Which instances there are, and when: as events of a cluster, and in dollars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.studies.spotserve.world import BOOT_S, ON_DEMAND, TRACES, USD, cluster
from sim import Cluster, ClusterEvent, ConfigError
from traces.cluster.availability import Availability, Turn, availability, read_availability


def test_turns_become_events() -> None:
    turns = availability(
        [{"t_s": 0, "op": "add", "nodes": [0]}, {"t_s": 10, "op": "add", "nodes": [1]},
         {"t_s": 50, "op": "remove", "nodes": [1]}, {"t_s": 60, "op": "end"}]
    )  # fmt: skip
    assert turns.at_start == 1
    assert turns.events(cluster(2)) == (
        ClusterEvent(at_s=10.0, kind="gpu_joined", target="n1"),
        ClusterEvent(at_s=20.0, kind="spot_notice", target="n1", deadline_s=30.0),
    )
    assert turns.events(cluster(2), grace_s=60)[0] == ClusterEvent(
        at_s=0.0, kind="spot_notice", target="n1", deadline_s=50.0
    )
    with pytest.raises(ConfigError, match="machine 1; the cluster has 1"):
        turns.events(cluster(1))


@pytest.mark.parametrize("trace", ["A_S", "B_S"])
def test_the_rent_is_what_the_artifact_counts(trace: str) -> None:
    assert TRACES[trace].rent_usd(cluster(12), boot_s=BOOT_S) == pytest.approx(USD[trace], rel=1e-6)


def test_the_rent_is_the_integral_of_prices() -> None:
    where = Cluster.of(nodes=[{"gpu": "T4", "count": 2, "nodes": 3, "usd_per_hour": 3.0, "usd_per_hour_spot": 1.0}])
    turns = availability(
        [{"t_s": 0, "op": "add", "nodes": [0, 1]}, {"t_s": 600, "op": "add", "nodes": [2]},
         {"t_s": 1200, "op": "remove", "nodes": [0]}, {"t_s": 1500, "op": "add", "nodes": [0]},
         {"t_s": 3600, "op": "end"}]
    )  # fmt: skip
    assert turns.rented_s() == {0: 1200 + 2100, 1: 3600, 2: 3000}
    assert turns.rented_s(boot_s=100) == {0: 1200 + 2200, 1: 3600, 2: 3100}
    assert turns.rent_usd(where) == pytest.approx(2 * (3300 + 3600 + 3000) / 3600)
    assert turns.rent_usd(where, on_demand=[2]) == pytest.approx(2 * (3300 + 3600 + 9000) / 3600)
    assert set(ON_DEMAND) < set(USD)


def test_a_file_of_the_artifact_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text('# T4\n[0, "add", {"nodes": [0, 1]}]\n[120000, "remove", {"nodes": [1]}]\n[180000, "DONE", {}]\n')
    assert read_availability(path).turns == (
        Turn(at_s=0.0, op="add", nodes=(0, 1)), Turn(at_s=120.0, op="remove", nodes=(1,)), Turn(at_s=180.0, op="end"),
    )  # fmt: skip
    path.write_text('[0, "add"]\n')
    with pytest.raises(ConfigError, match=r"trace.txt:1: .* expected \[milliseconds"):
        read_availability(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"t_s": 0, "op": "sell"}], "needs t_s in seconds and op: add, remove, end"),
        ([{"t_s": 0, "op": "add", "nodes": [0]}], "have one end"),
        ([{"t_s": 5, "op": "add", "nodes": [0]}, {"t_s": 1, "op": "end"}], "in order of time"),
        ([{"t_s": 0, "op": "end"}, {"t_s": 1, "op": "add", "nodes": [0]}], "the last one the end"),
        ([{"t_s": 0, "op": "remove", "nodes": [3]}, {"t_s": 1, "op": "end"}], "names machine 3, not there"),
        (
            [{"t_s": 0, "op": "add", "nodes": [1]}, {"t_s": 1, "op": "add", "nodes": [1]}, {"t_s": 1, "op": "end"}],
            "names machine 1, already there",
        ),
    ],
)
def test_wrong_turns(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        availability(rows)


def test_machines_at_the_start_are_the_first() -> None:
    late = Availability(turns=(Turn(at_s=0, op="add", nodes=(1,)), Turn(at_s=9, op="end")))
    with pytest.raises(ConfigError, match=r"numbered from 0 on, not \[1\]"):
        _ = late.at_start
