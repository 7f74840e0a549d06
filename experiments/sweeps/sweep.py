"""One scenario over rates, any fields, seeds and systems: every run a row, and the mean over seeds with its interval.

``points`` lists the runs, ``run_points`` does them on any ``concurrent.futures`` executor (``jobs`` has one that
survives), ``means`` and ``best_rates`` condense them, ``save_sweep`` writes the lot. ``grid.py``: which fields vary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.jobs.content import digest, plain
from experiments.jobs.journal import JobLostError
from experiments.jobs.run import Where, jobs
from experiments.runs.comparison import Given, variants
from experiments.runs.rundir import MARK, environment, into_folder, write_json
from experiments.scenario.file import Scenario, load
from experiments.scenario.resolve import resolve
from experiments.sweeps.grid import MOST_POINTS, Changes, changes_of
from sim.metrics import estimate
from sim.types import ConfigError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("system", "rate_per_s", "seed")
"""Of every row, before its figures; between the first and the second stand the fields that the sweep varies."""
FAILURE = "failure"
"""Column: why a point has no figures."""
LEVEL = 0.95
"""Of the confidence intervals."""
MOST_SEEDS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of the sweep. ``rate_per_s``: None for the scenario's own arrivals. ``changes``: fields that vary."""

    system: str
    rate_per_s: float | None
    scenario: Scenario
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a sweep is asked for; two that are equal have the same points."""

    scenario: Scenario
    rates_per_s: tuple[float, ...] = ()
    seeds: int = 1
    systems: str | None = None
    changes: tuple[Changes, ...] = ({},)

    def study(self) -> dict[str, Any]:
        """What a journal says of it: enough to ask for it again."""
        asked = {
            "scenario": self.scenario.model_dump(mode="json", exclude_unset=True), "where": self.scenario.where,
            "rates_per_s": self.rates_per_s, "seeds": self.seeds, "systems": self.systems, "changes": self.changes,
        }  # fmt: skip
        name = Path(self.scenario.where).stem
        return {"name": name, "hash": digest([metadata.version("phasewise"), plain(self)]), "asked": asked}


def sweep(
    scenario: Given,
    rates_per_s: Sequence[float] = (),
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    systems: str | None = None,
    workers: int | None = 1,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """A row a run: every system at every rate and point of the grid, with every seed; ``means`` condenses them.

    Columns: ``KEYS``, the grid's fields, those of ``row_of``, and ``failure``. ``grid``: field to values, such as
    ``{"system.engine.max_num_seqs": [64, 128]}``. ``systems`` as in ``points``. ``workers``: processes, None for one
    per processor; more than one needs a script whose work stands under ``if __name__ == "__main__":``. ``out``: a
    folder for the journal, from which the same call goes on after it was stopped.
    """
    changes = tuple(changes_of(grid or {}, None))
    asked = Asked(
        scenario=load(scenario), rates_per_s=tuple(rates_per_s), seeds=seeds, systems=systems, changes=changes
    )
    todo = points(asked)
    with jobs(None if out is None else Path(out), asked.study(), Where(workers=workers)) as executor:
        return frame(run_points(todo, executor))


def points(asked: Asked) -> list[Point]:
    """Every system at every rate and change with every seed; the seeds are the scenario's own and those that follow.

    Without ``systems`` the entries of ``compare``, else the scenario's own system; without rates its own arrivals.
    ``ConfigError`` for a rate that is not a positive number, a field that there is not, or one of the scenario's own
    mistakes.
    """
    if asked.seeds < 1 or asked.seeds > MOST_SEEDS:
        raise ConfigError(f"--seeds {asked.seeds}: give from 1 to {MOST_SEEDS:,}")
    for rate in asked.rates_per_s:
        if not 0 < rate < float("inf"):
            raise ConfigError(f"--rates {rate:g}: must be a positive number of requests/s")
    rates: list[float | None] = list(dict.fromkeys(asked.rates_per_s)) or [None]
    found = []
    for changes in asked.changes:
        texts = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        scenario = load(asked.scenario, texts) if texts else asked.scenario
        chosen = asked.systems if asked.systems is not None or scenario.compare else scenario.system.name
        for label, variant in variants(scenario, chosen).items():
            for at in rates:
                for seed in range(scenario.seed, scenario.seed + asked.seeds):
                    one = variant.at(rate_per_s=at, seed=seed) if at else variant.seeded(seed)
                    found.append(Point(system=label, rate_per_s=at, scenario=one, changes=changes))
    if len(found) > MOST_POINTS:
        raise ConfigError(f"{len(found):,} points are more than {MOST_POINTS:,}; take fewer values")
    return found


def run_point(point: Point) -> dict[str, Any]:
    """Simulate one point; its row."""
    setup = resolve(point.scenario)
    summary = setup.summary(setup.run())
    rate = point.rate_per_s or summary["workload"]["rate_per_s"]
    return {**_keys(point), "rate_per_s": rate, **row_of(summary, rate)}


def _keys(point: Point) -> dict[str, Any]:
    """What tells a point from the others; values that are no plain ones as text."""
    plain_values = {
        name: value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
        for name, value in point.changes.items()
    }
    return {"system": point.system, **plain_values, "rate_per_s": point.rate_per_s, "seed": point.scenario.seed}


def row_of(summary: Mapping[str, Any], rate_per_s: float) -> dict[str, float | None]:
    """What a sweep keeps of a summary.

    ``good_requests_per_s`` is the arrival rate times the attainment; unlike ``goodput_per_s``, which is over the
    makespan, it does not fall because a short run takes long to drain. ``tokens_per_s_per_user`` is 1 / median TPOT,
    the pace at which the median request's text appears; ``tokens_per_s_per_gpu`` the cluster's output tokens over all
    of its GPUs.
    """
    gpus = sum(summary["gpus"].values())
    slo, tokens_per_s, pace_s = summary["slo"], summary["output_tokens_per_s"], summary["tpot_s"]["p50"]
    spreads = {
        f"{name}_{q}_s": summary[f"{name}_s"][q] for name in ("ttft", "tpot", "e2e") for q in ("mean", "p50", "p99")
    }
    return {
        **{name: summary[name] for name in ("requests", "completed", "rejected", "failed", "preemptions")},
        **spreads,
        "attainment": slo["attainment"],
        "goodput_per_s": slo["goodput_per_s"],
        "good_requests_per_s": None if slo["attainment"] is None else slo["attainment"] * rate_per_s,
        "output_tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": None if tokens_per_s is None else tokens_per_s / gpus,
        "tokens_per_s_per_user": 1 / pace_s if pace_s else None,
        "gpus": gpus,
        "cluster_usd_per_hour": summary["cluster_usd_per_hour"],
        "usd_per_million_tokens": summary["usd_per_million_tokens"],
        "joules_per_token": summary["joules_per_token"],
        "mfu": summary["mfu"],
        "makespan_s": summary["makespan_s"],
        "extrapolated_share": summary["extrapolated_share"],
    }


def run_points(
    todo: Sequence[Point], executor: Executor, done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Rows in the order of the points; ``done`` is called after each.

    A point that failed, or for which its system finds no plan, has a row with its ``failure`` in place of figures.
    """
    futures = [executor.submit(run_point, point) for point in todo]
    rows = []
    for point, future in zip(todo, futures, strict=True):
        try:
            rows.append({**future.result(), FAILURE: None})
        except JobLostError:
            raise
        except ConfigError as error:
            rows.append({**_keys(point), FAILURE: str(error)})
        done()
    return rows


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """As a table; the column ``failure`` last."""
    import pandas as pd

    table = pd.DataFrame(list(rows))
    return table[[*(name for name in table.columns if name != FAILURE), FAILURE]]


