"""A plan over its cluster: who has which GPUs in which phase, and who sends to whom; and how a search went."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from experiments.plots.style import PHASE_COLOURS, RUN_COLOURS, TRANSFER_COLOUR, Drawing, styled
from sim.cluster import Cluster
from sim.planners.thunderserve import LogRow
from sim.types import Plan, Replica

GPUS_A_ROW = 4
MACHINES_A_ROW = 3
SHADES = (0.0, 0.35, 0.6, 0.18)
"""How far the phase's colour is mixed with white, in turn, so that neighbours differ."""
IDLE = "#eeeeee"
WIDEST = 7.0
"""Points, of the arrow with the largest share."""
MOST_LABELS = 24
MOST_BOXES = 10
"""Replicas that have a box each."""


def search_curve(log: Sequence[LogRow]) -> Drawing:
    """Every evaluation, and the best value so far."""
    table = pd.DataFrame(log)
    with styled():
        figure = Figure(figsize=(7.5, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.scatter(table["evaluation"], table["value"], s=8, color=RUN_COLOURS[6], label="evaluated")
        axes.step(table["evaluation"], table["best"], where="post", color=RUN_COLOURS[0], label="best so far")
        axes.set_xlabel("evaluation")
        flows = table["best"].max() > 1
        axes.set_ylabel("flow over arrival rate" if flows else "predicted share of requests within the SLO")
        axes.set_ylim(0, None if flows else 1.03)
        figure.suptitle(
            f"{len(table)} plans evaluated in {table['elapsed_s'].max():.1f} s", x=0.01, ha="left", fontsize=10
        )
        figure.legend(loc="outside lower center", ncols=2)
    return Drawing(figure, table)


def cluster_drawing(cluster: Cluster, plan: Plan) -> Drawing:
    """Left the machines with their GPUs, right the replicas and the share of the requests between each two."""
    labels = short_names(plan)
    colours = _colours(plan)
    rows = ceil(len(cluster.nodes) / MACHINES_A_ROW)
    tall = sum(_row_height(cluster, row) for row in range(rows))
    split = any(replica.role != "mixed" for replica in plan.replicas)
    boxes = _boxes(cluster, plan)
    most = max(sum((box[0].role == "decode") == right for box in boxes) for right in (False, True))
    with styled():
        figure = Figure(
            figsize=(13 if split else 8, max(4.5, 0.85 * tall + 1, 0.55 * most + 1.5)), layout="constrained"
        )
        axes = figure.subplots(1, 2, width_ratios=(1.15, 1)) if split else [figure.subplots()]
        _machines(axes[0], cluster, plan, labels, colours)
        if split:
            _flows(axes[1], cluster, plan, labels, colours)
    return Drawing(figure, _table(cluster, plan, labels))


def short_names(plan: Plan) -> dict[str, str]:
    """P0, D1, M2: phase and number."""
    counts: dict[str, int] = {}
    names = {}
    for replica in plan.replicas:
        letter = replica.role[0].upper()
        names[replica.name] = f"{letter}{counts.get(letter, 0)}"
        counts[letter] = counts.get(letter, 0) + 1
    return names


def _colours(plan: Plan) -> dict[str, tuple[float, float, float]]:
    turn: dict[str, int] = {}
    colours = {}
    for replica in plan.replicas:
        red, green, blue = to_rgb(PHASE_COLOURS[replica.role])
        white = SHADES[turn.get(replica.role, 0) % len(SHADES)]
        turn[replica.role] = turn.get(replica.role, 0) + 1
        colours[replica.name] = (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)
    return colours


# ---------------------------------------------------------------- machines


def _row_height(cluster: Cluster, row: int) -> float:
    machines = cluster.nodes[row * MACHINES_A_ROW : (row + 1) * MACHINES_A_ROW]
    return max(ceil(node.count / GPUS_A_ROW) for node in machines) + 1.1


def _machines(
    axes: Axes, cluster: Cluster, plan: Plan, labels: dict[str, str], colours: dict[str, tuple[float, float, float]]
) -> None:
    owner = {gpu: replica for replica in plan.replicas for gpu in replica.gpus}
    top = 0.0
    for number, node in enumerate(cluster.nodes):
        row, column = divmod(number, MACHINES_A_ROW)
        if column == 0 and row:
            top -= _row_height(cluster, row - 1)
        left = column * (GPUS_A_ROW + 0.8)
        height = ceil(node.count / GPUS_A_ROW)
        box = FancyBboxPatch(
            (left - 0.05, top - height - 0.1), GPUS_A_ROW + 0.1, height + 0.75, boxstyle="round,pad=0.1",
            facecolor="white", edgecolor="#999999",
        )  # fmt: skip
        axes.add_patch(box)
        region = "" if len({one.region for one in cluster.nodes}) == 1 else f", {node.region}"
        axes.text(left, top + 0.22, f"{node.name}: {node.count} x {node.gpu.name}{region}", fontsize=8, va="center")
        for place, gpu in enumerate(node.gpu_ids):
            x, y = left + place % GPUS_A_ROW, top - 1 - place // GPUS_A_ROW
            replica = owner.get(gpu)
            axes.add_patch(
                Rectangle(
                    (x + 0.05, y + 0.05),
                    0.9,
                    0.9,
                    facecolor=IDLE if replica is None else colours[replica.name],
                    edgecolor="#444444",
                    linewidth=0.8,
                )
            )
            text = "idle" if replica is None else _inside(replica, gpu, labels)
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)
    rows = ceil(len(cluster.nodes) / MACHINES_A_ROW)
    columns = min(MACHINES_A_ROW, len(cluster.nodes))
    axes.set_xlim(-0.3, columns * (GPUS_A_ROW + 0.8))
    axes.set_ylim(-sum(_row_height(cluster, row) for row in range(rows)) + 0.6, 0.9)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")
    axes.set_title("GPUs by replica (P prefill, D decode, M both; s: pipeline stage)")


def _inside(replica: Replica, gpu: str, labels: dict[str, str]) -> str:
    if len(replica.stages) == 1:
        return labels[replica.name]
    number = next(number for number, stage in enumerate(replica.stages) if gpu in stage.gpus)
    return f"{labels[replica.name]}\ns{number}"


# ---------------------------------------------------------------- flows


def _flows(
    axes: Axes, cluster: Cluster, plan: Plan, labels: dict[str, str], colours: dict[str, tuple[float, float, float]]
) -> None:
    """Arrows as wide as the shares; without shares the router chooses by itself and there are none.

    Replicas that are alike are one box where there are many. What a replica of both phases serves is in its box.
    """
    boxes = _boxes(cluster, plan)
    box_of = {name: box[0].name for box in boxes for name in (one.name for one in box)}
    shares: dict[tuple[str, str], float] = {}
    for (prefill, decode), share in plan.shares.items():
        pair = box_of[prefill], box_of[decode]
        shares[pair] = shares.get(pair, 0.0) + share
    places: dict[str, tuple[float, float]] = {}
    for x in (0.0, 1.0):
        column = [box for box in boxes if (box[0].role == "decode") == (x == 1)]
        for number, box in enumerate(column):
            first, y = box[0], 1 - (number + 0.5) / len(column)
            places[first.name] = (x, y)
            edge = {"boxstyle": "round,pad=0.35", "facecolor": colours[first.name], "edgecolor": "#444444"}
            text = f"{_called(box, labels)}  {_hardware(cluster, first)}"
            if (first.name, first.name) in shares:
                text += f": {shares.pop((first.name, first.name)):.0%}"
            axes.text(x, y, text, ha="left" if x else "right", va="center", fontsize=8, bbox=edge)
    _arrows(axes, shares, places)
    axes.set_xlim(-0.75, 1.75)
    axes.set_ylim(-0.02, 1.02)
    axes.axis("off")
    axes.set_title("KV flows: share of the requests" if plan.shares else "replicas (the router chooses the pairs)")


def _boxes(cluster: Cluster, plan: Plan) -> list[list[Replica]]:
    """One a replica; where there are many, those of the same phase and hardware together."""
    if len(plan.replicas) <= MOST_BOXES:
        return [[one] for one in plan.replicas]
    alike: dict[tuple[str, str], list[Replica]] = {}
    for one in plan.replicas:
        alike.setdefault((one.role, _hardware(cluster, one)), []).append(one)
    return list(alike.values())


def _called(box: Sequence[Replica], labels: dict[str, str]) -> str:
    """``P0``, ``P0 P1 P2``, or ``9 P (P0 ... P8)``."""
    names = [labels[one.name] for one in box]
    return " ".join(names) if len(names) < 4 else f"{len(names)} {names[0][0]} ({names[0]} ... {names[-1]})"


def _arrows(axes: Axes, shares: dict[tuple[str, str], float], places: dict[str, tuple[float, float]]) -> None:
    largest = max(shares.values(), default=1.0)
    for (prefill, decode), share in sorted(shares.items(), key=lambda item: item[1]):
        (x0, y0), (x1, y1) = places[prefill], places[decode]
        width = max(0.6, WIDEST * share / largest)
        style = f"simple,tail_width={width:.2f},head_width={width + 5:.2f},head_length=9"
        arrow = FancyArrowPatch(
            (x0 + 0.03, y0),
            (x1 - 0.03, y1),
            arrowstyle=style,
            mutation_scale=1,
            shrinkA=4,
            shrinkB=4,
            linewidth=0,
            color=TRANSFER_COLOUR,
            alpha=0.55,
        )
        axes.add_patch(arrow)
        if len(shares) <= MOST_LABELS:
            earlier = list(shares)[: list(shares).index((prefill, decode))]
            near = 0.14 + 0.13 * sum(pair[0] == prefill for pair in earlier)
            x, y = x0 + 0.05 + (x1 - x0 - 0.1) * near, y0 + (y1 - y0) * near
            box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7.5, bbox=box)


def _hardware(cluster: Cluster, replica: Replica) -> str:
    """``2 x A40`` of one stage, ``2 x A40 | 2 x A5000`` of a pipeline."""
    stages = [f"{stage.tp} x {cluster.gpu(stage.gpus[0]).name}" for stage in replica.stages]
    if len(set(stages)) == 1 and len(stages) > 1:
        return f"{stages[0]}, PP {len(stages)}"
    return " | ".join(stages) if len(stages) < 3 else f"{' | '.join(stages[:2])}\n| {' | '.join(stages[2:])}"


def _table(cluster: Cluster, plan: Plan, labels: dict[str, str]) -> pd.DataFrame:
    rows = [
        (replica.name, labels[replica.name], replica.role, stage.name, gpu, cluster.gpu(gpu).name,
         stage.first_layer, stage.end_layer)
        for replica in plan.replicas
        for stage in replica.stages
        for gpu in stage.gpus
    ]  # fmt: skip
    columns = ["replica", "label", "role", "stage", "gpu", "type", "first_layer", "end_layer"]
    return pd.DataFrame(rows, columns=columns)
