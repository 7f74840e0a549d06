"""A plan in words, for a person in a hurry: what to rent, how to lay it out, what it carries, what binds, what next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sim.planners.thunderserve.capacity import Bound
from sim.types import Replica, Role

if TYPE_CHECKING:
    from experiments.planning.plan import Found, Option

CHEAPER = 1.02
"""So many times as many requests per dollar are worth a word."""
CALLED: dict[Role, str] = {"prefill": "prefill", "decode": "decode", "mixed": "colocated"}


def told(option: Option, found: Found) -> list[str]:
    """The sentence, the bound with the gap, the least rent for the asked rate, and colocated vLLM beside it."""
    if found.bound is None:
        return []
    asked = option.setup.scenario.workload.rate
    lines = [sentence(option, found.bound), bound_line(option, found.bound)]
    if found.cheapest is not None and asked is not None:
        lines.append(cheapest_line(found.cheapest, asked))
    elif asked is not None and (option.goodput_per_s or 0.0) < asked:
        lines.append(f"No plan found carries the {asked:.4g} requests/s asked for.")
    return [*lines, *beside(option, found.baselines)]


def told_json(options: Sequence[Option], found: Found) -> dict[str, Any]:
    """What is printed, for programs."""
    data: dict[str, Any] = {"plans": [option.row() for option in options]}
    if found.notes:
        data["notes"] = list(found.notes)
    if found.bound is not None:
        best = options[0].goodput_per_s
        data |= {
            "sentence": sentence(options[0], found.bound),
            "bound": {
                "rate_per_s": found.bound.rate_per_s,
                "gap": 1 - best / found.bound.rate_per_s if best and found.bound.rate_per_s else None,
                "binds": found.bound.binds,
                "adds_per_s": dict(found.bound.adds),
            },
            "cheapest": None if found.cheapest is None else found.cheapest.row(),
            "baselines": [one.row() for one in found.baselines],
        }
    return data


def sentence(option: Option, bound: Bound) -> str:
    """``Rent 4 A100-80G-SXM ($5.6/h), 2 prefill on ..., and it carries 31 requests/s, 86 % of ...``"""
    problem = option.setup.problem
    gpus = Counter(problem.cluster.gpu(gpu).name for gpu in option.gpus)
    rent = "" if option.usd_per_hour is None else f" for {option.usd_per_hour:.4g} $/h"
    carried = option.goodput_per_s
    rate = "carries nothing within the SLO" if carried is None else f"carries {carried:.4g} requests/s within the SLO"
    share = "" if not carried or not bound.rate_per_s else f" ({carried / bound.rate_per_s:.0%} of the bound)"
    binds = "" if option.binds is None else f"; first it is held by {option.binds}"
    return (
        f"Rent {', '.join(f'{count} {name}' for name, count in gpus.items())}{rent} and serve with {layout(option)}: "
        f"it {rate}{share}{binds}; {_next(option, bound)}."
    )


def layout(option: Option) -> str:
    """``2 prefill (A100, TP 1) + 4 decode (L4, TP 2)``, with the system if it is another than the one asked for."""
    cluster = option.setup.problem.cluster

    def hardware(replica: Replica) -> str:
        stages = [f"{cluster.gpu(stage.gpus[0]).name}, TP {stage.tp}" for stage in replica.stages]
        if len(set(stages)) == 1:
            return stages[0] + (f", PP {len(stages)}" if len(stages) > 1 else "")
        return " | ".join(stages)

    alike = Counter((replica.role, hardware(replica)) for replica in option.plan.replicas)
    return " + ".join(f"{count} {CALLED[role]} ({what})" for (role, what), count in alike.items())


def bound_line(option: Option, bound: Bound) -> str:
    """As a MILP solver ends: best, bound and gap."""
    best = option.goodput_per_s or 0.0
    gap = f"gap {1 - best / bound.rate_per_s:.1%}" if bound.rate_per_s else "no gap"
    return f"best {best:.4g} requests/s, upper bound {bound.rate_per_s:.4g} by the capacity LP ({bound.binds}), {gap}"


def beside(option: Option, baselines: Sequence[Option]) -> list[str]:
    """What colocated vLLM does on the same machines: always its best, and who is better or cheaper per request."""
    lines = []
    rated = [one for one in baselines if one.goodput_per_s]
    for one in sorted(rated, key=lambda one: -(one.goodput_per_s or 0.0)):
        remarks = []
        if (one.goodput_per_s or 0.0) > (option.goodput_per_s or 0.0):
            remarks.append("more than the plan")
        mine, theirs = option.requests_per_usd, one.requests_per_usd
        if mine and theirs and theirs > CHEAPER * mine:
            remarks.append(f"{theirs / mine:.2f} times as many requests per dollar as the plan")
        said = f": {', and '.join(remarks)}" if remarks else ""
        rent = "" if one.usd_per_hour is None else f" for {one.usd_per_hour:.4g} $/h"
        lines.append(f"{one.label}: {one.goodput_per_s:.4g} requests/s{rent}{said}")
    return lines


def cheapest_line(option: Option, rate_per_s: float) -> str:
    gpus = Counter(option.setup.problem.cluster.gpu(gpu).name for gpu in option.gpus)
    what = ", ".join(f"{count} {name}" for name, count in gpus.items())
    return (
        f"Least rent found for the {rate_per_s:.4g} requests/s asked for: {what}, {option.usd_per_hour:.4g} $/h, "
        f"{layout(option)} ({option.setup.system.name}; {option.label})"
    )


def _next(option: Option, bound: Bound) -> str:
    """What one more of would add most, for a dollar where prices are known."""
    cluster = option.setup.problem.cluster
    prices = {node.gpu.name: node.gpu.usd_per_hour for node in cluster.nodes}
    gpus = {name: gain for name, gain in bound.adds.items() if name in prices and gain > 0}
    links = {name: gain for name, gain in bound.adds.items() if name not in prices and gain > 1e-6}
    if not gpus:
        return (
            "more GPUs of these types would add nothing" if not links else f"widen {max(links, key=lambda k: links[k])}"
        )
    known = all(prices[name] for name in gpus)
    best = max(gpus, key=lambda name: gpus[name] / ((prices[name] or 1.0) if known else 1.0))
    text = f"next add {best} (+{gpus[best]:.3g} requests/s a GPU by the bound)"
    widest = max(links, key=lambda name: links[name], default=None)
    return text if widest is None else f"{text}, or widen {widest} (+{links[widest]:.3g} for a tenth more)"
