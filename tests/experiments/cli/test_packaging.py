"""What the package declares: lower bounds that are tried, wheels without results."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_minima_that_are_tried_are_those_that_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    tried = re.findall(r"^([\w-]+)==(.+)$", (ROOT / ".ci" / "minima.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"{name}>={version}" for name, version in tried] == declared
