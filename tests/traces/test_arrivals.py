"""Arrival processes: their settings, and the rate they promise at every time."""

from itertools import islice

import numpy as np
import pytest

from sim.types import ConfigError
from traces import ARRIVALS, arrival_times, settings_of


def times(arrivals: str, rate_per_s: float, number: int = 20_000, **settings: float) -> np.ndarray:
    return np.array(list(islice(arrival_times(arrivals, rate_per_s, np.random.default_rng(2), **settings), number)))


def test_constant_arrivals():
    assert times("constant", 4.0, 3).tolist() == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_every_process_begins_at_0_and_never_goes_back(arrivals):
    found = times(arrivals, 5.0, **dict.fromkeys(settings_of(arrivals), 2.0))
    assert found[0] == 0.0
    assert np.diff(found).min() >= 0


def test_bursts_are_poisson_while_on_and_nothing_while_off():
    found = times("bursts", 5.0, on_s=10, off_s=30)
    assert (found % 40 < 10).all()
    within = found[found % 40 < 5]
    assert len(within) / len(found) == pytest.approx(0.5, abs=0.02)  # evenly over the time that is on
    assert len(found) / found[-1] == pytest.approx(5.0, rel=0.02)
    on_gaps = np.diff(found)[np.diff(found) < 10]
    assert on_gaps.mean() == pytest.approx(1 / 20, rel=0.05)


@pytest.mark.parametrize(("start", "end"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_a_ramp_has_the_expected_number_of_arrivals_at_every_time(monkeypatch, start, end):
    monkeypatch.setattr("traces.arrivals.poisson", ARRIVALS["constant"])
    found = times("ramp", end, 40, start_rate_per_s=start, ramp_s=10.0)
    during = np.minimum(found, 10)
    expected = start * during + (end - start) * during**2 / 20 + end * (found - during)
    assert expected == pytest.approx(np.arange(40))
    assert found[20] == pytest.approx(10)  # ten seconds at 2/s on average
    assert np.diff(found)[20:] == pytest.approx(1 / end)


def test_a_ramp_is_poisson():
    found = times("ramp", 20.0, start_rate_per_s=4.0, ramp_s=100.0)
    gaps = np.diff(found[found > 100])
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.02)


@pytest.mark.parametrize(
    ("arrivals", "settings", "message"),
    [
        ("bursts", {"on_s": 1.0}, "arrivals 'bursts' needs on_s, off_s and got on_s; set just what it needs"),
        ("constant", {"cv": 1.0}, "arrivals 'constant' needs nothing and got cv"),
        ("ramp", {"start_rate_per_s": 0.0, "ramp_s": 1.0}, "start_rate_per_s is 0.0; expected a finite number > 0"),
        ("burst", {}, "arrivals is 'burst'; did you mean 'bursts'"),
    ],
)
def test_wrong_settings_are_refused_at_once(arrivals, settings, message):
    with pytest.raises(ConfigError, match=message):
        arrival_times(arrivals, 1.0, np.random.default_rng(0), **settings)
