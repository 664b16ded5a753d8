"""Weights that a run may begin with: of a checkpoint or run, of an export, or of a transformers directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from dsbert.base.durable import checksum
from dsbert.base.errors import UserError
from dsbert.base.jsonl import parse_object
from dsbert.checkpoint.loading import resolve_checkpoint
from dsbert.checkpoint.restore import restore_model
from dsbert.checkpoint.state import MANIFEST, STATE
from dsbert.data.manifest import TOKENIZER
from dsbert.sparse import BlockTopology
from dsbert.sparse.linear import dense_weight
from dsbert.sparse.low_rank import PARTS

COMPACT = "sparse.safetensors"  # of an export, beside model.safetensors: the blocks, and where they stand
# What old checkpoints of BERT call the weights of LayerNorm.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# transformers leaves these out of files, as they are the parameters of another name.
_TIED = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight as blocks [K, B, B] and where they stand; low_rank: U [out, r] and V [r, in] beside them, or None."""

    topology: BlockTopology
    blocks: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    def dense(self) -> Tensor:
        """[out, in], U V included."""
        topology = self.topology
        weight = dense_weight(topology.shape, self.blocks, topology.rows, topology.cols)
        return weight if self.low_rank is None else weight.addmm_(*self.low_rank)


@dataclass(frozen=True, eq=False)
class WeightSource:
    """What was read, on the CPU.

    label: for people. digest: of the files. dense: parameters by the names of transformers' model. sparse: weights by
    the name of their layer. shape: num_attention_heads and hidden_act as far as they are known. tokenizer: a directory
    that has one, or None.
    """

    label: str
    digest: str
    dense: Mapping[str, Tensor]
    sparse: Mapping[str, SparseWeight]
    shape: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

    def find(self, name: str) -> Tensor | None:
        """A dense parameter, by its name, by that without the encoder's in front, or by the one that it is tied to."""
        for one in (name, _TIED.get(name, "")):
            for key in (one, one.partition(".")[2]):
                if key and key in self.dense:
                    return self.dense[key]
        return None

    def find_sparse(self, layer: str) -> SparseWeight | None:
        """Of a layer, in the same way."""
        return self.sparse.get(layer) or self.sparse.get(layer.partition(".")[2])

    def weight(self, layer: str) -> Tensor | None:
        """A linear layer's weight [out, in], whatever form it has."""
        sparse = self.find_sparse(layer)
        return self.find(f"{layer}.weight") if sparse is None else sparse.dense()


def source_digest(path: Path) -> str:
    """What tells these weights from others, without reading them into memory. Raises UserError, CheckpointError."""
    if _is_ours(path):
        return checksum(resolve_checkpoint(path) / MANIFEST)
    hasher = xxhash.xxh3_64()
    for file in _weight_files(path):
        hasher.update(f"{file.name} {checksum(file)}\n".encode())
    return hasher.hexdigest()


def open_source(path: Path) -> WeightSource:
    """Read all of it. Raises UserError, CheckpointError, each in one line."""
    return _of_checkpoint(path) if _is_ours(path) else _of_directory(path)


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / STATE).is_file() or (path / "checkpoints").is_dir()


def _of_checkpoint(path: Path) -> WeightSource:
    restored = restore_model(path)
    dense = {name: param.detach() for name, param in restored.model.named_parameters()}
    sparse = {}
    for name, layer in restored.layers.items():
        blocks = dense.pop(f"{name}.blocks")
        u, v = (dense.pop(f"{name}.{part}", None) for part in PARTS)
        sparse[name] = SparseWeight(layer.topology, blocks, None if u is None or v is None else (u, v))
    return WeightSource(
        label=f"{restored.path} (step {restored.state.step})",
        digest=source_digest(restored.path),
        dense=dense,
        sparse=sparse,
        shape={"num_attention_heads": restored.recipe.model.num_heads},
        tokenizer=restored.path / TOKENIZER,
    )


def _weight_files(path: Path) -> list[Path]:
    """Of an export or a transformers directory."""
    if not (path / "config.json").is_file():
        found = "nothing of the kind" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise UserError(f"expected a run, a checkpoint, an export or a transformers directory at {path}, found {found}")
    if (path / COMPACT).is_file():
        return [path / COMPACT]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"expected *.safetensors in {path}, found none: load it with transformers and call save_pretrained, which "
            "writes them"
        )
    return files


def _of_directory(path: Path) -> WeightSource:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= json.loads((opened.metadata() or {}).get("layers", "{}"))
                tensors |= {_renamed(name): opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  # no mapping
        except Exception as error:  # safetensors raises its own type
            raise UserError(f"expected safetensors in {file}, found: {' '.join(str(error).split())}") from None
    config = parse_object((path / "config.json").read_bytes()) or {}
    for name in _sparse_layers(tensors):  # a sparse export says it by its configuration alone
        shapes.setdefault(name, [*_shape_by_name(name, config), tensors[f"{name}.blocks"].shape[-1]])
    sparse = {name: _taken_sparse(name, tensors, shapes, path) for name in _sparse_layers(tensors)}
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return WeightSource(
        label=str(path),
        digest=source_digest(path),
        dense=tensors,
        sparse=sparse,
        shape={key: config[key] for key in ("num_attention_heads", "hidden_act") if key in config},
        tokenizer=path if has_tokenizer else None,
    )


def _renamed(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _sparse_layers(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".blocks") for name in names if name.endswith(".blocks")]


def _shape_by_name(name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """[out, in] of a linear layer of BERT's encoder."""
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    if name.endswith("intermediate.dense"):
        return inner, hidden
    is_wide = name.endswith("output.dense") and "attention" not in name
    return (hidden, inner) if is_wide else (hidden, hidden)


def _taken_sparse(name: str, tensors: dict[str, Tensor], shapes: dict[str, list[int]], path: Path) -> SparseWeight:
    """The layer's parts, which `tensors` loses."""
    try:
        blocks, rows, cols = (tensors.pop(f"{name}.{part}") for part in ("blocks", "rows", "cols"))
        out_features, in_features, block_size = shapes[name]
        topology = BlockTopology((out_features, in_features), block_size, rows.int(), cols.int())
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"expected the blocks of {name} in {path} with rows, cols and shape, found: {error}") from None
    parts = [tensors.pop(f"{name}.{part}", None) for part in PARTS]
    low_rank = (parts[0], parts[1]) if parts[0] is not None and parts[1] is not None else None
    return SparseWeight(topology, blocks, low_rank)
