"""One server's ``/v1/completions``: what it accepts, and one streamed answer with the times its tokens came.

Times are taken as ``vllm bench serve`` takes them (vllm/benchmarks/lib/endpoint_request_func.py): an event with
choices marks a token, the first one the TTFT, each later one a gap; tokens are counted by the server's ``usage``.
One event is no token here: a last one without text that carries the usage.

Only the host in the URL is ever contacted: redirects are not followed and proxies of the environment are ignored.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from experiments.validation.cleaning import clean
from sim.types import ConfigError

if TYPE_CHECKING:
    import httpx

MOST_LINE_BYTES = 2**20
MOST_ERROR_BYTES = 2**14
MOST_LISTING_BYTES = 2**22
MOST_TOKENS = 10**6
"""Of an answer, where the caller does not say; of a prompt that a server counts."""
EVENTS_PER_TOKEN, BYTES_PER_TOKEN = 4, 2**14
"""More than any server sends for one token."""
FIELDS = (b"data", b"event", b"id", b"retry", b"")
"""Names a line of an event stream begins with (HTML Living Standard, 9.2.6); none: a comment."""


class AnswerError(Exception):
    """Why one answer counts as failed."""


class RefusalError(AnswerError):
    """The server answered with another status than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class EventStream:
    """Bytes as they come, cut anywhere, to the data of whole server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> Iterator[str]:
        """``AnswerError`` for what is no event stream, and for a line of more than 1 MiB."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MOST_LINE_BYTES:
            raise AnswerError("the server streams garbage: a line of more than 1 MiB")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r"))

    def end(self) -> Iterator[str]:
        """What the last event lacked was its empty line."""
        yield from self.feed(b"\n\n")

    def _line(self, line: bytes) -> Iterator[str]:
        if not line:
            data, self._data = self._data, []
            self._size = 0
            if data:
                yield _text(b"\n".join(data))
            return
        name, _, value = line.partition(b":")
        if name not in FIELDS:
            raise AnswerError(f"the server streams garbage: {line.decode(errors='replace')}")
        if name == b"data":
            self._size += len(value)
            if self._size > MOST_LINE_BYTES:
                raise AnswerError("the server streams garbage: an event of more than 1 MiB")
            self._data.append(value.removeprefix(b" "))


class Listener:
    """What one stream of completion events tells: when tokens came, and how many the server counts."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self.most_tokens = most_tokens
        self.heard_bytes = 0
        self.token_s: list[float] = []
        self.finished = False
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self._events = EventStream()

    def hear(self, received: bytes, now_s: float) -> None:
        """``AnswerError`` for what no answer of so many tokens can be."""
        self.heard_bytes += len(received)
        if self.heard_bytes > 4 * MOST_LINE_BYTES + BYTES_PER_TOKEN * self.most_tokens:
            raise AnswerError(f"the server sends {self.heard_bytes:,} bytes for {self.most_tokens} tokens, and goes on")
        for data in self._events.feed(received):
            self._event(data, now_s)

    def end(self, now_s: float) -> None:
        """The stream is over. ``AnswerError`` if the answer is not whole."""
        for data in self._events.end():
            self._event(data, now_s)
        if not self.finished:
            raise AnswerError(f"the server closed the stream early, after {len(self.token_s)} events with tokens")
        if not self.token_s:
            raise AnswerError("the answer has no token")

    def _event(self, data: str, now_s: float) -> None:
        if data == "[DONE]":
            self.finished = True
            return
        event = _object(data)
        if event.get("error"):
            raise AnswerError(f"the server says: {_message(event)}")
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.input_tokens = _count(usage.get("prompt_tokens"), 10**8) or self.input_tokens
            self.output_tokens = _count(usage.get("completion_tokens"), 64 + 2 * self.most_tokens) or self.output_tokens
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices:
            return
        choice = choices[0] if isinstance(choices[0], dict) else {}
        self.finished |= choice.get("finish_reason") is not None
        if choice.get("text") or not usage:
            if len(self.token_s) > 64 + EVENTS_PER_TOKEN * self.most_tokens:
                raise AnswerError(
                    f"the server sends {len(self.token_s):,} events for {self.most_tokens} tokens, and more"
                )
            self.token_s.append(now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One whole answer. ``output_tokens`` as the server counts them, else one per event; times on ``perf_counter``."""

    token_s: tuple[float, ...]
    input_tokens: int | None
    output_tokens: int
    counted: bool
    """Whether the server said how many tokens there were."""


