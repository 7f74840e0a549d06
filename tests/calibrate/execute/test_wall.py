"""Wall-clock runs: the simulator's engine, real processes, real KV moves. Slow: each worker loads torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import numpy as np  # noqa: E402

from calibrate.execute import wall as wall_module  # noqa: E402
from calibrate.execute.how import Execution  # noqa: E402
from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.stage import Stage, generate  # noqa: E402
from calibrate.execute.run import execute  # noqa: E402
from calibrate.execute.wall import WallClock  # noqa: E402
from calibrate.execute.workers import fleet as fleet_module  # noqa: E402
from calibrate.execute.workers.fleet import Fleet, Word, WorkerLostError  # noqa: E402
from calibrate.execute.workers.wire import Paced, receive, send  # noqa: E402
from sim import SYSTEMS, ClusterEvent, Request, Result, System  # noqa: E402
from sim.model import ModelSpec  # noqa: E402
from sim.transfers import Quantized  # noqa: E402
from sim.types import ConfigError  # noqa: E402
from tests.calibrate.execute.test_measured import SMALL  # noqa: E402
from tests.calibrate.execute.test_model import save  # noqa: E402
from tests.toys import Requests, cluster, problem, request, with_limits  # noqa: E402

torch.set_num_threads(1)

SPLIT: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
WALL = Execution(mode="wall-clock")


def system(blocks: int = 200, name: str = "vllm", **options: Any) -> System:
    return with_limits(SYSTEMS[name](**options), num_kv_blocks=blocks)


def requests(count: int, output_tokens: int = 8, gap_s: float = 0.01) -> list[Request]:
    return [request(n, gap_s * n, 30 + 7 * n, output_tokens) for n in range(count)]


def wall(
    which: System, what: list[Request], how: Execution = WALL, **where: Any
) -> tuple[Result, dict[int, list[int]]]:
    outputs: dict[int, list[int]] = {}
    setup = replace(problem(**where), model=SMALL)
    return execute(setup, which, Requests(what), how, outputs=outputs), outputs


def alone(what: list[Request]) -> dict[int, list[int]]:
    """Every request's tokens, one after the other in this process."""
    stage = Stage(Architecture.of(SMALL), blocks=200)
    return {
        item.id: generate(
            stage, np.random.default_rng([0, item.id]).integers(0, 200, item.input_tokens).tolist(), item.output_tokens
        )
        for item in what
    }


# ---------------------------------------------------------------- without processes


class Script:
    """A fleet that says what it is told to, after a while."""

    def __init__(self, words: list[tuple[float, int]]) -> None:
        self.started_s = time.perf_counter()
        self.words = words

    def hear(self, timeout_s: float) -> Word | None:
        at_s, number = self.words[0] if self.words else (1e9, 0)
        left_s = self.started_s + at_s - time.perf_counter()
        if left_s > timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(0.0, left_s))
        self.words.pop(0)
        return Word("w", time.perf_counter(), {"number": number})


def test_the_wall_clock_rings_alarms_on_time_and_takes_answers_as_they_come() -> None:
    clock = WallClock(Script([(0.05, 1), (0.06, 1)]))  # type: ignore[arg-type]
    seen: list[tuple[str, int]] = []
    clock.at(30 * 10**9, lambda _: seen.append(("alarm", clock.now_ps)))
    clock.await_answers(1, 2, lambda at_ps, answers: seen.append(("answer", at_ps)))
    assert not clock.nothing_left()
    clock.run()
    assert [what for what, _ in seen] == ["alarm", "answer"]
    assert seen[0][1] == 30 * 10**9  # an alarm's time is its own, however late it rings
    assert 55 * 10**9 < seen[1][1] < 300 * 10**9


def test_orders_that_are_never_answered_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wall_module, "STUCK_S", 0.05)
    clock = WallClock(Script([]))  # type: ignore[arg-type]
    clock.await_answers(1, 1, lambda at_ps, answers: None)
    with pytest.raises(WorkerLostError, match="1 orders have not been answered for 0 s"):
        clock.run()


def test_the_wall_clock_stops_when_told() -> None:
    clock = WallClock(Script([]))  # type: ignore[arg-type]
    clock.await_answers(1, 1, lambda at_ps, answers: None)
    started_s = time.perf_counter()
    clock.run(50 * 10**9)
    assert 0.04 < time.perf_counter() - started_s < 1


