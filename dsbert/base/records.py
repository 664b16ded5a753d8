"""What stands in the small files of a run and of a checkpoint: read as what it must be, or not at all.

A file may be damaged, or come from a stranger: JSON of any kind may stand in it. Whoever reads one asks here, and gets
a JSON object whose fields are of the right type and size, or an error of one line. Fields that are not named may hold
anything; nobody reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbert.base.durable import read_regular
from dsbert.base.jsonl import parse_object

_MOST = 2**53  # what JSON's numbers hold exactly
Count = Annotated[int, Field(ge=0, le=_MOST)]
Number = Annotated[int, Field(ge=1, le=_MOST)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]
CheckpointName = Annotated[str, Field(pattern="^step_[0-9]{8}$")]
Word = Annotated[str, Field(pattern=r"^[\w-][\w.-]{0,99}$")]  # goes into names of files
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Shape = list[Count]


class Record(BaseModel):
    """Strict: a number is no string, and true is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class AttemptRecord(Record):
    """attempt.json and the lines of attempts.jsonl."""

    number: Number
    nonce: Word
    checkpoint: CheckpointName | None = None
    started: float | None = None
    world_size: Ranks | None = None


class StatusRecord(Record):
    """status.json. saved: the newest checkpoint that the attempt knows of."""

    attempt: Number
    outcome: str | None
    step: Count | None
    cause: str | None
    culprit: dict[str, Any] | None
    saved: CheckpointName | None = None


class StepRecord(Record):
    """The lines of metrics.jsonl."""

    step: Number


class UpdateRecord(Record):
    """The lines of masks.jsonl. Coordinates are lists, or packed (sparse/journal.py)."""

    step: Number
    update: Number
    digest: Digest
    pruned: Count
    layers: dict[str, dict[str, list[Count] | str]]


class EndRecord(Record):
    """How a rank left."""

    code: int
    cause: str | None


class BeatRecord(Record):
    """A heartbeat."""

    rank: Count
    host: str
    pid: Number
    place: str | None
    beat: Count
    step: Count
    progress: Count
    phase: str
    ended: EndRecord | None
    started_s: float | None = None


class FileRecord(Record):
    """A file of a checkpoint."""

    bytes: Count
    xxh3: Digest


class ManifestRecord(Record):
    """manifest.json of a checkpoint."""

    kind: str
    format: int
    step: Count
    world_size: Ranks
    topology_digest: Digest
    files: dict[str, FileRecord]
    created: float | None = None


class LayerRecord(Record):
    """A fully connected weight [out, in]; block_size is None where it is dense."""

    shape: Annotated[list[Number], Field(min_length=2, max_length=2)]
    block_size: Number | None
    kept: Count


class EngineRecord(Record):
    """DeepSpeed's counters."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    loss_scaler: dict[str, int | float]


class ChoiceRecord(Record):
    """What computes a product, and how fast."""

    backend: str
    ms: float | None
    speedup: float | None


class ProductsRecord(Record):
    """The products of a layer."""

    forward: ChoiceRecord
    dgrad: ChoiceRecord
    wgrad: ChoiceRecord


class KernelsRecord(Record):
    """Which kernels a run chose."""

    layers: dict[str, ProductsRecord]
    tokens: Count
    dtype: str = ""  # older checkpoints lack it
    device: str = ""
    instructions: str | None = None


class SparsityRecord(Record):
    """What `dsbert inspect` needs of a recipe."""

    pattern: str
    sparsity: float
    block_size: Number


class RecipeRecord(Record):
    """The rest of it is validated by config/recipe.py, by whoever builds a model from it."""

    sparsity: SparsityRecord


class IdentityRecord(Record):
    """What a resumed run must be; the rest of it is compared, whatever it is."""

    data_digest: str


class StateRecord(Record):
    """state.json of a checkpoint."""

    format: int
    step: Count
    adam_step: Count
    world_size: Ranks
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: str
    engine: EngineRecord
    kernels: KernelsRecord | None = None  # since there are any
    recipe: RecipeRecord
    identity: IdentityRecord
    vocab_size: Number
    layers: dict[str, LayerRecord]
    params: dict[str, Shape]
    totals: dict[str, int | float]
    deepspeed: dict[str, Any] = {}  # checkpoints of before have neither
    numerics: dict[str, Any] = {}


def checked(record: Any, model: type[Record]) -> dict[str, Any]:
    """`record` itself. Raises ValueError, in one line that names the first field that is wrong."""
    try:
        model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        found = "nothing" if first["type"] == "missing" else repr(first["input"])
        raise ValueError(f"expected a valid {where}, found {found[:80]}: {first['msg']}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    assert isinstance(record, dict)
    return record


def is_record(record: Any, model: type[Record]) -> bool:
    """Whether `checked` would take it."""
    try:
        checked(record, model)
    except ValueError:
        return False
    return True


def read_record(path: Path, model: type[Record]) -> dict[str, Any]:
    """A file's JSON object. Raises OSError, or ValueError if it holds anything else."""
    record = parse_object(read_regular(path))
    if record is None:
        raise ValueError("expected a JSON object, found none")
    return checked(record, model)
