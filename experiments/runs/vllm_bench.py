"""The result JSON of ``vllm bench serve``: written for any run, and read from a real one.

Field names and definitions are those of ``vllm/benchmarks/serve.py``: per-request arrays in seconds, summaries in
milliseconds, one entry per request in order of sending. A request that was not served has an ``errors`` text and no
tokens. TPOT counts from the first token; for goodput a request of one token has a TPOT of 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.runs.rundir import Run
from sim.metrics import met
from sim.outside import MOST_RESULT_BYTES, read_json
from sim.record import REQUEST_COLUMNS
from sim.types import ConfigError, Slo

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = (50, 90, 95, 99)
MS_PER_S = 1000.0
BOUNDS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
"""vLLM's names of the latencies that a goodput may bound, and ours."""
ARRAYS = ("input_lens", "output_lens", "ttfts", "itls")
DATE = "%Y%m%d-%H%M%S"
ABOUT = {
    "date": None, "endpoint_type": "openai", "backend": "openai", "label": None, "model_id": None, "tokenizer_id": None,
    "num_prompts": None, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": None,
}  # fmt: skip
"""What vLLM says about a benchmark (``main_async``), in its order."""
UNSERVED = "not served"
"""For a request that failed without a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark result: our request columns (what it cannot know is empty), token gaps, seconds it took."""

    requests: pd.DataFrame
    gaps_s: tuple[NDArray[np.float64], ...]
    duration_s: float


def of_run(run: Run) -> Bench:
    """``ConfigError`` if the run was kept without its tokens."""
    if run.tokens is None:
        raise ConfigError(f"{run.name}: the run has no tokens.parquet; run the scenario again with --out and --tokens")
    tokens = run.tokens.set_index("request")["gaps_s"]
    requests = run.requests.sort_values(["arrival_s", "request"], kind="stable", ignore_index=True)
    gaps = tuple(np.asarray(tokens[request], dtype=float) for request in requests["request"])
    return Bench(requests=requests, gaps_s=gaps, duration_s=float(run.summary["makespan_s"]))


def write_bench(path: Path, bench: Bench, *, slo: Slo | None = None, **more: object) -> None:
    """Write the JSON with every field of ``vllm bench serve --save-result --save-detailed``, and ``latencies``.

    ``slo`` adds ``request_goodput``; ``more``: fields about the benchmark, in place of ``ABOUT``.
    """
    fields = {
        **ABOUT,
        "date": f"{datetime.now():{DATE}}",
        **more,
        **figures(bench, slo),
        **peaks(bench),
        **_arrays(bench),
    }
    fields["tokenizer_id"] = fields["tokenizer_id"] or fields["model_id"]
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(json.dumps(fields, allow_nan=False) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another file") from None
    finally:
        new.unlink(missing_ok=True)


def figures(bench: Bench, slo: Slo | None = None) -> dict[str, Any]:
    """The scalar fields, over served requests. ``None`` where there is no value."""
    columns = {name: bench.requests[name].to_numpy() for name in bench.requests.columns}
    done = columns["outcome"] == "completed"
    inputs, outputs = (int(columns[name][done].sum()) for name in ("input_tokens", "output_tokens"))
    good = None if slo is None else int(met(columns, slo)["all"].sum())
    latencies = {name: columns[ours][done].astype(float) for name, ours in BOUNDS.items()}
    latencies["itl"] = np.concatenate([np.empty(0), *(bench.gaps_s[place] for place in np.flatnonzero(done))])
    return {
        "duration": bench.duration_s,
        "completed": int(done.sum()),
        "failed": int((~done).sum()),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _per(int(done.sum()), bench.duration_s),
        "request_goodput": None if good is None else _per(good, bench.duration_s),
        "output_throughput": _per(outputs, bench.duration_s),
        "total_token_throughput": _per(inputs + outputs, bench.duration_s),
        **{key: value for name in ("ttft", "tpot", "itl", "e2el") for key, value in _spread(name, latencies[name])},
    }


def peaks(bench: Bench) -> dict[str, Any]:
    """The busiest second, as vLLM counts it: in whole seconds from the first sending, over served requests. ``rtfx`` is
    about audio."""
    rows = bench.requests
    done = (rows["outcome"] == "completed").to_numpy() & rows["arrival_s"].notna().to_numpy()
    starts, first, e2e = (rows[name].to_numpy(dtype=float)[done] for name in ("arrival_s", "ttft_s", "e2e_s"))
    if not len(starts):
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0, "rtfx": 0.0}
    starts = starts - starts.min()
    begun, ended = starts.astype(int), (starts + e2e).astype(int)
    open_at_once = np.bincount(begun, minlength=ended.max() + 2) - np.bincount(ended + 1, minlength=ended.max() + 2)
    gaps = [bench.gaps_s[place] for place in np.flatnonzero(done)] if bench.gaps_s else []
    times = [start + ttft + np.r_[0.0, np.cumsum(gap)] for start, ttft, gap in zip(starts, first, gaps, strict=False)]
    tokens = np.bincount(np.concatenate(times).astype(int)) if times else np.zeros(1)
    return {
        "max_output_tokens_per_s": float(tokens.max()),
        "max_concurrent_requests": int(np.cumsum(open_at_once).max()),
        "rtfx": 0.0,
    }


