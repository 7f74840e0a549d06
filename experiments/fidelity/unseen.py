"""Any real run against its prediction: ``python -m experiments.fidelity.unseen RUN_DIR``.

Nothing is tuned: engine and machine are what the run's metadata says (``metadata.py``, with vLLM's defaults where it is
silent), step times come from the shipped profiles, else from kernel tables of the GPU or of its relative
(``calibrate/profile/relatives.py``), and the processor's time is ``SYNCHRONOUS``,
overlapped under asynchronous scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from calibrate.profile.file import read_profile, shipped_profiles
from calibrate.profile.relatives import kernels_for
from experiments.fidelity.constants import SYNCHRONOUS
from experiments.fidelity.metadata import Facts
from experiments.fidelity.recorded import RecordedRun, read_run
from experiments.fidelity.report import rows_frame, table
from experiments.fidelity.setup import Following, Recorded, run
from experiments.fidelity.table import Row, Study
from experiments.scenario.resolve import ENGINE
from sim import Limits, Problem, Request, Result, Workload
from sim.cluster import Cluster, Gpu
from sim.cost import Overhead, Profile, Roofline
from sim.memory import kv_blocks
from sim.model import ModelSpec, model
from sim.policy import System
from sim.systems.schedulers.releases import FIRST_V1
from sim.systems.schedulers.vllm import vllm
from sim.types import ConfigError

QUANTILES = (50, 90, 95, 99)


def system(facts: Facts) -> System:
    """vLLM as the metadata describes it."""
    return vllm(
        mode="v1" if facts.version >= FIRST_V1 else "v0",
        chunked_prefill=facts.chunked_prefill,
        long_prefill_token_threshold=facts.long_prefill_token_threshold,
        reserve_full_prompt=facts.reserve_full_prompt,
        replicas=facts.replicas,
        tp=facts.tp,
        pp=facts.pp,
    ).with_limits(facts.limits)


def overhead(facts: Facts) -> Overhead:
    return replace(SYNCHRONOUS, overlapped=facts.limits.async_scheduling)


def profiles(gpu: Gpu) -> list[Profile]:
    """What is known of a GPU type under vLLM: what is shipped, then what its relative makes likely."""
    relative = kernels_for(gpu)
    shipped = [read_profile(path) for name, path in shipped_profiles().items() if name.startswith(ENGINE)]
    return shipped if relative is None else [*shipped, relative]


def predict(recorded: RecordedRun, *, step_by_step: bool = False) -> Result:
    """The same requests under the settings of the run's own metadata."""
    facts = recorded.facts
    cluster = _cluster(facts)
    source = Recorded(recorded.requests) if recorded.clients is None else _closed(recorded.requests, recorded.clients)
    return run(
        cluster,
        system(facts),
        source,
        profiles(facts.gpu),
        limits(facts),
        overhead(facts),
        spec=spec(facts),
        step_by_step=step_by_step,
    )


def spec(facts: Facts) -> ModelSpec:
    return replace(model(facts.model, facts.dtype), kv_dtype=facts.kv_dtype)


def limits(facts: Facts) -> Limits:
    """The run's, with the KV blocks that its release of vLLM would have counted where the metadata does not say."""
    if facts.limits.num_kv_blocks is not None:
        return facts.limits
    problem = Problem(
        cluster=_cluster(facts),
        model=spec(facts),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((1000, 100),)),
        limits=facts.limits,
    )
    stages = system(facts).planner.plan(problem).replicas[0].stages
    blocks = kv_blocks(problem, stages, facts.limits)
    return replace(facts.limits, num_kv_blocks=blocks) if blocks else facts.limits


def _cluster(facts: Facts) -> Cluster:
    return Cluster.of(nodes=[{"gpu": facts.gpu, "count": facts.tp * facts.pp * facts.replicas}])


def _closed(requests: Iterable[Request], clients: int) -> Following:
    """Every answer is followed by the next request of the list."""
    later = iter(requests)
    first = list(islice(later, clients))

    def after(now_s: float, finished: Request) -> Iterable[Request]:
        following = next(later, None)
        return () if following is None else (replace(following, arrival_s=now_s),)

    return Following(first, after)