# ---------------------------------------------------------------- over the seeds


def means(rows: pd.DataFrame, fields: Sequence[str] = ()) -> pd.DataFrame:
    """Columns system, ``fields``, rate_per_s, metric, mean, low, high, runs: over the seeds, Student's 95 % interval.

    A run without a value is left out of ``runs``; the bounds are empty where fewer than two are left.
    """
    import pandas as pd

    keys = ["system", *fields, "rate_per_s"]
    metrics = [name for name in rows.columns if name not in (*keys, "seed", FAILURE)]
    found = []
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        for metric in metrics:
            value = estimate(group[metric].to_numpy(dtype=float), LEVEL)
            if value is not None:
                half = float("nan") if value.half_width is None else value.half_width
                found.append((*key, metric, value.mean, value.mean - half, value.mean + half, value.runs))
    return pd.DataFrame(found, columns=[*keys, "metric", "mean", "low", "high", "runs"])


def best_rates(rows: pd.DataFrame, target: float) -> list[dict[str, Any]]:
    """Per label (``labelled``) the highest rate tried whose mean attainment reaches the target; ``None`` if none does.

    Also per GPU, and in requests per dollar of the whole cluster's rent.
    """
    found = []
    for system, group in rows.groupby("system", sort=False):
        known = group.dropna(subset=["attainment"])
        shares = known.groupby("rate_per_s")["attainment"].mean()
        enough = shares.index[shares >= target]
        rate = float(enough.max()) if len(enough) else None
        usd, gpus = (known[name].iloc[0] if len(known) else None for name in ("cluster_usd_per_hour", "gpus"))
        priced = rate is not None and usd is not None and usd > 0
        found.append(
            {"system": system, "target": target, "rate_per_s": rate,
             "rate_per_s_per_gpu": rate / int(gpus) if rate is not None and gpus is not None else None,
             "requests_per_usd": rate * 3600 / float(usd) if priced and rate is not None and usd is not None else None}
        )  # fmt: skip
    return found