def test_a_message_arrives_as_it_was_sent_and_at_the_pace_of_the_link() -> None:
    here, there = socket.socketpair()
    parts = [torch.randn(3, 700), torch.zeros(0, 4, dtype=torch.float16), torch.randn(5).bfloat16()]
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.extend(receive(there)))
    reader.start()
    started_s = time.perf_counter()
    size_bytes = send(here, {"do": "kv"}, parts, Paced(100_000.0, latency_s=0.02))
    assert time.perf_counter() - started_s >= size_bytes / 100_000 == 0.0841
    reader.join()
    assert got[0] == {"do": "kv"}
    assert all(torch.equal(a, b) for a, b in zip(got[1], parts, strict=True))
    here.close()
    with pytest.raises(EOFError, match="gone"):
        receive(there)
    there.close()


@pytest.mark.parametrize(
    ("options", "limits", "events", "message"),
    [
        ({"replicas": 1, "tp": 3}, {}, (), "plan: stage .*: tp: 3: small has 4 query heads, which 3 GPUs cannot share"),
        ({"replicas": 1, "tp": 1}, {"prefix_caching": True}, (), "prefix_caching"),
        ({"replicas": 1, "tp": 1}, {}, (ClusterEvent(at_s=1, kind="gpu_lost", target="n0.g0"),), "gpu_lost at 1 s"),
    ],
)
def test_what_workers_cannot_do_is_refused_at_once(options: Any, limits: Any, events: Any, message: str) -> None:
    which = with_limits(SYSTEMS["vllm"](**options), num_kv_blocks=50, **limits)
    with pytest.raises(ConfigError, match=message):
        execute(replace(problem(), model=SMALL), which, Requests(requests(1)), WALL, events=events)


def test_a_system_that_skips_parts_of_the_model_is_only_simulated() -> None:
    skipping = system(name="deja-vu", tp=1, attention_density=0.5, mlp_density=0.1)
    for mode in ("measured-step", "wall-clock"):
        with pytest.raises(ConfigError, match=r"deja-vu: workers compute all of small; simulate it"):
            execute(replace(problem(), model=SMALL), skipping, Requests(requests(1)), Execution(mode=mode))


def test_modes_and_devices_are_checked() -> None:
    with pytest.raises(ConfigError, match="mode: 'wall' is unknown; did you mean 'wall-clock'"):
        Execution(mode="wall")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            Execution(device="cuda")


def test_measured_steps_need_no_process() -> None:
    setup = replace(problem(), model=SMALL)
    result = execute(setup, system(**SPLIT), Requests(requests(2)), Execution(kv_blocks=100))
    assert list(result.requests["outcome"]) == ["completed"] * 2


# ---------------------------------------------------------------- with processes


@pytest.mark.slow
def test_a_split_run_gives_the_tokens_of_each_request_alone() -> None:
    what = requests(6)
    result, outputs = wall(system(**SPLIT), what)
    assert outputs == alone(what)
    rows = result.requests
    assert list(rows["outcome"]) == ["completed"] * 6
    assert (rows["transfer_s"] > 0).all()
    assert (rows["ttft_s"] > 0).all()
    assert all(row.measured for row in result.rows.replicas)
    assert result.extrapolated_share == 0
    assert list(rows["bytes_moved"]) == [SMALL.kv_bytes_per_token() * item.input_tokens for item in what]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm", "sarathi-serve"])
def test_preemption_by_recompute_changes_no_token(name: str) -> None:
    what = requests(6, output_tokens=40, gap_s=0.0)
    result, outputs = wall(system(14, name, replicas=1, tp=1), what)
    assert result.requests["preemptions"].sum() > 0
    assert outputs == alone(what)


@pytest.mark.slow
def test_kv_moves_between_pipelines_cut_in_different_places() -> None:
    what = requests(4)
    layout = {"prefill": {"replicas": 1, "tp": 1, "pp": 2}, "decode": {"replicas": 1, "tp": 1}}
    _, outputs = wall(system(**layout), what)
    assert outputs == alone(what)
    _, outputs = wall(system(prefill=layout["decode"], decode=layout["prefill"]), what)
    assert outputs == alone(what)


