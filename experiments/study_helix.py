"""Helix's figures beside ours: ``python -m experiments.study_helix --out docs [--quick]``.

Mei et al., Helix: Serving Large Language Models over Heterogeneous GPUs and Network via Max-Flow (ASPLOS 2025;
arXiv 2406.01566), cluster A: 4 A100-40G, 8 L4 and 12 T4 in machines of one GPU each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from calibrate.profile_file import read_profile, shipped_profiles
from experiments.progress import Log
from experiments.study import Comparison, Study, row
from sim import SYSTEMS, Cluster, Plan, Problem, Request, Result, Workload, simulate
from sim.cost import Fitted, Roofline
from sim.model import model
from sim.planners.helix import END, HelixPlacement, Placement, Typical
from sim.policy import Source
from sim.types import PS_PER_S, InfeasibleError
from traces import ClosedLoop, TraceSource, read, resample, sample_path

INTRO = """
Helix (ASPLOS 2025) spreads the layers of one model over unequal machines so that the max-flow from the first to the
last layer is largest, and sends every request on a path of its own. Step times are those of its artifact (profile
`helix-2025`); requests have the lengths of Azure conversations that Helix kept (4 to 2048 tokens in, 4 to 1024 out),
drawn from the shipped sample. Links have 8 Gbit/s and 1 ms. KV memory is by our own model, of 95 % of a GPU.

Placements are our own: Gurobi ran for up to ten hours for the paper's. HiGHS finds less in minutes than moves of one or
two machines' layers do in seconds, so the search here starts from the baselines' placements and moves on. A flow
counts tokens of prompts and answers at a fill of KV of 30 %, as in the artifact: a yardstick, not a forecast.

Offline: so many users send one request after the other; the number with the highest throughput counts (the artifact
fills KV up to a mark). Online: the offered loads are the paper's, which feeds each system near its own limit.
Throughput is answer tokens per second from the second minute on. "Swarm" is its placement under our routing by flow;
"SP", a pipeline for each kind of machine, leaves out kinds that cannot hold the model.

Regenerate with `python -m experiments.study_helix --out docs`.
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
    """A model, and what the paper printed: (offline, online, offered tokens/s) of each placement."""

    name: str
    printed: dict[Placement, tuple[float, float, float]]
    figures: tuple[str, str]


SETTINGS = (
    Setting(
        "llama-2-70b",
        {"helix": (252.1, 141.6, 700.0), "swarm": (124.7, 69.8, 350.0), "separate": (124.3, 84.0, 370.0)},
        ("Fig. 5c", "Fig. 5d"),
    ),
    Setting(
        "llama-30b",
        {"helix": (339.6, 216.7, 970.0), "swarm": (151.6, 104.9, 450.0), "separate": (309.0, 189.8, 800.0)},
        ("Fig. 5a", "Fig. 5b"),
    ),
)
PRINTED_FLOWS: dict[Placement, float] = {"helix": 1289.5557702751464, "swarm": 757.853, "petals": 952.107}
NAMES: dict[Placement, str] = {"helix": "Helix", "swarm": "Swarm", "separate": "SP", "petals": "Petals"}


def study(scale: Scale, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    for setting in SETTINGS:
        where = problem(setting.name)
        plans = dict(placed(where, scale, log))
        if setting.name == "llama-2-70b":
            yield from flows(where, plans)
        yield from served(setting, where, plans, scale, log)


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


def placed(where: Problem, scale: Scale, log: Log) -> Iterator[tuple[Placement, Plan]]:
    for placement in NAMES:
        log.say(f"{where.model.name}: the placement of {NAMES[placement]}")
        try:
            yield placement, HelixPlacement(placement=placement, moves=scale.moves, typical=Typical()).plan(where)
        except InfeasibleError as error:
            log.say(str(error))


def flows(where: Problem, plans: dict[Placement, Plan]) -> Iterator[Comparison]:
    """What placements let through, against the artifact's own (its readme; Swarm's and Petals' recomputed)."""
    bound = HelixPlacement().network(where).upper_bound
    yield row("artifact", "70B, upper bound of the flow", 2803.860988, bound, "tokens/s", "measured profile")
    for placement, printed in PRINTED_FLOWS.items():
        plan = plans[placement]
        flow = sum(flow for (source, _), flow in plan.flows.items() if source == END)
        what = f"70B, max-flow of the placement of {NAMES[placement]}"
        note = "another placement than the shipped one, other KV memory"
        yield row("artifact", what, printed, flow, "tokens/s", "measured profile", note=note)


def served(
    setting: Setting, where: Problem, plans: dict[Placement, Plan], scale: Scale, log: Log
) -> Iterator[Comparison]:
    offline: dict[Placement, float] = {}
    for placement, printed in setting.printed.items():
        if placement not in plans:
            continue
        log.say(f"{setting.name}: {NAMES[placement]} serves")
        offline[placement], users = max((rate(where, plans[placement], scale, users), users) for users in scale.users)
        note = f"{users} users"
        what = f"{setting.name}, {NAMES[placement]}, offline"
        yield row(setting.figures[0], what, printed[0], offline[placement], "tokens/s", "measured profile", note=note)
        online = rate(where, plans[placement], scale, None, printed[2])
        what = f"{setting.name}, {NAMES[placement]}, online at {printed[2]:g} tokens/s offered"
        yield row(setting.figures[1], what, printed[1], online, "tokens/s", "measured profile")
    for other in ("swarm", "separate"):
        if other in offline:
            ours = offline["helix"] / offline[other]
            theirs = setting.printed["helix"][0] / setting.printed[other][0]
            what = f"{setting.name}, Helix over {NAMES[other]}, offline"
            yield row(setting.figures[0], what, theirs, ours, "x", "measured profile")


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
