"""A result file of any tool that is known: told by its keys, read in its units, and checked for sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.readers.aiperf import AIPERF, AIPERF_RECORDS, GENAI_PERF_RAW
from experiments.readers.base import Measured, Reader
from experiments.readers.guidellm import GUIDELLM
from experiments.readers.others import INFERENCE_PERF, INFERENCEX, REFUSED, TRTLLM
from experiments.readers.vllm import SGLANG, VLLM
from sim.outside import MOST_RESULT_BYTES, opening, parse_json
from sim.types import ConfigError
from traces.wrapping import open_text

READERS: tuple[Reader, ...] = (
    GUIDELLM, AIPERF_RECORDS, GENAI_PERF_RAW, AIPERF, INFERENCE_PERF, TRTLLM, SGLANG, VLLM, INFERENCEX, *REFUSED,
)  # fmt: skip
SHORTEST_S = {"TTFT": 1e-4, "TPOT": 2e-5, "ITL": 0.0, "E2E": 1e-4}
"""No server answers sooner: less is a number in a larger unit."""
LONGEST_S = 1e5


def read_measured(path: Path, benchmark: int | None = None) -> Measured:
    """A result file. ``benchmark``: which one of several. ``ConfigError`` names file and field."""
    records = load_records(path)
    reader = next((reader for reader in READERS if reader.is_it(records[0])), None)
    if reader is None:
        found = ", ".join(map(str, list(records[0])[:8])) or "nothing"
        raise ConfigError(
            f"{path}: not a result that is known (found {found}); known: "
            f"{', '.join(reader.tool for reader in READERS if reader not in REFUSED)}"
        )
    several = len(records) > 1 or reader in (GUIDELLM, GENAI_PERF_RAW)
    if benchmark is not None and (reader.per_request or not several):
        raise ConfigError(f"{path}: --benchmark {benchmark}: the file of {reader.tool} has one benchmark only")
    measured = reader.read(path, records, benchmark)
    _check(path, measured)
    return replace(measured, remarks=(*measured.remarks, *_counts(measured)))


def load_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file: one, a list of them, or one a line; compressed or not."""
    with opening(path, "result"), open_text(path) as file:
        try:
            text = file.read(MOST_RESULT_BYTES)
        except EOFError:
            raise ConfigError(f"{path}: the compressed file is cut short; copy it anew") from None
        if file.read(1):
            raise ConfigError(f"{path}: longer than {MOST_RESULT_BYTES >> 20} Mi characters")
    found = _parsed(path, text)
    if not found or not all(isinstance(item, dict) for item in found):
        raise ConfigError(
            f"{path}: not a JSON object, or one a line; give a result such as 'vllm bench serve --save-result' wrote"
        )
    return found


def _parsed(path: Path, text: str) -> list[Any]:
    mend = "give a result such as 'vllm bench serve --save-result' wrote"
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and _stands_alone(lines[0][1]):
        return [parse_json(line, f"{path}:{number}", mend=mend) for number, line in lines]
    found = parse_json(text, str(path), mend=f"not a JSON object; {mend}")
    return found if isinstance(found, list) else [found]


def _stands_alone(line: str) -> bool:
    """Whether a first line is a JSON object of its own."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------- sense


def _check(path: Path, measured: Measured) -> None:
    """ConfigError where a latency can only be in another unit, or the benchmark took less time than a request."""
    found: Mapping[str, float | None] = measured.measures
    span = found.get("makespan (s)")
    for name, least in SHORTEST_S.items():
        for key in ("mean", "p50"):
            value = found.get(f"{name} {key} (s)")
            what = f"{path}: {measured.source}: a {key} {name} of"
            if value is None or value == 0:
                continue
            if value < least and measured.bench is None:
                raise ConfigError(f"{what} {value:.3g} s is not possible: were seconds written as milliseconds?")
            if value > LONGEST_S or (span and name != "ITL" and value > 1.05 * span):
                longer = f"longer than the benchmark's {span:.4g} s" if span and value > span else "days"
                raise ConfigError(f"{what} {value:.4g} s is {longer}: were milliseconds written as seconds?")
    ttft, e2e = found.get("TTFT mean (s)"), found.get("E2E mean (s)")
    if ttft and e2e and ttft > 1.05 * e2e:
        raise ConfigError(
            f"{path}: {measured.source}: a mean TTFT of {ttft:.4g} s is more than the mean E2E of {e2e:.4g} s"
        )


def _counts(measured: Measured) -> tuple[str, ...]:
    """Whether rate, count and time agree."""
    found = measured.measures
    rate, done, span = found.get("requests/s"), found.get("completed"), found.get("makespan (s)")
    if rate and done and span and not 0.5 < rate * span / done < 2:
        return (f"it says {rate:.4g} requests/s, and {done:,.0f} requests in {span:.4g} s: one of them is wrong",)
    return ()
