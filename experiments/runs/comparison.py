"""One scenario under one system or several: which, their runs, and the directory that keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs.progress import Log
from experiments.runs.rundir import (
    MARK,
    Run,
    environment,
    read_run,
    read_summary,
    whole_files,
    whole_folder,
    write_json,
    write_run_files,
)
from experiments.runs.tables import METRICS, comparison_json
from experiments.scenario.file import Scenario, load
from experiments.scenario.resolve import resolve
from experiments.scenario.system import VariantSpec
from sim.cluster import did_you_mean
from sim.systems import SYSTEMS
from sim.types import ConfigError, InfeasibleError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.plots.run.timeline import Window


FILES = {".png", ".svg", ".csv", ".json", ".yaml", ".html", ".md", ".parquet"}
LONGEST_NAME = 100

Given = Scenario | str | Path | Mapping[str, Any]
"""What scripts may give for a scenario: see ``scenario.file.load``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs of the same requests under several systems, by label; ``left_out`` says who found no plan, and why."""

    title: str
    scenarios: Mapping[str, Scenario]
    runs: Mapping[str, Run]
    left_out: Mapping[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """A row a metric, a column a system."""
        return _metric_table({label: run.summary for label, run in self.runs.items()}).set_index("metric")

    def save(self, folder: str | Path) -> None:
        """A run directory per system, figures and tables, as 'phasewise compare --out' writes them."""
        save_comparison(Path(folder), self.title, self.scenarios, self.runs, self.left_out)


def run(scenario: Given, *, step_by_step: bool = False, tokens: bool = False) -> Run:
    """Simulate a scenario's own system: its summary and tables. ``tokens`` keeps the time of every token.

    ``ConfigError`` for a mistake in the scenario, ``InfeasibleError`` if no plan meets it.
    """
    experiment = load(scenario)
    setup = resolve(experiment)
    result = setup.run(step_by_step=step_by_step)
    name = Path(experiment.where).stem
    return Run.of(name, result, {"name": name, **setup.summary(result)}, tokens=tokens)


def compare(scenario: Given, systems: str | Sequence[str] | None = None, *, quiet: bool = True) -> Comparison:
    """The same requests under several systems. ``systems`` as ``variants`` takes them, or a list of labels."""
    experiment = load(scenario)
    chosen = variants(experiment, systems if systems is None or isinstance(systems, str) else ",".join(systems))
    runs, left_out = run_all(chosen, Log(quiet))
    return Comparison(title=Path(experiment.where).stem, scenarios=chosen, runs=runs, left_out=left_out)


def variants(scenario: Scenario, systems: str | None = None) -> dict[str, Scenario]:
    """Label -> scenario. A label is an entry of the scenario's ``compare``, the scenario's own system, or any system.

    ``systems`` picks, comma-separated; without it all entries of ``compare``, else every system there is.
    """
    known: dict[str, VariantSpec] = {name: VariantSpec() for name in SYSTEMS}
    known |= {scenario.system.name: scenario.system, **scenario.compare}
    labels = [label.strip() for label in systems.split(",") if label.strip()] if systems is not None else None
    chosen = labels if labels is not None else list(scenario.compare) or list(SYSTEMS)
    if not chosen:
        raise ConfigError("--systems: it names no system; 'phasewise systems' lists them")
    for label in chosen:
        if label not in known:
            raise ConfigError(f"--systems: {did_you_mean(label, known)}")
    check_labels(chosen)
    return {label: scenario.variant(label, known[label]) for label in dict.fromkeys(chosen)}


def check_labels(labels: Sequence[str]) -> None:
    """Each label becomes a folder beside figures and tables: refuse two that collide, and names of files."""
    taken: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        folder = _folder_name(label).lower()
        if Path(folder).suffix in FILES or len(folder) > LONGEST_NAME:
            raise ConfigError(
                f"compare.{label[:80]}: the label becomes a folder's name; choose a short one like 'vllm-tp2'"
            )
        if folder in taken:
            raise ConfigError(f"compare.{label}: its folder would be that of {taken[folder]!r}; rename one of them")
        taken[folder] = label


def run_all(
    chosen: Mapping[str, Scenario], log: Log, *, step_by_step: bool = False
) -> tuple[dict[str, Run], dict[str, str]]:
    """Simulate each; all are resolved first, so that a mistake in the last one is found before the first runs.

    Returns the runs, and why others are left out: their planners found nothing. ``InfeasibleError`` if all are.
    """
    setups = {label: resolve(scenario) for label, scenario in chosen.items()}
    for remark in dict.fromkeys(remark for setup in setups.values() for remark in setup.requests.remarks):
        log.say(remark)
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for number, (label, setup) in enumerate(setups.items(), start=1):
        try:
            with log.counting(label) as progress:
                result = setup.run(step_by_step=step_by_step, progress=progress)
        except InfeasibleError as error:
            if number == len(setups) and not runs:
                raise
            left_out[label] = str(error)
            continue
        log.say(f"{label}: {len(result.columns['request']):,} requests simulated in {result.wall_s:.1f} s")
        runs[label] = Run.of(label, result, {"name": label, **setup.summary(result)})
    return runs, left_out


def save_comparison(
    folder: Path, title: str, chosen: Mapping[str, Scenario], runs: Mapping[str, Run], left_out: Mapping[str, str]
) -> None:
    """Write a run directory per system, figures with their CSVs, comparison.csv and summary.json: all or nothing."""
    from experiments.plots.run.gallery import save_all

    summaries = {label: run.summary for label, run in runs.items()}
    with whole_folder(folder) as new:
        for label, run in runs.items():
            new.joinpath(_folder_name(label)).mkdir()
            write_run_files(new / _folder_name(label), run, chosen[label].to_yaml())
        save_all(runs, new, name=title)
        _metric_table(summaries).to_csv(new / "comparison.csv", index=False, lineterminator="\n")
        write_json(new / "environment.json", environment())
        folders = {label: _folder_name(label) for label in runs}
        write_json(new / MARK, {"name": title, "runs": folders, **comparison_json(summaries, left_out)})


def draw(run_dir: Path, out: Path | None, from_s: float | None, to_s: float | None) -> list[Path]:
    """Every figure of a run directory or a comparison, into ``out``; returns the files."""
    from experiments.plots.run.gallery import save_all

    window = _window(from_s, to_s)
    summary = read_summary(run_dir)
    if "runs" in summary:
        runs = {label: read_run(run_dir / name) for label, name in _parts(run_dir, summary["runs"]).items()}
    else:
        run = read_run(run_dir)
        runs = {run.summary.get("system") or run.name: run}
    folder = out or (run_dir if "runs" in summary else run_dir / "plots")
    with whole_files(folder) as new:
        try:
            drawn = save_all(runs, new, name=summary.get("name") or run_dir.name, window_s=window)
        except (KeyError, TypeError) as error:
            missing = f"its summary or tables lack {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{run_dir}: the run directory is damaged: {missing}; run the scenario again") from None
    return [folder / path.name for path in drawn]


def _parts(run_dir: Path, runs: Any) -> Mapping[str, str]:
    """Label -> folder of each run of a comparison."""
    if isinstance(runs, dict) and runs and all(isinstance(name, str) for name in runs.values()):
        return runs
    raise ConfigError(f"{run_dir / MARK}: field runs must map labels to folders; run the comparison again")


def _window(from_s: float | None, to_s: float | None) -> Window | None:
    if from_s is None and to_s is None:
        return None
    if from_s is None or to_s is None or not 0 <= from_s < to_s < inf:
        raise ConfigError(f"--from {from_s} --to {to_s}: give both, in seconds, the second greater")
    return (from_s, to_s)


def _metric_table(summaries: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    rows = [{"metric": metric.name, **{label: metric.value(s) for label, s in summaries.items()}} for metric in METRICS]
    return pd.DataFrame(rows)


def _folder_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in label).lstrip(".") or "run"
