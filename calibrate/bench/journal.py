"""The journal beside a profile: one line per measured point, on disk before the next one is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibrate.bench.family import Key, Measurement
from sim.types import ConfigError

FORMAT = "phasewise-calibration-1"


class Journal:
    """Measurements that survive the process, every look at a point in order.

    ``settings`` must be those of the run that began the file.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], *, restart: bool = False) -> None:
        self.path = path
        self.done: dict[Key, list[Measurement]] = {}
        if restart:
            path.unlink(missing_ok=True)
        try:
            if path.exists() and path.stat().st_size:
                self._read(settings)
            else:
                self._append({"format": FORMAT, "settings": dict(settings)})
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be used ({error}); choose a writable --out, or --restart") from None

    def add(self, key: Key, measurement: Measurement) -> None:
        """Keep a measurement, on disk when this returns."""
        self.done.setdefault(key, []).append(measurement)
        self._append({**key._asdict(), **measurement._asdict()})

    def _append(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, settings: Mapping[str, str]) -> None:
        text = self.path.read_text(encoding="utf-8")
        lines = text.split("\n")
        if lines.pop():
            # The line that was being written when the process died.
            os.truncate(self.path, len("".join(f"{line}\n" for line in lines).encode()))
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._check(row, settings)
                else:
                    key, measurement = _row(row)
                    self.done.setdefault(key, []).append(measurement)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f"{self.path}: line {number} is not of a calibration journal; --restart begins anew"
                ) from None

    def _check(self, row: Any, settings: Mapping[str, str]) -> None:
        if row["format"] != FORMAT:
            raise ValueError
        old = row["settings"]
        for name in sorted({*old, *settings}):
            if old.get(name) != settings.get(name):
                raise ConfigError(
                    f"{self.path}: was begun with {name} {old.get(name)}, now it is {settings.get(name)}; "
                    "use the same settings, another --out, or --restart to begin anew"
                )


def _row(row: Any) -> tuple[Key, Measurement]:
    seconds = tuple(float(value) for value in row["seconds"])
    if not seconds and not row["skipped"]:
        raise ValueError
    point = tuple((str(name), int(value)) for name, value in row["point"])
    key = Key(str(row["operator"]), int(row["tp"]), str(row["dtype"]), point)
    return key, Measurement(seconds, float(row["spent_s"]), row["skipped"])
