"""Step times as a published polynomial of token counts, one for steps with prompts and two for decodes alone.

DistServe's form (OSDI 2024, appendix A; released with its simulator): a step with prompts takes
``a + b * tokens + c * squares``, decodes ``a + b * context + c * sequences`` with a second set for large batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import NamedTuple

from sim.cost.pieces import Row, steeper
from sim.cost.roofline import Overhead
from sim.cost.step import Composed, Fixed, Operators
from sim.cost.tables import HeldOut
from sim.types import PS_PER_S, ConfigError, Line, Stage, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTerms:
    """Seconds of all layers: once a step, for each token, and for each prompt's squared tokens."""

    step_s: float
    token_s: float
    square_s: float

    def __post_init__(self) -> None:
        _check("prompts", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTerms:
    """Seconds of all layers: once a step, for each token attended to, and for each sequence."""

    step_s: float
    context_s: float
    sequence_s: float

    def __post_init__(self) -> None:
        _check("decodes", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial:
    """One model's terms on one GPU type at one tensor-parallel degree; a stage takes its share of the layers.

    ``large``: the decode terms from ``large_from`` sequences on. Where the published form falls there, it is levelled:
    a large batch costs no less than ``large_from - 1`` sequences with as much context (prices must rise).
    ``hop_s``: of a stage with prompts, over its share of the layers (as many times as there are equal stages; the one
    term of several stages that does not add up to the undivided model's). ``first_s``, ``first_token_s``: of the first
    stage, once a step and for each token prefilled or attended to. A chunk with context takes what the longer prompt
    takes more. Decodes beside prompts count as tokens there, and the step takes no less than they take alone.
    """

    gpus: tuple[str, ...]
    model: str
    num_layers: int
    tp: int
    dtypes: tuple[str, ...]
    prompts: PromptTerms
    decodes: DecodeTerms
    large: DecodeTerms
    large_from: int
    hop_s: float = 0.0
    first_s: float = 0.0
    first_token_s: float = 0.0
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.model, self)
        if self.large_from < 2 or self.tp < 1 or self.num_layers < 1 or not self.gpus or not self.dtypes:
            raise ConfigError(
                f"{self.model}: gpus and dtypes must not be empty, tp and num_layers >= 1, large_from >= 2"
            )

    def bind(self, stage: Stage, overhead: Overhead | None = None, slow: float = 1.0) -> PolynomialCost:
        """``overhead`` takes the place of ``first_s`` and ``first_token_s``."""
        share = stage.num_layers / self.num_layers
        first = stage.first_layer == 0
        token_s = self.first_token_s if first and overhead is None else 0.0
        step_s = self.first_s if overhead is None else overhead.step_s
        kernels = slow if overhead is None else slow * overhead.slowdown
        scaled = _Terms(self, share * kernels, token_s * kernels)
        parts = {
            "overhead_ps": _ps(step_s * slow) if first else 0,
            "sequence_ps": _ps(overhead.sequence_s * slow) if first and overhead is not None else 0,
        }
        return PolynomialCost(
            decodes=Composed(scaled.decode_steps(**parts), measured=True),
            prompts=Composed(scaled.prompt_steps(_ps(self.hop_s / share * kernels), **parts), measured=True),
        )


class PolynomialCost(NamedTuple):
    """A stage's price by whether the step holds prompt tokens, which stays the same along a line."""

    decodes: Composed
    prompts: Composed

    @property
    def measured(self) -> bool:
        return True

    def line(self, work: Work) -> Line:
        prompts = work.chunks and any(tokens for tokens, _ in work.chunks)
        return (self.prompts if prompts else self.decodes).line(work)


class _Terms(NamedTuple):
    """A polynomial's terms on one stage, in integer picoseconds."""

    of: Polynomial
    share: float
    token_s: float

    def decode_steps(self, overhead_ps: int, sequence_ps: int) -> Operators:
        def row(seqs: int) -> Row:
            return _larger(self._decode_lines(seqs))

        return _operators(_nothing, row, _no_chunk, overhead_ps, sequence_ps)

    def prompt_steps(self, hop_ps: int, overhead_ps: int, sequence_ps: int) -> Operators:
        terms, share = self.of.prompts, self.share

        def tokens_ps(count: int) -> int:
            return _ps(terms.step_s * share) + count * _ps(terms.token_s * share + self.token_s)

        def chunk(tokens: int) -> Row:
            square_s = terms.square_s * share
            return Row((0,), (_ps(square_s * tokens**2),), (_ps(2 * square_s * tokens + self.token_s),))

        def beside(seqs: int) -> Row:
            return _larger([(max(0, value - tokens_ps(seqs)), slope) for value, slope in self._decode_lines(seqs)])

        return _operators(lambda count: (tokens_ps(count), False), beside, chunk, overhead_ps + hop_ps, sequence_ps)

    def _decode_lines(self, seqs: int) -> list[tuple[int, int]]:
        """Value at no context and slope; of large batches also those of the last small one."""
        if seqs < self.of.large_from:
            return [self._line(self.of.decodes, seqs)]
        return [self._line(self.of.large, seqs), self._line(self.of.decodes, self.of.large_from - 1)]

    def _line(self, terms: DecodeTerms, seqs: int) -> tuple[int, int]:
        value_s = (terms.step_s + terms.sequence_s * seqs) * self.share
        return _ps(value_s), _ps(terms.context_s * self.share + self.token_s)


def _operators(
    linear: Fixed, decode: Callable[[int], Row], chunk: Callable[[int], Row], overhead_ps: int, sequence_ps: int
) -> Operators:
    return Operators(
        linear=linear,
        collective=_nothing,
        embedding=_nothing,
        head=_nothing,
        overhead_ps=overhead_ps,
        sequence_ps=sequence_ps,
        chunk=chunk,
        decode=decode,
        mixed=decode,
    )


def _larger(lines: list[tuple[int, int]]) -> Row:
    return steeper(lines[0], lines[-1])


def _nothing(_count: int) -> tuple[int, bool]:
    return 0, False


def _no_chunk(_tokens: int) -> Row:
    return Row((0,), (0,), (0,))


def _ps(seconds: float) -> int:
    return round(seconds * PS_PER_S)


def _check(place: str, terms: PromptTerms | DecodeTerms | Polynomial) -> None:
    for part in fields(terms):
        value = getattr(terms, part.name)
        if part.name.endswith("_s") and not 0 <= value < inf:
            raise ConfigError(f"{place}: {part.name} is {value}; it must be a number >= 0")