def _spread(name: str, seconds: NDArray[np.float64]) -> list[tuple[str, float | None]]:
    values = MS_PER_S * seconds[~np.isnan(seconds)]
    if not values.size:
        keys = [*(f"{word}_{name}_ms" for word in ("mean", "median", "std")), *(f"p{q}_{name}_ms" for q in PERCENTILES)]
        return [(key, None) for key in keys]
    spread = [("mean", values.mean()), ("median", np.median(values)), ("std", values.std())]
    spread += [(f"p{q}", np.percentile(values, q)) for q in PERCENTILES]
    return [(f"{word}_{name}_ms", float(value)) for word, value in spread]


def _arrays(bench: Bench) -> dict[str, list[Any]]:
    rows = bench.requests
    done = (rows["outcome"] == "completed").to_numpy()
    errors = ["" if ok else reason or UNSERVED for ok, reason in zip(done, rows["reason"], strict=True)]
    return {
        "input_lens": rows["input_tokens"].tolist(),
        "output_lens": np.where(done, rows["output_tokens"], 0).tolist(),
        "ttfts": np.where(done, rows["ttft_s"], 0.0).tolist(),
        "itls": [gaps.tolist() if ok else [] for gaps, ok in zip(bench.gaps_s, done, strict=True)],
        "latencies": np.where(done, rows["e2e_s"], 0.0).tolist(),
        "start_times": rows["arrival_s"].tolist(),
        "generated_texts": [""] * len(rows),
        "errors": errors,
    }


# ---------------------------------------------------------------- read


def read_bench(path: Path) -> Bench:
    """Read a result. ``ConfigError`` names file, field and mend.

    Arrivals count from the first sending. vLLM itself writes no ``latencies``: E2E is then TTFT plus the gaps.
    Without ``start_times`` arrivals are unknown.
    """
    return bench_of(path, load(path))


def bench_of(path: Path, fields: Mapping[str, Any]) -> Bench:
    """The same of a file that is loaded."""
    _check(path, fields)
    count = len(fields["ttfts"])
    arrays = {name: _array(path, fields, name, count) for name in ("input_lens", "output_lens", "ttfts")}
    errors = fields.get("errors") or [""] * count
    if not isinstance(errors, list) or not all(isinstance(error, str | None) for error in errors):
        raise ConfigError(f"{path}: errors: must be a list of texts, one a request; the file is damaged")
    gaps = tuple(_numbers(path, "itls", item) for item in fields["itls"])
    if not len(gaps) == len(errors) == count:
        raise ConfigError(f"{path}: ttfts, itls and errors have {count}, {len(gaps)} and {len(errors)} entries")
    if fields.get("latencies") is not None:
        e2e = _array(path, fields, "latencies", count)
    else:
        e2e = arrays["ttfts"] + np.array([item.sum() for item in gaps])
    starts = np.full(count, np.nan)
    if fields.get("start_times") is not None and count:
        starts = _array(path, fields, "start_times", count)
        starts = starts - starts.min()
    return Bench(requests=request_table(arrays, starts, e2e, errors), gaps_s=gaps, duration_s=fields["duration"])


