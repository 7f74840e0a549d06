"""Helix's figures beside ours: ``python -m experiments.studies.helix --out docs/studies/helix [--quick]``.

Mei et al., Helix: Serving Large Language Models over Heterogeneous GPUs and Network via Max-Flow (ASPLOS 2025;
arXiv 2406.01566), cluster A: 4 A100-40G, 8 L4 and 12 T4 in machines of one GPU each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from calibrate.profile.file import read_profile, shipped_profiles
from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from sim import SYSTEMS, Cluster, Plan, Problem, Request, Result, Workload, simulate
from sim.cost import Fitted, Roofline
from sim.model import model
from sim.planners.helix import END, Held, HelixPlacement, Placement, Typical, plan_of
from sim.policy import Source
from sim.types import PS_PER_S, InfeasibleError
from traces import ClosedLoop, TraceSource, read, resample, sample_path

INTRO = """
Helix (ASPLOS 2025) spreads the layers of one model over unequal machines so that the max-flow from the first to the
last layer is largest, and sends every request on a path of its own. Step times are those of its artifact (profile
`helix-2025`); requests have the lengths of Azure conversations that Helix kept (4 to 2048 tokens in, 4 to 1024 out),
drawn from the shipped sample. Links have 8 Gbit/s and 1 ms. KV memory is by our own model, of 95 % of a GPU.

Placements of Helix and Swarm for Llama-2-70B are the artifact's; "placed by us" and all others are ours: Gurobi ran for
up to ten hours for the paper's. HiGHS finds less in minutes than moves of one or two machines' layers do in seconds, so
our search starts from the baselines' placements and moves on. A flow counts tokens of prompts and answers at a fill of
KV of 30 %, as in the artifact: a yardstick, not a forecast, as two placements of the same flow show here. With the
artifact's own memory of KV, its placements pass what it prints, to the last digit (a test); with ours, a fifth more.

Offline: so many users send one request after the other; the number with the highest throughput counts (the artifact
fills KV up to a mark). Online: the offered loads are the paper's, which feeds each system near its own limit.
Throughput is answer tokens per second from the second minute on. "Swarm" is its placement under our routing by flow;
"SP", a pipeline for each kind of machine, leaves out kinds that cannot hold the model.

Regenerate with `python -m experiments.studies.helix --out docs/studies/helix`.
"""
CLUSTER = {"A100-40G-SXM": 4, "L4": 8, "T4": 12}
WARM_UP_S = 60.0
USERS = (128, 256, 512, 768)


class Scale(NamedTuple):
    """Simulated seconds, moves of the search, and which numbers of users are tried."""

    duration_s: float
    moves: int
    users: tuple[int, ...]


FULL, QUICK = Scale(660.0, 20_000, USERS), Scale(120.0, 500, (128,))


class Setting(NamedTuple):
    """A model, and what the paper printed: (offline, online, offered tokens/s) of each system."""

    name: str
    printed: dict[str, tuple[float, float, float]]
    figures: tuple[str, str]


OURS = "Helix, placed by us"
SETTINGS = (
    Setting(
        "llama-2-70b",
        {
            "Helix": (252.1, 141.6, 700.0),
            OURS: (252.1, 141.6, 700.0),
            "Swarm": (124.7, 69.8, 350.0),
            "SP": (124.3, 84.0, 370.0),
        },
        ("Fig. 5c", "Fig. 5d"),
    ),
    Setting(
        "llama-30b",
        {OURS: (339.6, 216.7, 970.0), "Swarm": (151.6, 104.9, 450.0), "SP": (309.0, 189.8, 800.0)},
        ("Fig. 5a", "Fig. 5b"),
    ),
)
SEARCHED: dict[str, Placement] = {OURS: "helix", "Petals": "petals", "Swarm": "swarm", "SP": "separate"}
PRINTED_FLOWS = {"Helix": 1289.5557702751464, OURS: 1289.5557702751464, "Swarm": 757.853, "Petals": 952.107}
SHIPPED = {
    "Helix": {
        "A100-40G-SXM": [(14, 23), (37, 49), (60, 68), (68, 77)],
        "L4": [(3, 7), (7, 11), (26, 33), (42, 49), (46, 53), (53, 60), (53, 60), (53, 60)],
        "T4": [
            (0, 3), (11, 14), (23, 25), (25, 26), (26, 30), (30, 34),
            (33, 37), (34, 38), (38, 42), (42, 46), (49, 53), (77, 80),
        ],
    },
    "Swarm": {
        "A100-40G-SXM": [(layer, layer + 4) for layer in range(0, 16, 4)],
        "L4": [(layer, layer + 4) for layer in range(16, 48, 4)],
        "T4": [(layer, layer + 4) for layer in (48, 48, 52, 52, 56, 56, 60, 60, 64, 68, 72, 76)],
    },
}  # fmt: skip
"""Layers of each machine in the artifact's placements of 70B (Thesys-lab/Helix-ASPLOS25 148b733, Apache-2.0,
artifact_evaluation/single_cluster/layout_llama70b, ilp_sol.ini and swarm_sol.ini)."""


def study(scale: Scale, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    for setting in SETTINGS:
        where = problem(setting.name)
        plans = dict(placed(where, scale, log))
        if setting.name == "llama-2-70b":
            plans |= {name: shipped(where, SHIPPED[name]) for name in SHIPPED}
            yield from flows(where, plans)
        yield from served(setting, where, plans, scale, log)


def shipped(where: Problem, layers: Mapping[str, Sequence[tuple[int, int]]]) -> Plan:
    """The artifact's placement on our machines of the same kinds."""
    network = HelixPlacement(placement="separate").network(where)  # which counts all layers that fit
    left = {kind: iter(held) for kind, held in layers.items()}
    held = [Held(*next(left[where.cluster.gpu(machine.gpus[0]).name])) for machine in network.machines]
    return plan_of(network, held)


