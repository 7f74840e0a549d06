"""When requests arrive: endless streams of arrival times, the first at 0.

``ARRIVALS`` maps a name to a process; each is drawn from one generator and depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from math import isfinite
from typing import Any

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


ARRIVALS: dict[str, Callable[..., Iterator[float]]] = {"poisson": poisson, "constant": constant, "gamma": gamma}


def arrival_times(
    arrivals: str, rate_per_s: float, rng: np.random.Generator, *, cv: float | None = None
) -> Iterator[float]:
    """Seconds of arrival, endless. ``cv`` is for ``gamma``, which needs it. ConfigError for bad settings."""
    if arrivals not in ARRIVALS:
        raise ConfigError(f"arrivals is '{arrivals}'; {nearest(arrivals, ARRIVALS)}")
    positive("rate_per_s", rate_per_s)
    if (cv is not None) != (arrivals == "gamma"):
        raise ConfigError(f"arrivals '{arrivals}' with cv {cv}; gamma needs cv, the others have none")
    options: dict[str, Any] = {} if cv is None else {"cv": positive("cv", cv)}
    return ARRIVALS[arrivals](rate_per_s, rng, **options)


def positive(name: str, value: float) -> float:
    """The value, if it is a finite number > 0; ConfigError otherwise."""
    if not (value > 0 and isfinite(value)):
        raise ConfigError(f"{name} is {value}; expected a finite number > 0")
    return value