def rows(recorded: RecordedRun, result: Result, study: str = "unseen") -> list[Row]:
    """Mean and quantiles of TTFT, TPOT and E2E, and the makespan; load is time to serve over time to arrive."""
    truth, predicted = recorded.truth, result.requests
    if recorded.engine_clock:  # it counts from when the scheduler knew of a request
        taken_in = predicted.intake_s
        predicted = predicted.assign(ttft_s=predicted.ttft_s - taken_in, e2e_s=predicted.e2e_s - taken_in)
    lost = predicted[predicted.outcome != "completed"]
    if not lost.empty:
        raise ConfigError(f"{recorded.name}: {len(lost)} requests were not served in simulation: {lost.reason.iloc[0]}")
    span_s = float(truth.arrival_s.max())
    load = result.makespan_s / span_s if span_s > 0 else 1.0

    def row(metric: str, measured_s: float, predicted_s: float) -> Row:
        return Row(
            study=study, case="run", metric=metric, unit="s", measured=measured_s, predicted=predicted_s, load=load
        )

    found = []
    for metric, column in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s")):
        pair = (summary(frame[column].dropna().to_numpy(float)) for frame in (truth, predicted))
        found += [row(f"{metric} {name}", a, b) for (name, a), (_, b) in zip(*pair, strict=True)]
    return [*found, row("makespan", recorded.makespan_s, result.makespan_s)]


def summary(values_s: np.ndarray) -> list[tuple[str, float]]:
    """(name, seconds) of mean and quantiles; nothing of no values."""
    if not values_s.size:
        return []
    return [("mean", float(values_s.mean()))] + [(f"p{q}", float(np.percentile(values_s, q))) for q in QUANTILES]


def described(recorded: RecordedRun, result: Result) -> str:
    """One line on what was simulated."""
    facts, replica = recorded.facts, result.replicas.iloc[0]
    priced = "measured kernels"
    if not result.replicas.measured.all():
        priced = "roofline" if kernels_for(facts.gpu) is None else "kernels scaled from a relative's"
    return (
        f"{recorded.name}: {facts.model} on {facts.replicas * facts.tp * facts.pp} x {facts.gpu.name} "
        f"(tp {facts.tp}, pp {facts.pp}), vLLM {'.'.join(map(str, facts.version))}, "
        f"{'a' if facts.limits.async_scheduling else ''}synchronous scheduling, {replica.total_blocks} KV blocks, "
        f"{facts.limits.max_num_seqs} sequences, {facts.limits.max_num_batched_tokens} tokens a step; {priced}"
    )


def main(
    run_dir: Annotated[
        Path, typer.Argument(help="folder with meta.json and requests.jsonl, a vllm bench JSON or a guidellm report")
    ],
    gpu: Annotated[str | None, typer.Option(help="GPU type, if the metadata lacks it")] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="model, if the metadata lacks it")] = None,
    tp: Annotated[int | None, typer.Option(help="tensor-parallel degree, if the metadata lacks it")] = None,
    version: Annotated[str | None, typer.Option(help="vLLM's version, if the metadata lacks it")] = None,
    benchmark: Annotated[int | None, typer.Option(help="which one of a guidellm report of several, from 0")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the table to this CSV file")] = None,
) -> None:
    """Predict a real run from its metadata alone, and print both side by side."""
    options = {"gpu": gpu, "model": model_name, "tensor_parallel_size": tp, "vllm_version": version}
    stated: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        recorded = read_run(run_dir, stated, benchmark)
        result = predict(recorded)
        study = Study(title=recorded.name, rows=tuple(rows(recorded, result)), bars=(), notes=recorded.notes)
    except (ConfigError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(described(recorded, result))
    for note in study.notes:
        typer.echo(f"- assumed: {note}")
    for note in recorded.facts.unmodelled:
        typer.echo(f"- not modelled: {note}")
    frame = rows_frame([study]).drop(columns=["study", "case", "use"])
    typer.echo(table(frame))
    if out is not None:
        frame.to_csv(out, index=False)
        typer.echo(f"wrote {out}", err=True)


if __name__ == "__main__":
    typer.run(main)
