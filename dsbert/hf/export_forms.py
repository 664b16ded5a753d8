"""The files of an export, in one of its forms.

dense   config.json and model.safetensors for transformers' own class of the model, and sparse.safetensors, the blocks
        alone, for readers of another make
sparse  config.json and model.safetensors for dsbert.hf: blocks and where they stand, no dense weight

and both: the tokenizer and README.md, the model card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbert.checkpoint.weight_source import COMPACT
from dsbert.hf.model_card import CARD, model_card
from dsbert.sparse.low_rank import PARTS

if TYPE_CHECKING:
    from torch import nn

    from dsbert.checkpoint.restore import Restored
    from dsbert.sparse import BlockSparseLinear

FORMS = ("dense", "sparse")
# The second has low-rank terms: who knows the first alone is to refuse it, and not to take blocks for the weight.
COMPACT_FORMATS = ("dsbert-compact-1", "dsbert-compact-2")


def write_form(restored: Restored, form: str, source: Path, to: Path) -> None:
    """Write what stands above of a form into the directory `to`. source: the run or checkpoint that was named.

    Raises UserError for an architecture that has no sparse form, or a tokenizer that transformers reads otherwise;
    OSError.
    """
    from dsbert.hf.from_checkpoint import pretrained_of, special_tokens, write_tokenizer

    config: Any = restored.model.config
    write_tokenizer(restored.path, to, config.max_position_embeddings)
    if form == "sparse":
        ids: dict[str, Any] = {**special_tokens(restored)}
        model: Any = pretrained_of(restored.model, restored.layers, **ids)
    else:
        model = transformers_model(restored)
        _save_compact(restored, to / COMPACT)
    with redirect_stdout(
        sys.stderr
    ):  # where accelerate is installed, transformers has it import DeepSpeed, which talks
        model.save_pretrained(to)
    (to / CARD).write_text(model_card(restored, form, type(model).__name__, source), encoding="utf-8")


def transformers_model(restored: Restored) -> Any:
    """A restored model (checkpoint/restore.py) as transformers has it: of its class, with dense weights, and with the
    ids of special tokens in its configuration."""
    from dsbert.hf.from_checkpoint import special_tokens
    from dsbert.models.spec import model_spec

    config: Any = restored.model.config
    for name, number in special_tokens(restored).items():
        setattr(config, name, number)
    model = model_spec(restored.recipe.model).exported(config)
    missing, unexpected = model.load_state_dict(dense_state(restored.model, restored.layers), strict=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    assert not missing, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def dense_state(model: nn.Module, layers: Mapping[str, BlockSparseLinear]) -> dict[str, Any]:
    """The parameters of the transformers model by name: sparse weights as dense [out, in] ones, with what stands beside
    their blocks."""
    state = {}
    for name, param in model.named_parameters():
        layer = layers.get(name.rpartition(".")[0])
        if layer is not None and name.endswith(".blocks"):
            state[name.removesuffix("blocks") + "weight"] = layer.to_dense()
        elif layer is None or not name.endswith(PARTS):
            state[name] = param.detach()
    return state


def _save_compact(restored: Restored, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: param.detach().contiguous() for name, param in restored.model.named_parameters()}
    for name, layer in restored.layers.items():
        tensors[f"{name}.rows"], tensors[f"{name}.cols"] = layer.rows.contiguous(), layer.cols.contiguous()
    shapes = {name: [*layer.shape, layer.block_size] for name, layer in restored.layers.items()}
    form = COMPACT_FORMATS[any(layer.low_rank for layer in restored.layers.values())]
    metadata = {"format": form, "layers": json.dumps(shapes), "step": str(restored.state.step)}
    save_file(tensors, path, metadata=metadata)
