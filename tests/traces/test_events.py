"""Cluster events: files and seeded generators."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.types import ClusterEvent, ConfigError
from traces import gpu_failures, read_events, spot_notices, write_events

EVENTS = (
    ClusterEvent(at_s=0.5, kind="gpu_slow", target="n0.g1", factor=1.5),
    ClusterEvent(at_s=10.0, kind="spot_notice", target="n1", deadline_s=120.0),
    ClusterEvent(at_s=60.0, kind="link_scaled", target="n0-n1", factor=0.0),
    ClusterEvent(at_s=90.0, kind="gpu_joined", target="n1.g0"),
)


def refused(path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_events(path)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "FILE")


def test_a_file_of_events(tmp_path):
    path = tmp_path / "events.yaml"
    path.write_text("- {at_s: 30, kind: gpu_lost, target: n0.g0}\n- {at_s: 5, kind: node_lost, target: n1}\n")
    assert read_events(path) == (
        ClusterEvent(at_s=5.0, kind="node_lost", target="n1"),
        ClusterEvent(at_s=30.0, kind="gpu_lost", target="n0.g0"),
    )


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".csv"])
def test_written_events_read_back_equal(tmp_path, suffix):
    write_events(tmp_path / f"events{suffix}", EVENTS)
    assert read_events(tmp_path / f"events{suffix}") == EVENTS
    assert len(list(tmp_path.iterdir())) == 1


def test_no_events_are_events_too(tmp_path):
    write_events(tmp_path / "none.yaml", [])
    assert read_events(tmp_path / "none.yaml") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{at_s: 1}", "FILE: holds {'at_s': 1}; expected a list of events"),
        ("- 5", "FILE: event 1 is 5; expected a mapping with at_s, kind, target, factor, deadline_s"),
        ("- {at: 1}", "FILE: event 1: field 'at' is unknown; did you mean 'at_s'?"),
        ("- {kind: gpu_lost, target: n0}", "FILE: event 1: field at_s is absent; expected a number of seconds"),
        ("- {at_s: soon, kind: gpu_lost, target: n0}", "FILE: event 1: field at_s is 'soon'; expected a number of"),
        (
            "- {at_s: 1, kind: gpu_losst, target: n0}",
            "FILE: event 1: field kind is 'gpu_losst'; did you mean 'gpu_lost'?",
        ),
        (
            "- {at_s: -1, kind: gpu_lost, target: n0}",
            "FILE: event 1: field at_s is -1.0; expected a number >= 0, at most 1e+09",
        ),
        ("- {at_s: 1, kind: spot_notice, target: n0}", "FILE: event 1: spot_notice needs field deadline_s"),
        ("- {at_s: 1, kind: gpu_lost, target: n0, factor: 2}", "FILE: event 1: gpu_lost has no field factor"),
        (
            "- {at_s: 1, kind: gpu_slow, target: n0, factor: 0}",
            "FILE: event 1: field factor is 0; expected a number > 0",
        ),
        ("- [", "FILE:1: not valid YAML"),
    ],
)
def test_malformed_yaml_says_where_and_why(tmp_path, text, message):
    assert refused(tmp_path / "events.yaml", text).startswith(message)


def test_malformed_csv_names_the_line(tmp_path):
    text = "at_s,kind,target,factor\n1,gpu_lost,n0,\n2,gpu_slow,n0,fast\n"
    assert refused(tmp_path / "events.csv", text) == "FILE:3: field factor is 'fast'; expected a number"
    assert refused(tmp_path / "events.txt", "") == "FILE: suffix '.txt' is unknown; use .yaml, .yml or .csv"


GPUS = tuple(f"n{i // 8}.g{i % 8}" for i in range(400))


def test_failures_are_exponential():
    events = gpu_failures(GPUS, mean_time_between_failures_s=100.0, horizon_s=100.0, seed=1)
    assert {event.kind for event in events} == {"gpu_lost"}
    assert len(events) / len(GPUS) == pytest.approx(1 - np.exp(-1), abs=0.06)
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)


def test_repaired_gpus_fail_again():
    events = gpu_failures(("g",), mean_time_between_failures_s=10.0, horizon_s=1000.0, repair_s=5.0, seed=2)
    assert [event.kind for event in events[:4]] == ["gpu_lost", "gpu_joined", "gpu_lost", "gpu_joined"]
    assert events[1].at_s == events[0].at_s + 5.0
    assert len(events) > 50


def test_a_spot_notice_comes_before_the_loss_and_the_replacement_after_it():
    events = spot_notices(("n0",), mean_life_s=50.0, deadline_s=30.0, horizon_s=2000.0, replaced_after_s=60.0, seed=3)
    assert [event.kind for event in events[:2]] == ["spot_notice", "gpu_joined"]
    assert events[0].deadline_s == 30.0
    assert events[1].at_s == pytest.approx(events[0].at_s + 90.0)


@given(st.integers(0, 2**32), st.integers(1, 10), st.integers(1, 10))
def test_more_gpus_keep_the_events_of_the_others(seed, few, more):
    settings = {"mean_time_between_failures_s": 50.0, "horizon_s": 100.0, "repair_s": 1.0, "seed": seed}
    fewer = gpu_failures(GPUS[:few], **settings)
    kept = [event for event in gpu_failures(GPUS[: few + more], **settings) if event.target in GPUS[:few]]
    assert tuple(kept) == fewer
    assert all(event.at_s < 100.0 for event in kept)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpu_failures(GPUS, mean_time_between_failures_s=0, horizon_s=1), "mean life in seconds is 0"),
        (lambda: gpu_failures(GPUS, mean_time_between_failures_s=1, horizon_s=0), "horizon_s is 0"),
        (lambda: spot_notices(GPUS, mean_life_s=1, deadline_s=-1, horizon_s=1), "deadline_s is -1"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
