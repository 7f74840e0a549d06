"""``phasewise replay``: what it sends, what it measures, and what becomes of servers that do not behave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httpx", reason="replay needs the extra 'http'")

from experiments.runs.vllm_bench import figures, read_bench
from experiments.validation.completions import connected
from experiments.validation.dialect import Dialect
from experiments.validation.replay import CUT_OFF, Manners, Replay, replay
from sim.types import Request
from tests.experiments.cli.test_cli import call
from tests.toy_server import HEAD, Asked, Reply, ToyServer, serving, well
from tests.toys import request

TRACE = "arrival_s,input_tokens,output_tokens\n0,20,5\n0.05,8,1\n0.1,30,8\n"
IDS = Dialect(model="toy", prompt="ids", ignore_eos=True, usage=True)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three requests within 100 ms, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def replayed(reply: Reply, requests: list[Request], *, timeout_s: float = 5.0, **manners: Any) -> Replay:
    """Sent to a server that behaves so."""

    async def main(server: ToyServer) -> Replay:
        settings = Manners(**manners)
        async with connected(server.url, key=None, timeout_s=timeout_s, connections=settings.concurrency) as to:
            return await replay(to, requests, IDS, settings)

    with serving(reply) as server:
        return asyncio.run(main(server))


def test_a_replay_is_written_as_vllm_writes_it(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        assert call("replay", "--url", server.url, "--trace", trace, "--out", "real.json") == 0
    sent = server.replayed()
    assert [(len(body["prompt"]), body["max_tokens"]) for body in sent] == [(20, 5), (8, 1), (30, 8)]
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in sent)
    written = json.loads(Path("real.json").read_text())
    assert (written["model_id"], written["completed"], written["failed"], written["num_prompts"]) == ("toy", 3, 0, 3)
    assert (written["input_lens"], written["output_lens"]) == ([20, 8, 30], [5, 1, 8])
    assert [len(gaps) for gaps in written["itls"]] == [4, 0, 7]
    assert written["phasewise"]["partial"] is False
    rows = read_bench(Path("real.json")).requests
    assert (rows["e2e_s"] >= rows["ttft_s"]).all()
    assert rows["arrival_s"].to_numpy() == pytest.approx([0, 0.05, 0.1], abs=0.04)
    assert "3 completed, 0 failed" in capsys.readouterr().out


def test_times_are_the_clients(trace: Path) -> None:
    async def paced(asked: Asked) -> None:
        await asyncio.sleep(0.1)
        await well(asked, gap_s=0.05)

    bench = replayed(paced, [request(0, 0.0, 10, 5)]).bench()
    row = bench.requests.iloc[0]
    assert row["ttft_s"] == pytest.approx(0.1, abs=0.04)
    assert bench.gaps_s[0] == pytest.approx([0.05] * 4, abs=0.04)
    assert row["tpot_s"] == pytest.approx(bench.gaps_s[0].mean(), rel=1e-9)
    assert row["e2e_s"] == pytest.approx(row["ttft_s"] + bench.gaps_s[0].sum(), rel=1e-9)


# ---------------------------------------------------------------- an open loop


def test_requests_do_not_wait_for_answers() -> None:
    run = replayed(partial(well, gap_s=0.1), [request(n, 5 + 0.03 * n, 4, 4) for n in range(5)])
    assert [answer.start_s for answer in run.answers] == pytest.approx([0, 0.03, 0.06, 0.09, 0.12], abs=0.05)
    assert run.duration_s < 0.12 + 0.3 + 0.3
    assert all(answer.delay_s < 0.05 for answer in run.answers)


def test_concurrency_is_bounded_and_said() -> None:
    async def slow(asked: Asked) -> None:
        await well(asked, gap_s=0.1)

    with serving(slow) as server:

        async def main() -> Replay:
            async with connected(server.url, key=None, timeout_s=5, connections=2) as to:
                return await replay(to, [request(n, 0.0, 4, 2) for n in range(6)], IDS, Manners(concurrency=2))

        run = asyncio.run(main())
    assert server.most == 2
    assert max(answer.delay_s for answer in run.answers) > 0.15
    assert "late (at most 2 at a time)" in run.remarks()[-1]


def test_failures_are_retried_on_request_only() -> None:
    seen: dict[int, int] = {}

    async def moody(asked: Asked) -> None:
        length = len(asked.body["prompt"])
        seen[length] = seen.get(length, 0) + 1
        await (well(asked) if seen[length] > 1 else asked.status(503, {"error": {"message": "busy"}}))

    once = replayed(moody, [request(0, 0.0, 4, 2)])
    assert [answer.error for answer in once.answers] == ["the server answers 503: busy"]
    seen.clear()
    again = replayed(moody, [request(0, 0.0, 4, 2)], retries=2)
    assert [(answer.error, answer.retries) for answer in again.answers] == [("", 1)]
    assert again.answers[0].token_s[0] - again.answers[0].start_s > 0.4  # from the first sending


# ---------------------------------------------------------------- servers that do not behave


async def stalls(asked: Asked) -> None:
    await asked.send(HEAD)
    await asked.event({"choices": [{"text": " a", "finish_reason": None}]}, 30)


async def stops(asked: Asked) -> None:
    await asked.send(HEAD)
    await asked.event({"choices": [{"text": " a", "finish_reason": None}]})


async def cut(asked: Asked) -> None:
    await asked.send(HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked") + b"400\r\ndata: {")


async def not_json(asked: Asked) -> None:
    await asked.send(HEAD + b"data: {'text'\n\n")


async def too_deep(asked: Asked) -> None:
    await asked.send(HEAD + b"data: " + b"[" * 100_000 + b"\n\n")


async def noise(asked: Asked) -> None:
    await asked.send(HEAD + bytes(range(128, 256)) + b"\n\n")


async def endless_line(asked: Asked) -> None:
    await asked.send(HEAD + b"data: ")
    for _ in range(40):
        await asked.send(b"x" * 2**16)


async def error_event(asked: Asked) -> None:
    await asked.send(HEAD)
    await asked.event({"error": {"message": "out of memory"}})


async def whole(asked: Asked) -> None:
    await asked.status(200, {"choices": []}, "Content-Type: application/json")


async def elsewhere(asked: Asked) -> None:
    await asked.status(307, {}, "Location: http://192.0.2.1/v1/completions")


async def empty(asked: Asked) -> None:
    await asked.send(HEAD + b"data: [DONE]\n\n")


async def hangs_up(asked: Asked) -> None:
    asked.writer.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (stalls, "no whole answer within 0.3 s"),
        (stops, "the server closed the stream early, after 1 events with tokens"),
        (cut, "the server closed the connection early"),
        (hangs_up, "the server closed the connection early"),
        (not_json, "the server sends garbage, no JSON object: {'text'"),
        (too_deep, "the server sends garbage, no JSON object: [[["),
        (noise, "the server streams garbage"),
        (endless_line, "a line of more than 1 MiB"),
        (error_event, "the server says: out of memory"),
        (whole, "the server did not stream"),
        (elsewhere, "the server redirects to http://192.0.2.1/v1/completions, which is not followed"),
        (empty, "the answer has no token"),
    ],
)
def test_a_bad_answer_fails_alone(reply: Reply, message: str) -> None:
    async def mixed(asked: Asked) -> None:
        await (reply(asked) if len(asked.body["prompt"]) == 13 else well(asked))

    run = replayed(mixed, [request(0, 0.0, 4, 2), request(1, 0.0, 13, 2), request(2, 0.02, 4, 2)], timeout_s=0.3)
    assert [bool(answer.error) for answer in run.answers] == [False, True, False]
    assert message in run.answers[1].error
    assert run.stopped is None
    summary = figures(run.bench())
    assert (summary["completed"], summary["failed"], summary["total_output_tokens"]) == (2, 1, 4)


@pytest.mark.parametrize("reply", [stalls, stops, not_json, noise, elsewhere, hangs_up])
def test_a_bad_server_is_one_line_and_no_file(trace: Path, capsys: pytest.CaptureFixture[str], reply: Reply) -> None:
    with serving(reply) as server:
        code = call("replay", "--url", server.url, "--trace", trace, "--out", "x.json", "--timeout-s", 0.3)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"phasewise: {server.url}/v1: ")
    assert error.count("\n") == 1
    assert not Path("x.json").exists()


def test_nobody_there(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        gone = server.url
    assert call("replay", "--url", gone, "--trace", trace, "--out", "x.json") == 2
    assert "cannot connect" in capsys.readouterr().err
    with serving(models=()) as server:
        assert call("replay", "--url", server.url, "--trace", trace, "--out", "x.json") == 2
    assert "it lists no model; name one with --model" in capsys.readouterr().err


def failing_after(good: int) -> Callable[[Asked], Awaitable[None]]:
    count = 0

    async def reply(asked: Asked) -> None:
        nonlocal count
        count += 1
        await (well(asked) if count <= good else asked.status(500, {"error": "broken"}))

    return reply


def test_a_server_that_breaks_down_ends_the_replay(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 20},9,3\n" for n in range(400)))
    with serving(failing_after(6)) as server:  # one is the question what it accepts
        code = call("replay", "--url", server.url, "--trace", trace, "--out", "x.json", "--give-up-after", 4)
    assert code == 1
    written = json.loads(Path("x.json").read_text())
    assert written["phasewise"]["partial"] is True
    assert written["phasewise"]["stopped"] == "gave up after 4 failures in a row"
    assert (written["completed"], written["failed"], written["num_prompts"]) == (5, 4, 400)
    assert set(written["errors"]) == {"", "the server answers 500: broken"}
    assert "the replay is partial" in capsys.readouterr().err


def _interruptible(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process that heeds Ctrl-C even where these tests do not: shells start background jobs to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(arguments, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_there_is(trace: Path) -> None:
    async def slower_and_slower(asked: Asked) -> None:
        await well(asked, gap_s=0.0 if len(asked.body["prompt"]) < 30 else 60.0)

    with serving(slower_and_slower) as server:
        arguments = ["replay", "--url", server.url, "--trace", "trace.csv", "--out", "x.json"]
        process = _interruptible([sys.executable, "-m", "experiments.cli", *arguments])
        try:
            deadline = time.monotonic() + 60
            while len(server.replayed()) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, said
    written = json.loads(Path("x.json").read_text())
    assert (written["completed"], written["phasewise"]["stopped"]) == (2, "interrupted")
    assert written["errors"] == ["", "", CUT_OFF]


# ---------------------------------------------------------------- keys, and mistakes


def test_the_key_is_sent_and_never_written(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tell_tale(asked: Asked) -> None:
        said = {"error": {"message": "x" * 160 + asked.headers["authorization"]}}
        await (asked.status(401, said) if asked.body["max_tokens"] == 8 else well(asked))

    monkeypatch.setenv("TOY_KEY", "sk-very-secret")
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:1")
    with serving(tell_tale) as server:
        url = ["--url", server.url]
        assert call("replay", *url, "--trace", trace, "--out", "x.json", "--api-key-env", "TOY_KEY") == 0
    assert server.keys == {"Bearer sk-very-secret"}
    written, said = Path("x.json").read_text(), capsys.readouterr()
    assert json.loads(written)["failed"] == 1
    assert "sk-v" not in written + said.out + said.err
    assert "Bearer ***" in written


def test_a_key_that_cannot_be_sent_is_not_shown(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret\n")
    assert call("replay", "--url", "http://127.0.0.1:1", "--trace", trace, "--out", "x.json") == 2
    error = capsys.readouterr().err
    assert "--api-key-env" in error
    assert "cret" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "give either --trace FILE or --scenario FILE"),
        (["--url", "http://127.0.0.1:1", "--trace", "sample", "--set", "seed=1"], "--set: belongs to --scenario"),
        (["--url", "http://127.0.0.1:1", "--trace", "sample", "--prompt", "text"], "must be ids or words"),
        (["--url", "http://127.0.0.1:1", "--scenario", "loop.yaml"], "workload.closed_loop: a replay waits for nobody"),
    ],
)
def test_mistakes_on_the_command_line(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("loop.yaml").write_text(
        "model: llama-2-7b\ncluster: {nodes: [{gpu: L4, count: 1}]}\nsystem: {name: vllm}\n"
        "workload: {closed_loop: {clients: 2}}\n"
    )
    assert call("replay", *arguments, "--out", "x.json") == 2
    assert message in capsys.readouterr().err


def test_without_httpx_it_says_what_to_install(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert call("replay", "--url", "http://127.0.0.1:1", "--trace", trace, "--out", "x.json") == 2
    assert "pip install 'phasewise[http]'" in capsys.readouterr().err


def test_a_folder_that_is_not_there(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        assert call("replay", "--url", server.url, "--trace", trace, "--out", "no/x.json") == 2
    assert "--out no/x.json" in capsys.readouterr().err
    assert server.paths == []


def test_a_scenarios_workload_measured_and_predicted(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(
        "model: llama-2-7b\ncluster: {nodes: [{gpu: A100-80G-SXM, count: 1}]}\nsystem: {name: vllm}\n"
        "workload: {generate: {requests: 50, input: {fixed: 6}, output: {fixed: 3}}, rate: 100}\n"
    )
    with serving() as server:
        assert call("replay", "--url", server.url, "--scenario", "s.yaml", "--limit", 5, "--out", "x.json") == 0
    assert [len(body["prompt"]) for body in server.replayed()] == [6] * 5
    capsys.readouterr()
    assert call("compare-run", "s.yaml", "x.json", "--json") == 0
    metrics = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["metrics"]}
    assert metrics["completed"]["measured"] == metrics["completed"]["predicted"] == 5
    assert metrics["TTFT p50 (s)"]["error"] is not None


def test_a_server_that_counts_nothing_has_a_token_per_event() -> None:
    async def silent(asked: Asked) -> None:
        await asked.send(HEAD)
        for _ in range(3):
            await asked.event({"choices": [{"text": "x", "finish_reason": "stop"}]})

    run = replayed(silent, [request(0, 0.0, 10, 5)])
    assert (run.answers[0].output_tokens, run.bench().requests["input_tokens"].tolist()) == (3, [10])
    assert "each event counts as one" in run.remarks()[-1]
    assert "1 of 1 answers are not as long as asked for (ignore_eos: sent)" in run.remarks()
    assert np.isfinite(run.bench().requests["tpot_s"]).all()
