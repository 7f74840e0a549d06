"""One scenario over arrival rates, seeds and systems: every run a row, and the mean over seeds with its interval.

``points`` lists the runs, ``run_points`` does them on any ``concurrent.futures`` executor, ``means`` and
``best_rates`` condense them, ``save_sweep`` writes the lot.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.runs.comparison import Given, variants
from experiments.runs.rundir import MARK, environment, whole_folder, write_json
from experiments.scenario.file import Scenario, load
from experiments.scenario.resolve import resolve
from sim.metrics import estimate
from sim.types import ConfigError, InfeasibleError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("system", "rate_per_s", "seed")
LEVEL = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of the sweep."""

    system: str
    rate_per_s: float
    scenario: Scenario


def sweep(
    scenario: Given,
    rates_per_s: Sequence[float],
    *,
    seeds: int = 1,
    systems: str | None = None,
    workers: int | None = 1,
) -> pd.DataFrame:
    """A row a run (columns of ``row_of``): every system at every rate with every seed; ``means`` condenses them.

    ``systems`` as in ``points``. ``workers``: processes, None for one per processor; more than one needs
    a script whose work stands under ``if __name__ == "__main__":``.
    """
    import pandas as pd

    todo = points(load(scenario), rates_per_s=rates_per_s, seeds=seeds, systems=systems)
    with Here() if workers == 1 else process_pool(workers) as executor:
        rows, _ = run_points(todo, executor)
    return pd.DataFrame(rows)


def points(scenario: Scenario, *, rates_per_s: Sequence[float], seeds: int, systems: str | None = None) -> list[Point]:
    """Every system at every rate with every seed; the seeds are the scenario's own and those that follow it.

    ``systems`` as in ``comparison.variants``; without it the entries of ``compare``, else the scenario's own system.
    ``ConfigError`` for a rate that is not a positive number, or one of the
    scenario's own mistakes.
    """
    if seeds < 1 or not rates_per_s:
        raise ConfigError(f"--rates {list(rates_per_s)} --seeds {seeds}: both need at least one")
    for rate in rates_per_s:
        if not 0 < rate < float("inf"):
            raise ConfigError(f"--rates {rate:g}: must be a positive number of requests/s")
    found = []
    chosen = systems if systems is not None or scenario.compare else scenario.system.name
    for label, variant in variants(scenario, chosen).items():
        for rate in dict.fromkeys(rates_per_s):
            for seed in range(scenario.seed, scenario.seed + seeds):
                found.append(Point(system=label, rate_per_s=rate, scenario=variant.at(rate_per_s=rate, seed=seed)))
    return found


def run_point(point: Point) -> dict[str, Any]:
    """Simulate one point; its row."""
    setup = resolve(point.scenario)
    summary = setup.summary(setup.run())
    figures = row_of(summary, point.rate_per_s)
    return {"system": point.system, "rate_per_s": point.rate_per_s, "seed": point.scenario.seed, **figures}


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
        "cluster_usd_per_hour": summary["cluster_usd_per_hour"],
        "usd_per_million_tokens": summary["usd_per_million_tokens"],
        "joules_per_token": summary["joules_per_token"],
        "mfu": summary["mfu"],
        "makespan_s": summary["makespan_s"],
        "extrapolated_share": summary["extrapolated_share"],
    }


def run_points(
    todo: Sequence[Point], executor: Executor, done: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows in the order of the points; ``done`` is called after each. The first error stops the sweep.

    Points for which a system finds no plan have no row; the second result says which, and why, by system and rate.
    """
    futures: dict[Future[dict[str, Any]], int] = {executor.submit(run_point, point): n for n, point in enumerate(todo)}
    rows: dict[int, dict[str, Any]] = {}
    missing: dict[int, str] = {}
    try:
        for future in as_completed(futures):
            try:
                rows[futures[future]] = future.result()
            except InfeasibleError as error:
                missing[futures[future]] = str(error)
            done()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    if not rows:
        raise InfeasibleError(missing[0])
    reasons = {f"{todo[place].system} at {todo[place].rate_per_s:g}/s": missing[place] for place in sorted(missing)}
    return [rows[place] for place in sorted(rows)], reasons


def process_pool(workers: int | None) -> ProcessPoolExecutor:
    """Fresh interpreters, so that a sweep behaves alike on every system; ``None``: one per processor."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


class Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **more))
        except Exception as error:
            future.set_exception(error)
        return future


# ---------------------------------------------------------------- over the seeds


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns system, rate_per_s, metric, mean, low, high, runs: over the seeds, with Student's 95 % interval.

    A run without a value is left out of ``runs``; the bounds are empty where fewer than two are left.
    """
    import pandas as pd

    metrics = [name for name in rows.columns if name not in KEYS]
    found = []
    for (system, rate), group in rows.groupby(["system", "rate_per_s"], sort=False):
        for metric in metrics:
            value = estimate(group[metric].to_numpy(dtype=float), LEVEL)
            if value is not None:
                half = float("nan") if value.half_width is None else value.half_width
                found.append((system, rate, metric, value.mean, value.mean - half, value.mean + half, value.runs))
    return pd.DataFrame(found, columns=["system", "rate_per_s", "metric", "mean", "low", "high", "runs"])


def best_rates(rows: pd.DataFrame, target: float, gpus: int) -> list[dict[str, Any]]:
    """Per system the highest rate tried at which the mean attainment reaches the target; ``None`` if none does.

    Also per GPU, and in requests per dollar of the whole cluster's rent.
    """
    found = []
    for system, group in rows.groupby("system", sort=False):
        shares = group.groupby("rate_per_s")["attainment"].mean()
        enough = shares.index[shares >= target]
        rate = float(enough.max()) if len(enough) else None
        usd_per_hour = group["cluster_usd_per_hour"].iloc[0]
        known = rate is not None and usd_per_hour is not None and usd_per_hour > 0
        found.append(
            {"system": system, "target": target, "rate_per_s": rate,
             "rate_per_s_per_gpu": None if rate is None else rate / gpus,
             "requests_per_usd": rate * 3600 / float(usd_per_hour) if known and rate is not None else None}
        )  # fmt: skip
    return found


# ---------------------------------------------------------------- the whole sweep


def save_sweep(folder: Path, title: str, scenario: Scenario, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Write runs.csv, means.csv, figures with their CSVs, scenario, environment and summary.json: all or nothing."""
    from experiments.plots.pareto import pareto
    from experiments.plots.rates import rate_curves
    from experiments.plots.style import save

    table = means(rows)
    gpus = sum(node.count * node.nodes for node in scenario.cluster.nodes)
    best = best_rates(rows, scenario.slo.attainment, gpus)
    with whole_folder(folder) as new:
        rows.to_csv(new / "runs.csv", index=False, lineterminator="\n")
        table.to_csv(new / "means.csv", index=False, lineterminator="\n")
        save(rate_curves(table, scenario.slo.attainment), new, "rates")
        save(pareto(table), new, "pareto")
        new.joinpath("scenario.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
        write_json(new / "environment.json", environment())
        write_json(new / MARK, {"name": title, "best_rates": best})
    return best


@contextmanager
def bar(count: int, what: str, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, where that is a terminal; gives a function to call after each step."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=count)
        yield partial(progress.advance, task)
