"""The client of streamed completions: what a server takes, prompts of a length, and a stream cut anywhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx", reason="replay needs the extra 'http'")

from experiments.validation.completions import AnswerError, EventStream, Listener, base_url, connected
from experiments.validation.dialect import FIRST_ID, LAST_ID, Dialect, agree
from sim.types import ConfigError, Request
from tests.toy_server import Asked, Reply, ToyServer, serving, well
from tests.toys import request

IDS = Dialect(model="toy", prompt="ids", ignore_eos=True, usage=True)


def refusing(*fields: str, ids: bool = True) -> Reply:
    """As servers that check their input: 422 for a field they do not know, 400 for a prompt that is no text."""

    async def reply(asked: Asked) -> None:
        unknown = [name for name in fields if name in asked.body]
        if unknown:
            await asked.status(422, {"detail": f"Unexpected fields: {unknown}"})
        elif not ids and not isinstance(asked.body["prompt"], str):
            await asked.status(400, {"detail": "prompt must be a string."})
        else:
            await well(asked)

    return reply


def agreed(reply: Reply, **wish: Any) -> Dialect:
    async def main(server: ToyServer) -> Dialect:
        async with connected(server.url, key=None, timeout_s=5, connections=1) as to:
            return await agree(to, "toy", **{"prompt": None, "ignore_eos": True} | wish)

    with serving(reply) as server:
        return asyncio.run(main(server))


@pytest.mark.parametrize(
    ("reply", "wish", "prompt", "ignore_eos", "usage"),
    [
        (well, {}, "ids", True, True),
        (well, {"ignore_eos": False}, "ids", False, True),
        (well, {"prompt": "words"}, "words", True, True),
        (refusing("ignore_eos"), {}, "ids", False, True),
        (refusing("ignore_eos", "stream_options"), {}, "ids", False, False),
        (refusing(ids=False), {}, "words", True, True),
        (refusing("ignore_eos", ids=False), {}, "words", False, True),
    ],
)
def test_what_a_server_accepts_is_found_out(
    reply: Reply, wish: dict[str, Any], prompt: str, ignore_eos: bool, usage: bool
) -> None:
    found = agreed(reply, **wish)
    assert (found.prompt, found.ignore_eos, found.usage) == (prompt, ignore_eos, usage)


def test_words_are_counted_by_the_server() -> None:
    async def two_per_word_and_one(asked: Asked) -> None:
        asked.body["prompt"] = asked.body["prompt"] + " " + asked.body["prompt"] + " bos"
        await well(asked)

    dialect = agreed(two_per_word_and_one, prompt="words")
    assert (dialect.per_unit, dialect.extra) == (2.0, 1.0)
    body = json.loads(dialect.body(request(0, 0.0, 201, 5), salt=1))
    assert len(body["prompt"].split()) == 100


def test_nothing_accepted_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"it accepts no request for a completion: .*Unexpected fields"):
        agreed(refusing("stream"))


def test_prompts_share_what_the_trace_shares() -> None:
    one = request(0, 0.0, 40, 1)
    shared = [
        Request(id=n, arrival_s=0, input_tokens=40, output_tokens=1, prefix=prefix, prefix_block_tokens=16)
        for n, prefix in enumerate([(7, -9), (7, -9), (7, 5), (8, 5)])
    ]
    units = [IDS.units(item, 3) for item in shared]
    assert all(len(unit) == 40 for unit in units)
    assert (units[0][:32] == units[1][:32]).all()
    assert (units[0][32:] != units[1][32:]).all()
    assert (units[0][:16] == units[2][:16]).all()
    assert (units[0][16:] != units[2][16:]).all()
    assert (units[2][16:32] == units[3][16:32]).all()
    assert (IDS.units(one, 3) != IDS.units(one, 4)).all()  # another replay, another text
    ids = json.loads(IDS.body(request(0, 0.0, 5000, 1), 3))["prompt"]
    assert FIRST_ID <= min(ids) < FIRST_ID + 100
    assert LAST_ID - 100 < max(ids) < LAST_ID
    assert len(set(ids)) > 4000


# ---------------------------------------------------------------- the stream


def told(text: bytes, cuts: list[int]) -> Listener:
    listener = Listener()
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    start = 0
    for number, end in enumerate(ends):
        listener.hear(text[start:end], float(number))
        start = end
    listener.end(float(len(ends)))
    return listener


@given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_may_be_cut_anywhere(cuts: list[int], newline: bytes) -> None:
    lines = [
        ": a comment", "", 'data: {"choices": [{"text": "é€𝄞"}]}', "", "event: x", 'data:{"choices": [{"text": "b"}]}',
        "id: 4", "", 'data: {"choices":', 'data:  [{"text": "", "finish_reason": "length"}]}', "",
        'data: {"choices": [{"text": ""}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}', "", "data: [DONE]",
    ]  # fmt: skip
    listener = told(newline.join(line.encode() for line in lines), cuts)
    assert len(listener.token_s) == 3  # the last event has no token
    assert (listener.input_tokens, listener.output_tokens, listener.finished) == (7, 3, True)
    assert listener.token_s == sorted(listener.token_s)


@given(st.binary(max_size=300))
def test_any_bytes_are_events_or_an_error(noise: bytes) -> None:
    stream = EventStream()
    try:
        found = [*stream.feed(noise), *stream.end()]
    except AnswerError:
        return
    assert all(isinstance(data, str) for data in found)


@pytest.mark.parametrize(
    ("url", "known"),
    [("http://h:8000", "http://h:8000/v1"), ("https://h/x/v1/", "https://h/x/v1"), ("http://h/", "http://h/v1")],
)
def test_addresses(url: str, known: str) -> None:
    assert base_url(url) == known


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://u:p@h",
        "http://h?key=1",
        "http://h#x",
        "http://h:99999",
        "http://[",
        "http://a b",
    ],
)
def test_no_addresses(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        base_url(url)
