"""``docs/reference/systems.md``: what each system decides, whom it mirrors, and how its study came out.

``python -m experiments.pages.systems_page docs`` prints it, from the tables that the studies left in that folder.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from sim.systems import SYSTEMS

STUDIES: Mapping[str, str] = {
    "vllm": "vllm",
    "orca": "vllm",
    "fastertransformer": "vllm",
    "sarathi": "sarathi",
    "sarathi-serve": "sarathi",
    "splitwise": "splitwise",
    "distserve": "distserve",
    "tetriinfer": "tetriinfer",
    "thunderserve": "thunderserve",
    "hexgen": "hexgen",
    "hexgen-2": "thunderserve",
    "helix": "helix",
    "alpaserve": "alpaserve",
    "exegpt": "exegpt",
    "deja-vu": "dejavu",
    "melange": "melange",
    "spotserve": "spotserve",
    "metis": "metis",
}
MODES: Mapping[str, str] = {
    "vllm": "paper, v0, v1; recompute, swap; prefix caching; priorities; colocated or split",
    "orca": "contiguous KV: max, pow2, oracle",
    "fastertransformer": "fixed batch",
    "sarathi": "decode-maximal batching, baseline, Orca's best case",
    "sarathi-serve": "token budget (stated, or from a TBT limit), chunked-only, "
    "hybrid-only, dynamic chunks; colocated or split",
    "splitwise": "serial, per-layer and automatic KV transfer; three machine pools; its "
    "authors' simulator, defects included",
    "distserve": "placement search for high and low node affinity, vLLM++; KV pulled; replanning on shifts",
    "tetriinfer": "fixed chunks in ordered groups, predicted lengths, power-of-two dispatch, four admissions, flips",
    "thunderserve": "tabu search over groups and phases, LP routing, KV in 4 bits; lightweight and full rescheduling",
    "hexgen": "genetic search over unequal replicas, asymmetric pipelines; its own cost model or measured times",
    "hexgen-2": "spectral partition, max-flow routing, guided swaps",
    "metis": "its training planner as published, and our transfer to serving: two "
    "pools of uneven pipelines over mixed GPUs",
    "helix": "layers over unequal machines by max-flow, a path of nodes per "
    "request; placements of Petals, Swarm and separate pipelines",
    "exegpt": "RRA, WAA-C and WAA-M schedules, partial TP, branch and bound under a latency bound",
    "spotserve": "pipelines that move with weights and KV on spot notices and joins; "
    "reparallelization and rerouting beside it",
    "melange": "the cheapest mix of GPU types by an ILP over sizes of requests, within a bound on TPOT",
    "alpaserve": "several models share groups of GPUs: greedy or beam placement, admission by a clock per group",
    "deja-vu": "contextual sparsity of decodes by predictors, union over the batch, under any of seven schedulers",
}
"""What can be switched, by system."""
NEAR = 1.15
"""A ratio within 15 % of the printed one."""
INTRODUCTION = """\
# Systems

Every system is a planner, a router, a batcher, a transfer and a rescheduler, put together in one file under
`sim/systems/`; `phasewise systems` lists their options. A study sets figures that a paper printed beside ours: *exact*
ones (arithmetic: they must be equal), *ratios* and rates (how many are within 15 %, and the middle of ours over
theirs), and *directions*. Nothing is tuned to fit: what differs is in the study, with the reason where we know it.
`python -m experiments.pages.systems_page docs > docs/reference/systems.md` writes this page from the studies' tables.

| System | Decides | Mirrors | Modes | Study | Exact | Ratios within 15 % | Ours / printed, median | Directions |
|---|---|---|---|---|---|---|---|---|
"""


def page(folder: Path) -> str:
    return INTRODUCTION + "".join(_row(name, folder) for name in SYSTEMS)


def _row(name: str, folder: Path) -> str:
    factory = SYSTEMS[name]
    first = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
    decides = first.split(": ", 1)[-1]
    cells = [f"`{name}`", decides, factory().mirrors, MODES.get(name, ""), *_study(STUDIES.get(name), folder)]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def _study(study: str | None, folder: Path) -> Sequence[str]:
    """Study, exact, ratios, median, directions; of the whole study, which may be of several systems."""
    path = folder / "studies" / str(study) / f"study_{study}.csv"
    if study is None or not path.exists():
        return ("none", "", "", "", "")
    rows = pd.read_csv(path)
    exact = rows[(rows["kind"] == "exact") & rows["ratio"].notna()]
    ratios = [float(value) for value in rows[rows["kind"].isin(["ratio", "aim"])]["ratio"].dropna()]
    near = sum(1 / NEAR <= value <= NEAR for value in ratios)
    equal = sum(abs(float(value) - 1) <= 0.02 for value in exact["ratio"])
    return (
        f"[{study}](../studies/{study}/study_{study}.md)",
        f"{equal} of {len(exact)}" if len(exact) else "",
        f"{near} of {len(ratios)}" if ratios else "",
        f"{median(ratios):.2f}" if ratios else "",
        str(int((rows["kind"] == "direction").sum()) or ""),
    )


if __name__ == "__main__":
    print(page(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")), end="")
