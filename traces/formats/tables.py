"""Formats with a fixed unit: published traces, and what simulators beside this one read."""

from __future__ import annotations

from traces.formats.base import TICKS_PER_S, TOKENS, Format, date_clock, lengths, time_column
from traces.table import Column, count, hashes, label, optional, seconds, truth, whole


def azure() -> Format:
    """Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset)."""
    time = Column("arrival_s", "TIMESTAMP", date_clock(), "a time such as 2023-11-16 18:17:03.9799600")
    return Format(columns=(time, *lengths("ContextTokens", "GeneratedTokens")), per_s=TICKS_PER_S)


def burstgpt() -> Format:
    """BurstGPT (HPMLL/BurstGPT); the model becomes the class. Releases before v2.0 have no sessions."""
    columns = (
        Column("arrival_s", "Timestamp", seconds, "a number of seconds"),
        *lengths("Request tokens", "Response tokens"),
        Column("klass", "Model", label, "a model's name"),
        Column("session", "Session ID", optional(label), "a text", required=False),
    )
    return Format(columns=columns)


def splitwise_sim() -> Format:
    """Traces of the Splitwise simulator (Mutinifni/splitwise-sim); the application becomes the class."""
    columns = (
        Column("arrival_s", "arrival_timestamp", seconds, "a number of seconds"),
        *lengths("prompt_size", "token_size"),
        Column("klass", "application_id", label, "an application's number"),
    )
    return Format(columns=columns)


def vidur() -> Format:
    """Vidur's processed traces (microsoft/vidur)."""
    time = Column("arrival_s", "arrived_at", seconds, "a number of seconds")
    return Format(columns=(time, *lengths("num_prefill_tokens", "num_decode_tokens")))


def vidur_lengths() -> Format:
    """Vidur's traces without arrivals: every request arrives at 0; ``with_rate`` spreads them."""
    return Format(columns=lengths("num_prefill_tokens", "num_decode_tokens"))


def llmservingsim() -> Format:
    """Workloads of LLMServingSim 2.0 (casys-kaist/LLMServingSim): arrivals in nanoseconds; token ids are not used."""
    return Format(columns=(time_column("arrival_time_ns", "ns"), *lengths("input_toks", "output_toks")), per_s=10**9)


def phasewise() -> Format:
    """Our own CSV or Parquet: the fields of ``Request``, hashes separated by spaces."""
    columns = (
        Column("arrival_s", "arrival_s", seconds, "a number of seconds"),
        *lengths("input_tokens", "output_tokens"),
        Column("session", "session", optional(label), "a text", required=False),
        Column("klass", "klass", optional(label), "a text", required=False),
        Column("priority", "priority", optional(whole, 0), "a whole number", required=False),
        Column("prefix", "prefix", optional(hashes, ()), "whole numbers separated by spaces", required=False),
        Column("prefix_block_tokens", "prefix_block_tokens", optional(count), TOKENS, required=False),
        Column("samples", "samples", optional(count, 1), "a whole number >= 1", required=False),
        Column("beam_search", "beam_search", optional(truth, False), "true or false", required=False),
        Column("think_s", "think_s", optional(seconds), "a number of seconds", required=False),
    )
    return Format(columns=columns, foreign=False)