def labelled(rows: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """With the fields that vary in the name of the system: ``vllm, max_num_seqs=64``."""
    varied = [name for name in fields if rows[name].nunique(dropna=False) > 1]
    if not varied:
        return rows.drop(columns=list(fields))
    last = {name: name.rpartition(".")[2] for name in varied}
    short = {name: last[name] if list(last.values()).count(last[name]) == 1 else name for name in varied}
    parts = [short[name] + "=" + rows[name].map(_short) for name in varied]
    names = rows["system"]
    for part in parts:
        names = names + ", " + part
    return rows.assign(system=names).drop(columns=list(fields))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- the whole sweep


def save_sweep(folder: Path, scenario: Scenario, rows: pd.DataFrame, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Write runs (CSV and Parquet), means.csv, figures with their CSVs, scenario, environment and summary.json."""
    from experiments.plots.heat import shares
    from experiments.plots.pareto import pareto
    from experiments.plots.rates import rate_curves
    from experiments.plots.style import save

    names = labelled(rows, fields)
    table, best = means(names), best_rates(names, scenario.slo.attainment)
    varied = [name for name in (*fields, "rate_per_s") if rows[name].nunique(dropna=False) > 1]
    with into_folder(folder) as new:
        rows.to_csv(new / "runs.csv", index=False, lineterminator="\n")
        rows.astype({name: "string" for name in rows.columns if rows[name].dtype == object}).to_parquet(
            new / "runs.parquet", index=False
        )
        means(rows, fields).to_csv(new / "means.csv", index=False, lineterminator="\n")
        if len(table):
            save(rate_curves(table, scenario.slo.attainment), new, "rates")
            save(pareto(table), new, "pareto")
        for system, group in rows.groupby("system", sort=False) if len(varied) >= 2 else ():
            drawing = shares(group, varied[0], varied[1], f"{system}: requests within the SLO")
            save(drawing, new, f"heat-{re.sub(r'[^a-z0-9.]+', '-', str(system).lower())}")
        new.joinpath("scenario.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
        write_json(new / "environment.json", environment())
        failed = int(rows[FAILURE].notna().sum())
        summary = {"name": Path(scenario.where).stem, "best_rates": best, "points": len(rows), "failed": failed}
        write_json(new / MARK, {**summary, "fields": list(fields)})
    return best


@contextmanager
def bar(count: int, what: str, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where that is a terminal; gives a function to call after each step."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=count)
        yield partial(progress.advance, task)
