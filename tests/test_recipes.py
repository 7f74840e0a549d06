"""The recipes of CONTRIBUTING.md and docs/add_a_system.md, done to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("phasewise", "sim", "calibrate", "traces", "experiments", "tests", "pyproject.toml")
SECTION = re.compile(r"^## Recipe: (.+?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    file: str
    text: str


def recipe(title: str) -> list[Block]:
    pages = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "add_a_system.md")
    sections = dict(found for page in pages for found in SECTION.findall(page.read_text(encoding="utf-8")))
    return [Block(*found) for found in BLOCK.findall(sections[title])]


def patched(text: str, diff: str) -> str:
    """The text with each part of a diff applied; its old lines must stand in it once."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"CONTRIBUTING.md is out of date: {old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    return text


def write(folder: Path, block: Block) -> None:
    target = folder / block.file
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    target.write_text(
        patched(before, block.text) if block.language == "diff" else before + block.text, encoding="utf-8"
    )


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def do(folder: Path, blocks: list[Block]) -> dict[str, str]:
    """Write the files, then run the commands; what each printed."""
    commands = [line for block in blocks if block.language == "bash" for line in block.text.splitlines()]
    first = shell(folder, commands[0])
    for block in blocks:
        if block.language != "bash":
            write(folder, block)
    printed = {}
    for line in commands:
        done = shell(folder, line)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed[line] = done.stdout
    assert printed[commands[0]] != first.stdout, f"{commands[0]} prints the same as before the recipe"
    return printed


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / name)
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_a_trace_format(copy: Path) -> None:
    printed = do(copy, recipe("add a trace format"))
    stats = dict(line.split(maxsplit=1) for line in printed["phasewise trace stats acme.jsonl"].splitlines())
    assert stats["requests"] == "2"
    assert stats["skipped"] == "1"
    rows = (copy / "acme.csv").read_text().splitlines()
    assert rows[1].startswith("0.0,120,30")
    assert rows[2].startswith("2.0,300,45")


def test_a_gpu_and_a_profile(copy: Path) -> None:
    printed = do(copy, recipe("add a GPU or a profile"))
    assert "X1-32G" in printed["phasewise gpus"]
    assert "x1-example" in printed["phasewise profiles"]
    assert "roofline estimate" not in printed["phasewise run x1.yaml"]
    assert "X1-32G are a roofline estimate" in printed["phasewise run x1.yaml --set latency=roofline"]


@pytest.mark.slow
def test_a_system(copy: Path) -> None:
    printed = do(copy, recipe("add a system"))
    assert "session-affinity\n" in printed["phasewise systems"]
    laws = next(output for line, output in printed.items() if "test_laws" in line)
    assert re.search(r"^[.]+ ", laws, re.MULTILINE)
    for command in ("check", "format --check"):
        style = shell(
            copy,
            f"ruff {command} sim/systems/__init__.py sim/systems/schedulers/session_affinity.py "
            "tests/sim/systems/schedulers/test_session_affinity.py",
        )
        assert style.returncode == 0, style.stdout


def test_a_diff_that_does_not_fit_is_noticed() -> None:
    with pytest.raises(AssertionError, match="out of date"):
        patched("a\nb\n", " c\n+d\n")
    assert patched("a\nb\nc\n", " b\n+d\n@@\n-c\n+e\n") == "a\nb\nd\ne\n"
