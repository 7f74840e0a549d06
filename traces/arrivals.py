"""When requests arrive: endless streams of arrival times, the first at 0.

``ARRIVALS`` maps a name to a process; each is drawn from one generator and depends on nothing else. The keyword
arguments of a process are its settings: it needs all of them, and they are finite numbers > 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import count
from math import isfinite, sqrt

import numpy as np

from sim.types import ConfigError
from traces.table import nearest

DRAWS = 1024  # numbers drawn at once; the stream of times does not depend on it


def constant(rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """One request every ``1 / rate_per_s`` seconds."""
    del rng
    return (number / rate_per_s for number in count())


def poisson(rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Independent users: exponential gaps, whose coefficient of variation is 1."""
    return gamma(rate_per_s, rng, cv=1.0)


def gamma(rate_per_s: float, rng: np.random.Generator, *, cv: float) -> Iterator[float]:
    """Gamma gaps of coefficient of variation ``cv``: above 1 burstier than Poisson, below 1 smoother."""
    shape = 1 / cv**2
    time_s = 0.0
    while True:
        for gap in (rng.standard_gamma(shape, DRAWS) / (shape * rate_per_s)).tolist():
            yield time_s
            time_s += gap


def bursts(rate_per_s: float, rng: np.random.Generator, *, on_s: float, off_s: float) -> Iterator[float]:
    """Poisson for ``on_s`` seconds, nothing for ``off_s``, and again; ``rate_per_s`` is the mean over both."""
    while_on = poisson(rate_per_s * (on_s + off_s) / on_s, rng)
    return (time_s + time_s // on_s * off_s for time_s in while_on)


def ramp(rate_per_s: float, rng: np.random.Generator, *, start_rate_per_s: float, ramp_s: float) -> Iterator[float]:
    """Poisson whose rate goes linearly from ``start_rate_per_s`` to ``rate_per_s`` in ``ramp_s``, and stays.

    Times of a unit rate are mapped through the inverse of the expected number of arrivals.
    """
    slope = (rate_per_s - start_rate_per_s) / ramp_s
    during = ramp_s * (start_rate_per_s + rate_per_s) / 2

    def when(expected: float) -> float:
        if expected >= during:
            return ramp_s + (expected - during) / rate_per_s
        return 2 * expected / (start_rate_per_s + sqrt(max(0.0, start_rate_per_s**2 + 2 * slope * expected)))

    return map(when, poisson(1.0, rng))


ARRIVALS: dict[str, Callable[..., Iterator[float]]] = {
    "poisson": poisson,
    "constant": constant,
    "gamma": gamma,
    "bursts": bursts,
    "ramp": ramp,
}


def arrival_times(
    arrivals: str, rate_per_s: float, rng: np.random.Generator, **settings: float | None
) -> Iterator[float]:
    """Seconds of arrival, endless; ``settings`` are the process's own, None counting as absent.

    ConfigError for an unknown process, a setting that is missing, too many or no number > 0.
    """
    if arrivals not in ARRIVALS:
        raise ConfigError(f"arrivals is '{arrivals}'; {nearest(arrivals, ARRIVALS)}")
    positive("rate_per_s", rate_per_s)
    given = {name: positive(name, value) for name, value in settings.items() if value is not None}
    needed = settings_of(arrivals)
    if set(given) != set(needed):
        has, needs = (", ".join(names) or "nothing" for names in (given, needed))
        raise ConfigError(f"arrivals '{arrivals}' needs {needs} and got {has}; set just what it needs")
    return ARRIVALS[arrivals](rate_per_s, rng, **given)


def settings_of(arrivals: str) -> tuple[str, ...]:
    """Names of a process's settings beside its rate."""
    parameters = inspect.signature(ARRIVALS[arrivals]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def positive(name: str, value: float) -> float:
    """The value, if it is a finite number > 0; ConfigError otherwise."""
    if not (value > 0 and isfinite(value)):
        raise ConfigError(f"{name} is {value}; expected a finite number > 0")
    return value
