"""Replay of a trace against a real server: an open loop, in which requests are sent when the trace says.

``replay`` sends them and listens; ``Replay.bench`` has what came of it as ``vllm bench serve`` would. At most so
many requests are under way at a time; one that had to wait for a place is sent late, which ``delay_s`` says.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from experiments.runs.vllm_bench import Bench, request_table
from experiments.validation.completions import AnswerError, Heard, Server
from experiments.validation.dialect import Dialect
from sim.types import ConfigError, Request

FIRST_PAUSE_S = 0.5
"""Before the first retry; each later one waits twice as long."""
CUT_OFF = "cut off: the replay was stopped before the answer was whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How much at a time, and how patiently."""

    concurrency: int = 256
    retries: int = 0
    give_up_after: int = 20
    """So many failures in a row end the replay; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one request; times from the start of the replay. ``error`` is empty if it was answered whole."""

    request: Request
    start_s: float
    token_s: tuple[float, ...] = ()
    input_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    error: str = ""
    retries: int = 0

    @property
    def delay_s(self) -> float:
        """Sent so much later than the trace says."""
        return self.start_s - self.request.arrival_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay that has ended: an answer per request sent, in order of sending. ``stopped``: why it is partial."""

    answers: tuple[Answer, ...]
    planned: int
    duration_s: float
    dialect: Dialect
    manners: Manners
    stopped: str | None

    def bench(self) -> Bench:
        """As a benchmark result; prompts are as long as the server counts them, else as they were asked for."""
        rows = self.answers
        arrays = {
            "input_lens": np.array([row.input_tokens or row.request.input_tokens for row in rows], dtype=float),
            "output_lens": np.array([row.output_tokens for row in rows], dtype=float),
            "ttfts": np.array([row.token_s[0] - row.start_s if row.token_s else 0.0 for row in rows]),
        }
        ends = np.array([row.token_s[-1] - row.start_s if row.token_s else 0.0 for row in rows])
        starts = np.array([row.start_s for row in rows])
        gaps = tuple(np.diff(row.token_s) for row in rows)
        table = request_table(arrays, starts, ends, [row.error for row in rows])
        return Bench(requests=table, gaps_s=gaps, duration_s=self.duration_s)

    def fields(self) -> dict[str, Any]:
        """What the JSON says beside the result: vLLM's own names, and under ``phasewise`` what has none there."""
        asked = [row.request for row in self.answers]
        span_s = asked[-1].arrival_s if asked else 0.0
        return {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "backend": "openai",
            "endpoint_type": "openai",
            "model_id": self.dialect.shown or self.dialect.model,
            "tokenizer_id": None,
            "num_prompts": self.planned,
            "request_rate": (len(asked) - 1) / span_s if span_s > 0 else None,
            "max_concurrency": self.manners.concurrency,
            "phasewise": {
                "partial": self.stopped is not None,
                "stopped": self.stopped,
                "sent": len(asked),
                "prompt": self.dialect.prompt,
                "ignore_eos": self.dialect.ignore_eos,
                "tokens_counted_by_server": sum(row.counted for row in self.answers),
                "asked_input_lens": [request.input_tokens for request in asked],
                "asked_output_lens": [request.output_tokens for request in asked],
                "arrivals": [request.arrival_s for request in asked],
                "retries": [row.retries for row in self.answers],
            },
        }

    def remarks(self) -> list[str]:
        """What a reader should know before the figures."""
        done = [row for row in self.answers if not row.error]
        found = [f"the replay is partial: {self.stopped}"] if self.stopped else []
        reasons = Counter(row.error for row in self.answers if row.error)
        found += [f"{count} failed: {reason}" for reason, count in reasons.most_common(3)]
        other = sum(row.output_tokens != row.request.output_tokens for row in done)
        if other:
            found.append(f"{other} of {len(done)} answers are not as long as asked for (ignore_eos: {self._forced()})")
        longer = [row.input_tokens / row.request.input_tokens - 1 for row in done if row.input_tokens]
        if longer and max(map(abs, longer)) > 0.02:
            found.append(f"prompts were up to {max(longer, key=abs):+.0%} off the length asked for, by usage")
        if done and not all(row.counted for row in done):
            found.append("the server did not say how many tokens there were: each event counts as one")
        late = max((row.delay_s for row in self.answers), default=0.0)
        if late > 0.05:
            found.append(f"requests were sent up to {late:.3g} s late (at most {self.manners.concurrency} at a time)")
        return found

    def _forced(self) -> str:
        return "sent" if self.dialect.ignore_eos else "not sent"