def request_table(
    arrays: Mapping[str, NDArray[np.float64]],
    starts: NDArray[np.float64],
    e2e: NDArray[np.float64],
    errors: Sequence[str],
) -> pd.DataFrame:
    """Request columns from arrays in vLLM's sense; what is not served has no times."""
    import pandas as pd

    outputs = arrays["output_lens"].astype(int)
    served = np.array([not error for error in errors], dtype=bool) & (outputs > 0)
    ttft = np.where(served, arrays["ttfts"], np.nan)
    e2e = np.where(served, e2e, np.nan)
    known = {
        "request": np.arange(len(outputs)),
        "arrival_s": starts,
        "input_tokens": arrays["input_lens"].astype(int),
        "output_tokens": outputs,
        "outcome": np.where(served, "completed", "failed").astype(object),
        "reason": ["" if ok else error or UNSERVED for ok, error in zip(served, errors, strict=True)],
        "ttft_s": ttft,
        "tpot_s": np.where(outputs > 1, (e2e - ttft) / np.maximum(outputs - 1, 1), np.nan),
        "e2e_s": e2e,
    }
    return pd.DataFrame({name: known.get(name, np.nan) for name in REQUEST_COLUMNS}, index=range(len(outputs)))


def load(path: Path) -> dict[str, Any]:
    """A benchmark's JSON object, as it is."""
    mend = "give the file that 'vllm bench serve --save-result' wrote"
    fields = read_json(path, "result", MOST_RESULT_BYTES, mend=mend)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: not a JSON object; give the file that 'vllm bench serve --save-result' wrote")
    return fields


def duration_of(path: Path, fields: Mapping[str, Any]) -> float:
    """Seconds the benchmark took."""
    duration_s = fields.get("duration")
    if duration_s is None:
        raise ConfigError(f"{path}: duration: missing; give the JSON that 'vllm bench serve --save-result' wrote")
    if isinstance(duration_s, bool) or not isinstance(duration_s, int | float) or not 0 <= duration_s < float("inf"):
        raise ConfigError(f"{path}: duration: {duration_s!r} must be a number of seconds >= 0")
    return float(duration_s)


def _check(path: Path, fields: Mapping[str, Any]) -> None:
    duration_of(path, fields)
    for name in ARRAYS:
        if not isinstance(fields.get(name), list):
            raise ConfigError(f"{path}: {name}: missing; run 'vllm bench serve' with --save-detailed")


def _array(path: Path, fields: Mapping[str, Any], name: str, count: int) -> NDArray[np.float64]:
    values = _numbers(path, name, fields[name])
    if len(values) != count:
        raise ConfigError(f"{path}: {name} has {len(values)} entries, ttfts {count}; the file is damaged")
    return values


def _numbers(path: Path, name: str, values: object) -> NDArray[np.float64]:
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
            raise ConfigError(f"{path}: {name}: {value!r} must be a number >= 0")
    return np.array(values, dtype=float).reshape(-1)


def _per(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


# ---------------------------------------------------------------- goodput


def goodput_slo(pairs: Sequence[str]) -> Slo:
    """vLLM's ``--goodput ttft:200 tpot:50 e2el:5000``, in milliseconds."""
    bounds: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            value_ms = float(text)
        except ValueError:
            value_ms = float("nan")
        if name not in BOUNDS or not 0 < value_ms < float("inf"):
            raise ConfigError(f"--goodput {pair}: must be ttft, tpot or e2el, a colon and milliseconds, as in ttft:200")
        bounds[BOUNDS[name]] = value_ms / MS_PER_S
    return Slo(ttft_s=bounds.get("ttft_s"), tpot_s=bounds.get("tpot_s"), e2e_s=bounds.get("e2e_s"))
