"""Metis's figures beside ours: ``python -m experiments.studies.metis --out docs/studies/metis [--quick]``.

Um et al., Metis: Fast Automatic Distributed Training on Heterogeneous GPUs (USENIX ATC 2024).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from experiments.studies.thunderserve.world import (
    FULL,
    QUICK,
    Served,
    Size,
    best,
    colocated,
    hexgen2,
    problem,
    thunderserve,
)
from experiments.studies.thunderserve.world import two_kinds as a40_and_3090
from sim import SYSTEMS, Cluster, Plan
from sim.cost import Roofline
from sim.model import model
from sim.planners.metis.balance import balanced
from sim.planners.metis.groups import device_groups
from sim.planners.metis.training import Machine, Profile, Training
from sim.planners.pools import evenly
from sim.types import PS_PER_S, Stage, Work

INTRO = """
Metis (USENIX ATC 2024) plans *training* over GPUs of several types: which type comes first in a pipeline, how many GPUs
each stage has, how it divides them between data and tensor parallelism, and how many layers it gets. Its text was not
available to us; its public repository was, whose logs are what stands here as published. Its code and its profiles may
not be redistributed, so of the profiles only the sums that two rows need are repeated, and the T4's are not public at
all: where one is needed, forward passes of our roofline stand in.

