"""What the mappings of a scenario file have in common: unknown keys are errors, and numbers have bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

TINY = 1e-12


def _no_truth_value(value: Any) -> Any:
    """Python takes true for 1; who writes true means something else."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth_value", "{value}", {"value": value})
    return value


def _not_tiny(value: float) -> float:
    """A subnormal number passes for positive, and what is divided by it is infinite."""
    if value < TINY:
        raise PydanticCustomError("too_tiny", "{value}", {"value": value})
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=-(10**9), le=10**9)]
Seed = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=10**9)]
"""Of tokens, requests, blocks: what fits into memory, and into the columns of a result."""
Positive = Annotated[Number, Field(gt=0, le=1e12, allow_inf_nan=False), AfterValidator(_not_tiny)]
NonNegative = Annotated[Number, Field(ge=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[Number, Field(gt=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[Number, Field(ge=0, le=1e9, allow_inf_nan=False)]
"""Up to 30 years: more is a date, or another unit."""
PositiveSeconds = Annotated[Number, Field(gt=0, le=1e9, allow_inf_nan=False), AfterValidator(_not_tiny)]
StepSeconds = Annotated[Number, Field(ge=0, le=3600, allow_inf_nan=False)]
"""Of one step of a serving engine."""


def _a_real_link(gbps: float) -> float:
    if 0 < gbps < 1e-6:
        raise PydanticCustomError("too_slow", "{value}", {"value": gbps})
    return gbps


Gbps = Annotated[Number, Field(ge=0, le=1e6, allow_inf_nan=False), AfterValidator(_a_real_link)]
"""0: no connection; else from a kilobit to a petabit per second."""


class Part(BaseModel):
    """A mapping of the file. Unknown keys are errors that name their place, or the nearest key there is."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    inside = next((place for place, model in within(cls) if key in model.model_fields), "")
                    context = {"key": key, "known": list(cls.model_fields), "inside": inside}
                    raise PydanticCustomError("unknown_key", "{key}", context)
        return data


def within(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """(place, model) of every mapping inside a mapping, outer ones first."""
    todo = [("", model)]
    while todo:
        place, model = todo.pop(0)
        for name, field in model.model_fields.items():
            for part, mark in parts(field.annotation):
                todo.append((f"{place}.{name}".removeprefix(".") + mark, part))
                yield todo[-1]


def parts(annotation: Any, mark: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Models in an annotation: directly, in a list (``[]``), or by name (``.NAME``)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, mark
        return
    origin = getattr(annotation, "__origin__", None)
    inner = "[]" if origin is tuple else ".NAME" if origin is dict else mark
    for argument in get_args(annotation):
        yield from parts(argument, inner)
