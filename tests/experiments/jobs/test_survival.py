"""Sweeps that are killed at random moments, moved to Dask, and cut into shards: the same bytes come out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiments.jobs.journal import FILE, read

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = """
model: llama-3.1-8b
cluster: {nodes: [{gpu: H100-SXM, count: 1}]}
workload: {rate: 1.0, generate: {requests: 40, input: {fixed: 300}, output: {fixed: 20}}}
system: {name: vllm, tp: 1}
latency: roofline
slo: {ttft_s: 1.0, tpot_s: 0.05}
"""
GRID = ("--grid", "system.engine.max_num_seqs=8,16,32", "--rates", "1,2,4,8,16", "--seeds", "4", "--quiet")
POINTS = 60
RESULTS = ("runs.csv", "means.csv", "rates.csv", "pareto.csv")


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


def started(scenario: Path, out: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.cli", "sweep", str(scenario), *GRID, "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=scenario.parent, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def finished(scenario: Path, out: str, *options: str) -> Path:
    process = started(scenario, out, *options)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return scenario.parent / out


def left_over(family: list[psutil.Process], within_s: float = 10) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(family, timeout=within_s)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


@pytest.mark.slow
def test_shards_are_merged_to_the_same_bytes(scenario: Path) -> None:
    whole = finished(scenario, "whole", "--workers", "1")
    for part in (1, 2, 3):
        finished(scenario, f"part{part}", "--shard", f"{part}/3", "--workers", "1")
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "merge",
        "part1",
        "part2",
        "part3",
        "--out",
        "merged",
        "--quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = {"cwd": scenario.parent, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert results(scenario.parent / "merged") == results(whole)
    lacking = subprocess.run([*command[:-4], "--out", "less"], check=False, **run)  # type: ignore[call-overload]
    assert lacking.returncode == 2
    assert "20 of 60 points are missing" in lacking.stderr
    finished(scenario, "other", "--workers", "1", "--set", "seed=9")
    mixed = [*command[:4], "part1", "other", "--out", "mixed"]
    foreign = subprocess.run(mixed, check=False, **run)  # type: ignore[call-overload]
    assert foreign.returncode == 2
    assert "of another study" in foreign.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", [("--workers", "2"), ("--dask", "local", "--workers", "2")], ids=["pool", "dask"])
def test_other_workers_give_the_same_bytes(scenario: Path, where: tuple[str, ...]) -> None:
    if "--dask" in where:
        pytest.importorskip("distributed", reason="needs the extra 'cluster'")
    assert results(finished(scenario, "apart", *where)) == results(finished(scenario, "here", "--workers", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("where", [("--workers", "2"), ("--dask", "local", "--workers", "2")], ids=["pool", "dask"])
def test_killed_at_random_moments_it_goes_on(scenario: Path, where: tuple[str, ...]) -> None:
    """The driver is killed ten times, a worker ten times; in the end nothing is lost, repeated or half-written."""
    if "--dask" in where:
        pytest.importorskip("distributed", reason="needs the extra 'cluster'")
    whole = results(finished(scenario, "whole", "--workers", "1"))
    dice, survived = random.Random(7), 0
    for attempt in range(20):
        out = f"try{attempt}"
        process = started(scenario, out, *where)
        driver = psutil.Process(process.pid)
        time.sleep(1.0 + dice.random() * 4.0)
        family = [driver, *driver.children(recursive=True)] if driver.is_running() else []
        if attempt % 2 == 0 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)  # nobody else holds its pipes
            assert left_over(family) == []
        elif process.poll() is None:
            workers = [one for one in family[1:] if "spawn_main" in " ".join(_command(one))]
            if workers:
                dice.choice(workers).kill()
        process.communicate(timeout=240)
        folder = finished(scenario, out, *where)
        _, entries = read(folder)
        lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()[1:]]
        assert len(lines) == len(entries) == POINTS
        survived += results(folder) == whole
        assert not [name for name in folder.iterdir() if name.name.startswith(".")]
    print(f"{survived} of 20 survived")
    assert survived == 20


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_its_code_and_leaves_no_process(
    scenario: Path, number: signal.Signals, code: int
) -> None:
    process = started(scenario, "stopped", "--workers", "2")
    driver = psutil.Process(process.pid)
    while not (scenario.parent / "stopped" / FILE).exists():
        time.sleep(0.05)
    time.sleep(1.5)
    family = [driver, *driver.children(recursive=True)]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert left_over(family) == []
    finished(scenario, "stopped", "--workers", "2")
