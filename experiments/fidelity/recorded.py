"""Real runs as they were saved: LLMServingSim's folders, or the results of load generators.

The latter name no GPU: ``meta.json`` beside them does, or whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.fidelity.metadata import Facts, read_facts
from experiments.readers.read import READERS, load_records, read_measured
from experiments.runs.vllm_bench import Bench
from sim import Request
from sim.outside import MOST_RESULT_BYTES, parse_json, read_json, read_text
from sim.types import ConfigError

COLUMNS = ("input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run: its engine, the requests to replay, and what was measured of each (arrival_s, ttft_s, tpot_s, e2e_s).

    ``engine_clock``: times are the engine's (``queued_ts``), not a client's. ``clients``: the most requests that the
    client had open at once, or None. ``notes``: what was assumed.
    """

    name: str
    facts: Facts
    requests: Sequence[Request]
    truth: pd.DataFrame
    clients: int | None
    engine_clock: bool
    notes: tuple[str, ...]

    @property
    def makespan_s(self) -> float:
        return float((self.truth.arrival_s + self.truth.e2e_s).max())


def read_run(place: Path, stated: dict[str, Any] | None = None, benchmark: int | None = None) -> RecordedRun:
    """A benchmark's file, or a folder with it or ``requests.jsonl``, and ``meta.json``; ``stated`` goes before that.

    ``benchmark``: which one of a guidellm report of several. ``ConfigError`` names file, field and mend.
    """
    file, folder = (place, place.parent) if place.is_file() else (None, place)
    meta_path = folder / "meta.json"
    meta = _json(meta_path) if meta_path.is_file() else {}
    meta = {**meta, "engine_kwargs": {**meta.get("engine_kwargs", {}), **(stated or {})}}
    if (folder / "requests.jsonl").is_file() and file in (None, folder / "requests.jsonl"):
        facts = read_facts(meta, str(meta_path))
        return _logged(folder, facts)
    for path in [file] if file is not None else sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        if path == meta_path or path.name == "trace.jsonl":
            continue
        records = load_records(path)
        if file is None and not any(reader.is_it(records[0]) for reader in READERS):
            continue
        measured = read_measured(path, benchmark)
        where = str(meta_path if meta_path.is_file() else path)
        if measured.bench is None:
            raise ConfigError(f"{path}: this result of {measured.source} has no requests (vLLM: --save-detailed)")
        fields = records[benchmark or 0] if len(records) > (benchmark or 0) else records[0]
        named = {"model": measured.facts["model"]} if "model" in measured.facts else {}
        return _benchmark(path, measured.bench, fields, read_facts({**fields, **named, **meta}, where))
    raise ConfigError(
        f"{folder}: has neither requests.jsonl, nor the result of a load generator that has its requests ("
        "'vllm bench serve --save-detailed', guidellm, SGLang's --output-details, aiperf)"
    )


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path, "result", MOST_RESULT_BYTES)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold an object; copy it anew")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path, "log", MOST_RESULT_BYTES).splitlines()
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _logged(folder: Path, facts: Facts) -> RecordedRun:
    """Arrivals are the engine's (``queued_ts``), and so are first and last tokens."""
    path = folder / "requests.jsonl"
    rows = pd.DataFrame(_lines(path))
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing; it needs {', '.join(COLUMNS)}")
    rows = rows.sort_values("queued_ts", kind="stable", ignore_index=True)
    arrival_s = rows.queued_ts - rows.queued_ts.min()
    truth = pd.DataFrame(
        {
            "arrival_s": arrival_s,
            "ttft_s": rows.first_token_ts - rows.queued_ts,
            "tpot_s": _per_token(rows.last_token_ts - rows.first_token_ts, rows.output_toks),
            "e2e_s": rows.last_token_ts - rows.queued_ts,
        }
    )
    prefixes = _prefixes(folder / "trace.jsonl", len(rows), facts)
    columns = zip(arrival_s, rows.input_toks, rows.output_toks, prefixes, strict=True)
    requests = [_request(number, *fields, facts) for number, fields in enumerate(columns)]
    hidden = facts.limits.prefix_caching and not any(prefixes)
    notes = ("no trace.jsonl: prompts count as different ones",) if hidden else ()
    return RecordedRun(
        name=folder.name,
        facts=facts,
        requests=requests,
        truth=truth,
        clients=None,
        engine_clock=True,
        notes=facts.assumed + notes,
    )


