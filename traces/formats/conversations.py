"""Conversations of the ShareGPT kind, and prompts: text, whose tokens must be counted.

A conversation is ``{"id": ..., "conversations": [{"from": ..., "value": ...}, ...]}`` (ShareGPT), with ``conversation``
(LMSYS) or ``messages`` (OpenAI) in place of the one key, ``role`` and ``content`` in place of the others. Datasets
hold hundreds of megabytes in one array, so a file is read item by item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sim.types import ConfigError
from traces.formats.base import Format, lengths
from traces.formats.texts import NEEDS_COUNTER, CountTokens, counted, token_counter
from traces.table import Column, Record, clip, count, label, nearest, optional, reading
from traces.wrapping import Progress, json_items, open_text

LISTS = ("conversations", "conversation", "messages")
"""Where the messages stand."""
AUTHORS, TEXTS = ("from", "role"), ("value", "content")
ASKING = ("human", "user", "system", "developer", "tool", "function", "function_response", "observation")
ANSWERING = ("gpt", "chatgpt", "assistant", "bing", "bard", "model", "function_call")
"""Whose message it is: the names found in the published datasets."""
TURNS = ("first", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRows:
    """Reads turns: the text before an answer, and the answer. Fits ``traces.table.Rows``.

    ``line`` is the number of the conversation. A prompt without an answer is a turn without output tokens, and
    an answer without a prompt is context of the next turn. With ``turns='all'`` the conversation
    is the session and inputs are the new text alone; with ``'first'`` later turns are left out.
    """

    count: CountTokens | None
    turns: str

    def __call__(
        self, path: Path, columns: Sequence[Column], progress: Progress | None = None, /
    ) -> Iterator[tuple[int, Record]]:
        del columns
        if self.count is None:
            raise ConfigError(f"{path}: {NEEDS_COUNTER}")
        with reading(path), open_text(path, progress) as file:
            for number, item in enumerate(json_items(path, file), start=1):
                place = f"{path}: conversation {number}"
                found = _turns(place, item)
                for prompt, answer in found if self.turns == "all" else found[:1]:
                    record: Record = {"input_tokens": self._tokens(prompt), "output_tokens": self._tokens(answer)}
                    if self.turns == "all":
                        record["session"] = str(item.get("id") or item.get("conversation_id") or number)
                    yield number, record

    def _tokens(self, texts: Sequence[str]) -> int:
        assert self.count is not None
        return sum(self.count(text) for text in texts)


Turn = tuple[list[str], list[str]]


def _turns(place: str, item: object) -> list[Turn]:
    """Pairs of (texts ahead of an answer, the answer); the last may have no answer."""
    found = [item[name] for name in LISTS if name in item] if isinstance(item, dict) else []
    if len(found) != 1 or not isinstance(found[0], list):
        raise ConfigError(f"{place} is {clip(item)}; expected an object with one list {' or '.join(LISTS)}")
    messages = found[0]
    turns: list[Turn] = []
    ahead: list[str] = []
    asked = False
    for message in messages:
        asking, text = _message(place, message)
        if asked and not asking:
            turns.append((ahead, [text]))
            ahead, asked = [], False
        else:
            ahead.append(text)
            asked = asked or asking
    if asked:
        turns.append((ahead, []))
    return turns


def _message(place: str, message: object) -> tuple[bool, str]:
    """Whether it asks, and its text."""
    fields = message if isinstance(message, dict) else {}
    author = next((fields[name] for name in AUTHORS if name in fields), None)
    text = _text(next((fields[name] for name in TEXTS if name in fields), None))
    if text is None:
        raise ConfigError(
            f"{place}: message {clip(message)}; expected texts 'from' and 'value', or 'role' and 'content'"
        )
    if author not in ASKING + ANSWERING:
        raise ConfigError(f"{place}: field from (or role) is {clip(author)}; {nearest(author, ASKING + ANSWERING)}")
    return author in ASKING, text


def _text(content: object) -> str | None:
    """A text, or the texts of OpenAI's content parts; images and sound have no tokens that could be counted here."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def sharegpt(
    *,
    tokenizer: CountTokens | str | None = None,
    characters_per_token: float | None = None,
    turns: str = "first",
) -> Format:
    """Conversations (ShareGPT, LMSYS-Chat, OpenAI's messages): every request arrives at 0, ``with_rate`` spreads them.

    Needs ``tokenizer`` or ``characters_per_token``. ``turns``: the ``first`` of each conversation, as vLLM's
    benchmark takes it, or ``all``, each with its new text only and the conversation as session: ``Sessions`` makes the
    context grow.
    """
    if turns not in TURNS:
        raise ConfigError(f"format option turns is {turns!r}; {nearest(turns, TURNS)}")
    session = Column("session", "id", optional(label), "a text", required=False)
    more = tuple(frozenset({name}) for name in LISTS)
    optional_lengths = tuple(column._replace(required=False) for column in lengths("conversations", "conversations"))
    rows = ConversationRows(count=token_counter(tokenizer, characters_per_token), turns=turns)
    return Format(rows=rows, columns=(*optional_lengths, session), more=more, texts_only=True)


def vllm_custom(*, tokenizer: CountTokens | str | None = None, characters_per_token: float | None = None) -> Format:
    """vLLM's custom data set: JSON lines with a ``prompt`` and the ``output_tokens`` to ask for; all arrive at 0."""
    text = counted(token_counter(tokenizer, characters_per_token))
    columns = (
        Column("input_tokens", "prompt", text, "a text"),
        Column("output_tokens", "output_tokens", count, "a whole number >= 0"),
    )
    return Format(columns=columns, texts=frozenset({"prompt"}))
