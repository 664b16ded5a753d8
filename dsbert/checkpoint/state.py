"""The records of a checkpoint, state.json and manifest.json: each field, in its order; and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dsbert.base.durable import read_regular
from dsbert.base.errors import CheckpointError
from dsbert.base.records import Count, Digest, JsonObject, Number, NumRanks, OpenRecord, Record, Shape
from dsbert.sparse.kernels.record import KernelRecord

MANIFEST, STATE = "manifest.json", "state.json"
KIND, FORMAT = "dsbert-checkpoint", 1


class FileRecord(Record):
    """A file of a checkpoint. xxh3: its xxh3_128, in hexadecimal."""

    bytes: Count
    xxh3: Digest


class Manifest(Record):
    """manifest.json. attempt: "<number>-<nonce>" of the attempt that published it; created: seconds since 1970."""

    kind: str
    format: int
    step: Count
    world_size: NumRanks
    topology_digest: Digest
    attempt: str | None = None
    created: float | None = None  # older checkpoints lack it
    files: dict[str, FileRecord]


class LayerRecord(Record):
    """A fully connected weight [out, in]; block_size is None where it is dense. kept: weights that are trained, also
    those of a low-rank term."""

    shape: Annotated[list[Number], Field(min_length=2, max_length=2)]
    block_size: Number | None
    kept: Count

    @property
    def out_in(self) -> tuple[int, int]:
        """The shape."""
        return self.shape[0], self.shape[1]


class EngineRecord(Record):
    """DeepSpeed's counters."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    loss_scaler: dict[str, int | float]


class SparsityRecord(Record):
    """What `dsbert inspect` and `verify` need of a recipe, and whoever reads the mask manager's state."""

    pattern: str
    sparsity: float
    block_size: Number
    fresh_moments: str = "zero"  # left out where it is
    low_rank: Count = 0


class RecipeRecord(OpenRecord):
    """A recipe. The rest of it is validated by config/recipe.py, by whoever builds a model from it."""

    sparsity: SparsityRecord


class IdentityRecord(OpenRecord):
    """What a resumed run must be; the rest of it is compared, whatever it is."""

    data_digest: str


class Totals(Record):
    """Since the start of the run: tokens and FLOPs trained on, steps skipped, and those skipped in a row up to now for
    another reason than a loss scale that falls. Older checkpoints lack some."""

    tokens: int | float = 0
    flops: int | float = 0
    flops_dense: int | float = 0
    skipped: int | float = 0
    skipped_in_a_row: int | float = 0


class RunRecord(Record):
    """What all checkpoints of an attempt say alike.

    deepspeed: its configuration without batches; numerics: as `training.numerics` says; params: shapes by name.
    """

    recipe: RecipeRecord
    identity: IdentityRecord
    vocab_size: Number
    layers: dict[str, LayerRecord]
    deepspeed: JsonObject | None = None  # older checkpoints have neither
    numerics: JsonObject | None = None
    params: dict[str, Shape]


class CheckpointState(Record):
    """state.json: the counters of its step, and what `RunRecord` says."""

    format: int
    step: Count
    adam_step: Count
    engine: EngineRecord
    world_size: NumRanks
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: str
    kernels: KernelRecord | None = None  # since there are any
    recipe: RecipeRecord
    identity: IdentityRecord
    vocab_size: Number
    layers: dict[str, LayerRecord]
    deepspeed: JsonObject | None = None  # as in RunRecord
    numerics: JsonObject | None = None
    params: dict[str, Shape]
    totals: Totals


def read_manifest(path: Path) -> Manifest:
    """manifest.json of a checkpoint. Raises CheckpointError."""
    try:
        return Manifest.from_json(manifest_object(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def manifest_object(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint, of this format, whatever else stands in it. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads(read_regular(path / MANIFEST))
        kind, version = manifest["kind"], manifest["format"]
    except FileNotFoundError:
        raise CheckpointError("missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"unreadable: {' '.join(str(error).split())}") from None
    if (kind, version) != (KIND, FORMAT):
        raise CheckpointError(f"expected {KIND} {FORMAT}, found {kind} {version}")
    return manifest


def read_state(path: Path) -> CheckpointState:
    """state.json of a checkpoint. Raises CheckpointError."""
    try:
        return CheckpointState.from_json(state_object(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def state_object(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, of this format, whatever else stands in it. Raises CheckpointError."""
    try:
        state: dict[str, Any] = json.loads(read_regular(path / STATE))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"expected {path / STATE}, found: {' '.join(str(error).split())}") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(f"expected checkpoint format {FORMAT} in {path / STATE}, found {found!r}")
    return state
