"""``phasewise`` as its tests call it."""

from __future__ import annotations

import pytest

from experiments.cli import main


def call(*arguments: object) -> int:
    """The exit code with these arguments."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)