def problem(name: str) -> Problem:
    """Cluster A with the step times of the artifact."""
    profile = read_profile(shipped_profiles()["helix-2025"])
    lengths = tuple((r.input_tokens, r.output_tokens) for r in requests(500, 1.0))
    system = SYSTEMS["helix"]()
    return Problem(
        cluster=Cluster.of(
            nodes=[{"gpu": gpu, "count": 1, "nodes": count} for gpu, count in CLUSTER.items()],
            links={"inter_node": {"gbps": 8, "latency_us": 1000}},
        ),
        model=replace(model(name), max_position_embeddings=4096),
        cost=Fitted(profiles=(profile,), fallback=Roofline()),
        workload=Workload(rate_per_s=1.0, lengths=lengths),
        limits=replace(system.limits, gpu_memory_utilization=0.95, max_num_seqs=4096),
    )


def requests(count: int, rate_per_s: float) -> list[Request]:
    """Conversations within Helix's bounds, as Poisson arrivals."""
    kept = [r for r in read(sample_path()) if 4 <= r.input_tokens <= 2048 and 4 <= r.output_tokens <= 1024]
    return list(resample(kept, count, rate_per_s, arrivals="poisson", cv=None, seed=0))


def placed(where: Problem, scale: Scale, log: Log) -> Iterator[tuple[str, Plan]]:
    for name, placement in SEARCHED.items():
        log.say(f"{where.model.name}: the placement of {name}")
        try:
            yield name, HelixPlacement(placement=placement, moves=scale.moves, typical=Typical()).plan(where)
        except InfeasibleError as error:
            log.say(str(error))


def flows(where: Problem, plans: Mapping[str, Plan]) -> Iterator[Comparison]:
    """What placements let through, by our throughputs and theirs (its readme; Swarm's and Petals' recomputed)."""
    bound = HelixPlacement().network(where).upper_bound
    yield row("artifact", "70B, upper bound of the flow", 2803.860988, bound, "tokens/s", "measured profile")
    for name, printed in PRINTED_FLOWS.items():
        flow = sum(flow for (source, _), flow in plans[name].flows.items() if source == END)
        note = "the shipped placement, our KV memory" if name in SHIPPED else "another placement, our KV memory"
        yield row("artifact", f"70B, max-flow of {name}", printed, flow, "tokens/s", "measured profile", note=note)


def served(setting: Setting, where: Problem, plans: Mapping[str, Plan], scale: Scale, log: Log) -> Iterator[Comparison]:
    offline: dict[str, float] = {}
    for name, printed in setting.printed.items():
        if name not in plans:
            continue
        log.say(f"{setting.name}: {name} serves")
        offline[name], users = max((rate(where, plans[name], scale, users), users) for users in scale.users)
        what = f"{setting.name}, {name}, offline"
        note = f"{users} users"
        yield row(setting.figures[0], what, printed[0], offline[name], "tokens/s", "measured profile", note=note)
        online = rate(where, plans[name], scale, None, printed[2])
        what = f"{setting.name}, {name}, online at {printed[2]:g} tokens/s offered"
        yield row(setting.figures[1], what, printed[1], online, "tokens/s", "measured profile")
    best = "Helix" if "Helix" in offline else OURS
    for other in ("Swarm", "SP"):
        if other in offline:
            theirs = setting.printed[best][0] / setting.printed[other][0]
            what = f"{setting.name}, {best} over {other}, offline"
            yield row(setting.figures[0], what, theirs, offline[best] / offline[other], "x", "measured profile")


def rate(where: Problem, plan: Plan, scale: Scale, users: int | None, offered: float | None = None) -> float:
    """Answer tokens per second after the warm-up, of so many users or of tokens per second ``offered``."""
    mean = where.workload.mean_input_tokens + where.workload.mean_output_tokens
    if users is not None:
        source: Source = ClosedLoop(requests(40 * users, 1.0), users=users)
        system = SYSTEMS["helix"](high_water=0.85, output_ratio=1.0)
    else:
        assert offered is not None
        per_s = offered / mean
        source = TraceSource(requests(round(per_s * scale.duration_s), per_s))
        system = SYSTEMS["helix"](high_water=0.9, output_ratio=0.6)
    system = system.with_limits(where.limits)
    result = simulate(where, system, source, plan=plan, until_s=scale.duration_s)
    return tokens_after(result, WARM_UP_S) / (scale.duration_s - WARM_UP_S)


def tokens_after(result: Result, start_s: float) -> int:
    """Answer tokens that came out later."""
    start_ps = round(start_s * PS_PER_S)
    return sum(at > start_ps for r in result.rows.requests for at in result.token_times_ps(r.request.id))


STUDY = Study(
    name="study_helix",
    title="Helix (ASPLOS 2025): published figures and ours",
    intro=INTRO,
    sizes={"": (FULL, ""), "quick": (QUICK, "three simulated minutes, one number of users, a short search")},
    rows=study,
)

if __name__ == "__main__":
    STUDY.main()
