"""The checkpoint format for weights and moments: named pieces of flat parameters, as safetensors.

Every rank writes one file with just what it answers for: tensors "<parameter>/master", "/exp_avg", "/exp_avg_sq" (fp32,
1-D), and in the file's metadata, under the format's name, where each piece stands: {parameter: [offset, length]}. A
reader of any world size and any ZeRO stage reads the pieces that overlap what it needs. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.errors import CheckpointError
from dsbert.zero_shards import ParamShard

FORMAT = "dsbert-fragments-1"
Floats = NDArray[np.float32]


def fragments_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"fragments-{rank:05d}-of-{world_size:05d}.safetensors"


def write_fragments(path: Path, shards: dict[str, ParamShard]) -> None:
    """Write this rank's pieces to `path`, durably. Raises OSError."""
    from safetensors.numpy import save

    tensors: dict[str, Floats] = {}
    index = {}
    for name, shard in shards.items():
        if not shard.numel:
            continue
        index[name] = [shard.offset, shard.numel]
        for kind, tensor in {"master": shard.master, **shard.moments}.items():
            tensors[f"{name}/{kind}"] = tensor.detach().float().cpu().numpy()
    write_durably(path, save(tensors, metadata={FORMAT: json.dumps(index)}))


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and have the disk hold it before returning. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Piece:
    path: Path
    offset: int
    length: int


class FragmentReader:
    """Reads any range of any parameter out of the fragment files of a checkpoint, whatever wrote them.

    Raises CheckpointError, naming the file, if one is not of this format, or if a wanted range is not covered.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="numpy")
                metadata = file.metadata() or {}
            except Exception as error:  # safetensors raises its own type, which is not an OSError
                raise CheckpointError(f"expected a fragment file at {path}, found: {error}") from None
            if FORMAT not in metadata:
                raise CheckpointError(f"expected format {FORMAT} in {path}, found {sorted(metadata)}")
            self._files[path] = file
            for name, (offset, length) in json.loads(metadata[FORMAT]).items():
                self._pieces.setdefault(name, []).append(_Piece(path, offset, length))

    def names(self) -> list[str]:
        """All parameters."""
        return sorted(self._pieces)

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return max((piece.offset + piece.length for piece in self._pieces.get(name, [])), default=0)

    def read(self, name: str, kind: str, offset: int, length: int) -> Floats:
        """Elements [offset, offset + length) of a parameter's master weight or moment: fp32 [length]."""
        out = np.empty(length, dtype=np.float32)
        covered = 0
        for piece in self._pieces.get(name, []):
            start, stop = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if start >= stop:
                continue
            source = self._files[piece.path].get_slice(f"{name}/{kind}")
            out[start - offset : stop - offset] = source[start - piece.offset : stop - piece.offset]
            covered += stop - start
        if covered != length:
            raise CheckpointError(
                f"expected elements {offset}..{offset + length} of {name}/{kind} in the checkpoint, found {covered} of "
                f"{length}"
            )
        return out