class Server:
    """A connection to one OpenAI-compatible server; made by ``connected``."""

    def __init__(self, client: httpx.AsyncClient, url: str, key: str | None, timeout_s: float) -> None:
        self.client, self.url, self.key, self.timeout_s = client, url, key, timeout_s

    async def first_model(self) -> str:
        """The first name under ``/v1/models``. ``ConfigError`` if there is none."""
        try:
            async with self._limited(), self.client.stream("GET", f"{self.url}/models") as answer:
                await self._accept(answer)
                listed = _object((await _body(answer, MOST_LISTING_BYTES)).decode(errors="replace")).get("data")
        except AnswerError as error:
            raise ConfigError(f"{self.url}/models: {error}; check --url, or name a model with --model") from None
        for item in listed if isinstance(listed, list) else ():
            if isinstance(item, dict) and isinstance(item.get("id"), str):
                return str(item["id"])
        raise ConfigError(f"{self.url}/models: it lists no model; name one with --model")

    async def complete(self, body: bytes, most_tokens: int = MOST_TOKENS) -> Heard:
        """Send a request (JSON) of at most so many tokens, listen to the end. ``AnswerError`` says what went wrong."""
        listener = Listener(most_tokens)
        try:
            async with self._limited():
                await self._listen(body, listener)
        except AnswerError:
            if not listener.finished or not listener.token_s:
                raise
        counted = listener.output_tokens is not None
        return Heard(
            token_s=tuple(listener.token_s),
            input_tokens=listener.input_tokens,
            output_tokens=listener.output_tokens or len(listener.token_s),
            counted=counted,
        )

    async def _listen(self, body: bytes, listener: Listener) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        async with self.client.stream("POST", f"{self.url}/completions", content=body, headers=headers) as answer:
            await self._accept(answer)
            if answer.headers.get("Content-Type", "").startswith("application/json"):
                said = (await _body(answer, MOST_ERROR_BYTES)).decode(errors="replace")
                raise AnswerError(f"the server did not stream: {said}")
            _check_plain(answer)
            async for received in answer.aiter_raw():
                listener.hear(received, time.perf_counter())
            listener.end(time.perf_counter())

    @asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        """Everything that can go wrong on the way as ``AnswerError``, without the key, after ``timeout_s`` at most."""
        import httpx

        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except TimeoutError:
            raise AnswerError(f"no whole answer within {self.timeout_s:g} s") from None
        except httpx.ConnectError as error:
            raise AnswerError(self.shown(f"cannot connect: {error}")) from None
        except httpx.RemoteProtocolError as error:
            raise AnswerError(self.shown(f"the server closed the connection early: {error}")) from None
        except httpx.HTTPError as error:
            raise AnswerError(self.shown(f"{type(error).__name__}: {error}")) from None
        except RefusalError as refused:
            raise RefusalError(refused.status, self.shown(str(refused))) from None
        except AnswerError as fault:
            raise AnswerError(self.shown(str(fault))) from None

    def shown(self, text: str) -> str:
        """What a server says, as it may be shown and kept: one short line without the key."""
        return clean(text, self.key)

    async def _accept(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        if answer.is_redirect:
            place = answer.headers.get("Location", "elsewhere")
            raise RefusalError(answer.status_code, f"the server redirects to {place}, which is not followed")
        said = _said((await _body(answer, MOST_ERROR_BYTES)).decode(errors="replace"))
        raise RefusalError(
            answer.status_code, f"the server answers {answer.status_code}: {said or answer.reason_phrase}"
        )


@asynccontextmanager
async def connected(url: str, *, key: str | None, timeout_s: float, connections: int) -> AsyncIterator[Server]:
    """A server at ``url`` (with or without ``/v1``), whose every request takes at most ``timeout_s`` in all."""
    try:
        import httpx
    except ImportError:
        raise ConfigError("replay needs httpx; pip install 'phasewise[http]'") from None
    headers = {"Accept-Encoding": "identity", "User-Agent": "phasewise"}
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key-env: the key in that variable must be plain ASCII in one line")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(
        headers=headers, limits=limits, timeout=None, trust_env=False, follow_redirects=False
    ) as client:
        yield Server(client, base_url(url), key, timeout_s)


def base_url(url: str) -> str:
    """The address under which the endpoints are. ``ConfigError`` for what is no plain http(s) address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--url {url}: must be an address such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError("--url: it must have no user, password, query or fragment; keys come from --api-key-env")
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise AnswerError(f"the server sends garbage, no JSON object: {text}")
    return value


def _said(text: str) -> str:
    """The message in an error's body, whatever its shape."""
    try:
        return _message(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _message(value: Any) -> str:
    while isinstance(value, dict):
        value = next((value[name] for name in ("error", "message", "detail") if value.get(name)), str(value))
    return str(value)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise AnswerError("the server streams garbage: it is not UTF-8") from None


async def _body(answer: httpx.Response, most_bytes: int) -> bytes:
    """The beginning of a body, never more."""
    _check_plain(answer)
    body = b""
    async for received in answer.aiter_raw():
        body += received[: most_bytes - len(body)]
        if len(body) >= most_bytes:
            break
    return body


def _check_plain(answer: httpx.Response) -> None:
    """A compressed answer was not asked for, and may be of any size."""
    coding = answer.headers.get("Content-Encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        raise AnswerError(f"the server answers in {coding}, which was not asked for")


def _count(value: object, most: int) -> int | None:
    """``AnswerError`` for a count that cannot be."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return None
    if value > most:
        raise AnswerError(f"the server counts {value:.3g} tokens; at most {most:,} are possible")
    return value
