"""Records: what stands in the small files of a run and of a checkpoint, read as what it must be, or not at all.

A file may be damaged, or come from a stranger: JSON of any kind may stand in it. Each kind of file has one class, by
which it is written and read: `to_json` gives its JSON object, with fields in the order of the class; `from_json` takes
one whose fields are of the right type and size, or raises an error of one line. Fields that the class does not name may
hold anything; nobody reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)

from dsbert.base.durable import read_regular
from dsbert.base.jsonl import parse_object

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST = 2**53  # what JSON's numbers hold exactly
JsonObject = dict[str, JsonValue]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Number = Annotated[int, Field(ge=1, le=_MOST)]
NumRanks = Annotated[int, Field(ge=1, le=2**20)]
CheckpointName = Annotated[str, Field(pattern="^step_[0-9]{8}$")]
Word = Annotated[str, Field(pattern=r"^[\w-][\w.-]{0,99}$")]  # goes into names of files
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Shape = list[Count]


class Record(BaseModel):
    """Strict: a number is no string, and true is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises ValueError, in one line that names the first field that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            found = "nothing" if first["type"] == "missing" else repr(first["input"])
            raise ValueError(f"expected a valid {where}, found {found[:80]}: {first['msg']}") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def to_json(self) -> JsonObject:
        """What was given, in the order of the class: a field that an older file lacks is not made up."""
        return self.model_dump(exclude_unset=True)


class OpenRecord(Record):
    """A record of which only some fields are named, and all are kept, as they were given and in that order."""

    _whole: JsonObject = PrivateAttr(default_factory=dict)

    @property
    def whole(self) -> JsonObject:
        """All fields."""
        return self._whole

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        record = handler(value)
        if isinstance(value, dict):
            record._whole = value
        return record

    @model_serializer
    def _written(self) -> JsonObject:
        return self._whole


RecordT = TypeVar("RecordT", bound=Record)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """What a file holds. Raises OSError, or ValueError if it is anything else than one such record."""
    record = parse_object(read_regular(path))
    if record is None:
        raise ValueError("expected a JSON object, found none")
    return kind.from_json(record)


def valid_records(values: Iterable[object], kind: type[RecordT]) -> list[RecordT]:
    """Those of the values that are records of this kind, in their order."""
    found = []
    for value in values:
        try:
            found.append(kind.from_json(value))
        except ValueError:
            continue
    return found
