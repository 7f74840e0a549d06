"""SpotServe's planner (ASPLOS 2024; arXiv 2311.15566): pipelines for the instances there are, and ways to others.

``configure`` chooses the pipelines, ``mapping`` the GPUs of each that have to fetch least, ``migration`` what is
fetched from where, in which order of layers. Start with ``Pipelines``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sim.memory import kv_blocks
from sim.planners.spotserve.configure import SPARE_INSTANCES, Choice, Configuration, Optimizer, wanted_instances
from sim.planners.spotserve.mapping import group_size, groups, in_order, pipeline
from sim.planners.spotserve.profile import LayerProfile, times_of
from sim.policy import Problem
from sim.types import InfeasibleError, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """The configuration that the optimiser chooses for the GPUs there are, on them in their order.

    ``need_per_s``: requests/s to be served; None: the workload's. ``least_gpus`` of a pipeline, beside what memory
    asks for. ``padded_layers``: what stages must divide; None: the profile's, or any number of stages will do.
    ``instances``: how many machines, the first, are there at the start; None: all. ``shape_for_all``: stages and tensor
    parallelism are those for all machines of the cluster, whether they are there or not.
    """

    need_per_s: float | None = None
    least_gpus: int = 1
    max_tp: int = 8
    max_batch: int = 4
    padded_layers: int | None = None
    instances: int | None = None
    shape_for_all: bool = False

    def plan(self, problem: Problem) -> Plan:
        there = self.at_start(problem)
        all_there = self.choose(problem, problem.cluster.gpu_ids) if self.shape_for_all else None
        best = self.choose(problem, there, shape=None if all_there is None else all_there.configuration[1:3])
        if best is None:
            raise InfeasibleError(
                f"no pipeline of {problem.model.name} fits on {len(there)} GPUs; take more instances, "
                "or lower least_gpus or max_batch"
            )
        found = groups(problem.cluster, there, best.configuration.tp)
        stages = in_order(best.configuration, found)
        return Plan(replicas=tuple(pipeline(problem.model, f"s{d}", one) for d, one in enumerate(stages)))

    def explain(self, problem: Problem) -> list[str]:
        """What it expects, and what to ask the cloud for."""
        there = self.at_start(problem)
        best = self.choose(problem, there)
        if best is None:
            return []
        per_instance = max(node.count for node in problem.cluster.nodes)
        more = wanted_instances(best.configuration, len(there), per_instance)
        words = f"ask for {more} more" if more > 0 else f"give {-more} back" if more < 0 else "keep those there are"
        return [
            f"{best.configuration}: {best.latency_s:.3g} s a batch, up to {best.rate_per_s:.3g} requests/s",
            f"instances: {words}, so that {SPARE_INSTANCES} are spare",
        ]

    def at_start(self, problem: Problem) -> tuple[str, ...]:
        return tuple(gpu for node in problem.cluster.nodes[: self.instances] for gpu in node.gpu_ids)

    def choose(
        self,
        problem: Problem,
        gpus: Collection[str],
        need_per_s: float | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Choice | None:
        """``shape``: (stages, tp) that are given, so that only the number of pipelines and the batch are chosen."""
        need_per_s = next(
            rate for rate in (need_per_s, self.need_per_s, problem.workload.rate_per_s) if rate is not None
        )
        return self.optimizer(problem, shape).choose(lambda tp: self.usable(problem, gpus, tp), need_per_s)

    def usable(self, problem: Problem, gpus: Collection[str], tp: int) -> int:
        """GPUs that can take part at this degree of tensor parallelism."""
        return len(groups(problem.cluster, gpus, tp)) * group_size(problem.cluster, tp)

    def optimizer(self, problem: Problem, shape: tuple[int, int] | None = None) -> Optimizer:
        times = times_of(problem)
        profile = times if isinstance(times, LayerProfile) else None
        context = round(problem.workload.mean_input_tokens + problem.workload.mean_output_tokens)
        known: dict[tuple[int, int], int] = {}

        def fits(stages: int, tp: int, batch: int) -> bool:
            if stages > problem.model.num_layers or (shape is not None and (stages, tp) != shape):
                return False
            if profile is not None and (tp not in profile.steps or batch not in profile.ends_s):
                return False
            if (stages, tp) not in known:
                gpus = [problem.cluster.gpu_ids[:tp]] * stages
                probe = pipeline(problem.model, "probe", gpus)
                known[stages, tp] = kv_blocks(problem, probe.stages, problem.limits) * problem.limits.block_size
            return known[stages, tp] >= batch * context

        return Optimizer(
            times=times,
            output_tokens=round(problem.workload.mean_output_tokens),
            padded_layers=self._padded(problem, profile),
            stages_divide=self.padded_layers is not None or profile is not None,
            least_gpus=self.least_gpus,
            max_tp=self.max_tp,
            max_batch=self.max_batch,
            fits=fits,
        )

    def _padded(self, problem: Problem, profile: LayerProfile | None) -> int:
        if self.padded_layers is not None:
            return self.padded_layers
        return problem.model.num_layers if profile is None else profile.padded_layers


__all__ = ["Choice", "Configuration", "LayerProfile", "Optimizer", "Pipelines"]
