"""Goodput of a scenario's systems: the highest rate within the SLO, and the attainment around it.

``search`` finds the rates on any ``concurrent.futures`` executor, ``curve`` replays rates around them, ``save_goodput``
writes the lot. The bisection is in ``sim.goodput``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.jobs.workers import Here, process_pool
from experiments.runs.comparison import Given, variants
from experiments.runs.rundir import MARK, environment, into_folder, write_json
from experiments.scenario.file import Scenario, load
from experiments.scenario.requests import RequestStream
from experiments.scenario.resolve import Setup, resolve
from experiments.sweeps.sweep import means
from sim.goodput import CRITERIA, HALVINGS, Criterion, Goodput, growing, sustained, trial_requests
from sim.goodput import goodput as bisected
from sim.goodput import longest_s as longest_within
from sim.metrics import BOUNDS, attainment
from sim.types import ConfigError, Slo

if TYPE_CHECKING:
    import pandas as pd

AROUND = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Rates of the curve, over the goodput."""
MOST_TIMES = 4096.0
"""The workload's own rate: no higher one is tried unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked for. ``target`` and ``max_rate_per_s``: None for the SLO's, and for as high as it goes."""

    target: float | None = None
    criterion: Criterion = "joint"
    seeds: int = 3
    tolerance: float = 0.02
    max_rate_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ConfigError(f"--criterion {self.criterion}: must be {' or '.join(CRITERIA)}")
        for name, value, most in (("target", self.target, 1), ("max-rate", self.max_rate_per_s, inf)):
            if value is not None and not 0 < value <= most:
                raise ConfigError(f"--{name} {value:g}: must be greater than 0" + (" and at most 1" * (most == 1)))
        if not 0 < self.tolerance < 1 or self.seeds < 1:
            raise ConfigError(
                f"--tolerance {self.tolerance:g} --seeds {self.seeds}: give a share between 0 and 1, and a seed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The scenario at any rate and seed, for as long as a trial must last; what crosses to another process."""

    scenario: Scenario
    criterion: Criterion

    def __call__(self, rate_per_s: float, seed: int) -> float:
        setup = self._setup(rate_per_s, seed)
        return sustained(setup.run().columns, setup.problem.slo, self.criterion)

    def row(self, rate_per_s: float, seed: int) -> dict[str, float | bool | None]:
        """Attainment jointly, by bound and by the criterion (0 where the queue grows)."""
        setup = self._setup(rate_per_s, seed)
        columns, slo = setup.run().columns, setup.problem.slo
        return {
            "rate_per_s": rate_per_s,
            "seed": seed,
            **attainment(columns, slo),
            "judged": sustained(columns, slo, self.criterion),
            "queue_grows": growing(columns),
        }

    def quantiles(self, rate_per_s: float, seed: int, share: float) -> dict[str, float]:
        """Each bounded latency that ``share`` of the requests keep; infinite where fewer completed."""
        setup = self._setup(rate_per_s, seed)
        columns = setup.run().columns
        done = columns["outcome"] == "completed"
        found = {}
        for bound in BOUNDS:
            if getattr(setup.problem.slo, f"{bound}_s") is not None:
                values = columns[f"{bound}_s"]
                kept = np.where(done, values, inf)[~(done & np.isnan(values))]
                found[bound] = float(np.quantile(kept, share, method="higher")) if kept.size else 0.0
        return found

    def _setup(self, rate_per_s: float, seed: int) -> Setup:
        return long_enough(resolve(self.scenario.at(rate_per_s=rate_per_s, seed=seed)))


def long_enough(setup: Setup, least: int = 0) -> Setup:
    """With as many requests as a trial at its rate takes, or ``least``: what is drawn goes on, a recording begins anew.

    ``ConfigError`` if its workload is cut to a time that is too short.
    """
    rate_per_s = setup.scenario.workload.rate
    if rate_per_s is None or setup.scenario.workload.closed_loop is not None:
        return setup
    need = max(least, needed(setup, rate_per_s))
    if sum(1 for _ in islice(setup.requests, need)) >= need:
        return setup
    spec = setup.requests
    longer = RequestStream(spec.workload, seed=spec.seed, max_model_len=spec.max_model_len, at_least=need)
    count = sum(1 for _ in islice(longer, need))
    if count < need:
        raise ConfigError(
            f"{setup.scenario.where}: workload: start_s and end_s leave {count:,} requests at {rate_per_s:.4g} "
            f"requests/s, too few to see a queue grow ({need:,}); drop them"
        )
    return replace(setup, requests=longer)


def needed(setup: Setup, rate_per_s: float) -> int:
    return trial_requests(setup.problem.slo, setup.problem.workload.mean_output_tokens, rate_per_s)


def goodput(
    scenario: Given, systems: str | None = None, *, settings: Settings | None = None, workers: int | None = 1
) -> pd.DataFrame:
    """The highest rate within the SLO, a row a system (columns of ``search``'s row).

    ``systems``: labels with commas between them, as in ``comparison.variants``; None: the scenario's own. ``workers``
    as in ``sweep``.
    """
    import pandas as pd

    experiment, asked = load(scenario), settings or Settings()
    chosen = variants(experiment, systems or experiment.system.name)
    with Here() if workers == 1 else process_pool(workers) as executor:
        rows = [{"system": label, **search(one, asked, executor)[0]} for label, one in chosen.items()]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- the search


def search(
    scenario: Scenario, settings: Settings, executor: Executor, done: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], Goodput]:
    """One system's row of the table, and everything that was tried.

    A row without a rate has the ``reason``; ``remark`` says if trials were longer than the workload. ``ConfigError`` if
    the SLO is absent.
    """
    setup = resolve(scenario)
    target = settings.target or setup.problem.slo.attainment
    longest_s(setup)
    start = setup.problem.workload.rate_per_s
    high = settings.max_rate_per_s or start * MOST_TIMES
    start = min(start, high)
    replay = Replay(scenario=scenario, criterion=settings.criterion)
    seeds = range(scenario.seed, scenario.seed + settings.seeds)
    found = bisected(
        replay, target=target, seeds=seeds, start=start, high=high,
        tolerance=settings.tolerance, executor=executor, done=done,
    )  # fmt: skip
    rates = found.by_seed.values()
    reason = None if any(rates) else _why_not(replay, start / 2**HALVINGS, target, setup.problem.slo)
    remark = extension(setup, max(trial.rate_per_s for trial in found.trials))
    return {**_row(setup, found, target, settings.criterion, high), "reason": reason, "remark": remark}, found


