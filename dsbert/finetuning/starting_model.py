"""The model that a fine-tuning begins with: out of a run, a checkpoint, an export, or whatever transformers loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from dsbert.base.errors import UserError
from dsbert.checkpoint.loading import resolve_checkpoint
from dsbert.finetuning.task_file import Kind
from dsbert.inspection.export import export
from dsbert.sparse import BlockSparseLinear

PATTERNS = ("keep", "dense", "dynamic")

_CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}


@dataclass(frozen=True, eq=False)
class StartingModel:
    """model: transformers', with a head of the task's kind; layers: its sparse ones by name; pattern: keep | dense |
    dynamic."""

    model: Any
    layers: dict[str, BlockSparseLinear]
    pattern: str

    @property
    def density(self) -> float:
        """Share of the sparse layers' weights that is there; 1 of a dense model."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        return sum(layer.num_active * layer.block_size**2 for layer in self.layers.values()) / total if total else 1.0


def resolve_model(path: Path) -> Path:
    """What `path` means now: of a run its newest checkpoint. Raises UserError or CheckpointError."""
    if (path / "config.json").is_file() or not path.exists():
        return path  # a directory of transformers, or a name on the hub
    return resolve_checkpoint(path)


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of what `resolve_model` returned, which knows how many tokens the model takes.

    Raises UserError, CheckpointError.
    """
    with _readable(path) as folder, _plainly(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        positions = transformers.AutoConfig.from_pretrained(folder).max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_model(path: Path, kind: Kind, pattern: str | None = None, **changes: Any) -> StartingModel:
    """The model of what `resolve_model` returned, in fp32 on the CPU.

    pattern: None: keep of a sparse model, dense of another. changes: of the configuration, such as id2label. A head
    that is not there, or of other classes, begins at random. Raises UserError, CheckpointError.
    """
    if pattern in ("keep", "dynamic"):
        raise UserError("expected...")
    with _readable(path) as folder, _plainly(path):
        model = _CLASSES[kind].from_pretrained(folder, dtype="float32", ignore_mismatched_sizes=True, **changes)
    return StartingModel(model, {}, "dense")


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """A directory that transformers loads: of a checkpoint a dense export, for the time being."""
    if (path / "config.json").is_file() or not path.exists():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dsbert-finetune-") as folder:
        export(path, Path(folder) / "dense")
        yield Path(folder) / "dense"


@contextmanager
def _plainly(path: Path) -> Iterator[None]:
    """What transformers cannot load becomes one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise UserError(
            f"expected a run, a checkpoint, an export or a model of transformers at {path}, found: {found}"
        ) from None
