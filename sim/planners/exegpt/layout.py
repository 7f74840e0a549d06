"""Where the layers go: a pipeline whose first GPUs may be joined by tensor parallelism (partial TP), or two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sim.model import ModelSpec
from sim.policy import Problem
from sim.types import ConfigError, Replica, Role, Stage

Groups = tuple[tuple[str, ...], ...]


class Tensor(NamedTuple):
    """Partial tensor parallelism: ``gpus`` of them in groups of ``degree``, every other GPU a stage of its own."""

    degree: int
    gpus: int


def alike(problem: Problem, gpu: str | None, gpus: int | None) -> tuple[str, ...]:
    """The first ``gpus`` (None: all) of a type (None: any). ``ConfigError`` unless they are there, and of one type."""
    cluster = problem.cluster
    types = list(dict.fromkeys(cluster.gpu(name).name for name in cluster.gpu_ids))
    if gpu is not None and gpu.lower() not in [one.lower() for one in types]:
        raise ConfigError(f"system.gpu is {gpu}; the cluster has {', '.join(types)}")
    names = [name for name in cluster.gpu_ids if gpu is None or cluster.gpu(name).name.lower() == gpu.lower()]
    if len(names) < (gpus or 1):
        raise ConfigError(f"system.gpus is {gpus}; the cluster has {len(names)}; state fewer, or leave it out for all")
    chosen = tuple(names[:gpus])
    if len({cluster.gpu(name).name for name in chosen}) > 1:
        raise ConfigError(
            f"system.gpu: one schedule is for GPUs of one type, the cluster has {', '.join(types)}; set system.gpu to "
            "one of them"
        )
    return chosen


def degrees(problem: Problem, gpus: Sequence[str]) -> list[int]:
    """Tensor-parallel degrees that divide the heads and the GPUs of each machine."""
    counts = {problem.cluster.node(gpu).count for gpu in gpus}
    heads = problem.model.num_attention_heads
    return [g for g in (1, 2, 4, 8) if g <= len(gpus) and heads % g == 0 and all(c % g == 0 for c in counts)]


def groups(gpus: Sequence[str], tensor: Tensor) -> Groups:
    """The first GPUs in groups, the others alone. So many GPUs must be in whole groups, and be there."""
    degree, joined = tensor
    wide = tuple(tuple(gpus[at : at + degree]) for at in range(0, joined, degree)) if degree > 1 else ()
    return wide + tuple((gpu,) for gpu in gpus[joined if degree > 1 else 0 :])


def spread(num_layers: int, speeds: Sequence[float]) -> list[int]:
    """Layers of each stage, one at least, the more the faster; what is left goes where it is done first.

    Equal speeds give layers that differ by one at most, the earlier stages having more.
    """
    layers = [max(1, int(num_layers * speed / sum(speeds) + 1e-9)) for speed in speeds]
    while sum(layers) > num_layers:
        slowest = max(range(len(layers)), key=lambda at: (layers[at] > 1, layers[at] / speeds[at]))
        layers[slowest] -= 1
    while sum(layers) < num_layers:
        layers[min(range(len(layers)), key=lambda at: (layers[at] + 1) / speeds[at])] += 1
    return layers


def pipeline(model: ModelSpec, name: str, role: Role, gpus: Groups, speed: Callable[[int], float]) -> Replica:
    """A stage on each group, as far as there are layers; ``speed`` is that of a group of so many GPUs."""
    used = gpus[: model.num_layers]
    layers = spread(model.num_layers, [speed(len(group)) for group in used])
    first, stages = 0, []
    for number, (group, count) in enumerate(zip(used, layers, strict=True)):
        stages.append(Stage(name=f"{name}.{number}", gpus=group, first_layer=first, end_layer=first + count))
        first += count
    return Replica(name=name, role=role, stages=tuple(stages))


def shared(tensor: Tensor, encode_gpus: int, decode_gpus: int) -> tuple[Tensor, Tensor]:
    """Which of two pools the groups are in (ours): the decode pool, where most of the latency is, as far as it goes."""
    degree, joined = tensor
    decode = min(joined, decode_gpus // degree * degree)
    return Tensor(degree, min(joined - decode, encode_gpus // degree * degree)), Tensor(degree, decode)
