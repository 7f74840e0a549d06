"""Conversations of the ShareGPT kind: text, whose tokens must be counted before it says anything about load.

A file is one JSON array, or JSON objects one after the other, of ``{"id": ..., "conversations": [{"from": ...,
"value": ...}, ...]}``. Datasets hold hundreds of megabytes in one array, so it is read item by item. Nothing
is guessed about tokens: the caller gives a tokenizer, or asks for a rule of thumb by its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, TextIO

from sim.types import ConfigError
from traces.arrivals import positive
from traces.table import LONGEST_CELL, Column, Progress, Record, clip, nearest, open_text, reading

CHUNK = 2**16
ASKING = ("human", "user", "system")
ANSWERING = ("gpt", "chatgpt", "assistant", "bing", "bard")
"""Whose message it is: the names found in the published datasets."""
TURNS = ("first", "all")

CountTokens = Callable[[str], int]


def token_counter(
    tokenizer: CountTokens | str | None = None, characters_per_token: float | None = None
) -> CountTokens | None:
    """How many tokens a text has: by a function, by the path of a ``tokenizer.json`` (needs the package
    ``tokenizers``; special tokens are not added), or by a rule: characters over ``characters_per_token``,
    rounded up. None if neither is given; ConfigError if both are, or for a tokenizer that cannot be loaded.
    """
    if tokenizer is not None and characters_per_token is not None:
        raise ConfigError("both tokenizer and characters_per_token are given; drop one")
    if isinstance(tokenizer, str):
        return _from_file(tokenizer)
    if characters_per_token is None:
        return tokenizer
    per_token = positive("characters_per_token", characters_per_token)
    return lambda text: ceil(len(text) / per_token)


def _from_file(path: str) -> CountTokens:
    try:
        tokenizers = import_module("tokenizers")
    except ImportError:
        raise ConfigError(
            f"tokenizer '{path}' needs the package tokenizers; install it, or give characters_per_token"
        ) from None
    if not Path(path).is_file():
        raise ConfigError(f"tokenizer '{path}' is not a file; give the path of a tokenizer.json")
    try:
        loaded = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the package raises bare Exception for a file it cannot parse
        raise ConfigError(f"tokenizer '{path}' cannot be loaded: {' '.join(str(error).split())}") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


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
            raise ConfigError(
                f"{path}: the file holds text, not token counts; give option tokenizer (a function from text to "
                "tokens, or the path of a tokenizer.json) or characters_per_token (4 is usual for English)"
            )
        with reading(path), open_text(path, progress) as file:
            for number, item in enumerate(json_items(path, file), start=1):
                place = f"{path}: conversation {number}"
                found = _turns(place, item)
                for prompt, answer in found if self.turns == "all" else found[:1]:
                    record: Record = {"input_tokens": self._tokens(prompt), "output_tokens": self._tokens(answer)}
                    if self.turns == "all":
                        record["session"] = str(item.get("id") or number)
                    yield number, record

    def _tokens(self, texts: Sequence[str]) -> int:
        assert self.count is not None
        return sum(self.count(text) for text in texts)


Turn = tuple[list[str], list[str]]


def _turns(place: str, item: object) -> list[Turn]:
    """Pairs of (texts ahead of an answer, the answer); the last may have no answer."""
    messages = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(messages, list):
        raise ConfigError(f"{place} is {clip(item)}; expected an object with a list 'conversations'")
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
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise ConfigError(f"{place}: message {clip(message)}; expected an object with texts 'from' and 'value'")
    author = message.get("from")
    if author not in ASKING + ANSWERING:
        raise ConfigError(f"{place}: field from is {clip(author)}; {nearest(author, ASKING + ANSWERING)}")
    return author in ASKING, message["value"]


def json_items(path: Path, file: TextIO) -> Iterator[Any]:
    """The items of one JSON array, or JSON values one after the other; memory for one item.

    ConfigError for what is no JSON, or an item of more than 64 Mi characters.
    """
    decode = json.JSONDecoder().raw_decode
    text, place, wanted, number = "", 0, CHUNK, 1
    while True:
        while place < len(text) and text[place] in "[],\n\r\t ":
            place += 1
        with suppress(json.JSONDecodeError, RecursionError):
            item, place = decode(text, place)
            yield item
            number, wanted = number + 1, CHUNK
            continue
        more = file.read(wanted)
        text, place, wanted = text[place:] + more, 0, wanted * 2
        if not more and text:
            raise ConfigError(f"{path}: item {number} is {clip(text)}; expected JSON")
        if not more:
            return
        if len(text) > LONGEST_CELL:
            raise ConfigError(
                f"{path}: item {number} is {clip(text[:80])}; expected JSON of less than 64 Mi characters"
            )