How many plans are searched must agree exactly, and so must the price of a training step (two uniform plans whose price
needs no times of single layers; by hand we also compared five of several stages, without the activations between
stages, which the log leaves out: two agree, and three are 0.02 to 0.05 % above the log, which charges the optimizer
for an equal share of the layers and not for the largest stage's).

What Metis gains in training is printed as a range over models, clusters and baselines that we do not know. Ours is one
cell: GPT of eight blocks on 8 A100 and 8 T4 (machines of four, links of 46 and 10 GB/s), against the best plan of equal
stages with equal layers and equal shares of the samples.

The T4 gets four of ten layers in its log and one of ten from us: its A100 profile (29.5 ms for a block forward and
backward at one sample) is at about 13 % of the A100's peak, where the roofline's is well above, so that its types are
nearer to each other.

The rest is ours: the planner carried over to serving. Every GPU goes to a prefill or to a decode pool, each laid out by
Metis's search with prices of prefill steps and decode steps. Data parallelism inside a stage becomes replicas, so all
stages of a pool have the same degree of it. Metis takes the largest degree that memory allows; with "exhaustive" we
let it try all of them. Model, traffic and SLO are those of [ThunderServe's
study](../thunderserve/study_thunderserve.md): LLaMA-30B, conversation, 90 % of the requests within 20 times what the
mean request takes alone on two A100. "Even layers" is the same plan with as many layers in every stage. HexGen-2 and
ThunderServe (KV in 16 bits, so that only the plans differ) take the best of five candidates in the engine; vLLM is
colocated at its best TP degree, on replicas of one type each.

Trying every degree gains over the largest one: by 1.25 times on two types, by 1.02 on three. Layers by ability matter
where pipelines mix types (three types: without them a 3090 Ti has no room for its stage in one plan, the other
serves a third less); on two types the plan has one mixed pipeline and gains nothing by them. Of the planners the
exhaustive search is level with HexGen-2 and below ThunderServe on two types, and above both on three. It models no
queues, plans for no rate, and its pools must use every GPU, in groups of powers of two.

Regenerate with `python -m experiments.studies.metis --out docs/studies/metis`.
"""
LISTS = (1, 1, 3, 1, 7, 6, 4, 1)
"""Of 8 GPUs, by stages (results/het_search_space)."""
STEPS = {(8, 1): (236.763, 292.796, 5170.046), (4, 2): (136.218, 167.600, 5599.803)}
"""By data and tensor parallelism: ms of the layers, of a whole pass (profile_data_samples), and of a training step
(results/homo_cost_model)."""
LOGGED_PARAMETER_BYTES = 2.3491e9
"""What the logs were made with."""
BLOCKS, SEQUENCE, LONGEST = 8, 1024, 16
"""The repository's example: transformer blocks between embedding and head, tokens of a sample, samples at once."""


def study(size: Size, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    yield from counts()
    yield from prices()
    yield from t4_layers()
    yield from training_gain(log)
    for name, cluster in clusters().items():
        yield from served(name, cluster, size, log)


# ---------------------------------------------------------------- the planner of training


def counts() -> Iterator[Comparison]:
    """Lists of GPUs by stage."""

    def row_of(what: str, published: int, ours: int, where: str = "Its code, run") -> Comparison:
        return row(where, what, published, ours, "", "arithmetic", kind="exact")

    for stages, printed in enumerate(LISTS, start=1):
        ours = len(device_groups(8, stages))
        yield row_of(f"device groups, 8 GPUs, stages: {stages}", printed, ours, "Its log")
    for gpus, stages, printed in ((8, 8, 56), (16, 10, 3282)):
        found = [device_groups(gpus, s, variance=0.0, max_permute_len=None) for s in range(1, stages + 1)]
        yield row_of(f"device groups, {gpus} GPUs, unpruned", printed, sum(map(len, found)))
    pruned = sum(len(device_groups(16, stages)) for stages in range(1, 11))
    yield row_of("device groups, 16 GPUs, pruned", 79, pruned)


def prices() -> Iterator[Comparison]:
    """Uniform plans of 8 A100 in two machines, one stage, one sample a micro-batch."""
    for (dp, tp), (layers_ms, whole_ms, step_ms) in STEPS.items():
        key = ("A100", tp, 1)
        profile = Profile(
            layer_ms={key: (layers_ms,)},
            sync_ms={key: whole_ms - layers_ms},
            layer_mib={key: (1.0,)},
            parameter_bytes=(round(LOGGED_PARAMETER_BYTES),),
            optimizer_ms=39.309,
            batch_ms=0.9145,
            hidden=4096,
            sequence=SEQUENCE,
        )
        planner = Training(profile=profile, machines=[Machine("A100", 4, 81920, inside=46, outside=10)] * 2)
        found = planner.priced(("A100",), (8,), 128 // dp, ((dp, tp),), (0, 1))
        what = f"training step, dp {dp}, tp {tp}"
        yield row("Its log", what, step_ms, found.step_ms, "ms", "arithmetic", kind="exact")


def forward_ms(gpu: str, tp: int, samples: int) -> float:
    """Of one block of the example, by the roofline."""
    spec = model("llama-2-7b")  # its blocks have as many parameters
    where = Cluster.of([{"gpu": gpu, "count": 4}])

    def seconds(layers: int) -> float:
        stage = Stage(name="blocks", gpus=where.gpu_ids[:tp], first_layer=1, end_layer=1 + layers)
        work = Work(((SEQUENCE, 0),) * samples, 0, 0)
        return Roofline().bind(spec, stage, where).line(work).first_ps / PS_PER_S

    return 1000 * (seconds(2) - seconds(1))


def t4_layers() -> Iterator[Comparison]:
    """8 T4, then 8 A100, either as four replicas of TP 2, 8 micro-batches of 128 samples."""
    loads = [0.0, *[1.0] * BLOCKS, 0.0]
    bounds = balanced(loads, [1 / forward_ms(gpu, 2, 4) for gpu in ("T4", "A100-80G-SXM")])
    assert bounds is not None
    blocks = min(max(bounds[1] - 1, 0), BLOCKS)
    yield row("Its log", "layers of the T4 stage in its best plan, of 10", 4, 1 + blocks, "",
              note="ours: forward passes by the roofline; the T4's profile is not public")  # fmt: skip


def training_gain(log: Log) -> Iterator[Comparison]:
    """The best plan over the best one of equal stages, layers, degrees and shares."""
    planner = Training(profile=roofline_profile(), machines=machines())
    found = planner.search()[0]
    log.say(f"training: {found}")
    layers = [end - first for first, end in pairwise(found.bounds)]
    note = f"{' then '.join(found.order)}; GPUs by stage {list(found.groups)}, layers {layers}"
    yield row("Abstract", "training, over the best uniform plan", None, uniform_ms(planner) / found.step_ms, "x",
              kind="direction", text="1.05 to 8.43x", note=note)  # fmt: skip


def machines() -> list[Machine]:
    a100, t4 = Machine("A100", 4, 81920, inside=46, outside=10), Machine("T4", 4, 15360, inside=50, outside=10)
    return [a100, a100, t4, t4]


def roofline_profile() -> Profile:
    """Forward and backward as three forward passes; embedding and head as next to nothing; memory as parameters."""
    gpus = {"A100": "A100-80G-SXM", "T4": "T4"}
    keys = [(kind, tp, 1 << k) for kind in gpus for tp in (1, 2, 4) for k in range(LONGEST.bit_length())]
    parameters = [393216000, *[202383360] * BLOCKS, 393216000]
    times = {key: 3 * forward_ms(gpus[key[0]], key[1], key[2]) for key in keys}
    return Profile(
        layer_ms={key: [0.01 * ms, *[ms] * BLOCKS, 0.01 * ms] for key, ms in times.items()},
        sync_ms=dict.fromkeys(keys, 0.0),
        layer_mib={key: [size / 2**20 / key[1] for size in parameters] for key in keys},
        parameter_bytes=parameters,
        optimizer_ms=39.3,
        batch_ms=0.9,
        hidden=4096,
        sequence=SEQUENCE,
    )


def uniform_ms(planner: Training) -> float:
    """Of the best plan with equal stages and shares: all GPUs in one, which waits for T4, or a type in each of two."""
    slow = replace(planner, machines=[machine._replace(kind="T4") for machine in planner.machines])
    layers, found = planner.profile.layers, []
    for stages, orders in ((1, [("T4",)]), (2, [("A100", "T4"), ("T4", "A100")])):
        bounds = tuple(layers * k // stages for k in range(stages + 1))
        for tp, samples in product((1, 2, 4), (1, 2, 4, 8, 16)):
            degree = (16 // stages // tp, tp)
            if micro_batches := planner.batch // degree[0] // samples:
                shape = ((16 // stages,) * stages, micro_batches, (degree,) * stages, bounds)
                priced = [(slow if stages == 1 else planner).priced(order, *shape).step_ms for order in orders]
                found.append(min(priced))
    return min(found)


# ---------------------------------------------------------------- serving


def clusters() -> Mapping[str, Cluster]:
    three = [{"gpu": gpu, "count": 4} for gpu in ("A100-80G-SXM", "A40", "RTX-3090-Ti")]
    return {
        "4 A40 + 4 3090 Ti": a40_and_3090(40.0),
        "4 A100 + 4 A40 + 4 3090 Ti": Cluster.of(three, links={"inter_node": {"gbps": 100, "latency_us": 50}}),
    }


def served(name: str, cluster: Cluster, size: Size, log: Log) -> Iterator[Comparison]:
    """Rates within the SLO, of Metis's plans and of others on the same GPUs."""
    where = problem(cluster, "conversation")
    found = {
        "Metis": best(where, [SYSTEMS["metis"]()], 1.0, size),
        "Metis, exhaustive": best(where, [SYSTEMS["metis"](exhaustive=True)], 1.0, size),
    }
    found |= {f"{how}, even layers": leveled(one, size) for how, one in list(found.items())}
    found |= {
        "HexGen-2": best(where, [hexgen2(size)], 1.0, size),
        "ThunderServe": best(where, [thunderserve(size, bits=16)], 1.0, size),
        "vLLM V1": best(where, colocated("v1"), 1.0, size),
    }
    for how, one in found.items():
        log.say(f"{name}, {how}: {one.rate_per_s:.2f} requests/s; {shape(one.plan, cluster)}")
        yield row("-", f"{name}, {how}", None, one.rate_per_s or None, "1/s", text="-", note=shape(one.plan, cluster))


def leveled(one: Served, size: Size) -> Served:
    """The same stages with as many layers each."""
    replicas = tuple(
        evenly(one.problem.model, each.name, each.role, [stage.gpus for stage in each.stages])
        for each in one.plan.replicas
    )
    return replace(one, plan=replace(one.plan, replicas=replicas)).found(1.0, size)


def shape(plan: Plan, cluster: Cluster) -> str:
    """``prefill 2 x (1 A40: 30 + 1 A40: 30)``: replicas by stages, GPUs and layers."""
    replicas = Counter(
        (one.role, " + ".join(f"{s.tp} {cluster.gpu(s.gpus[0]).name}: {s.num_layers}" for s in one.stages))
        for one in plan.replicas
    )
    return "; ".join(f"{role} {count} x ({stages})" for (role, stages), count in replicas.items())


STUDY = Study(
    name="study_metis",
    title="Metis: published and simulated",
    intro=INTRO,
    sizes={"": (FULL, ""), "quick": (QUICK, "fewer requests, shorter searches")},
    rows=study,
)

if __name__ == "__main__":
    STUDY.main()
