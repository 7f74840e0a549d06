"""Every command in the documentation is run, and every link and path in it is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_server import serving, well

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "reference").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAND_INS = {
    "--model llama-3.1-8b --tp 1,2 --minutes 10": "--model two.json --device cpu --threads 1 --minutes 0.1",
    "phasewise run scenario.yaml --set latency=my-h200.json": "phasewise run two.yaml --set latency=my-h200.json",
    "validate_cpu_colocated.yaml --overhead --tolerance ttft=0.12 --tolerance tpot=0.06": (
        "validate_cpu_colocated.yaml --overhead --set workload.generate.requests=10 --set latency=roofline"
    ),
    "phasewise validate scenario.yaml --device cuda --minutes 10 --repeats 3": (
        "phasewise validate two.yaml --device cpu --set latency=roofline --repeats 1"
    ),
    "--out results/h200 --minutes 25": "--help",
}
"""What is run in place of a command that wants a GPU, a long time or a big model."""
NOT_RUN = ("pip install", "export ")
SLOW = {"calibrate", "validate", "rent", "start"}
TWO_LAYERS = """{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 4096,
"torch_dtype": "float32"}"""
TWO = """
model: two.json
cluster: {nodes: [{gpu: CPU, count: 1}]}
workload: {generate: {requests: 10, input: {uniform: [20, 80]}, output: {uniform: [4, 16]}}, rate: 100}
system: {name: vllm, tp: 1, engine: {num_kv_blocks: 500, prefix_caching: false}}
accept_error: 10
"""
SCENARIO = """
model: llama-3.1-8b
cluster: {nodes: [{gpu: H100-SXM, count: 1}]}
workload: {trace: sample, rate: 2, limit: 200}
system: {name: vllm, tp: 1}
"""


def commands(page: Path) -> list[str]:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    lines = [line for language, _, text in blocks if language == "bash" for line in text.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


def with_commands() -> list[object]:
    chosen = [page for page in PAGES if commands(page) and page.stem != "add_a_system"]
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in chosen]


@pytest.mark.parametrize("page", with_commands())
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for name, text in (("two.json", TWO_LAYERS), ("two.yaml", TWO), ("scenario.yaml", SCENARIO)):
        (tmp_path / name).write_text(text)
    for language, name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if name and language != "bash":
            (tmp_path / name).write_text(text)
    with serving(well) as server:
        for line in commands(page):
            if line.startswith(NOT_RUN):
                continue
            for written, run in STAND_INS.items():
                line = line.replace(written, run)
            done = shell(
                tmp_path, line.replace("http://127.0.0.1:8000", server.url).replace("--limit 200", "--limit 5")
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_the_python_of_a_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    (tmp_path / "mine.yaml").write_text(next(text for _, name, text in blocks if name == "mine.yaml"))
    script = "\n".join(text for language, _, text in blocks if language == "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SLO attainment (%)" in done.stdout


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    own = folder / "bin"
    own.mkdir(exist_ok=True)
    command = own / "phasewise"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m experiments.cli "$@"\n')
    command.chmod(0o755)
    paths = os.pathsep.join([str(own), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": paths}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_and_paths_are_right(page: Path) -> None:
    text = re.sub(BLOCK, "", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith(("http:", "https:"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
    rooms = r"`((?:sim|calibrate|traces|experiments|docs|notebooks|tests|phasewise)/[\w/.\-]+)`"
    assert [path for path in re.findall(rooms, text) if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES} - {"README.md", "replay.md", "validate.md"}
    assert pages <= set(re.findall(r"\((?:reference/)?(\w+\.md)\)", index))
    trust = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    assert {"replay.md", "validate.md"} <= set(re.findall(r"\((\w+\.md)\)", trust))
