"""Profile files: JSON that carries measured operators and their provenance. ``shipped_profiles`` lists ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.profile.samples import Samples, samples_data
from sim.cost import (
    SHARED_LAUNCH,
    AttentionTable,
    DecodeTerms,
    Device,
    GemmTable,
    Graphs,
    Grid,
    HeldOut,
    Kernels,
    Polynomial,
    Profile,
    ProfileEntry,
    PromptTerms,
    Provenance,
    Table,
)
from sim.outside import clip, is_file, read_json
from sim.types import ConfigError

SCHEMA = "phasewise-profile"
VERSION = 1
INNERMOST = re.compile(r"\[\s+([^][{}]*?)\s+\]")
PLAIN = ("gpus", "model", "num_layers", "tp", "dtypes")
"""Fields of an entry that are the same in the file and in memory."""
OPERATORS: Mapping[str, type[Table] | type[Grid]] = {
    "linear": Table,
    "head": Table,
    "collective": Table,
    "attention_prefill": Grid,
    "attention_decode": Grid,
    "attention_mixed": Grid,
}
FOLDER = Path(__file__).with_name("shipped")


def shipped_profiles() -> dict[str, Path]:
    """Every profile that comes with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile file; ``ConfigError`` names the file, the field, the value and the mend.

    The fields of shipped files are checked by the tests, so that reading one need not wait for pydantic.
    """
    path = Path(path)
    data = read_data(path)
    if path.resolve().parent != FOLDER.resolve():
        from calibrate.profile.schema import checked

        data = checked(data, path)
    try:
        return _profile(_tuples({name: part for name, part in data.items() if name != "samples"}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_samples(path: str | Path) -> tuple[Samples, ...]:
    """The raw measurements of a profile file; empty if it has none. ``ConfigError`` as ``read_profile`` gives it."""
    from calibrate.profile.schema import checked

    path = Path(path)
    rows = checked(read_data(path), path)["samples"]
    try:
        return tuple(Samples(**row) for row in rows)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_data(path: Path) -> dict[str, Any]:
    """What the file holds, known to be a profile of this version; its fields are not checked."""
    data = _read_json(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f'{path}: not a profile; its top level needs "schema": "{SCHEMA}"')
    if data.get("version") != VERSION:
        raise ConfigError(f"{path}: version is {data.get('version')!r}, this release reads {VERSION}; make it anew")
    return data


def write_profile(profile: Profile, path: str | Path, samples: tuple[Samples, ...] = ()) -> None:
    """Write a profile under a temporary name, then rename it: no reader meets half a file."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(profile_text(profile, samples), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose a writable folder") from None
    finally:
        partial.unlink(missing_ok=True)


def profile_text(profile: Profile, samples: tuple[Samples, ...] = ()) -> str:
    """The file's text, the same for equal profiles."""
    from calibrate.profile.schema import file_data

    entries = [_entry_data(entry) for entry in profile.entries]
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "name": profile.name,
        "provenance": asdict(profile.provenance),
        "entries": entries or None,
        "kernels": [asdict(kernels) for kernels in profile.kernels] or None,
        "polynomials": [asdict(form) for form in profile.polynomials] or None,
        "device": profile.device and asdict(profile.device),
        "tables": {name: asdict(table) for name, table in profile.tables.items()} or None,
        "samples": samples_data(samples) or None,
    }
    given = {name: part for name, part in data.items() if part is not None}
    text = json.dumps(file_data(given), indent=1)
    return INNERMOST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _read_json(path: Path) -> Any:
    if not is_file(path):
        known = ", ".join(shipped_profiles())
        raise ConfigError(f"{clip(str(path))}: cannot be read: there is no such file; give a file, or one of: {known}")
    return read_json(path, "profile", mend="it is damaged or cut short: copy or make it anew")


