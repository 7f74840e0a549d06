"""When two points are the same: a hash of what is called and of everything that its answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sim.types import ConfigError


def key_of(call: Callable[..., Any], *arguments: Any) -> str:
    """SHA-256 over the call's name, its arguments in full, the files that they name, and this version of phasewise."""
    target = call if hasattr(call, "__qualname__") else type(call)
    parts = [metadata.version("phasewise"), f"{target.__module__}.{target.__qualname__}"]
    parts += [] if target is call else [plain(call)]
    return digest([*parts, *map(plain, arguments)])


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """As JSON has it; the path of a file stands for what is in it."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json", exclude_none=True))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(part) for part in value]
    if isinstance(value, str | Path):
        text = str(value)
        stamp = _stamp(text) if "/" in text else None
        return text if stamp is None else f"file {_sum(text, *stamp)}"
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(f"a job's argument is a {type(value).__name__}, which has no content to compare")


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        file = Path(path)
        stat = file.stat()
    except (OSError, ValueError):
        return None
    return (stat.st_size, stat.st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=256)
def _sum(path: str, _size: int, _changed: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