def extension(setup: Setup, rate_per_s: float) -> str | None:
    """What a trial at this rate adds to the workload, in words."""
    need = needed(setup, rate_per_s)
    count = sum(1 for _ in islice(setup.requests, need))
    if count >= need:
        return None
    recorded = any(stream.generate is None for stream in setup.scenario.workload.streams.values())
    how = f"begun anew {need / count:.1f} times" if recorded else "drawn on"
    return f"trials had up to {need:,} requests, so as to see queues grow; the workload's {count:,} were {how}"


def longest_s(setup: Setup) -> float:
    """Seconds that a request of mean length may take within the SLO."""
    found = longest_within(setup.problem.slo, setup.problem.workload.mean_output_tokens)
    if found is None:
        raise ConfigError(
            f"{setup.scenario.where}: slo: it bounds nothing, so there is no goodput; set slo.ttft_s, tpot_s or e2e_s"
        )
    return found


def _why_not(replay: Replay, lowest: float, target: float, slo: Slo) -> str:
    """Nothing passes: what the requests need when they hardly meet."""
    alone = replay.quantiles(lowest, replay.scenario.seed, target)
    parts = [
        f"{bound.upper()} {'is never reached' if value == inf else f'{value:.4g} s'} "
        f"(SLO {getattr(slo, f'{bound}_s'):g} s)"
        for bound, value in alone.items()
    ]
    return f"not reached even at {lowest:.3g} requests/s, where {target:.0%} of the requests keep {', '.join(parts)}"


def _row(setup: Setup, found: Goodput, target: float, criterion: Criterion, high: float) -> dict[str, Any]:
    rate, usd_per_hour = found.rate.mean, setup.usd_per_hour
    served = rate > 0
    return {
        "target": target,
        "criterion": criterion,
        "rate_per_s": rate if served else None,
        "half_width_per_s": found.rate.half_width if served else None,
        "seeds": found.rate.runs,
        "at_least": served and min(found.by_seed.values()) >= high,
        "rate_per_s_per_gpu": rate / len(setup.problem.cluster.gpu_ids) if served else None,
        "requests_per_usd": rate * 3600 / usd_per_hour if served and usd_per_hour else None,
    }


def most_trials(settings: Settings) -> int:
    """About as many as a search of one system makes, for a progress bar."""
    return settings.seeds * (4 + ceil(log2(1 / settings.tolerance)))


# ---------------------------------------------------------------- around it


def curve(
    scenario: Scenario, rate_per_s: float, settings: Settings, executor: Executor,
    done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Attainment at shares and multiples of a rate, with every seed: a row a run."""
    replay = Replay(scenario=scenario, criterion=settings.criterion)
    seeds = range(scenario.seed, scenario.seed + settings.seeds)
    futures = [executor.submit(replay.row, rate_per_s * share, seed) for share in AROUND for seed in seeds]
    rows = []
    for future in futures:
        rows.append(future.result())
        done()
    return rows


def save_goodput(
    folder: Path,
    title: str,
    scenario: Scenario,
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Goodput],
    around: pd.DataFrame,
) -> None:
    """Write goodput.csv, trials.csv, runs.csv, curve.csv with its plot, scenario, environment and summary.json."""
    import pandas as pd

    from experiments.plots.goodput import goodput_curves
    from experiments.plots.style import save

    trials = [{"system": label, **trial._asdict()} for label, one in found.items() for trial in one.trials]
    with into_folder(folder) as new:
        for name, table in (("goodput", pd.DataFrame(rows)), ("trials", pd.DataFrame(trials)), ("runs", around)):
            table.to_csv(new / f"{name}.csv", index=False, lineterminator="\n")
        if len(around):
            save(goodput_curves(means(around), rows), new, "curve")
        new.joinpath("scenario.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
        write_json(new / "environment.json", environment())
        write_json(new / MARK, {"name": title, "goodput": list(rows)})
