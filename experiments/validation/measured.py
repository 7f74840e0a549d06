"""A real server's result beside a prediction, metric by metric and request by request.

``experiments.readers`` reads the files of the tools that measure. Times in seconds. Errors are predicted over measured
less 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.readers.agree import contradictions, load_remarks
from experiments.readers.base import LATENCIES, SPREADS, Measured, measures
from experiments.readers.read import read_measured
from experiments.runs.rundir import Run
from experiments.runs.vllm_bench import Bench, of_run
from experiments.scenario.file import Scenario
from experiments.scenario.workload import WorkloadSpec
from sim.metrics import distribution
from sim.types import ConfigError, Request
from traces import write

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Measured", "compare", "measures", "of_saved", "predict", "read_measured", "served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows of metric, measured, predicted, error; a row per request where they are the same ones on both sides."""

    rows: list[dict[str, Any]]
    requests: pd.DataFrame | None
    remarks: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """How many latencies could be compared."""
        names = [row["metric"].partition(" ")[0] for row in self.rows if row["error"] is not None]
        return sum(name in SPREADS for name in names)

    def beyond(self, tolerance: float) -> list[str]:
        """Metrics whose error is greater."""
        return [row["metric"] for row in self.rows if row["error"] is not None and abs(row["error"]) > tolerance]

    def per_request(self) -> dict[str, dict[str, float | None]]:
        """Median and 90th percentile of the requests' absolute relative errors, by latency."""
        if self.requests is None:
            return {}
        found = {}
        for name in LATENCIES:
            spread = distribution(self.requests[f"{name} error"].abs().to_numpy(dtype=float))
            found[name] = {key: spread[key] for key in ("p50", "p90")}
        return found


# ---------------------------------------------------------------- predict


def predict(
    scenario: Scenario, measured: Measured, *, own: bool, progress: Callable[[int], None] | None = None
) -> Bench:
    """Simulate what was measured: the file's requests at the times they were sent, or the scenario's ``own``.

    ``ConfigError`` where the file does not have them.
    """
    from experiments.scenario.resolve import resolve

    if own:
        setup = resolve(scenario)
        return _simulated(scenario.where, setup.run(progress=progress), setup)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "sent.csv"
        write(trace, _sent(scenario, measured))
        workload = WorkloadSpec(trace=str(trace), too_long=scenario.workload.too_long)
        setup = resolve(scenario.model_copy(update={"workload": workload}))
        return _simulated(scenario.where, setup.run(progress=progress), setup)


def _simulated(name: str, result: Any, setup: Any) -> Bench:
    return of_run(Run.of(name, result, setup.summary(result), tokens=True))


def _sent(scenario: Scenario, measured: Measured) -> list[Request]:
    """The requests that were served, in order of sending; the others had no answer to repeat."""
    mend = "simulate the scenario's own requests with --workload scenario"
    if measured.bench is None:
        raise ConfigError(f"{scenario.where}: the result has no requests (vLLM: --save-detailed); {mend}")
    rows = served(measured.bench).requests
    if rows["arrival_s"].isna().any():
        raise ConfigError(f"{scenario.where}: the result does not say when requests were sent (start_times); {mend}")
    if not len(rows):
        raise ConfigError(f"{scenario.where}: the result has no request that was served; {mend}")
    cells = zip(rows["arrival_s"], rows["input_tokens"], rows["output_tokens"], strict=True)
    return [
        Request(id=number, arrival_s=float(arrival_s), input_tokens=max(1, int(inputs)), output_tokens=int(outputs))
        for number, (arrival_s, inputs, outputs) in enumerate(cells)
    ]


def served(bench: Bench) -> Bench:
    """Only what completed, in order of sending."""
    rows = bench.requests[bench.requests["outcome"] == "completed"].sort_values("arrival_s", kind="stable")
    gaps = tuple(bench.gaps_s[place] for place in rows.index) if bench.gaps_s else ()
    return replace(bench, requests=rows.reset_index(drop=True), gaps_s=gaps)


def of_saved(run: Run) -> Bench:
    """A run directory as a prediction; without its tokens it has no ITL."""
    if run.tokens is not None:
        return of_run(run)
    rows = run.requests.sort_values(["arrival_s", "request"], kind="stable", ignore_index=True)
    return Bench(requests=rows, gaps_s=(), duration_s=float(run.summary["makespan_s"]))


# ---------------------------------------------------------------- facts


def facts_of_run(run: Run) -> dict[str, Any]:
    """What a finished run says of itself, for ``disagreements``."""
    degrees = run.replicas["tp"].tolist() if "tp" in run.replicas else []
    return {"model": str(run.summary.get("model")), "gpus": list(run.summary.get("gpus") or ()), "tps": degrees}


def facts_of_scenario(scenario: Scenario) -> dict[str, Any]:
    """The same of a scenario; degrees only where it states them."""
    options = scenario.system.options
    stated = [options.get("tp"), *(part.get("tp") for part in options.values() if isinstance(part, Mapping))]
    model = scenario.model
    path = Path(model)
    if path.suffix == ".json":
        model = path.parent.name if path.name == "config.json" else path.stem
    gpus = sorted({node.gpu for node in scenario.cluster.nodes})
    return {"model": model, "gpus": gpus, "tps": [tp for tp in stated if isinstance(tp, int)]}


def disagreements(
    measured: Measured, facts: Mapping[str, Any], scenario: Scenario | None, *, despite: bool = False
) -> list[str]:
    """Remarks on what the result says otherwise than the scenario. ConfigError where nothing can be compared then.

    ``scenario``: whose own requests are simulated; None where those of the result are.
    """
    remarks = []
    for remark, void in contradictions(measured.facts, **facts):
        if void and not despite:
            raise ConfigError(f"{remark}: there is nothing to compare; --despite compares all the same")
        remarks.append(remark)
    if scenario is not None:
        loop = scenario.workload.closed_loop
        clients = None if loop is None else loop.clients
        remarks += load_remarks(measured.facts, rate=scenario.workload.rate, clients=clients)
    return remarks


# ---------------------------------------------------------------- compare


def compare(measured: Measured, predicted: Bench) -> Comparison:
    """Both sides by the same functions; request by request if they are the same ones in the same order.

    Failed requests are counted but not judged: the prediction is of those that were served, and must complete them.
    """
    ours = measures(predicted)
    rows = []
    for metric, value in measured.measures.items():
        guess = ours[metric]
        error = None
        if metric != "requests" and value and guess is not None:
            error = guess / value - 1
        rows.append({"metric": metric, "measured": value, "predicted": guess, "error": error})
    return Comparison(rows=rows, requests=_paired(measured.bench, predicted), remarks=list(measured.remarks))


def _paired(measured: Bench | None, predicted: Bench) -> pd.DataFrame | None:
    """A row per request: lengths, each latency measured, predicted, and its error. None if they are other requests."""
    if measured is None:
        return None
    real, ours = served(measured).requests, predicted.requests
    same = len(real) == len(ours) and all(
        (real[name].to_numpy() == ours[name].to_numpy()).all() for name in ("input_tokens", "output_tokens")
    )
    if not same:
        return None
    table = ours[["request", "arrival_s", "input_tokens", "output_tokens"]].copy()
    for name, column in LATENCIES.items():
        seen, guess = real[column].to_numpy(dtype=float), ours[column].to_numpy(dtype=float)
        table[f"{name} measured (s)"], table[f"{name} predicted (s)"] = seen, guess
        table[f"{name} error"] = np.divide(guess, seen, out=np.full(len(seen), np.nan), where=seen > 0) - 1
    return table