@pytest.mark.slow
def test_a_full_decoder_holds_its_sender_back_and_a_slow_link_takes_its_time() -> None:
    what = requests(5, output_tokens=30, gap_s=0.0)
    slow = cluster(gpus=1, nodes=2, gbps=0.001)
    how = replace(WALL, emulate_links=True)
    result, outputs = wall(system(9, **SPLIT), what, how, where=slow)
    assert outputs == alone(what)
    for _, row in result.requests.iterrows():
        assert row["transfer_s"] >= row["bytes_moved"] * 8 / 1e6


@pytest.mark.slow
def test_weights_come_from_a_folder_and_a_cut_off_run_keeps_what_it_has(tmp_path: Path) -> None:
    sizes = {"vocab_size": 200, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    save(tmp_path, "Llama", **sizes)
    (long,) = requests(1, output_tokens=3000)
    outputs: dict[int, list[int]] = {}
    execute(
        replace(problem(), model=ModelSpec.from_config(tmp_path)), system(replicas=1, tp=1), Requests([long]),
        replace(WALL, folder=str(tmp_path)), until_s=1.0, outputs=outputs,
    )  # fmt: skip
    stage = Stage(Architecture.read(tmp_path), blocks=200, folder=str(tmp_path))
    prompt = np.random.default_rng([0, 0]).integers(0, 200, long.input_tokens).tolist()
    assert 10 < len(outputs[0]) < 3000
    assert outputs[0][:10] == generate(stage, prompt, 10)


@pytest.mark.slow
def test_kv_of_four_bits_moves_fewer_bytes() -> None:
    what = requests(3)
    plain, _ = wall(system(**SPLIT), what)
    quantised, outputs = wall(replace(system(**SPLIT), transfer=lambda: Quantized(bits=4)), what)
    assert list(quantised.requests["outcome"]) == ["completed"] * 3
    assert [len(outputs[n]) for n in range(3)] == [8] * 3
    assert quantised.requests["bytes_moved"].sum() < 0.3 * plain.requests["bytes_moved"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_freezes_ends_the_run_with_a_report(
    how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "SILENT_S", 3.0)
    started: list[Fleet] = []
    enter = Fleet.__enter__

    def remember(fleet: Fleet) -> Fleet:
        started.append(enter(fleet))
        threading.Timer(0.5, os.kill, (list(fleet.pids.values())[1], how)).start()
        return fleet

    monkeypatch.setattr(Fleet, "__enter__", remember)
    with pytest.raises(WorkerLostError, match=r"worker .* (is gone|hung up|silent).*the others .* are stopped"):
        wall(system(**SPLIT), requests(400, output_tokens=30))
    assert not [pid for pid in started[0].pids.values() if alive(pid)]


@pytest.mark.slow
def test_a_worker_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match=r"worker .*: layers 0 to 2 and 1000000000 KV blocks: needs .* missing"):
        wall(system(10**9, replicas=1, tp=1), requests(1))


@pytest.mark.slow
def test_workers_end_with_their_coordinator(tmp_path: Path) -> None:
    """Killed hard, it cannot clean up: its workers must notice by themselves."""
    script = f"""
import time
from calibrate.execute.workers.crew import worker_configs
from calibrate.execute.run import _architecture, Execution, Fleet
from tests.calibrate.execute.test_wall import system, problem, replace, SMALL
setup = replace(problem(), model=SMALL)
which = system(replicas=2, tp=1)
how = Execution(mode="wall-clock")
plan = which.planner.plan(replace(setup, limits=which.limits))
with Fleet(worker_configs(setup, which, plan, _architecture(setup, how), how, "")) as fleet:
    open({str(tmp_path / "pids")!r}, "w").write(" ".join(map(str, fleet.pids.values())) + " end")
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    deadline_s = time.perf_counter() + 60
    told = tmp_path / "pids"
    while not (told.exists() and told.read_text().endswith("end")):
        assert time.perf_counter() < deadline_s
        time.sleep(0.1)
    pids = [int(word) for word in told.read_text().split()[:-1]]
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in pids):
        assert time.perf_counter() < deadline_s
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent to notice does not)."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:4]
    except FileNotFoundError:
        return False
