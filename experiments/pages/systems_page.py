"""``docs/systems.md``: what each system decides, whom it mirrors, and how its study came out.

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
NEAR = 1.15
"""A ratio within 15 % of the printed one."""
INTRODUCTION = """\
# Systems

Every system is a planner, a router, a batcher, a transfer and a rescheduler, put together in one file under
`sim/systems/`; `phasewise systems` lists their options. A study sets figures that a paper printed beside ours: *exact*
ones (arithmetic: they must be equal), *ratios* and rates (how many are within 15 %, and the middle of ours over
theirs), and *directions*. Nothing is tuned to fit: what differs is in the study, with the reason where we know it.
`python -m experiments.pages.systems_page docs > docs/systems.md` writes this page from the studies' tables.

| System | Decides | Mirrors | Study | Exact | Ratios within 15 % | Ours / printed, median | Directions |
|---|---|---|---|---|---|---|---|
"""


def page(folder: Path) -> str:
    return INTRODUCTION + "".join(_row(name, folder) for name in SYSTEMS)


def _row(name: str, folder: Path) -> str:
    factory = SYSTEMS[name]
    first = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
    decides = first.split(": ", 1)[-1]
    cells = [f"`{name}`", decides, factory().mirrors, *_study(STUDIES.get(name), folder)]
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
        f"[{study}](studies/{study}/study_{study}.md)",
        f"{equal} of {len(exact)}" if len(exact) else "",
        f"{near} of {len(ratios)}" if ratios else "",
        f"{median(ratios):.2f}" if ratios else "",
        str(int((rows["kind"] == "direction").sum()) or ""),
    )


if __name__ == "__main__":
    print(page(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")), end="")
