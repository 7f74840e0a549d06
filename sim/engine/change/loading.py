"""Replicas on their way up: the weights they fetch once their GPUs are free, and from where.

By default every stage loads all its weights over the links to its hosts. A change of plan may say what is fetched in
place of that (``Change.loads``): from GPUs that hold the weights, and only what a GPU does not hold itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

from sim.cluster import Path
from sim.engine.clock import Alarm
from sim.engine.links import Flow
from sim.memory import common_weight_bytes
from sim.types import Change, Load, PolicyError, Replica, Stage

if TYPE_CHECKING:
    from sim.engine.run import Engine

Held = tuple[Stage, int, tuple[str, ...]]
"""What a GPU has in its memory: a stage, its rank there, and the models."""


class Loading:
    """``specs`` are the replicas that wait for GPUs or weights, by name; ``up`` is called when one has them."""

    def __init__(self, engine: Engine, up: Callable[[Replica], None]) -> None:
        self._engine = engine
        self._up = up
        self.specs: dict[str, Replica] = {}
        self._flows: dict[str, dict[Hashable, Flow]] = {}  # of those that load: what is on its way
        self._fetched: dict[str, tuple[Load, ...]] = {}  # where a change of plan says so
        self._held: dict[str, Held] = {}

    def holds(self, spec: Replica) -> None:
        """A replica is up: its GPUs hold its weights from now on."""
        for stage in spec.stages:
            self._held.update({gpu: (stage, rank, spec.models) for rank, gpu in enumerate(stage.gpus)})

    def revise(self, wanted: Mapping[tuple[str, ...], Replica], change: Change) -> None:
        """Stop loading what a new plan does not want any more, and note what it says about the rest."""
        self._check(change)
        for name, spec in list(self.specs.items()):
            new = wanted.get(spec.leg)
            if new is not None and (new.name, new.stages, new.models) == (name, spec.stages, spec.models):
                self.specs[name] = new  # its role may be another
            else:
                self._drop(name)
        self._fetched.update(change.loads)

    def start(self) -> None:
        """Fetch weights for every new replica whose GPUs, and the names of whose stages, are free."""
        engine = self._engine
        busy = {gpu for replica in engine.by_leg.values() for gpu in replica.gpus}
        for name, spec in self.specs.items():
            if name in self._flows or busy & set(spec.gpus) or spec.leg in engine.by_leg:
                continue
            self._flows[name] = {
                key: engine.links.start(path, size_bytes, self._loaded, (name, key))
                for key, path, size_bytes in self._fetches(spec)
            }

    def lose(self, gpus: Collection[str]) -> None:
        """What was for these GPUs is dropped; what came from them comes from the host, from its beginning."""
        for gpu in gpus:
            self._held.pop(gpu, None)
        for name in [name for name, spec in self.specs.items() if set(gpus) & set(spec.gpus)]:
            self._drop(name)
        links = self._engine.links
        for name, flows in self._flows.items():
            for key, flow in flows.items():
                if isinstance(key, Load) and key.source in gpus:
                    links.cancel(flow)
                    flows[key] = links.start(self._path(None, key.gpu), key.size_bytes, self._loaded, (name, key))

    # ------------------------------------------------------------ inside

    def _fetches(self, spec: Replica) -> Iterator[tuple[Hashable, Path, float]]:
        """(key, path, bytes) of each flow; one of nothing if all is there."""
        cluster, model = self._engine.problem.cluster, self._engine.problem.model
        loads = self._fetched.get(spec.name)
        if loads is None:
            for stage in spec.stages:
                weight_bytes = model.weight_bytes(stage.first_layer, stage.end_layer, stage.tp)
                yield stage.name, cluster.load_path(stage.gpus), weight_bytes * max(1, len(spec.models))
        for load in loads or ():
            source = load.source if load.source in self._held else None  # lost while its target waited
            yield load, self._path(source, load.gpu), load.size_bytes
        if loads == ():
            yield spec.name, cluster.load_path(spec.gpus), 0.0

    def _path(self, source: str | None, gpu: str) -> Path:
        cluster = self._engine.problem.cluster
        return cluster.load_path((gpu,)) if source is None else cluster.path((source,), (gpu,))

    def _loaded(self, alarm: Alarm) -> None:
        name, key = alarm.subject
        del self._flows[name][key]
        if not self._flows[name]:
            del self._flows[name]
            self._fetched.pop(name, None)
            self._up(self.specs.pop(name))

    def strand(self) -> int:
        """Nothing is left to happen: weights on a cut link never arrive. Returns how many replicas are given up."""
        names = [name for name, flows in self._flows.items() if any(flow.stuck for flow in flows.values())]
        for name in names:
            self._drop(name)
        return len(names)

    def _drop(self, name: str) -> None:
        del self.specs[name]
        self._fetched.pop(name, None)
        for flow in self._flows.pop(name, {}).values():
            self._engine.links.cancel(flow)

    def _check(self, change: Change) -> None:
        """Raise ``PolicyError`` for a replica that would come up without all its weights."""
        specs = {spec.name: spec for spec in change.plan.replicas}
        policy = type(self._engine.changes.rescheduler).__name__
        for name, loads in change.loads.items():
            if name not in specs:
                raise PolicyError(f"{policy} loads weights for {name!r}, which its plan does not have")
            for load in loads:
                if load.source is not None and load.source not in self._held:
                    raise PolicyError(f"{policy} fetches weights for {name} from {load.source}, which holds none")
            for gpu, missing_bytes in self._missing(specs[name], loads).items():
                if missing_bytes > 1:
                    raise PolicyError(f"{policy} leaves {gpu} of {name} without {missing_bytes:.0f} bytes of weights")

    def _missing(self, spec: Replica, loads: Collection[Load]) -> dict[str, float]:
        """By GPU: bytes that it neither holds nor fetches."""
        model, copies = self._engine.problem.model, max(1, len(spec.models))
        fetched: Counter[str] = Counter()
        for load in loads:
            fetched[load.gpu] += load.size_bytes  # type: ignore[assignment]
        missing = {}
        for stage in spec.stages:
            needed = copies * model.weight_bytes(stage.first_layer, stage.end_layer, stage.tp) / stage.tp
            for rank, gpu in enumerate(stage.gpus):
                old, old_rank, models = self._held.get(gpu, (None, 0, ()))
                own = 0.0
                if old is not None and models == spec.models:
                    own = copies * common_weight_bytes(model, (old, old_rank), (stage, rank))
                missing[gpu] = needed - own - fetched[gpu]
        return missing
