"""Predictors of output length: the only objects beside the engine that are shown the truth."""

from __future__ import annotations

from sim.types import Request


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
