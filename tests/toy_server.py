"""A small server of streamed completions on loopback, in a thread, that behaves as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[["Asked"], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@dataclass
class Asked:
    """One request, and the way back."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def send(self, data: bytes, pause_s: float = 0.0) -> None:
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(pause_s)

    async def event(self, value: Any, pause_s: float = 0.0) -> None:
        await self.send(b"data: " + json.dumps(value).encode() + b"\n\n", pause_s)

    async def status(self, code: int, value: Any, *headers: str) -> None:
        body = json.dumps(value).encode()
        lines = [f"HTTP/1.1 {code} Status", f"Content-Length: {len(body)}", "Connection: close", *headers]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


@dataclass
class ToyServer:
    """``url``, and what it was asked: completions in ``asked``, every path in ``paths``. ``most``: at a time."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    open: int = 0
    most: int = 0

    def replayed(self) -> list[dict[str, Any]]:
        """Without the questions by which a replay finds out what is accepted."""
        return [body for body in self.asked if body["max_tokens"] != 2]


async def well(asked: Asked, gap_s: float = 0.0) -> None:
    """As many tokens as were asked for, then the usage apart, as vLLM does."""
    await asked.send(HEAD)
    for number in range(count := asked.body["max_tokens"]):
        choice = {"index": 0, "text": f" w{number}", "finish_reason": "length" if number + 1 == count else None}
        await asked.event({"choices": [choice], "usage": None}, gap_s if number + 1 < count else 0.0)
    await asked.event({"choices": [], "usage": {"prompt_tokens": length_of(asked), "completion_tokens": count}})
    await asked.send(b"data: [DONE]\n\n")


def length_of(asked: Asked) -> int:
    prompt = asked.body["prompt"]
    return len(prompt) if isinstance(prompt, list) else len(prompt.split())


@contextmanager
def serving(reply: Reply = well, *, models: tuple[str, ...] = ("toy",)) -> Iterator[ToyServer]:
    """``reply`` answers completions; it may raise nothing but ``OSError``, as when the client has gone."""
    server = ToyServer()
    ready = threading.Event()
    ends: list[Callable[[], object]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.open += 1
        server.most = max(server.most, server.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            path, length = head[0].split()[1], int(headers.get("content-length", 0))
            body = json.loads(await reader.readexactly(length)) if length else {}
            server.paths.append(path)
            server.keys.add(headers.get("authorization"))
            asked = Asked(path, headers, body, writer)
            if path.endswith("/models"):
                await asked.status(200, {"object": "list", "data": [{"id": name} for name in models]})
            else:
                server.asked.append(body)
                await reply(asked)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            server.open -= 1
            writer.close()

    async def main() -> None:
        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        ready.set()
        await stop.wait()
        listening.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        ends[0]()
        thread.join(10)
        assert not thread.is_alive()
