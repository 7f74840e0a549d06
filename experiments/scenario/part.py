"""What the mappings of a scenario file have in common: unknown keys are errors, and numbers have bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


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
