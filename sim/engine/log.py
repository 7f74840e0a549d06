"""What the engine writes down: flights, requests and replicas as rows of the run's record."""

from __future__ import annotations

from sim.cluster import Cluster
from sim.engine.replica.job import Job
from sim.engine.replica.state import Flight, ReplicaState
from sim.record import Recorder, ReplicaRow, RequestRow
from sim.types import Outcome, to_s


def log_flight(rows: Recorder, replica: ReplicaState, flight: Flight, now_ps: int) -> int:
    """What the flight did, for token times, stage use and the step table; how many iterations it was."""
    count, cohort = flight.iterations, flight.cohort
    if cohort is not None:
        cohort.log.append((cohort.it - count, flight.start_ps, count, flight.first_ps, flight.slope_ps))
    for number, line in enumerate(flight.stage_lines):
        replica.stage_busy_ps[number] += count * line.first_ps + line.slope_ps * (count * (count - 1) // 2)
    prefill_tokens = sum([tokens for _, tokens in flight.chunks]) if flight.chunks else 0
    decode_seqs = cohort.size if cohort is not None else 0
    rows.step_fields.append(
        (replica.name, flight.start_ps, now_ps, count, prefill_tokens, decode_seqs, flight.decode_context)
    )
    return count


def request_row(job: Job, outcome: Outcome, reason: str, finish_ps: int | None) -> RequestRow:
    return RequestRow(
        job.request, outcome, reason, job.first_scheduled_ps, job.first_token_ps, job.prefill_end_ps,
        job.transfer_ps, finish_ps, tuple(job.tokens), job.preemptions, job.cached_tokens, job.bytes_moved,
        *job.places, job.queued_ps,
    )  # fmt: skip


def log_replica(rows: Recorder, cluster: Cluster, replica: ReplicaState, down_s: float | None) -> None:
    """The replica and its cohorts' iterations, when it goes (``down_s``) or the run ends (None)."""
    kinds = dict.fromkeys(cluster.gpu(gpu).name for gpu in replica.gpus)
    busy_s = tuple(to_s(busy_ps) for busy_ps in replica.stage_busy_ps)
    rows.replicas.append(
        ReplicaRow(
            replica.name, replica.role, " ".join(replica.gpus), " + ".join(kinds),
            replica.spec.stages[0].tp, len(replica.spec.stages), replica.total_blocks, max(busy_s), busy_s,
            all(cost.measured for cost in replica.costs), tuple(stage.tp for stage in replica.spec.stages),
            to_s(replica.up_ps), down_s,
        )
    )  # fmt: skip
    for cohort in replica.cohorts:
        rows.segments[cohort.id] = cohort.log
