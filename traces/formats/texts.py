"""Texts whose tokens must be counted before they say anything about load.

Nothing is guessed about tokens: the caller gives a tokenizer, or asks for a rule of thumb by its number.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

from sim.types import ConfigError
from traces.arrivals import positive

NEEDS_COUNTER = (
    "the file holds text, not token counts; give --tokenizer (the path of a tokenizer.json; from Python a function "
    "from text to tokens) or --characters-per-token (4 is usual for English), in a scenario under "
    "workload.format_options as tokenizer or characters_per_token"
)

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


def counted(count: CountTokens | None) -> Callable[[Any], int]:
    """Reads a text as its number of tokens. ConfigError without a way to count."""

    def tokens(cell: Any) -> int:
        if not isinstance(cell, str):
            raise ValueError
        if count is None:
            raise ConfigError(NEEDS_COUNTER)
        return count(cell)

    return tokens
