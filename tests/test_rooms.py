"""The house: every room is in the architecture page, says what it is, and is small enough to look over."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("phasewise", "sim", "calibrate", "traces", "experiments")
MOST = 16
"""Files at one level."""


def folders() -> list[Path]:
    """Every folder of the repository, of files that git knows or would take."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    files = done.stdout.split("\0") if done.returncode == 0 else []
    if not any(files):
        pytest.skip("not a git checkout")
    return sorted({(ROOT / name).parent for name in files if name and (ROOT / name).exists()})


def rooms() -> set[str]:
    """Folders with code, those of one paper's study apart: they are named after it."""
    found = {str(path.relative_to(ROOT)) for path in folders() if (path / "__init__.py").exists()}
    return {name for name in found if name.split("/")[0] in CODE and not name.startswith("experiments/studies/")}


def test_the_architecture_page_has_every_room_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## The rooms") : page.index("## Who may import whom")]
    listed = re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)
    assert set(listed) == rooms() - {"experiments"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("room", sorted(rooms()))
def test_every_room_says_what_it_is(room: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))), room


def test_no_level_has_too_many_files() -> None:
    sizes = {str(path.relative_to(ROOT)): sum(file.is_file() for file in path.iterdir()) for path in folders()}
    assert {name: size for name, size in sizes.items() if size > MOST} == {}
