"""``fetch``: public traces from where they are published, checked against known SHA-256 sums.

A download that is cut off leaves a hidden ``.partial`` file, which the next request continues (HTTP Range); the
file appears under its name only when complete and right. ``PUBLIC_TRACES`` is the table of what there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sim.types import ConfigError
from traces.table import Progress, nearest

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicTrace:
    """A published file: its address, the name it gets here, size and SHA-256, format and licence."""

    url: str
    file: str
    size_bytes: int
    sha256: str
    format: str
    licence: str | None


def _github(path: str) -> str:
    return f"https://raw.githubusercontent.com/{path}"


_AZURE = _github("Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data")
_MOONCAKE = _github("kvcache-ai/Mooncake/3cca71daccf2a7afb8fe3f0295358f70e3a69fdb/FAST25-release/traces")

PUBLIC_TRACES: dict[str, PublicTrace] = {
    "azure-conv": PublicTrace(
        url=f"{_AZURE}/AzureLLMInferenceTrace_conv.csv",
        file="AzureLLMInferenceTrace_conv.csv",
        size_bytes=719_188,
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        format="azure",
        licence="CC-BY-4.0",
    ),
    "azure-code": PublicTrace(
        url=f"{_AZURE}/AzureLLMInferenceTrace_code.csv",
        file="AzureLLMInferenceTrace_code.csv",
        size_bytes=320_117,
        sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        format="azure",
        licence="CC-BY-4.0",
    ),
    "mooncake": PublicTrace(
        url=f"{_MOONCAKE}/conversation_trace.jsonl",
        file="mooncake_conversation_trace.jsonl",
        size_bytes=3_029_533,
        sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        format="mooncake",
        licence="Apache-2.0",
    ),
    "burstgpt": PublicTrace(
        url="https://github.com/HPMLL/BurstGPT/releases/download/v2.0/BurstGPT_1.csv",
        file="BurstGPT_1.csv",
        size_bytes=52_283_111,
        sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
        format="burstgpt",
        licence=None,
    ),
}


def fetch(
    name: str,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    table: Mapping[str, PublicTrace] = PUBLIC_TRACES,
) -> Path:
    """The path of a public trace in ``folder``, downloaded unless it is there; ``progress`` gets bytes and total.

    ``timeout_s``: how long the server may be silent. ConfigError for an unknown name, a folder that cannot be
    written, no connection, an answer other than the file, or a file with another checksum: nothing
    is left under the trace's name then, and what was right so far is kept for the next call.
    """
    if name not in table:
        raise ConfigError(f"public trace '{name}' is unknown; {nearest(name, table)}")
    trace = table[name]
    path = Path(folder) / trace.file
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists():
            _check(path, trace, f"{path} is there with other content; move it away")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        from traces.download import download  # it loads Python's HTTP client, which nothing else needs

        download(trace, partial, progress, timeout_s)
        try:
            _check(partial, trace, f"{trace.url} is not the file it was; ask its publisher, or read your own copy")
        except ConfigError:
            partial.unlink()
            raise
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; choose another folder") from None
    return path


def _check(path: Path, trace: PublicTrace, complaint: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != trace.sha256:
        raise ConfigError(f"{complaint} (SHA-256 {found}, expected {trace.sha256})")
