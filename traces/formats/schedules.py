"""Schedules that load generators replay: a timestamp whose unit the file does not say, lengths, prefix hashes."""

from __future__ import annotations

from traces.formats.base import Format, a_block, lengths, time_column, unit_per_s
from traces.formats.texts import CountTokens, counted, token_counter
from traces.table import Column, count, hashes, label, optional, seconds, whole

PREFIX = "a list of whole numbers"
SESSION = Column("session", "session_id", optional(label), "a text", required=False)
DELAYED = frozenset({"session_id", "delay"})
TIMED = frozenset({"timestamp"})
LENGTH, TEXT = frozenset({"input_length"}), frozenset({"text_input"})


def mooncake(*, block_tokens: int | None = None, time_unit: str | None = None) -> Format:
    """Mooncake traces (kvcache-ai/Mooncake): lengths and a content hash for every prompt block.

    Mooncake itself publishes 512-token blocks and milliseconds, others 16 and seconds: where nobody says, the file's
    content must. The hash of a last, partly filled block is dropped: a block that is not full cannot be shared.
    """
    prefix = Column("prefix", "hash_ids", optional(hashes, ()), PREFIX)
    return Format(
        columns=(
            time_column("timestamp", time_unit or "ms"),
            *lengths("input_length", "output_length"),
            SESSION,
            prefix,
        ),
        per_s=unit_per_s(time_unit, "ms"),
        open_unit=time_unit is None,
        block_tokens=a_block(block_tokens, 512),
        open_block=block_tokens is None,
    )


def bailian(*, block_tokens: int | None = None, time_unit: str | None = None) -> Format:
    """Qwen-Bailian traces (alibaba-edu/qwen-bailian-usagetraces-anon): seconds, 16-token blocks; chains of
    ``parent_chat_id`` become sessions."""
    return Format(
        columns=(
            time_column("timestamp", time_unit or "s"),
            *lengths("input_length", "output_length"),
            Column("chat", "chat_id", label, "a number"),
            Column("parent", "parent_chat_id", optional(whole), "a number, -1 for none"),
            Column("prefix", "hash_ids", optional(hashes, ()), PREFIX),
        ),
        per_s=unit_per_s(time_unit, "s"),
        block_tokens=a_block(block_tokens, 16),
        open_block=block_tokens is None,
        parent=True,
    )


def aiperf(
    *,
    block_tokens: int | None = None,
    time_unit: str | None = None,
    tokenizer: CountTokens | str | None = None,
    characters_per_token: float | None = None,
) -> Format:
    """aiperf and genai-perf schedules: as Mooncake's, the hashes being optional.

    A line with a ``delay`` in place of a timestamp is the next turn of its session, so long after the end of the one
    before; a ``text_input`` in place of ``input_length`` is counted.
    """
    text = counted(token_counter(tokenizer, characters_per_token))
    columns = (
        time_column("timestamp", time_unit or "ms", required=False),
        Column("think_s", "delay", optional(seconds), "a number, in ms", required=False),
        Column("input_tokens", "input_length", optional(count), "a whole number >= 0", required=False),
        Column("input_text", "text_input", optional(text), "a text", required=False),
        Column("output_tokens", "output_length", count, "a whole number >= 0"),
        SESSION,
        Column("prefix", "hash_ids", optional(hashes, ()), PREFIX, required=False),
    )
    return Format(
        columns=columns,
        per_s=unit_per_s(time_unit, "ms"),
        open_unit=time_unit is None,
        block_tokens=a_block(block_tokens, 512),
        open_block=block_tokens is None,
        texts=frozenset({"text_input"}),
        more=tuple(time | text for time in (TIMED, DELAYED, TIMED | DELAYED) for text in (LENGTH, TEXT)),
    )


def guidellm(*, time_unit: str | None = None) -> Format:
    """guidellm's minimal trace: timestamps in seconds, from any origin, and lengths."""
    return Format(
        columns=(time_column("timestamp", time_unit or "s"), *lengths("input_length", "output_length"), SESSION),
        per_s=unit_per_s(time_unit, "s"),
        open_unit=time_unit is None,
    )
