"""Hand a trained model on: as a dense transformers model, and as its blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dsbert.checkpoint import read_manifest
from dsbert.data.manifest import TOKENIZER
from dsbert.data.tokenizer import load_tokenizer, save_tokenizer
from dsbert.data.tokenizer_check import check_saved
from dsbert.errors import UserError

COMPACT = "sparse.safetensors"


def export(path: Path, to: Path) -> dict[str, Any]:
    """Write a checkpoint, or the newest one of a run, into the directory `to`:

    config.json, model.safetensors and the tokenizer, for transformers' BertForPreTraining and AutoTokenizer; and
    sparse.safetensors with "<layer>.blocks" [K, B, B], ".rows", ".cols" (int32 [K]) and every dense parameter by name.
    Raises UserError if `to` holds something else, CheckpointError without a valid checkpoint.
    """
    from transformers import BertForPreTraining

    from dsbert.restore import restore_model

    if to.exists() and not (to.is_dir() and (not any(to.iterdir()) or (to / COMPACT).is_file())):
        raise UserError(f"expected a new directory, or an earlier export, at {to}, found something else")
    restored = restore_model(path)
    model = BertForPreTraining(restored.model.config)
    weights = dense_state(restored)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [
        name for name in missing if name not in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    ]
    assert not missing, missing
    assert not unexpected, unexpected
    model.tie_weights()
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for name in read_manifest(restored.path)["files"]:  # no more than was verified, whatever else lies there
        if name.startswith(f"{TOKENIZER}/"):
            shutil.copyfile(restored.path / name, temporary / Path(name).name)  # with modes of ours
    # As this version writes it: an older one had transformers rebuild normalisers that are not BERT's.
    save_tokenizer(load_tokenizer(restored.path / TOKENIZER), temporary)
    check_saved(temporary)
    _save_compact(restored, temporary / COMPACT)
    if to.exists():
        shutil.rmtree(to)
    temporary.rename(to)
    return {"step": restored.state["step"], "to": str(to), "files": sorted(file.name for file in to.iterdir())}


def dense_state(restored: Any) -> dict[str, Any]:
    """The parameters of transformers.BertForPreTraining by name: sparse weights as dense [out, in] ones."""
    state = {}
    for name, param in restored.model.named_parameters():
        layer = restored.layers.get(name.removesuffix(".blocks"))
        if layer is not None and name.endswith(".blocks"):
            state[name.removesuffix("blocks") + "weight"] = layer.to_dense()
        else:
            state[name] = param.detach()
    return state


def _save_compact(restored: Any, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: param.detach().contiguous() for name, param in restored.model.named_parameters()}
    for name, layer in restored.layers.items():
        tensors[f"{name}.rows"], tensors[f"{name}.cols"] = layer.rows.contiguous(), layer.cols.contiguous()
    shapes = {name: [*layer.shape, layer.block_size] for name, layer in restored.layers.items()}
    metadata = {"format": "dsbert-compact-1", "layers": json.dumps(shapes), "step": str(restored.state["step"])}
    save_file(tensors, path, metadata=metadata)
