"""Metis as it is: the plan of a training step over GPUs of several types, priced from a profile of layers.

Source: Metis (USENIX ATC 2024), ``cost_estimator`` and ``plan`` of its repository. Not copied: the release takes the
bandwidth inside a machine for that between machines, and checks memory by the type of the first rank; here links and
memory are those of the ranks. Times in ms, sizes in MiB, bandwidths in MiB/ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import NamedTuple

from sim.planners.metis.balance import Balanced, repaired, shares
from sim.planners.metis.groups import device_groups, type_orders
from sim.types import ConfigError

MIB = 2**20
MEMORY_FACTOR = 5.0
"""Of a layer's memory over what the profile says."""
Degrees = tuple[tuple[int, int], ...]
"""(data, tensor) parallelism by stage."""
Ranks = Sequence[int]
"""The number of each rank's machine."""


class Machine(NamedTuple):
    """Equal GPUs. ``inside`` and ``outside``: MiB/ms between them and to other machines."""

    kind: str
    gpus: int
    memory_mib: float
    inside: float
    outside: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Of a model's layers, by (type, TP degree, samples of a micro-batch); the degrees and samples are powers of two.

    ``sync_ms``: forward and backward pass over the sum of the layers. ``optimizer_ms``, ``batch_ms``: of the whole
    model on one GPU, and of making a micro-batch.
    """

    layer_ms: Mapping[tuple[str, int, int], Sequence[float]]
    sync_ms: Mapping[tuple[str, int, int], float]
    layer_mib: Mapping[tuple[str, int, int], Sequence[float]]
    parameter_bytes: Sequence[int]
    optimizer_ms: float
    batch_ms: float
    hidden: int
    sequence: int

    def __post_init__(self) -> None:
        if {len(times) for times in self.layer_ms.values()} != {len(self.parameter_bytes)}:
            raise ConfigError("profile: layer_ms and parameter_bytes must have as many layers everywhere")

    @property
    def layers(self) -> int:
        return len(self.parameter_bytes)


class Candidate(NamedTuple):
    """A plan: stage s has layers ``bounds[s]`` to ``bounds[s + 1]`` on the next ``groups[s]`` GPUs of the order."""

    step_ms: float
    order: tuple[str, ...]
    groups: tuple[int, ...]
    micro_batches: int
    degrees: Degrees
    bounds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Finds the plan of the shortest step for ``batch`` samples.

    ``exhaustive``: all degrees of all stages, in place of data parallelism first (which ends at the first that fits).
    """

    profile: Profile
    machines: Sequence[Machine]
    batch: int = 128
    variance: float = 1.0
    max_permute_len: int | None = 4
    max_tp: int = 4
    max_samples: int = 16
    exhaustive: bool = False

    def search(self) -> list[Candidate]:
        """Every plan that memory holds and the profile covers, the shortest step first."""
        found = [
            self.priced(order, groups, micro_batches, degrees, balanced.bounds)
            for order, groups, micro_batches in self._shapes()
            for degrees, balanced in self._intra(order, groups, micro_batches)
        ]
        return sorted(found)

    def _shapes(self) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], int]]:
        count = sum(machine.gpus for machine in self.machines)
        for order in type_orders(machine.kind for machine in self.machines):
            for stages in range(1, min(count, self.profile.layers) + 1):
                for groups in device_groups(
                    count, stages, variance=self.variance, max_permute_len=self.max_permute_len
                ):
                    for m in range(self.batch, 0, -1):
                        if self.batch % m == 0:
                            yield order, groups, m

    # ------------------------------------------------------------ degrees and layers

    def _intra(
        self, order: tuple[str, ...], groups: tuple[int, ...], micro_batches: int
    ) -> Iterator[tuple[Degrees, Balanced]]:
        if self.exhaustive:
            ways = ([(g >> k, 1 << k) for k in range(g.bit_length())] for g in groups)
            for degrees in product(*ways):
                found = self._balanced(order, groups, micro_batches, degrees)
                if found is not None and found.fits:
                    yield degrees, found
            return
        now = [(group, 1) for group in groups]
        tightness: Sequence[float] | None = None
        while True:
            found = self._balanced(order, groups, micro_batches, tuple(now))
            if found is not None and found.fits:
                yield tuple(now), found
                if found.attempts == 1:
                    return
            tightness = tightness if found is None else found.slack
            by = tightness or [1 / dp for dp, _ in now]
            stage = next((s for s in sorted(range(len(groups)), key=by.__getitem__) if now[s][0] > 1), None)
            if stage is None:
                return
            now[stage] = (now[stage][0] // 2, now[stage][1] * 2)

    def _balanced(
        self, order: tuple[str, ...], groups: tuple[int, ...], micro_batches: int, degrees: Degrees
    ) -> Balanced | None:
        """None where a degree or a micro-batch is too large, or not in the profile."""
        ranks = self._ranks(order, groups)
        first = order[0]
        if (first, 1, 1) not in self.profile.layer_ms:
            raise ConfigError(f"profile: {first} has no times for one GPU and one sample; measure them")
        times, needs = [], []
        for (dp, tp), of_stage in zip(degrees, ranks, strict=True):
            samples = self.batch // dp // micro_batches
            if not 1 <= samples <= self.max_samples or tp > self.max_tp:
                return None
            time = self._stage_ms(of_stage, dp, tp, micro_batches, (0, self.profile.layers))
            kinds = {self.machines[rank].kind for rank in of_stage}
            need = [self.profile.layer_mib.get((kind, tp, samples), ()) for kind in kinds]
            if time is None or not all(need):
                return None
            times.append(time)
            needs.append([MEMORY_FACTOR * max(mib) for mib in zip(*need, strict=True)])
        total = sum(1 / time for time in times)
        memory = [sum(self.machines[rank].memory_mib for rank in of_stage) for of_stage in ranks]
        return repaired(self.profile.layer_ms[first, 1, 1], [1 / time / total for time in times], needs, memory)

    def _ranks(self, order: tuple[str, ...], groups: tuple[int, ...]) -> list[Ranks]:
        """By stage."""
        laid = [
            number
            for kind in order
            for number, machine in enumerate(self.machines)
            if machine.kind == kind
            for _ in range(machine.gpus)
        ]
        ends = accumulate(groups)
        return [laid[end - group : end] for group, end in zip(groups, ends, strict=True)]

    # ------------------------------------------------------------ times

    def _stage_ms(self, ranks: Ranks, dp: int, tp: int, micro_batches: int, layers: tuple[int, int]) -> float | None:
        """Of the slowest replica, each with its share of a micro-batch; None if the profile lacks it."""
        kinds = [{self.machines[rank].kind for rank in ranks[i * tp : (i + 1) * tp]} for i in range(dp)]
        each = [max((self._layers_ms(kind, tp, 1, layers) or 0.0) for kind in of_replica) for of_replica in kinds]
        if not all(each):
            return None
        given = shares(self.batch // micro_batches, each)
        times = [self._samples_ms(kind, tp, h, layers) for ks, h in zip(kinds, given, strict=True) for kind in ks]
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else None

    def _samples_ms(self, kind: str, tp: int, samples: int, layers: tuple[int, int]) -> float | None:
        """The sum over the binary digits of the number of samples."""
        digits = [1 << k for k in range(samples.bit_length()) if samples >> k & 1]
        times = [self._layers_ms(kind, tp, digit, layers) for digit in digits]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None

    def _layers_ms(self, kind: str, tp: int, samples: int, layers: tuple[int, int]) -> float | None:
        times = self.profile.layer_ms.get((kind, tp, samples))
        return None if times is None else sum(times[layers[0] : layers[1]])

    def priced(
        self,
        order: tuple[str, ...],
        groups: tuple[int, ...],
        micro_batches: int,
        degrees: Degrees,
        bounds: tuple[int, ...],
    ) -> Candidate:
        """With the time of a step; ``ConfigError`` where the profile lacks what it takes."""
        ranks, profile = self._ranks(order, groups), self.profile
        stages = list(zip(ranks, degrees, pairwise(bounds), strict=True))
        times = [self._stage_ms(of_stage, dp, tp, micro_batches, layers) for of_stage, (dp, tp), layers in stages]
        known = [time for time in times if time is not None]
        (last_dp, last_tp), last = degrees[-1], ranks[-1]
        samples = self.batch // last_dp // micro_batches
        syncs = [profile.sync_ms.get((self.machines[rank].kind, last_tp, samples)) for rank in last]
        if len(known) < len(times) or None in syncs:
            raise ConfigError(f"profile: nothing for {groups} with degrees {degrees} and {micro_batches} micro-batches")
        update = max(2 * profile.optimizer_ms * (b - a) / (profile.layers * tp) for _, (_, tp), (a, b) in stages)
        step_ms = (
            (micro_batches - 1) * max(known)
            + sum(known)
            + micro_batches * max(sync for sync in syncs if sync is not None)
            + update
            + max(self._gradients_ms(of_stage, *degree, layers) for of_stage, degree, layers in stages)
            + sum(self._handovers_ms(ranks, degrees, micro_batches))
            + micro_batches * profile.batch_ms
        )
        return Candidate(step_ms, order, groups, micro_batches, degrees, bounds)

    def _gradients_ms(self, ranks: Ranks, dp: int, tp: int, layers: tuple[int, int]) -> float:
        """The all-reduce of the replicas of a stage."""
        mib = sum(self.profile.parameter_bytes[layers[0] : layers[1]]) / tp / MIB
        return 2 * (dp - 1) / dp * mib / self._slowest(ranks)

    def _handovers_ms(self, ranks: Sequence[Ranks], degrees: Degrees, micro_batches: int) -> Iterator[float]:
        """One micro-batch from each stage to the next; the release counts values, not bytes."""
        for (a, b), (dp, _) in zip(pairwise(ranks), degrees, strict=False):
            values = self.batch // dp // micro_batches * self.profile.sequence * self.profile.hidden
            yield values / MIB / self._slowest((*a, *b))

    def _slowest(self, ranks: Ranks) -> float:
        """MiB/ms of the slowest link among them."""
        if len(set(ranks)) == 1:
            return self.machines[ranks[0]].inside
        return min(self.machines[rank].outside for rank in ranks)