def _tuples(data: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    if isinstance(data, dict):
        return {name: _tuples(part) for name, part in data.items()}
    return tuple(map(_tuples, data)) if isinstance(data, list | tuple) else data


def _profile(data: Mapping[str, Any]) -> Profile:
    entries = tuple(_entry(number, entry) for number, entry in enumerate(data.get("entries", ())))
    kernels = tuple(_kernels(number, part) for number, part in enumerate(data.get("kernels", ())))
    device = data.get("device")
    return Profile(
        name=data["name"],
        provenance=Provenance(**data["provenance"]),
        entries=entries,
        kernels=kernels,
        polynomials=tuple(_polynomial(number, part) for number, part in enumerate(data.get("polynomials", ()))),
        device=None if device is None else Device(**device),
        tables={name: _table(name, table) for name, table in data.get("tables", {}).items()},
    )


def _table(name: str, data: Mapping[str, Any]) -> Table | Grid:
    try:
        return Grid(**data) if "contexts" in data else Table(**data)
    except ConfigError as error:
        raise ConfigError(f"tables.{name}: {error}") from None


def _kernels(number: int, data: Mapping[str, Any]) -> Kernels:
    try:
        attention = [
            {**table, "prefill": Table(**table["prefill"]), "decode": Grid(**table["decode"])}
            for table in data["attention"]
        ]
        return Kernels(
            gpus=data["gpus"],
            dtypes=data["dtypes"],
            gemm=GemmTable(**data["gemm"]),
            attention=tuple(AttentionTable(**table) for table in attention),
            gemm8=None if data.get("gemm8") is None else GemmTable(**data["gemm8"]),
            all_reduce={int(count): Table(**table) for count, table in data.get("all_reduce", {}).items()},
            beside_chunks=data.get("beside_chunks", 0.0),
            predicted=data.get("predicted", False),
            graphs=_graphs(data),
            held_out=_held_out(data),
        )
    except ConfigError as error:
        raise ConfigError(f"kernels.{number}: {error}") from None


def _polynomial(number: int, data: Mapping[str, Any]) -> Polynomial:
    try:
        terms = {
            "prompts": PromptTerms(**data["prompts"]),
            "decodes": DecodeTerms(**data["decodes"]),
            "large": DecodeTerms(**data["large"]),
        }
        return Polynomial(**{**data, **terms, "held_out": _held_out(data)})
    except ConfigError as error:
        raise ConfigError(f"polynomials.{number}: {error}") from None


def _entry(number: int, data: Mapping[str, Any]) -> ProfileEntry:
    given = data["operators"]
    operators: dict[str, Any] = {"overhead_s": given.get("overhead_s")}
    for name, kind in OPERATORS.items():
        part = given.get(name)
        try:
            operators[name] = None if part is None else kind(**part)
        except ConfigError as error:
            raise ConfigError(f"entries.{number}.operators.{name}: {error}") from None
    plain = {name: data[name] for name in PLAIN}
    included, shared = frozenset(data.get("included", ())), data.get("shared_launch")
    try:
        return ProfileEntry(
            **plain,
            **operators,
            included=included,
            shared_launch=SHARED_LAUNCH if shared is None else shared,
            graphs=_graphs(data),
            held_out=_held_out(data),
        )
    except ConfigError as error:
        raise ConfigError(f"entries.{number}: {error}") from None


def _graphs(data: Mapping[str, Any]) -> Graphs | None:
    return None if data.get("graphs") is None else Graphs(**data["graphs"])


def _held_out(data: Mapping[str, Any]) -> dict[str, HeldOut]:
    return {name: HeldOut(**part) for name, part in data.get("held_out", {}).items()}


def _entry_data(entry: ProfileEntry) -> dict[str, Any]:
    operators: dict[str, Any] = {}
    for name in (*OPERATORS, "overhead_s"):
        part = getattr(entry, name)
        operators[name] = asdict(part) if isinstance(part, Table | Grid) else part
    held = {name: asdict(part) for name, part in entry.held_out.items()}
    plain = {name: getattr(entry, name) for name in PLAIN}
    data = {**plain, "included": sorted(entry.included), "operators": operators, "held_out": held}
    if entry.shared_launch != SHARED_LAUNCH:
        data["shared_launch"] = entry.shared_launch
    return data if entry.graphs is None else {**data, "graphs": asdict(entry.graphs)}
