"""Public traces: where each is published, and what must arrive."""

from __future__ import annotations

from dataclasses import dataclass


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