def _prefixes(path: Path, count: int, facts: Facts) -> list[tuple[int, ...]]:
    """Block hashes of every prompt in order of arrival, from the trace beside the run if there is one."""
    if not facts.limits.prefix_caching or not path.is_file():
        return [()] * count
    rows = sorted(_lines(path), key=lambda row: row["timestamp"])
    if len(rows) != count:
        raise ConfigError(f"{path}: has {len(rows)} requests, requests.jsonl has {count}; copy both anew")
    return [tuple(row.get("hash_ids", ())) for row in rows]


def _request(
    number: int, at_s: float, input_tokens: int, output_tokens: int, prefix: tuple[int, ...], facts: Facts
) -> Request:
    return Request(
        id=number,
        arrival_s=float(at_s),
        input_tokens=int(input_tokens),
        output_tokens=int(output_tokens),
        prefix=prefix,
        prefix_block_tokens=facts.limits.block_size if prefix else None,
    )


def _per_token(span_s: pd.Series, outputs: pd.Series) -> pd.Series:
    """TPOT, which a single token does not have."""
    return span_s / (outputs - 1).where(outputs > 1)


def _benchmark(path: Path, bench: Bench, fields: dict[str, Any], facts: Facts) -> RecordedRun:
    """What the client saw: HTTP and tokenizer are in its TTFT, and not in the prediction."""
    served = bench.requests[bench.requests.outcome == "completed"].reset_index(drop=True)
    if served.empty:
        raise ConfigError(f"{path}: no request was served; there is nothing to compare")
    arrivals_s, clients, note = _arrivals(bench, served, fields, str(path))
    served = served.assign(arrival_s=arrivals_s).sort_values("arrival_s", kind="stable", ignore_index=True)
    truth = served[["arrival_s", "ttft_s", "tpot_s", "e2e_s"]].astype(float)
    columns = zip(served.arrival_s, served.input_tokens, served.output_tokens, [()] * len(served), strict=True)
    requests = [_request(number, *fields, facts) for number, fields in enumerate(columns)]
    notes = (*facts.assumed, note, "measured by the client: HTTP and tokenizer are in its TTFT, not in the prediction")
    return RecordedRun(
        name=path.stem,
        facts=facts,
        requests=requests,
        truth=truth,
        clients=clients,
        engine_clock=False,
        notes=tuple(filter(None, notes)),
    )


def _arrivals(
    bench: Bench, served: pd.DataFrame, fields: dict[str, Any], where: str
) -> tuple[np.ndarray, int | None, str]:
    """When requests were sent; how many were open at most, where that is what set it; and what was assumed."""
    if not served.arrival_s.isna().any():
        return served.arrival_s.to_numpy(float), None, ""
    clients, rate = fields.get("max_concurrency"), fields.get("request_rate", "inf")
    try:
        rate_per_s = float(rate)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: request_rate is {rate!r}; it must be a number of requests/s, or inf") from None
    if np.isinf(rate_per_s):
        return np.zeros(len(served)), clients, "no start_times: all are sent at once"
    if not rate_per_s > 0:
        raise ConfigError(f"{where}: request_rate is {rate!r}; it must be > 0")
    shape = fields.get("burstiness", 1.0)
    if isinstance(shape, bool) or not isinstance(shape, int | float) or not shape > 0:
        raise ConfigError(f"{where}: burstiness is {shape!r}; it must be a number > 0")
    gaps_s = np.random.default_rng(0).gamma(shape, 1 / (rate_per_s * shape), len(served))
    note = f"no start_times: arrivals are drawn at request_rate (gamma of shape {shape}, seed 0)"
    return np.cumsum(gaps_s) - gaps_s[0], None, note