async def replay(
    server: Server,
    requests: Sequence[Request],
    dialect: Dialect,
    manners: Manners,
    progress: Callable[[], None] | None = None,
) -> Replay:
    """Send every request at its time, the first one now, and wait for all answers. Cancelled, it gives what there is.

    ``progress`` is called for each answer. ``ConfigError`` for requests of several samples.
    """
    for request in requests:
        if request.samples > 1:
            raise ConfigError(f"request {request.id} asks for {request.samples} samples; a replay sends one each")
    first_s = requests[0].arrival_s if requests else 0.0
    requests = [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]
    run = _Run(server, dialect, manners, progress)
    stopped = await run.all(requests)
    return Replay(
        answers=tuple(run.answers[place] for place in sorted(run.answers)),
        planned=len(requests),
        duration_s=time.perf_counter() - run.began_s,
        dialect=dialect,
        manners=manners,
        stopped=stopped,
    )


class _Run:
    """A replay under way."""

    def __init__(self, server: Server, dialect: Dialect, manners: Manners, progress: Callable[[], None] | None) -> None:
        self.server, self.dialect, self.manners, self.progress = server, dialect, manners, progress
        self.answers: dict[int, Answer] = {}
        self.salt = secrets.randbits(62)  # a second replay must not find the first one's prompts in a prefix cache
        self.places = asyncio.Semaphore(manners.concurrency)
        self.gave_up = asyncio.Event()
        self.failed_in_a_row = 0
        self.began_s = time.perf_counter()

    async def all(self, requests: Sequence[Request]) -> str | None:
        """Why it stopped before the end; None if it did not. Nothing is under way afterwards."""
        tasks: list[asyncio.Task[None]] = []
        work = asyncio.create_task(self._send(requests, tasks))
        halt = asyncio.create_task(self.gave_up.wait())
        try:
            await asyncio.wait((work, halt), return_when=asyncio.FIRST_COMPLETED)
            stopped = None if work.done() else f"gave up after {self.failed_in_a_row} failures in a row"
        except asyncio.CancelledError:
            stopped = "interrupted"
            if (this := asyncio.current_task()) is not None:
                this.uncancel()
        for task in (work, halt, *tasks):
            task.cancel()
        for result in await asyncio.gather(work, halt, *tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return stopped

    async def _send(self, requests: Sequence[Request], tasks: list[asyncio.Task[None]]) -> None:
        for place, request in enumerate(requests):
            body = self.dialect.body(request, self.salt)
            await asyncio.sleep(max(0.0, self.began_s + request.arrival_s - time.perf_counter()))
            await self.places.acquire()
            tasks.append(asyncio.create_task(self._one(place, request, body)))
        await asyncio.gather(*tasks)

    async def _one(self, place: int, request: Request, body: bytes) -> None:
        """One request to its end. Its times count from the first sending, whatever was retried."""
        answer = Answer(request=request, start_s=time.perf_counter() - self.began_s, error=CUT_OFF)
        try:
            for tries in range(self.manners.retries + 1):
                if tries:
                    await asyncio.sleep(FIRST_PAUSE_S * 2 ** (tries - 1))
                    answer = replace(answer, retries=tries)
                try:
                    answer = self._whole(answer, await self.server.complete(body, request.output_tokens))
                    break
                except AnswerError as error:
                    if tries == self.manners.retries:
                        answer = replace(answer, error=str(error))
        finally:
            self.places.release()
            self._keep(place, answer)

    def _whole(self, answer: Answer, heard: Heard) -> Answer:
        return replace(
            answer,
            token_s=tuple(at_s - self.began_s for at_s in heard.token_s),
            input_tokens=heard.input_tokens,
            output_tokens=heard.output_tokens,
            counted=heard.counted,
            error="",
        )

    def _keep(self, place: int, answer: Answer) -> None:
        self.answers[place] = answer
        self.failed_in_a_row = self.failed_in_a_row + 1 if answer.error else 0
        if self.failed_in_a_row == self.manners.give_up_after:
            self.gave_up.set()
        if self.progress is not None:
            self.progress()
