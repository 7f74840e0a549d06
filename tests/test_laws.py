"""The law, over every system: collapsing iterations into segments changes no time of any request or token.

Also: requests in = requests out, ledgers end empty, equal seeds give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ClusterEvent, Plan, Problem, Request, Result, System
from sim.cost import Roofline, Sparse, Sparsity
from sim.planners.pools import Pool, Split
from sim.planners.thunderserve import TabuSearch
from sim.policy import View
from sim.predictors import ConstantLength, TrueLength
from sim.systems.split.distserve import ReplanOnShift
from sim.systems.split.splitwise import Repurpose
from sim.systems.split.tetriinfer import FlipIdle
from sim.systems.split.thunderserve import Reschedule
from sim.types import Change, Later, Load, Replica, Signal, Stage
from tests.toys import ToyCost, cluster, problem, replica, run, with_limits

SPLIT = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 2, "tp": 1}}


def eager_repurposing(system: System) -> System:
    """Machines that were mixed at two of the last three ticks change their role."""
    return replace(system, rescheduler=lambda: Repurpose(window_s=0.3, interval_s=0.1))


@dataclass
class TwoPlans:
    """A planner that takes turns: a decode instance of two stages, or two of one, each with a prefill instance."""

    turn: int = 0

    def plan(self, problem: Problem) -> Plan:
        self.turn += 1
        decode = Pool(tp=1, pp=2) if self.turn % 2 else Pool(tp=1, replicas=2)
        return Split(prefill=Pool(replicas=1, tp=1), decode=decode).plan(problem)


class Fleeing:
    """After a notice: a pipeline over the GPUs that stay, which hold what it needs, and all decodes go on there."""

    interval_s: float | None = None

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.doomed: set[str] = set()

    def react(self, signal: Signal, view: View) -> Change | Later | None:
        self.plan = self.plan or view.plan
        if signal.kind == "notice":
            self.doomed = set(signal.gpus)
            return Later(signal.at_s + 0.05)
        if signal.kind == "joined":
            return Change(plan=self.plan, reason="back", requeue=True)
        if signal.kind != "due":
            return None
        staying = [gpu for spec in view.plan.replicas for gpu in spec.gpus if gpu not in self.doomed]
        plan = Plan(replicas=(replica("pipe", staying[-2:], pp=2), *(replica(g, [g]) for g in staying[:-2])))
        ids = sorted({request.id for one in view.replicas for request in one.running})
        keep = {number: plan.replicas[number % len(plan.replicas)].name for number in ids}
        held: dict[str, tuple[Load, ...]] = {spec.name: () for spec in plan.replicas}
        return Change(plan=plan, reason="flee", drain=False, keep=keep, loads=held, forget=len(ids) % 2 > 0)


def eager_replanning() -> System:
    """Observes a tenth of a second and replans on a few requests."""
    return replace(
        SYSTEMS["distserve"](**SPLIT),
        rescheduler=lambda: ReplanOnShift(TwoPlans(), interval_s=0.1, window_s=0.3, fewest_requests=3),
    )


def eager_flipping(system: System) -> System:
    """Instances that were idle at half of the last three ticks change their role."""
    return replace(system, rescheduler=lambda: FlipIdle(busy_share=0.5, window_s=0.3, interval_s=0.1))


def rescheduling(system: System, lightweight: bool) -> System:
    """Plans anew as soon as five requests differ from what was expected."""
    search = TabuSearch(n_steps=3, n_neighbors=3)
    return replace(
        system,
        rescheduler=lambda: Reschedule(
            search, lightweight=lightweight, interval_s=0.2, window_s=0.5, fewest_requests=5
        ),
    )


class Nodes:
    """Nodes of one GPU with a part of the layers, ranges that overlap, two chains and more."""

    def plan(self, problem: Problem) -> Plan:
        layers = {"n0.g0": (0, 1), "n0.g1": (0, 2), "n1.g0": (1, 2), "n1.g1": (0, 1)}
        return Plan(
            replicas=tuple(
                Replica(name=gpu, stages=(Stage(name=gpu, gpus=(gpu,), first_layer=first, end_layer=end),))
                for gpu, (first, end) in layers.items()
            )
        )


class Shared:
    """Groups that host one model or both, one of them a pipeline."""

    def plan(self, problem: Problem) -> Plan:
        return Plan(
            replicas=(
                replace(replica("both", ["n0.g0", "n1.g0"], pp=2), models=("a", "b")),
                replace(replica("a", ["n0.g1"]), models=("a",)),
                replace(replica("b", ["n1.g1"]), models=("b",)),
            )
        )


def over_nodes(**options: Any) -> System:
    return replace(SYSTEMS["helix"](**options), planner=Nodes())


def reserving(name: str, **options: Any) -> System:
    """With contexts short enough for a few to fit in the smallest KV cache."""
    return with_limits(SYSTEMS[name](**options), max_model_len=320)


def deceived(system: System) -> System:
    """What takes itself for an oracle believes in ten tokens."""
    return replace(system, predictor=ConstantLength(10))


SETTINGS: dict[str, Callable[[], System]] = {
    "vllm v1": lambda: SYSTEMS["vllm"](replicas=2, tp=1),
    "vllm v1 long prompts capped": lambda: SYSTEMS["vllm"](replicas=1, tp=2, long_prefill_token_threshold=48),
    "vllm v1 unchunked": lambda: SYSTEMS["vllm"](replicas=2, tp=1, chunked_prefill=False),
    "vllm v1 pp2": lambda: SYSTEMS["vllm"](replicas=2, tp=1, pp=2),
    "vllm v1 split": lambda: SYSTEMS["vllm"](**SPLIT),
    "vllm v1 prefix-aware": lambda: SYSTEMS["vllm"](routing="prefix_aware", replicas=3, tp=1),
    "vllm v1 split prefix-aware, old index": lambda: SYSTEMS["vllm"](
        routing="prefix_aware", index_age_s=0.3, prefill={"replicas": 2, "tp": 1}, decode={"replicas": 2, "tp": 1}
    ),
    "vllm v0": lambda: SYSTEMS["vllm"](mode="v0", replicas=2, tp=1),
    "vllm v0 swap": lambda: SYSTEMS["vllm"](mode="v0", preemption="swap", replicas=1, tp=2),
    "vllm v0 split": lambda: SYSTEMS["vllm"](mode="v0", **SPLIT),
    "vllm v1 priority": lambda: SYSTEMS["vllm"](policy="priority", replicas=2, tp=1),
    "vllm v1 priority, long prompts capped": lambda: SYSTEMS["vllm"](
        policy="priority", long_prefill_token_threshold=48, replicas=1, tp=1
    ),
    "vllm v1 priority pp2": lambda: SYSTEMS["vllm"](policy="priority", replicas=1, tp=1, pp=2),
    "vllm paper": lambda: SYSTEMS["vllm"](mode="paper", replicas=2, tp=1),
    "vllm paper swap": lambda: SYSTEMS["vllm"](mode="paper", preemption="swap", replicas=1, tp=2),
    "vllm paper pp2": lambda: SYSTEMS["vllm"](mode="paper", replicas=1, tp=1, pp=2),
    "vllm paper split": lambda: SYSTEMS["vllm"](mode="paper", **SPLIT),
    "orca max": lambda: reserving("orca", replicas=2, tp=1),
    "orca pow2": lambda: reserving("orca", reserve="pow2", replicas=2, tp=1),
    "orca oracle pp2": lambda: reserving("orca", reserve="oracle", replicas=1, tp=1, pp=2),
    "orca oracle deceived": lambda: deceived(reserving("orca", reserve="oracle", replicas=2, tp=1)),
    "fastertransformer": lambda: reserving("fastertransformer", replicas=2, tp=1),
    "fastertransformer pp2": lambda: reserving("fastertransformer", replicas=1, tp=1, pp=2),
    "sarathi": lambda: reserving("sarathi", chunk_size=64, tile=32, replicas=2, tp=1),
    "sarathi auto": lambda: reserving("sarathi", chunk_size="auto", tile=64, replicas=2, tp=1),
    "sarathi pp2": lambda: reserving("sarathi", chunk_size=64, tile=32, replicas=1, tp=1, pp=2),
    "sarathi baseline": lambda: reserving("sarathi", mode="baseline", replicas=2, tp=1),
    "sarathi baseline pp2": lambda: reserving("sarathi", mode="baseline", replicas=1, tp=1, pp=2),
    "sarathi orca-best": lambda: reserving("sarathi", mode="orca-best", replicas=2, tp=1),
    "sarathi-serve chunked-only": lambda: SYSTEMS["sarathi-serve"](
        token_budget=64, mode="chunked-only", replicas=2, tp=1
    ),
    "sarathi-serve chunked-only pp2": lambda: SYSTEMS["sarathi-serve"](
        token_budget=64, mode="chunked-only", replicas=1, tp=1, pp=2
    ),
    "sarathi-serve chunked-only split": lambda: SYSTEMS["sarathi-serve"](token_budget=64, mode="chunked-only", **SPLIT),
    "sarathi-serve hybrid-only": lambda: SYSTEMS["sarathi-serve"](mode="hybrid-only", replicas=2, tp=1),
    "sarathi-serve dynamic": lambda: SYSTEMS["sarathi-serve"](
        dynamic_chunks={"high_tokens": 96, "low_tokens": 32, "stages": 3, "max_tokens": 240}, replicas=2, tp=1
    ),
    "sarathi-serve by tbt": lambda: SYSTEMS["sarathi-serve"](tbt_s=0.02, replicas=2, tp=1),
    "sarathi-serve": lambda: SYSTEMS["sarathi-serve"](token_budget=64, replicas=2, tp=1),
    "sarathi-serve pp2": lambda: SYSTEMS["sarathi-serve"](token_budget=64, replicas=1, tp=1, pp=2),
    "sarathi-serve split": lambda: SYSTEMS["sarathi-serve"](token_budget=64, **SPLIT),
    "splitwise": lambda: SYSTEMS["splitwise"](prompt_queue_tokens=300, **SPLIT),
    "splitwise serial": lambda: SYSTEMS["splitwise"](transfer="serial", prompt_queue_tokens=2000, **SPLIT),
    "splitwise 4 bits": lambda: SYSTEMS["splitwise"](kv_bits=4, prompt_queue_tokens=300, **SPLIT),
    "splitwise 8 bits, per layer": lambda: SYSTEMS["splitwise"](
        kv_bits=8, transfer="per-layer", prompt_queue_tokens=300, **SPLIT
    ),
    "vllm v1 split, 4 bits": lambda: SYSTEMS["vllm"](kv_bits=4, **SPLIT),
    "sarathi-serve split, 4 bits": lambda: SYSTEMS["sarathi-serve"](kv_bits=4, token_budget=64, **SPLIT),
    "splitwise late status, capped": lambda: SYSTEMS["splitwise"](
        prompt_queue_tokens=300, status_delay_s=0.2, power_capped=["n1"], **SPLIT
    ),
    "splitwise repurposing": lambda: eager_repurposing(SYSTEMS["splitwise"](prompt_queue_tokens=200, **SPLIT)),
    "distserve": lambda: SYSTEMS["distserve"](**SPLIT),
    "distserve few prompts a batch": lambda: SYSTEMS["distserve"](max_prompts=2, **SPLIT),
    "distserve pp2": lambda: SYSTEMS["distserve"](
        prefill={"replicas": 1, "tp": 1, "pp": 2}, decode={"replicas": 1, "tp": 1, "pp": 2}
    ),
    "distserve replanning": eager_replanning,
    "tetriinfer": lambda: SYSTEMS["tetriinfer"](chunk_tokens=64, bucket_tokens=20, **SPLIT),
    "tetriinfer greedy, longest first": lambda: SYSTEMS["tetriinfer"](
        chunk_tokens=64, group=3, order="ljf", admission="greedy", **SPLIT
    ),
    "tetriinfer static, chunk by chunk": lambda: SYSTEMS["tetriinfer"](
        chunk_tokens=64, bucket_tokens=20, admission="reserve-static", transfer="chunk", dispatch="random", **SPLIT
    ),
    "tetriinfer commit": lambda: SYSTEMS["tetriinfer"](
        chunk_tokens=64, bucket_tokens=20, admission="commit", order="fcfs", monitor_s=0.013, **SPLIT
    ),
    "tetriinfer flipping": lambda: eager_flipping(SYSTEMS["tetriinfer"](chunk_tokens=64, **SPLIT)),
    "thunderserve": lambda: SYSTEMS["thunderserve"](**SPLIT),
    "thunderserve by shares": lambda: SYSTEMS["thunderserve"](routing="round-robin", **SPLIT),
    "thunderserve drawn": lambda: SYSTEMS["thunderserve"](routing="random", bits=16, **SPLIT),
    "thunderserve lightweight": lambda: rescheduling(SYSTEMS["thunderserve"](**SPLIT), lightweight=True),
    "thunderserve full": lambda: rescheduling(SYSTEMS["thunderserve"](**SPLIT), lightweight=False),
    "thunderserve pp2": lambda: SYSTEMS["thunderserve"](
        prefill={"replicas": 1, "tp": 1, "pp": 2}, decode={"replicas": 1, "tp": 1, "pp": 2}
    ),
    "hexgen-2": lambda: replace(
        SYSTEMS["hexgen-2"](), planner=Split(prefill=Pool(replicas=2, tp=1), decode=Pool(tp=1))
    ),
    "hexgen": lambda: SYSTEMS["hexgen"](generations=5),
    "hexgen one request a batch": lambda: SYSTEMS["hexgen"](generations=5, batching="one"),
    "alpaserve": lambda: replace(SYSTEMS["alpaserve"](), planner=Shared()),
    "alpaserve batches": lambda: replace(SYSTEMS["alpaserve"](batch=None), planner=Shared()),
    "alpaserve two a batch": lambda: replace(SYSTEMS["alpaserve"](batch=2), planner=Shared()),
    "vllm v1 fleeing": lambda: replace(SYSTEMS["vllm"](replicas=4, tp=1), rescheduler=Fleeing),
    "sarathi-serve fleeing": lambda: replace(
        SYSTEMS["sarathi-serve"](token_budget=64, replicas=4, tp=1), rescheduler=Fleeing
    ),
    "vllm v0 fleeing": lambda: replace(SYSTEMS["vllm"](mode="v0", replicas=4, tp=1), rescheduler=Fleeing),
    "helix": lambda: over_nodes(),
    "helix random": lambda: over_nodes(routing="random"),
    "helix shortest-queue, one prompt a batch": lambda: over_nodes(routing="shortest-queue", max_prompts=1),
    "exegpt rra": lambda: SYSTEMS["exegpt"](schedule="rra", encode_batch=3, decode_iterations=5, gpus=1),
    "exegpt rra, paper's rule": lambda: SYSTEMS["exegpt"](
        schedule="rra", encode_batch=8, decode_iterations=2, gpus=2, tp=2, rule="paper", band=0.0
    ),
    "exegpt rra pp2": lambda: SYSTEMS["exegpt"](schedule="rra", encode_batch=4, decode_iterations=3, gpus=2, tp=1),
    "exegpt rra pp2 tp2": lambda: SYSTEMS["exegpt"](
        schedule="rra", encode_batch=5, decode_iterations=40, tp=2, tp_gpus=4
    ),
    "exegpt waa": lambda: SYSTEMS["exegpt"](schedule="waa-c", encode_batch=3, micro_batches=1, gpus=2, tp=1),
    "exegpt waa pp2": lambda: SYSTEMS["exegpt"](schedule="waa-m", encode_batch=2, micro_batches=2, tp=1),
    "deja-vu": lambda: SYSTEMS["deja-vu"](attention_density=0.4, mlp_density=0.13, replicas=2, tp=1),
    "deja-vu by operator": lambda: replace(
        SYSTEMS["deja-vu"](attention_density=0.4, mlp_density=0.13, overlap=0.3, replicas=1, tp=2),
        cost=lambda _: Sparse(inner=Roofline(), sparsity=Sparsity(attention_density=0.4, mlp_density=0.13)),
    ),
    "deja-vu over sarathi-serve pp2": lambda: SYSTEMS["deja-vu"](
        attention_density=1,
        mlp_density=[0.1, 0.7],
        scheduler="sarathi-serve",
        scheduler_options={"token_budget": 64},
        replicas=1,
        tp=1,
        pp=2,
    ),
    "deja-vu over splitwise": lambda: SYSTEMS["deja-vu"](
        attention_density=0.4,
        mlp_density=0.13,
        scheduler="splitwise",
        scheduler_options={"prompt_queue_tokens": 300, "power_capped": ["n1"]},
        **SPLIT,
    ),
    "melange": lambda: replace(SYSTEMS["melange"](), planner=SYSTEMS["vllm"](replicas=3, tp=1).planner),
    "spotserve": lambda: reserving("spotserve", max_tp=1, least_gpus=2, need_per_s=1.0),
    "spotserve tp2, rates seen": lambda: reserving("spotserve", max_tp=2, least_gpus=2),
    "spotserve growing": lambda: reserving("spotserve", max_tp=2, instances=1, need_per_s=1e6),
    "spotserve without its parts": lambda: reserving(
        "spotserve", max_tp=1, least_gpus=2, need_per_s=1.0, without=["controller", "mapper", "arranger"]
    ),
    "spotserve reparallelization": lambda: reserving(
        "spotserve", mode="reparallelization", max_tp=1, least_gpus=2, need_per_s=1.0, disk_bytes_per_s=1e10
    ),
    "spotserve rerouting": lambda: reserving("spotserve", mode="rerouting", max_tp=1, least_gpus=2, need_per_s=1.0),
    "metis": lambda: SYSTEMS["metis"](max_tp=1),
    "metis exhaustive, tp2, 4 bits": lambda: SYSTEMS["metis"](exhaustive=True, max_tp=2, kv_bits=4),
    "splitwise as splitwise-sim": lambda: SYSTEMS["splitwise"](
        prompt_queue_tokens=300, compat="splitwise_sim", **SPLIT
    ),
}
"""Every system in every mode that schedules differently; a new system adds its own lines."""


OF_NODES = {"helix"}
"""Nodes with a part of the layers share no prefixes and decide no step ahead, and say so."""


def test_every_system_is_under_the_law() -> None:
    assert {name.split()[0] for name in SETTINGS} == set(SYSTEMS)


@st.composite
def traffic(draw: st.DrawFn) -> list[Request]:
    """Bursts on a coarse grid (ties), short and long prompts, some of several samples, half the traces with hashes."""
    count = draw(st.integers(1, 40))
    gap = draw(st.sampled_from([0.0, 0.0037, 0.01, 0.05, 0.3]))
    hashed = draw(st.booleans())
    arrival, requests = 0.0, []
    for number in range(count):
        arrival = round(arrival + gap * draw(st.integers(0, 3)), 3)
        tokens = draw(st.integers(1, 250))
        shared = draw(st.integers(0, 3)) if hashed else 0
        answer = draw(st.integers(1, 120))
        known = (tokens + (answer if draw(st.booleans()) else 0)) // 16
        blocks = tuple((shared, block).__hash__() for block in range(known)) if shared else ()
        requests.append(
            Request(
                id=number, arrival_s=arrival, input_tokens=tokens, output_tokens=answer,
                prefix=blocks, prefix_block_tokens=16 if blocks else None, priority=draw(st.integers(0, 2)),
                samples=draw(st.sampled_from([1, 1, 1, 1, 3])), beam_search=draw(st.booleans()),
                klass=draw(st.sampled_from([None, "a", "b"])),
            )
        )  # fmt: skip
    return requests


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """Everything that varies beside the system: KV size, batch limits, step costs, links."""
    return {
        "limits": {
            "num_kv_blocks": draw(st.sampled_from([24, 40, 80, 1000])),
            "max_num_seqs": draw(st.sampled_from([1, 2, 7, 256])),
            "max_num_batched_tokens": draw(st.sampled_from([37, 256, 300, 2048])),
            "block_size": draw(st.sampled_from([8, 16])),
            "prefix_caching": draw(st.booleans()),
            "async_scheduling": draw(st.booleans()),
        },
        "cost": ToyCost(
            knot=draw(st.sampled_from([200, 1500, 10**9])), base_ps=draw(st.sampled_from([10**10, 10**9 + 7]))
        ),
        "gbps": draw(st.sampled_from([0.001, 0.1, 100])),
    }


def both_modes(
    make: Callable[[], System], world: dict[str, Any], requests: list[Request], **more: Any
) -> tuple[Result, Result]:
    limits = world["limits"]
    if make().name in OF_NODES:
        limits = limits | {"prefix_caching": False, "async_scheduling": False}
    system = with_limits(make(), **limits)
    where = problem(cluster(gpus=2, nodes=2, gbps=world["gbps"]), world["cost"])
    more["predictor"] = system.predictor or TrueLength()
    collapsed = run(system, requests, where, **more)
    return collapsed, run(with_limits(make(), **limits), requests, where, step_by_step=True, **more)


def check(collapsed: Result, stepped: Result, requests: list[Request]) -> None:
    assert collapsed.log() == stepped.log()
    assert len(collapsed.rows.requests) == len(requests)
    assert collapsed.iterations == stepped.iterations
    assert collapsed.segments <= stepped.segments == stepped.iterations
    busy = [[row.stage_busy_s for row in result.rows.replicas] for result in (collapsed, stepped)]
    assert busy[0] == busy[1]
    for row in collapsed.rows.requests:
        if row.outcome == "completed":
            times = collapsed.token_times_ps(row.request.id)
            assert len(times) == row.request.output_tokens
            assert times == sorted(times)
            assert times[0] == row.first_token_ps
            assert times[-1] == row.finish_ps


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=25)
@given(world=worlds(), requests=traffic())
def test_collapsing_changes_nothing(name: str, world: dict[str, Any], requests: list[Request]) -> None:
    check(*both_modes(SETTINGS[name], world, requests), requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=40)
@given(world=worlds(), requests=traffic())
def test_collapsing_changes_nothing_in_more_worlds(name: str, world: dict[str, Any], requests: list[Request]) -> None:
    check(*both_modes(SETTINGS[name], world, requests), requests)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10)
@given(world=worlds(), requests=traffic(), data=st.data())
def test_collapsing_changes_nothing_under_faults(
    name: str, world: dict[str, Any], requests: list[Request], data: st.DataObject
) -> None:
    lost = data.draw(st.sampled_from(["n0", "n1", "n0.g1"]))
    at_s = data.draw(st.sampled_from([0.02, 0.5, 1.0]))
    events = (
        ClusterEvent(at_s=at_s / 2, kind="gpu_slow", target="n1.g0", factor=1.5),
        data.draw(
            st.sampled_from(
                [
                    ClusterEvent(at_s=at_s, kind="node_lost", target=lost),
                    ClusterEvent(at_s=at_s, kind="spot_notice", target=lost, deadline_s=0.3),
                ]
            )
        ),
        ClusterEvent(at_s=at_s, kind="link_scaled", target="nic:n0:out", factor=0.5),
        ClusterEvent(at_s=at_s + 0.7, kind="gpu_joined", target=lost),
    )
    check(*both_modes(SETTINGS[name], world, requests, events=events), requests)


@settings(max_examples=10)
@given(world=worlds(), requests=traffic())
def test_equal_runs_give_equal_bytes(world: dict[str, Any], requests: list[Request]) -> None:
    system = with_limits(SETTINGS["vllm v1"](), **world["limits"])
    first, second = (run(system, requests, problem(cluster(2, 2), world["cost"])) for _ in range(2))
    assert first.log() == second.log()
