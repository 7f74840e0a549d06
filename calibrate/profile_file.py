"""Profile files: JSON that carries measured operators and their provenance. ``shipped_profiles`` lists ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sim.cost import AttentionTable, GemmTable, Grid, HeldOut, Kernels, Profile, ProfileEntry, Provenance, Table
from sim.types import ConfigError

SCHEMA = "phasewise-profile"
VERSION = 1
INNERMOST = re.compile(r"\[\s+([^][{}]*?)\s+\]")
PLAIN = ("gpus", "model", "num_layers", "tp", "dtypes")
"""Fields of an entry that are the same in the file and in memory."""
FOLDER = Path(__file__).with_name("profiles")

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1)]
Per = Literal["layer", "model"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _TableFile(_Part):
    counts: tuple[Count, ...]
    seconds: tuple[Seconds, ...]
    per: Per


class _GridFile(_Part):
    counts: tuple[Count, ...]
    contexts: tuple[Count, ...]
    seconds: tuple[tuple[Seconds, ...], ...]
    per: Per


class _OperatorsFile(_Part):
    linear: _TableFile
    head: _TableFile | None = None
    collective: _TableFile | None = None
    attention_prefill: _GridFile | None = None
    attention_decode: _GridFile | None = None
    attention_mixed: _GridFile | None = None
    overhead_s: Seconds | None = None


class _HeldOutFile(_Part):
    mape: Seconds
    largest: Seconds
    points: Annotated[int, Field(ge=1)]


class _GemmFile(_Part):
    tokens: tuple[Count, ...]
    n: tuple[Count, ...]
    k: tuple[Count, ...]
    seconds: tuple[tuple[tuple[Seconds, ...], ...], ...]


class _AttentionFile(_Part):
    heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]
    prefill: _TableFile
    decode: _GridFile


class _KernelsFile(_Part):
    """Kernel tables of GPU types, for any dense model."""

    gpus: Annotated[tuple[Text, ...], Field(min_length=1)]
    dtypes: Annotated[tuple[Text, ...], Field(min_length=1)]
    gemm: _GemmFile
    attention: tuple[_AttentionFile, ...]
    all_reduce: dict[int, _TableFile] = {}
    held_out: dict[str, _HeldOutFile] = {}


class _EntryFile(_Part):
    gpus: tuple[Text, ...]
    model: Text
    num_layers: Annotated[int, Field(ge=1)]
    tp: Annotated[int, Field(ge=1)]
    dtypes: tuple[Text, ...]
    included: tuple[str, ...] = ()
    operators: _OperatorsFile
    held_out: dict[str, _HeldOutFile] = {}


class _ProvenanceFile(_Part):
    source: Text
    licence: Text
    date: Text
    tool: Text
    engine: Text
    method: Text


class _ProfileFile(_Part):
    schema_name: Annotated[Literal["phasewise-profile"], Field(alias="schema")]
    version: Literal[1]
    name: Text
    provenance: _ProvenanceFile
    entries: tuple[_EntryFile, ...] = ()
    kernels: tuple[_KernelsFile, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.entries and not self.kernels:
            raise ValueError("a profile needs entries or kernels")
        return self


def shipped_profiles() -> dict[str, Path]:
    """Every profile that comes with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def read_profile(path: str | Path) -> Profile:
    """Read and check a profile file; ``ConfigError`` names the file, the field, the value and the mend."""
    data = _read_json(Path(path))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f'{path}: not a profile; its top level needs "schema": "{SCHEMA}"')
    if data.get("version") != VERSION:
        raise ConfigError(f"{path}: version is {data.get('version')!r}, this release reads {VERSION}; make it anew")
    try:
        return _profile(_ProfileFile.model_validate(data))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile under a temporary name, then rename it: no reader meets half a file."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(profile_text(profile), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose a writable folder") from None
    finally:
        partial.unlink(missing_ok=True)


