"""Plans on disk: what ``phasewise plan --out`` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.planning.plan import Found, Option
from experiments.planning.told import told_json
from experiments.runs.rundir import MARK, environment, whole_folder, write_json
from experiments.scenario.planfile import plan_yaml


def save_plans(folder: Path, title: str, options: Sequence[Option], found: Found) -> None:
    """Write plan.yaml (the best), plan2.yaml ..., cheapest.yaml, candidates.csv, the search and the cluster drawn, the
    scenario."""
    import pandas as pd

    from experiments.plots.plan import cluster_drawing, search_curve
    from experiments.plots.style import save

    best = options[0]
    with whole_folder(folder) as new:
        rows = []
        for name, option in zip(file_names(), options, strict=False):
            new.joinpath(name).write_text(plan_yaml(option.plan), encoding="utf-8")
            rows.append({"file": name, **option.row()})
        pd.DataFrame(rows).to_csv(new / "candidates.csv", index=False, lineterminator="\n")
        for name, others in (("baselines", found.baselines), ("cheapest", (found.cheapest,) if found.cheapest else ())):
            if others:
                pd.DataFrame([one.row() for one in others]).to_csv(
                    new / f"{name}.csv", index=False, lineterminator="\n"
                )
        if found.cheapest is not None:
            new.joinpath("cheapest.yaml").write_text(plan_yaml(found.cheapest.plan), encoding="utf-8")
        if found.log:
            save(search_curve(found.log), new, "search")
        save(cluster_drawing(best.setup.problem.cluster, best.plan), new, "cluster")
        scenario = best.setup.scenario.model_copy(update={"plan": None})
        new.joinpath("scenario.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
        write_json(new / "environment.json", environment())
        write_json(new / MARK, {"name": title, **told_json(options, found), "plans": rows})


def file_names() -> Iterator[str]:
    yield "plan.yaml"
    number = 2
    while True:
        yield f"plan{number}.yaml"
        number += 1
