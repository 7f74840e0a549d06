"""The fields of a profile file, as pydantic checks them. ``profile_file`` reads and writes without it where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sim.types import ConfigError

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


class _GraphsFile(_Part):
    """The CUDA graphs that an engine runs its steps in: see ``sim.cost.Graphs``."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    block_tokens: Annotated[int, Field(ge=1)] | None = None


class _KernelsFile(_Part):
    """Kernel tables of GPU types, for any model."""

    gpus: Annotated[tuple[Text, ...], Field(min_length=1)]
    dtypes: Annotated[tuple[Text, ...], Field(min_length=1)]
    gemm: _GemmFile
    attention: tuple[_AttentionFile, ...]
    gemm8: _GemmFile | None = None
    all_reduce: dict[int, _TableFile] = {}
    beside_chunks: Seconds = 0.0
    predicted: bool = False
    graphs: _GraphsFile | None = None
    held_out: dict[str, _HeldOutFile] = {}


class _PromptTermsFile(_Part):
    step_s: Seconds
    token_s: Seconds
    square_s: Seconds


class _DecodeTermsFile(_Part):
    step_s: Seconds
    context_s: Seconds
    sequence_s: Seconds


class _PolynomialFile(_Part):
    """Whole steps of one model on one GPU type at one tensor-parallel degree."""

    gpus: Annotated[tuple[Text, ...], Field(min_length=1)]
    model: Text
    num_layers: Annotated[int, Field(ge=1)]
    tp: Annotated[int, Field(ge=1)]
    dtypes: Annotated[tuple[Text, ...], Field(min_length=1)]
    prompts: _PromptTermsFile
    decodes: _DecodeTermsFile
    large: _DecodeTermsFile
    large_from: Annotated[int, Field(ge=2)]
    hop_s: Seconds = 0.0
    first_s: Seconds = 0.0
    first_token_s: Seconds = 0.0
    held_out: dict[str, _HeldOutFile] = {}


class _EntryFile(_Part):
    gpus: tuple[Text, ...]
    model: Text
    num_layers: Annotated[int, Field(ge=1)]
    tp: Annotated[int, Field(ge=1)]
    dtypes: tuple[Text, ...]
    included: tuple[str, ...] = ()
    shared_launch: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the shortest chunk's attention, what every further chunk of a step saves; None: as in vLLM (SHARED_LAUNCH)."""
    graphs: _GraphsFile | None = None
    operators: _OperatorsFile
    held_out: dict[str, _HeldOutFile] = {}


class _ProvenanceFile(_Part):
    source: Text
    licence: Text
    date: Text
    tool: Text
    engine: Text
    method: Text


class _DeviceFile(_Part):
    """Where the measurements were made."""

    gpu: Text
    description: Text
    memory_bytes: Annotated[int, Field(ge=1)]
    bandwidth_bytes_per_s: Seconds | None = None
    flops: dict[str, Seconds] = {}
    torch: Text | None = None
    driver: Text | None = None
    cuda: Text | None = None
    threads: Count | None = None
    attention_backend: Text | None = None
    git_commit: Text | None = None
    sm_clock_mhz: Seconds | None = None
    memory_clock_mhz: Seconds | None = None
    power_limit_w: Seconds | None = None
    power_w: Seconds | None = None
    settings: dict[str, str] = {}


class _SamplesFile(_Part):
    """One operator's raw measurements, in columns: see ``calibrate.profile.samples``."""

    operator: Text
    dtype: Text
    tp: Annotated[int, Field(ge=1)]
    axes: dict[str, tuple[Count, ...]]
    seconds: tuple[tuple[Seconds, ...], ...]
    noise: tuple[Seconds, ...]
    flops: tuple[Seconds, ...] | None = None
    bytes: tuple[Seconds, ...] | None = None
    predicted_s: tuple[Seconds | None, ...] | None = None


class ProfileFile(_Part):
    schema_name: Annotated[Literal["phasewise-profile"], Field(alias="schema")]
    version: Literal[1]
    name: Text
    provenance: _ProvenanceFile
    entries: tuple[_EntryFile, ...] = ()
    kernels: tuple[_KernelsFile, ...] = ()
    polynomials: tuple[_PolynomialFile, ...] = ()
    device: _DeviceFile | None = None
    tables: dict[str, _TableFile | _GridFile] = {}
    samples: tuple[_SamplesFile, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.entries and not self.kernels and not self.polynomials:
            raise ValueError("a profile needs entries or kernels or polynomials")
        return self


def checked(data: object, path: Path) -> dict[str, Any]:
    """The content of the profile file ``path``, complete; ``ConfigError`` names the first fault and the mend."""
    try:
        return ProfileFile.model_validate(data).model_dump()
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None


def file_data(data: object) -> dict[str, Any]:
    """The same as it is written: in the order of the fields, without those that are unknown or empty."""
    file = ProfileFile.model_validate(data)
    return file.model_dump(by_alias=True, exclude_none=True, include=file.model_fields_set)


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