def profile_text(profile: Profile) -> str:
    """The file's text, the same for equal profiles."""
    entries = [_entry_data(entry) for entry in profile.entries]
    provenance = {name: getattr(profile.provenance, name) for name in _ProvenanceFile.model_fields}
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "name": profile.name,
        "provenance": provenance,
        "entries": entries or None,
        "kernels": [asdict(kernels) for kernels in profile.kernels] or None,
    }
    data = {name: part for name, part in data.items() if part is not None}
    checked = _ProfileFile.model_validate(data)
    text = json.dumps(
        checked.model_dump(by_alias=True, exclude_none=True, include=set(data) | {"schema_name"}), indent=1
    )
    return INNERMOST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(shipped_profiles())
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a file, or one of: {known}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a profile is JSON in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged or cut short ({error}); copy or make it anew") from None


def _first(error: ValidationError) -> str:
    """One line for the first fault."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    value = repr(fault["input"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "missing":
        return f"{place} is missing; add it{more}"
    if fault["type"] == "extra_forbidden":
        return f"{place} is not a field of a profile; remove it{more}"
    return f"{place} is {value if len(value) < 60 else value[:57] + '...'}: {fault['msg']}{more}"


def _profile(file: _ProfileFile) -> Profile:
    provenance = Provenance(**file.provenance.model_dump())
    entries = tuple(_entry(number, entry) for number, entry in enumerate(file.entries))
    kernels = tuple(_kernels(number, part) for number, part in enumerate(file.kernels))
    return Profile(name=file.name, provenance=provenance, entries=entries, kernels=kernels)


def _kernels(number: int, part: _KernelsFile) -> Kernels:
    try:
        return Kernels(
            gpus=part.gpus,
            dtypes=part.dtypes,
            gemm=GemmTable(**part.gemm.model_dump()),
            attention=tuple(
                AttentionTable(
                    heads=table.heads,
                    kv_heads=table.kv_heads,
                    head_dim=table.head_dim,
                    prefill=Table(**table.prefill.model_dump()),
                    decode=Grid(**table.decode.model_dump()),
                )
                for table in part.attention
            ),
            all_reduce={count: Table(**table.model_dump()) for count, table in part.all_reduce.items()},
            held_out={name: HeldOut(**held.model_dump()) for name, held in part.held_out.items()},
        )
    except ConfigError as error:
        raise ConfigError(f"kernels.{number}: {error}") from None


def _entry(number: int, entry: _EntryFile) -> ProfileEntry:
    kinds: Mapping[str, Any] = {
        "linear": Table,
        "head": Table,
        "collective": Table,
        "attention_prefill": Grid,
        "attention_decode": Grid,
        "attention_mixed": Grid,
    }
    operators: dict[str, Any] = {"overhead_s": entry.operators.overhead_s}
    for name, kind in kinds.items():
        part = getattr(entry.operators, name)
        try:
            operators[name] = None if part is None else kind(**part.model_dump())
        except ConfigError as error:
            raise ConfigError(f"entries.{number}.operators.{name}: {error}") from None
    held = {name: HeldOut(**part.model_dump()) for name, part in entry.held_out.items()}
    plain = entry.model_dump(include=set(PLAIN))
    try:
        return ProfileEntry(**plain, **operators, included=frozenset(entry.included), held_out=held)
    except ConfigError as error:
        raise ConfigError(f"entries.{number}: {error}") from None


def _entry_data(entry: ProfileEntry) -> dict[str, Any]:
    operators: dict[str, Any] = {}
    for name in _OperatorsFile.model_fields:
        part = getattr(entry, name)
        fields = ("counts", "contexts", "seconds", "per")
        is_table = isinstance(part, Table | Grid)
        operators[name] = {key: getattr(part, key) for key in fields if hasattr(part, key)} if is_table else part
    held = {
        name: {key: getattr(part, key) for key in _HeldOutFile.model_fields} for name, part in entry.held_out.items()
    }
    plain = {name: getattr(entry, name) for name in PLAIN}
    return {**plain, "included": sorted(entry.included), "operators": operators, "held_out": held}
