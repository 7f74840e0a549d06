"""What a server accepts, found out by asking; and prompts of a given length, made without a tokenizer.

A prompt is a list of token ids where the server takes one (vLLM, SGLang, TensorRT-LLM), else words, as many as make the
tokens asked for by the server's own count. Requests that share a prefix in the trace share the text of its blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.validation.completions import AnswerError, Heard, RefusalError, Server
from sim.types import ConfigError, Request

PromptKind = Literal["ids", "words"]
FIRST_ID, LAST_ID = 1000, 31_000
"""Token ids of prompts: inside the vocabularies of 32,000 and more, and above their special tokens."""
COMMON = """the of and to in a is that it was for on are with as his they be at one have this from or had by hot but
some what there we can out other were all your when up use word how said an each she which do their time if will way
about many then them would write like so these her long make thing see him two has look more day could go come did my
no most who over know than call first people may down side been now find"""
WORDS = COMMON.split()
PROBE_TOKENS = (8, 72)
NOT_ACCEPTED = (400, 415, 422, 500)
"""Answers after which a plainer request is worth a try; servers answer 500 to a prompt of a type they do not expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How to ask one server. ``per_unit`` and ``extra``: tokens per word or id, and those it puts before a prompt."""

    model: str
    prompt: PromptKind
    ignore_eos: bool
    usage: bool
    per_unit: float = 1.0
    extra: float = 0.0
    shown: str = ""
    """The model's name as it may be printed and kept."""

    def body(self, request: Request, salt: int) -> bytes:
        """The request's JSON: a prompt of its length, its answer's length, greedy sampling, streamed."""
        units = self.units(request, salt)
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": (FIRST_ID + units % np.uint64(LAST_ID - FIRST_ID)).tolist()
            if self.prompt == "ids"
            else " ".join(WORDS[unit] for unit in (units % np.uint64(len(WORDS))).tolist()),
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        if self.usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields).encode()

    def units(self, request: Request, salt: int) -> NDArray[np.uint64]:
        """A random number per word or id, equal where two requests share a block of their prefix."""
        count = max(1, round((request.input_tokens - self.extra) / self.per_unit))
        block = max(1, round((request.prefix_block_tokens or 1) / self.per_unit))
        shared = np.array([salt ^ (key % 2**62) for key in request.prefix[: -(-count // block)]], dtype=np.uint64)
        keys: NDArray[np.uint64] = np.full(count, (salt ^ 2**63) + request.id, dtype=np.uint64)
        repeated = np.repeat(shared, block)[:count]
        keys[: len(repeated)] = repeated
        places: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
        return _mixed(np.add(_mixed(keys), places, dtype=np.uint64))


async def agree(server: Server, model: str, *, prompt: PromptKind | None, ignore_eos: bool) -> Dialect:
    """The fullest request the server accepts. ``ConfigError`` if it accepts none, or does not answer.

    ``prompt``: insist on a kind. ``ignore_eos``: ask for answers of the length asked for, if the server knows how.
    """
    kinds = get_args(PromptKind) if prompt is None else (prompt,)
    tries = [
        Dialect(model=model, prompt=kind, ignore_eos=forced, usage=usage, shown=server.shown(model))
        for kind in kinds
        for forced, usage in ((ignore_eos, True), (False, True), (False, False))
    ]
    complaint = ""
    for dialect in dict.fromkeys(tries):
        try:
            short = await _probe(server, dialect, PROBE_TOKENS[0])
        except RefusalError as error:
            if error.status not in NOT_ACCEPTED:
                raise ConfigError(f"{server.url}: {error}; check --url, --model and --api-key-env") from None
            complaint = str(error)
            continue
        except AnswerError as error:
            raise ConfigError(f"{server.url}: {error}; check --url, and that the server runs") from None
        return dialect if dialect.prompt == "ids" else await _counted(server, dialect, short)
    raise ConfigError(f"{server.url}: it accepts no request for a completion: {complaint}; check --model")


async def _counted(server: Server, dialect: Dialect, short: Heard) -> Dialect:
    """The same, with the server's own count of two prompts' tokens; a word is a token where it counts none."""
    try:
        long = await _probe(server, dialect, PROBE_TOKENS[1])
    except AnswerError as error:
        raise ConfigError(f"{server.url}: {error}; check that the server runs") from None
    if short.input_tokens is None or long.input_tokens is None or long.input_tokens <= short.input_tokens:
        return dialect
    per_word = (long.input_tokens - short.input_tokens) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
    return replace(dialect, per_unit=per_word, extra=short.input_tokens - per_word * PROBE_TOKENS[0])


async def _probe(server: Server, dialect: Dialect, input_tokens: int) -> Heard:
    asked = Request(id=input_tokens, arrival_s=0.0, input_tokens=input_tokens, output_tokens=2)
    return await server.complete(dialect.body(asked, salt=0), asked.output_tokens)


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
