"""Predictors of output length: the only objects beside the engine that are shown the truth."""

from __future__ import annotations

import numpy as np

from sim.types import ConfigError, Request


class TrueLength:
    """An oracle."""

    name = "oracle"

    def predict(self, request: Request) -> int:
        return request.output_tokens


class ConstantLength:
    """The same for every request: a mean or an upper bound."""

    def __init__(self, tokens: int, name: str = "constant") -> None:
        self.name = name
        self.tokens = tokens

    def predict(self, request: Request) -> int:
        return self.tokens


class LengthRange:
    """A classifier into ranges of ``bucket_tokens``, right with probability ``accuracy``; says the range's lower end.

    Source: TetriInfer (arXiv 2401.11181): 74.9 % at ranges of 200. Ours: a wrong one is 1 + geometric(1/2) ranges off,
    to either side (upwards where there is none below). Drawn by ``seed`` and request, whatever the order of events.
    """

    def __init__(self, bucket_tokens: int = 200, accuracy: float = 0.749, seed: int = 0) -> None:
        if bucket_tokens < 1 or not 0 <= accuracy <= 1:
            raise ConfigError(
                f"system: bucket_tokens is {bucket_tokens}, accuracy {accuracy}; they must be >= 1, and from 0 to 1"
            )
        self.name = f"ranges of {bucket_tokens} tokens, {accuracy:.1%} right"
        self.bucket_tokens = bucket_tokens
        self.accuracy = accuracy
        self.seed = seed

    def predict(self, request: Request) -> int:
        bucket = request.output_tokens // self.bucket_tokens
        rng = np.random.default_rng((self.seed, request.id))
        if rng.random() >= self.accuracy:
            off = int(rng.geometric(0.5))
            bucket += off if off > bucket or rng.random() < 0.5 else -off
        return bucket * self.bucket_tokens
