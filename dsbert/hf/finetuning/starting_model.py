"""The model that a fine-tuning begins with: out of a run, a checkpoint, an export, or whatever transformers loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

import dsbert.hf as hf
from dsbert.base.errors import UserError
from dsbert.checkpoint.loading import resolve_checkpoint
from dsbert.checkpoint.state import read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.hf.export import export
from dsbert.hf.export_forms import dense_state
from dsbert.hf.finetuning.task_file import Kind
from dsbert.sparse import BlockSparseLinear

_SEQUENCES = (transformers.AutoModelForSequenceClassification, hf.DsbertForSequenceClassification)
# By kind of task transformers' class of any model, and the one of a sparse model.
_CLASSES: dict[Kind, tuple[Any, Any]] = {
    "classification": _SEQUENCES,
    "regression": _SEQUENCES,
    "token-classification": (transformers.AutoModelForTokenClassification, hf.DsbertForTokenClassification),
    "question-answering": (transformers.AutoModelForQuestionAnswering, hf.DsbertForQuestionAnswering),
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
        """Share of the sparse layers' weights that is there, without a low-rank term; 1 of a dense model."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        return sum(layer.num_active * layer.block_size**2 for layer in self.layers.values()) / total if total else 1.0


def resolve_model(path: Path) -> Path:
    """What `path` means now: of a run its newest checkpoint. Raises UserError or CheckpointError."""
    return path if _is_for_transformers(path) else resolve_checkpoint(path)


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of what `resolve_model` returned, which knows how many tokens the model takes.

    Raises UserError, CheckpointError.
    """
    if not _is_for_transformers(path):
        return hf.tokenizer_from_run(path)
    with _plainly(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        positions = transformers.AutoConfig.from_pretrained(path).max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_model(path: Path, kind: Kind, pattern: str | None = None, **changes: Any) -> StartingModel:
    """The model of what `resolve_model` returned, in fp32 on the CPU.

    pattern: None: keep of a sparse model, dense of another. changes: of the configuration, such as id2label. A head
    that is not there, or of other classes, begins at random. Raises UserError, CheckpointError.
    """
    model = _load(path, kind, pattern, changes)
    layers = _sparse_layers(model)
    if layers and pattern == "dense":
        model, layers = _densified(model, layers, kind), {}
    if not layers and pattern in ("keep", "dynamic"):
        raise UserError(
            f"expected a sparse model for --pattern {pattern}, found a dense one at {path}: give a run, or what "
            "`dsbert export --form sparse` wrote, or --pattern dense"
        )
    return StartingModel(model, layers, pattern or ("keep" if layers else "dense"))


def _load(path: Path, kind: Kind, pattern: str | None, changes: dict[str, Any]) -> Any:
    of_any, of_sparse = _CLASSES[kind]
    if _is_for_transformers(path):
        return _from_pretrained(of_any, path, changes)
    recipe = recipe_from_dict(read_state(path).recipe.whole)
    is_sparse = recipe.sparsity.pattern != "dense" and recipe.model.architecture == "bert"
    if is_sparse if pattern is None else pattern != "dense":
        return hf.from_run(path, of_sparse, **changes)
    with tempfile.TemporaryDirectory(prefix="dsbert-finetune-") as folder:
        export(path, Path(folder) / "dense")
        return _from_pretrained(of_any, Path(folder) / "dense", changes)


def _from_pretrained(model_class: Any, path: Path, changes: dict[str, Any]) -> Any:
    with _plainly(path):
        return model_class.from_pretrained(path, dtype="float32", ignore_mismatched_sizes=True, **changes)


def _sparse_layers(model: Any) -> dict[str, BlockSparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def _densified(model: Any, layers: dict[str, BlockSparseLinear], kind: Kind) -> Any:
    """transformers' own model with the weights of a sparse one, zeros where there are no blocks."""
    known = set(transformers.BertConfig().to_dict()) - {"model_type", "architectures"}
    config = transformers.BertConfig(**{name: value for name, value in model.config.to_dict().items() if name in known})
    dense = _CLASSES[kind][0].from_config(config)
    missing, unexpected = dense.load_state_dict(dense_state(model, layers), strict=False)
    assert not unexpected, unexpected
    assert not set(missing) & {name for name, _ in dense.named_parameters()}, missing
    return dense


def _is_for_transformers(path: Path) -> bool:
    """A directory of transformers, or else a name on the hub; not a run or a checkpoint."""
    return (path / "config.json").is_file() or not path.exists()


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
