"""A sparse model of transformers out of a run or a checkpoint, and its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, BertConfig

from dsbert.base.errors import UserError
from dsbert.base.jsonl import parse_object
from dsbert.checkpoint.loading import resolve_checkpoint
from dsbert.checkpoint.restore import Restored, restore_model
from dsbert.checkpoint.state import read_manifest, read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.data.manifest import TOKENIZER
from dsbert.data.preparing.tokenizer_check import check_saved
from dsbert.data.tokenizer import Vocabulary, load_tokenizer, save_tokenizer
from dsbert.hf.configuration import DsbertConfig
from dsbert.hf.modeling import DsbertForPreTraining, DsbertPreTrainedModel
from dsbert.models.spec import model_spec
from dsbert.sparse import BlockSparseLinear

# Of a configuration, what a model says of itself and not of its shape.
_ABOUT = ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path")


def from_run(
    path: str | os.PathLike[str], model_class: type[DsbertPreTrainedModel] = DsbertForPreTraining, **changes: Any
) -> DsbertPreTrainedModel:
    """The model of a checkpoint, or of the newest one of a run, in evaluation mode, in fp32 on the CPU.

    model_class: one of dsbert.hf; a head that was not trained begins at random. changes: of the configuration, such as
    num_labels=3. Raises UserError or CheckpointError.
    """
    restored = restore_model(Path(path))
    return pretrained_of(restored.model, restored.layers, model_class, **(special_tokens(restored) | changes))


def tokenizer_from_run(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, or of the newest one of a run, as transformers' AutoTokenizer makes it, which cuts
    texts at as many tokens as the model takes if it is told to. Raises UserError or CheckpointError."""
    checkpoint = resolve_checkpoint(Path(path))
    recipe = recipe_from_dict(read_state(checkpoint).recipe.whole)
    with tempfile.TemporaryDirectory(prefix="dsbert-tokenizer-") as folder:
        write_tokenizer(checkpoint, Path(folder), recipe.model.max_positions)
        return AutoTokenizer.from_pretrained(folder)


def pretrained_of(
    model: nn.Module,
    layers: Mapping[str, BlockSparseLinear],
    model_class: type[DsbertPreTrainedModel] = DsbertForPreTraining,
    **changes: Any,
) -> DsbertPreTrainedModel:
    """A model of dsbert (models/bert.py) with its sparse layers by name, as one of transformers: the same tensors.

    Raises UserError for an architecture other than BERT's.
    """
    base: Any = model.config
    if not isinstance(base, BertConfig):
        raise UserError(
            f"expected a model of the architecture bert for a sparse form, found {base.model_type}: give "
            "`dsbert export --form dense`"
        )
    known = {name: value for name, value in base.to_dict().items() if name not in _ABOUT}
    prefix = DsbertPreTrainedModel.base_model_prefix + "."
    sizes = {layer.block_size for layer in layers.values()}
    sparse = {
        "block_size": sizes.pop() if sizes else 1,
        "active_blocks": {name.removeprefix(prefix): layer.num_active for name, layer in layers.items()},
        "low_rank": max((layer.low_rank for layer in layers.values()), default=0),
    }
    config = DsbertConfig(**(known | sparse | changes))
    found: DsbertPreTrainedModel = model_class.from_pretrained(None, config=config, state_dict=model.state_dict())
    return found


def special_tokens(restored: Restored) -> dict[str, int]:
    """Ids of special tokens by their names in the model's configuration. Raises UserError."""
    vocabulary = Vocabulary.of(load_tokenizer(restored.path / TOKENIZER))
    spec = model_spec(restored.recipe.model)
    return {name: getattr(vocabulary, token) for name, token in spec.special_tokens.items()}


def write_tokenizer(checkpoint: Path, to: Path, max_positions: int) -> None:
    """Write a checkpoint's tokenizer into a directory, as AutoTokenizer reads it: with `truncation=True` it cuts texts
    at max_positions tokens. Raises UserError, OSError."""
    for name in read_manifest(checkpoint).files:  # no more than was verified, whatever else lies there
        if name.startswith(f"{TOKENIZER}/"):
            shutil.copyfile(checkpoint / name, to / Path(name).name)
    # As this version writes it: an older one had transformers rebuild normalisers that are not BERT's.
    save_tokenizer(load_tokenizer(to), to)
    check_saved(to)
    _limit_tokenizer(to / "tokenizer_config.json", max_positions)


def _limit_tokenizer(path: Path, max_positions: int) -> None:
    config = parse_object(path.read_bytes())
    if config is None:
        raise UserError(f"expected a JSON object in {TOKENIZER}/{path.name} of the checkpoint, found none")
    path.write_text(json.dumps(config | {"model_max_length": max_positions}, indent=2) + "\n", encoding="utf-8")
