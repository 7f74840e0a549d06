"""The layout options that engines without a planner of their own share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sim.planners.pools import Colocated, Pool, Split
from sim.policy import Planner, Router
from sim.routers import LeastLoadedPair, LeastRequests
from sim.types import ConfigError

PoolOption = Mapping[str, Any] | Pool | None


class Layout(NamedTuple):
    planner: Planner
    router: Callable[[], Router]


def layout(
    replicas: int | None, tp: int | None, pp: int, gpu: str | None, prefill: PoolOption, decode: PoolOption
) -> Layout:
    """Split if ``prefill`` or ``decode`` is given (as mappings of the other four), colocated otherwise."""
    if prefill is None and decode is None:
        pool = Pool.of({"replicas": replicas, "tp": tp, "pp": pp, "gpu": gpu}, "")
        return Layout(Colocated(pool=pool), LeastRequests)
    if (replicas, tp, pp, gpu) != (None, None, 1, None):
        raise ConfigError(
            "system: replicas, tp, pp and gpu describe colocated replicas; with prefill and decode, set them there"
        )
    return Layout(Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode")), LeastLoadedPair)
