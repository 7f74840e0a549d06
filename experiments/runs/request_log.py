"""A finished run's requests as a trace: replayed as an open loop they give the same run again."""

from __future__ import annotations

from experiments.runs.rundir import Run
from sim.record import TRACE_COLUMNS
from sim.types import ConfigError, Request
from traces import by_arrival

FIELDS = ("arrival_s", "input_tokens", "output_tokens", "klass", *TRACE_COLUMNS)


def requests_of(run: Run) -> list[Request]:
    """In order of arrival, whatever became of them; ids are running numbers. ``ConfigError`` for an old run directory.

    Requests that had waited for others (a closed loop, sessions) arrive when they did.
    """
    absent = [name for name in FIELDS if name not in run.requests.columns]
    if absent:
        raise ConfigError(f"{run.name}: its requests have no column {absent[0]}; run the scenario again with --out")
    ordered = run.requests.sort_values("request")
    columns = [ordered[name].astype(object).where(ordered[name].notna(), None).tolist() for name in FIELDS]
    return list(by_arrival(_request(number, *cells) for number, cells in enumerate(zip(*columns, strict=True))))


def _request(number: int, *cells: object) -> Request:
    fields: dict[str, object] = dict(zip(FIELDS, cells, strict=True))
    fields["prefix"] = tuple(map(int, str(fields["prefix"]).split())) if fields["prefix"] else ()
    return Request(id=number, **fields)  # type: ignore[arg-type]
