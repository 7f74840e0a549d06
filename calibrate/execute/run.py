"""Execute what could be simulated: the same problem, system and requests, in one of two modes.

``measured-step``: virtual clock, every step run on one device (``step_cost.py``). ``wall-clock``: real time, a worker
process per stage, KV moved between them (``wall.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from calibrate.execute.how import Execution
from calibrate.execute.model.architecture import Architecture
from calibrate.execute.step_cost import MeasuredCodec, MeasuredSteps
from calibrate.execute.wall import ForPolicies, Wall
from calibrate.execute.workers.crew import joins, worker_configs
from calibrate.execute.workers.fleet import Fleet
from sim.engine import simulate
from sim.policy import Predictor, Problem, Source, System, Transfer, View
from sim.record import Result
from sim.transfers import Quantized
from sim.types import Chunk, ClusterEvent, ConfigError, Move, Plan


def execute(
    problem: Problem,
    system: System,
    source: Source,
    how: Execution | None = None,
    *,
    plan: Plan | None = None,
    events: Sequence[ClusterEvent] = (),
    predictor: Predictor | None = None,
    until_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    outputs: dict[int, list[int]] | None = None,
    readings: list[float] | None = None,
) -> Result:
    """As ``simulate``, executed. ``outputs`` receives the generated tokens of each request (wall clock only),
    ``readings`` those of the device's pace, in seconds (``pace.py``).

    ``ConfigError`` for what cannot be executed, ``WorkerLostError`` if a worker process dies.
    """
    how = how or Execution()
    if system.model(problem.model) != problem.model:
        raise ConfigError(f"system.name: {system.name}: workers compute all of {problem.model.name}; simulate it")
    plan = plan if plan is not None else system.planner.plan(replace(problem, limits=system.limits))
    options: dict[str, Any] = {"plan": plan, "predictor": predictor, "until_s": until_s, "progress": progress}
    if how.mode == "measured-step":
        return _with_measured_steps(problem, system, source, how, options | {"events": events}, readings)
    _check_wall(system, plan, events)
    return _by_the_wall_clock(problem, system, source, how, options, {} if outputs is None else outputs, readings)


def _with_measured_steps(
    problem: Problem,
    system: System,
    source: Source,
    how: Execution,
    options: dict[str, Any],
    readings: list[float] | None,
) -> Result:
    if how.device == "cpu":
        torch.set_num_threads(1)  # as in a worker process
    cost = MeasuredSteps(
        device=how.device, kv_blocks=how.kv_blocks, block_size=system.limits.block_size, memoise=how.memoise,
        seed=problem.seed, paced=readings is not None or how.reference_s is not None, reference_s=how.reference_s,
    )  # fmt: skip
    timed = replace(system, transfer=lambda: _with_measured_codec(system.transfer(), problem, how.device))
    result = simulate(replace(problem, cost=cost), timed, source, step_by_step=True, **options)
    if readings is not None:
        readings += cost.readings
    return result


def _by_the_wall_clock(
    problem: Problem,
    system: System,
    source: Source,
    how: Execution,
    options: dict[str, Any],
    outputs: dict[int, list[int]],
    readings: list[float] | None,
) -> Result:
    arch, plan, paced = _architecture(problem, how), options["plan"], readings is not None
    with (
        TemporaryDirectory(prefix="phasewise-") as folder,
        Fleet(worker_configs(problem, system, plan, arch, how, str(Path(folder) / "store"), paced=paced)) as fleet,
    ):
        for replica in plan.replicas:
            for front, back in joins(replica):
                fleet.say(front, {"do": "join", "ports": [fleet.ports[worker] for worker in back]})
        wall = Wall(
            fleet, problem.cluster, vocab_size=arch.vocab_size, kv_heads=arch.num_kv_heads, seed=problem.seed,
            kv_bits=_kv_bits(system.transfer()), emulate_links=how.emulate_links,
        )  # fmt: skip
        at_once = replace(system, transfer=lambda: AtOnce(system.transfer()))
        real = replace(problem, cost=ForPolicies(problem.cost))
        result = simulate(real, at_once, source, hardware=wall, **options)
    outputs.update(wall.outputs)
    if readings is not None:
        readings += wall.readings
    return result


class AtOnce:
    """Another transfer's KV, sent when the prompt is done: workers do not send layer by layer during a step.

    Its overhead (synchronisation, codec) is not modelled: the workers take that time.
    """

    pull = False

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return (Chunk(min(1.0, sum(share for share, _ in self._inner.chunks(move, view))), 1.0),)

    def overhead_s(self, move: Move) -> float:
        return 0.0


def _kv_bits(transfer: Transfer) -> int:
    """Bits per value of KV on the way: of a transfer that quantises, else 16 (as it is)."""
    bits = transfer.bits if isinstance(transfer, Quantized) else 16
    if bits not in (4, 16):
        raise ConfigError(f"system: KV in {bits} bits is not executed; workers send it in 4 bits or as it is (16)")
    return bits


def _with_measured_codec(transfer: Transfer, problem: Problem, device: str) -> Transfer:
    if isinstance(transfer, Quantized) and _kv_bits(transfer) == 4:
        return MeasuredCodec(transfer, problem.model, device)
    return transfer


def _check_wall(system: System, plan: Plan, events: Sequence[ClusterEvent]) -> None:
    if events:
        raise ConfigError(f"events: {events[0].kind} at {events[0].at_s} s: wall-clock runs have no made-up faults")
    if system.limits.prefix_caching:
        raise ConfigError("system.engine.prefix_caching: true: workers do not share prefixes; set it to false")


def _architecture(problem: Problem, how: Execution) -> Architecture:
    own = Architecture.of(problem.model)
    if how.folder is None:
        return own
    given = Architecture.read(how.folder, problem.model.dtype)
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        if getattr(given, name) != getattr(own, name):
            raise ConfigError(
                f"{how.folder}: {name} is {getattr(given, name)}; {problem.model.name} has {getattr(own, name)}"
            )
    return given
