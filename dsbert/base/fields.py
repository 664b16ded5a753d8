"""Types of what people write into recipes and DeepSpeed's JSON: nothing is taken for something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import PydanticCustomError, PydanticKnownError

_CONTROLS = re.compile("[\\0-\x1f\x7f-\x9f]")


def number(value: Any) -> Any:
    """In front of numbers: pydantic would take true for 1 and "5" for 5."""
    if isinstance(value, bool | str):
        raise PydanticKnownError("float_type")
    return value


def whole(value: Any) -> Any:
    """In front of whole numbers."""
    if isinstance(value, bool | str):
        raise PydanticKnownError("int_type")
    return value


def path(value: Any) -> Any:
    """In front of paths: an empty one would be the working directory."""
    if isinstance(value, Path) or (isinstance(value, str) and value and not _CONTROLS.search(value)):
        return value
    raise PydanticCustomError("path_type", "a path")


Whole = Annotated[int, BeforeValidator(whole), Field(lt=2**63)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
PathName = Annotated[Path, BeforeValidator(path)]


class Section(BaseModel):
    """A section of what people write: frozen, and without keys that nobody knows.

    added_later: options of which records say nothing while they are at their defaults, as records did before there were
    any: what began before is resumed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    added_later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        for name in self.added_later:
            if name in values and getattr(self, name) == type(self).model_fields[name].default:
                del values[name]
        return values
