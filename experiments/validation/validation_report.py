"""The figures of a validation: errors beside the noise of the real runs, where they come from, tables and files.

Real runs differ from each other too: every error stands beside the noise floor, which is what one real run tells of
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.validation.recorded_steps import StepPair
from experiments.validation.validate import Validation
from sim.metrics import distribution
from sim.record import Result
from sim.transfers import Quantized

if TYPE_CHECKING:
    import pandas as pd

LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p99")
WHOLE = ("makespan_s", "output_tokens_per_s")
BOUNDED = {"ttft": ("ttft_s", "mean"), "tpot": ("tpot_s", "mean"), "e2e": ("e2e_s", "mean"),
           "makespan": ("makespan_s", ""), "throughput": ("output_tokens_per_s", "")}  # fmt: skip
"""What a tolerance may be set on, and the figure that it bounds."""


def figures(found: Validation) -> list[dict[str, Any]]:
    """A row per metric and statistic: predicted, the median of the real runs, error of the one, noise of the others.

    ``error`` = predicted / median - 1; ``noise``: the farthest that a real run is from the median of all of them, as a
    share of it; None with one run. ``measured_steps``: the median of the executions with a virtual clock, ``apart``:
    how far it is from that of the others. Over requests that completed in every run.
    """
    common = in_common(found)
    values: dict[tuple[str, str], list[Any]] = {}
    for result in _results(found):
        for metric in LATENCIES:
            spread = distribution(result.columns[metric][_places(result, common)])
            for name in STATISTICS:
                values.setdefault((metric, name), []).append(spread[name])
        for metric, value in _whole(result).items():
            values.setdefault((metric, ""), []).append(value)
    return [_row(key, own, len(found.runs)) for key, own in values.items()]


def _results(found: Validation) -> list[Result]:
    return [found.predicted, *(run.result for run in found.runs), *found.measured_steps]


def in_common(found: Validation) -> list[int]:
    """Ids of the requests that completed in the prediction and in every real run."""
    return sorted(set.intersection(*[_completed(result) for result in _results(found)]))


def _completed(result: Result) -> set[int]:
    return set(result.columns["request"][result.columns["outcome"] == "completed"].tolist())


def _places(result: Result, requests: Sequence[int]) -> NDArray[np.int64]:
    """Rows of these requests (columns are in order of id)."""
    return np.searchsorted(result.columns["request"], np.asarray(requests, dtype=np.int64))


def _whole(result: Result) -> dict[str, float]:
    done = result.columns["outcome"] == "completed"
    tokens = float(result.columns["output_tokens"][done].sum())
    return {
        "makespan_s": result.makespan_s,
        "output_tokens_per_s": tokens / result.makespan_s if result.makespan_s else 0.0,
    }


def _row(key: tuple[str, str], values: Sequence[Any], runs: int) -> dict[str, Any]:
    """Of the values predicted, of so many runs, and of those with measured steps."""
    predicted = values[0]
    real = [float(value) for value in values[1 : 1 + runs] if value is not None]
    virtual = [float(value) for value in values[1 + runs :] if value is not None]
    row = {"metric": key[0], "statistic": key[1], "predicted": predicted, "real": None, "runs": real}
    row |= {"error": None, "noise": None, "measured_steps": median(virtual) if virtual else None, "apart": None}
    if real and predicted is not None:
        row["real"] = middle = median(real)
        row["error"] = _error(predicted, middle)
        row["apart"] = _error(row["measured_steps"], middle) if virtual else None
        if len(real) > 1:
            row["noise"] = max(abs(value / middle - 1) for value in real) if middle else None
    return row


def _error(predicted: float, real: float) -> float | None:
    return predicted / real - 1 if real else None


def beyond(rows: Sequence[Mapping[str, Any]], tolerance: Mapping[str, float]) -> list[str]:
    """What misses its tolerance, by its short name; a figure that is not there does too."""
    errors = {(row["metric"], row["statistic"]): row["error"] for row in rows}
    missed = []
    for name, most in tolerance.items():
        error = errors[BOUNDED[name]]
        if error is None or abs(error) > most:
            missed.append(name)
    return missed


# ---------------------------------------------------------------- where the error comes from


def attribution(found: Validation) -> dict[str, Any]:
    """The parts of the error, each on its own, over all real runs; None where it cannot arise or be told."""
    return {
        "workload": _workload(found),
        "step_time": _step_times(found),
        "scheduling": _scheduling(found),
        "transfer": _transfers(found),
    }


def _workload(found: Validation) -> dict[str, float] | None:
    """How late requests were taken in."""
    late_s = [late for run in found.runs for late in run.late_s.values()]
    return {"mean_late_s": float(np.mean(late_s)), "max_late_s": max(late_s)} if late_s else None


def _step_times(found: Validation) -> dict[str, dict[str, float]] | None:
    """Predicted against measured seconds of the very same steps, by kind; ``error`` is that of their sum."""
    kinds: dict[str, list[StepPair]] = {"all": [pair for run in found.runs for pair in run.pairs]}
    for pair in kinds["all"]:
        kinds.setdefault(kind(pair), []).append(pair)
    return {name: _step_error(pairs) for name, pairs in kinds.items() if pairs} or None


def kind(pair: StepPair) -> str:
    return "decode" if not pair.prefill_tokens else "mixed" if pair.decode_seqs else "prefill"


def _step_error(pairs: Sequence[StepPair]) -> dict[str, float]:
    measured, predicted = (np.array([getattr(pair, name) for pair in pairs]) for name in ("measured_s", "predicted_s"))
    return {
        "steps": len(pairs),
        "measured_mean_s": float(measured.mean()),
        "predicted_mean_s": float(predicted.mean()),
        "error": float(predicted.sum() / measured.sum() - 1),
        "median_absolute_error": float(np.median(np.abs(predicted / measured - 1))),
    }


def _scheduling(found: Validation) -> dict[str, Any] | None:
    """Request times of the replay with recorded step and transfer times, against the real ones."""
    off: dict[str, list[float]] = {"ttft_s": [], "e2e_s": []}
    for run in found.runs:
        if run.replayed is not None:
            common = sorted(_completed(run.result) & _completed(run.replayed))
            for metric, values in off.items():
                real, replayed = (
                    result.columns[metric][_places(result, common)] for result in (run.result, run.replayed)
                )
                values.extend(np.abs(replayed / real - 1).tolist())
    diverged = [run.diverged for run in found.runs if run.diverged is not None]
    if not found.runs:
        return None
    largest = {f"largest_{metric[:-2]}_error": max(values, default=None) for metric, values in off.items()}
    return {**largest, "diverged": diverged}


def _transfers(found: Validation) -> dict[str, float] | None:
    """KV moves of the prediction against the measured ones of the same requests, alone from sending to landing.

    Measured steps model their links as the prediction does: nothing to compare but a codec.
    """
    if found.mode == "measured-step" and not isinstance(found.setup.system.transfer(), Quantized):
        return None
    guesses = _moves(found.predicted)
    pairs = [
        (guesses[request], took_s)
        for run in found.runs
        for request, took_s in _moves(run.result).items()
        if request in guesses
    ]
    if not pairs:
        return None
    predicted, measured = np.array(pairs).T
    return {
        "moves": len(pairs),
        "measured_mean_s": float(measured.mean()),
        "predicted_mean_s": float(predicted.mean()),
        "error": float(predicted.sum() / measured.sum() - 1),
    }


def _moves(result: Result) -> dict[int, float]:
    links = result.links
    return dict(zip(links["request"].tolist(), (links["end_s"] - links["start_s"]).tolist(), strict=True))


# ---------------------------------------------------------------- tables and files


def summary(found: Validation, tolerance: Mapping[str, float], name: str) -> dict[str, Any]:
    """Everything that the report prints, as JSON can hold it."""
    rows = figures(found)
    setup = found.setup
    cost = setup.problem.cost
    return {
        "name": name,
        "complete": found.lost is None,
        "lost": found.lost,
        "mode": found.mode,
        "device": found.device,
        "model": setup.problem.model.name,
        "system": setup.system.name,
        "mirrors": setup.system.mirrors,
        "overhead": None if setup.scenario.overhead is None else setup.scenario.overhead.model_dump(),
        "step_times": [profile.name for profile in getattr(cost, "profiles", ())] or [cost.name],
        "requests": len(found.predicted.rows.requests),
        "compared": len(in_common(found)),
        "runs": len(found.runs),
        "load_average": [run.load for run in found.runs],
        "reference_s": [run.reference_s for run in found.runs],
        "busy_share": max((row.busy_s / found.predicted.makespan_s for row in found.predicted.rows.replicas), default=0)
        if found.predicted.makespan_s
        else 0.0,
        "seed": setup.problem.seed,
        "figures": rows,
        "attribution": attribution(found),
        "tolerance": dict(tolerance),
        "beyond_tolerance": beyond(rows, tolerance),
    }


def request_table(found: Validation) -> pd.DataFrame:
    """A row per request that every run completed: its lengths, and each latency predicted, real (median) and by run."""
    import pandas as pd

    common = in_common(found)
    at = _places(found.predicted, common)
    columns: dict[str, Any] = {
        name: found.predicted.columns[name][at] for name in ("request", "arrival_s", "input_tokens", "output_tokens")
    }
    for metric in LATENCIES:
        real = [run.result.columns[metric][_places(run.result, common)] for run in found.runs]
        columns[f"predicted_{metric}"] = found.predicted.columns[metric][at]
        columns[f"real_{metric}"] = np.median(real, axis=0) if real else np.full(len(common), np.nan)
        columns |= {f"run{number}_{metric}": values for number, values in enumerate(real, start=1)}
    return pd.DataFrame(columns)


def step_table(found: Validation) -> pd.DataFrame:
    import pandas as pd

    rows = [(number, *pair) for number, run in enumerate(found.runs, start=1) for pair in run.pairs]
    return pd.DataFrame(rows, columns=["run", *StepPair._fields])


def lost_table(found: Validation) -> pd.DataFrame:
    """What the run that a worker's death ended had finished until then."""
    import pandas as pd

    rows = [
        (request.id, request.arrival_s, request.input_tokens, request.output_tokens, at_s - request.arrival_s)
        for request, at_s in found.ended
    ]
    return pd.DataFrame(rows, columns=["request", "arrival_s", "input_tokens", "output_tokens", "e2e_s"])


def save(found: Validation, figures_of: Mapping[str, Any], folder: Path) -> None:
    """Write summary, tables, figures and the scenario; the folder is replaced whole."""
    from experiments.plots.style import save as save_figure
    from experiments.plots.validation import latency_distributions, predicted_against_real, step_times
    from experiments.runs.rundir import environment, whole_folder, write_json

    with whole_folder(folder) as new:
        write_json(new / "summary.json", figures_of)
        write_json(new / "environment.json", environment())
        new.joinpath("scenario.yaml").write_text(found.setup.scenario.to_yaml(), encoding="utf-8")
        if found.lost is not None:
            lost_table(found).to_csv(new / "lost_run.csv", index=False)
        if not found.runs:
            return
        table, title = request_table(found), f"{figures_of['name']}: {figures_of['system']}"
        save_figure(predicted_against_real(table, title), new, "requests")
        save_figure(latency_distributions(table, title), new, "distributions")
        save_figure(step_times(step_table(found), title), new, "steps")
