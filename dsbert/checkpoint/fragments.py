"""The checkpoint format for weights and moments: named pieces of flat parameters, as safetensors.

Every rank writes one file with just what it answers for: tensors "<parameter>/master", "/exp_avg", "/exp_avg_sq" (fp32,
1-D), and in the file's metadata, under the format's name, where each piece stands: {parameter: [offset, length]}. A
reader of any world size and any ZeRO stage reads the pieces that overlap what it needs. No pickle is written or read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsbert.base.errors import CheckpointError
from dsbert.engine.zero_shards import ParamShard

FORMAT = "dsbert-fragments-1"
Floats = NDArray[np.float32]


def fragments_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"fragments-{rank:05d}-of-{world_size:05d}.safetensors"


class FragmentBuffer:
    """The image of this rank's fragment file, in memory that every save reuses: as large as the file, page-locked where
    the shards live on a GPU. Once filled it is a snapshot: training may go on while a thread writes it.

    The header is made here because the library's writer would hold a second copy of all data, and Python's lock.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self._memory.numel()

    @torch.no_grad()
    def fill(self, shards: dict[str, ParamShard]) -> memoryview:
        """Copy this rank's pieces; what is returned is valid until the next call. Raises nothing but MemoryError."""
        tensors = {
            f"{name}/{kind}": tensor
            for name, shard in shards.items()
            if shard.numel
            for kind, tensor in {"master": shard.master, **shard.moments}.items()
        }
        header, size = _header({key: tensor.numel() for key, tensor in tensors.items()}, _index(shards))
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._memory.numel() < len(header) + size:
            self._memory = torch.empty(len(header) + size, dtype=torch.uint8, pin_memory=on_gpu)
        image = self._memory[: len(header) + size]
        image[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        start = len(header)
        for tensor in tensors.values():
            stop = start + 4 * tensor.numel()
            image[start:stop].view(torch.float32).copy_(tensor, non_blocking=on_gpu)
            start = stop
        if on_gpu:
            torch.cuda.synchronize()
        return image.numpy().data


def fragment_bytes(shards: dict[str, ParamShard]) -> int:
    """Size of the file that this rank would write."""
    numels = {
        f"{name}/{kind}": shard.numel
        for name, shard in shards.items()
        if shard.numel
        for kind in ("master", *shard.moments)
    }
    header, size = _header(numels, _index(shards))
    return len(header) + size


def _index(shards: dict[str, ParamShard]) -> dict[str, list[int]]:
    return {name: [shard.offset, shard.numel] for name, shard in shards.items() if shard.numel}


def _header(numels: dict[str, int], index: dict[str, list[int]]) -> tuple[bytes, int]:
    """The safetensors header of fp32 tensors, its length first, and the bytes of data that follow it."""
    entries: dict[str, Any] = {"__metadata__": {FORMAT: json.dumps(index)}}
    offset = 0
    for key, numel in numels.items():
        entries[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


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
            for name, (offset, length) in _read_index(path, metadata[FORMAT]).items():
                self._pieces.setdefault(name, []).append(_Piece(path, offset, length))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.offset)

    def names(self) -> list[str]:
        """All parameters."""
        return sorted(self._pieces)

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return max((piece.offset + piece.length for piece in self._pieces.get(name, [])), default=0)

    def read(self, name: str, kind: str, offset: int, length: int) -> Floats:
        """Elements [offset, offset + length) of a parameter's master weight or moment: fp32 [length]."""
        out = np.empty(length, dtype=np.float32)
        covered = 0  # from the front, each element once
        for piece in self._pieces.get(name, []):
            start, stop = max(offset, piece.offset), min(offset + length, piece.offset + piece.length)
            if start >= stop:
                continue
            if start != offset + covered:
                break
            try:
                source = self._files[piece.path].get_slice(f"{name}/{kind}")
                if source.get_dtype() != "F32" or source.get_shape() != [piece.length]:
                    raise ValueError(f"{source.get_dtype()} {source.get_shape()} instead of F32 [{piece.length}]")
                out[start - offset : stop - offset] = source[start - piece.offset : stop - piece.offset]
            except Exception as error:  # safetensors raises its own type
                raise CheckpointError(f"expected {name}/{kind} in {piece.path}, found: {error}") from None
            covered += stop - start
        if covered != length:
            raise CheckpointError(
                f"expected elements {offset}..{offset + length} of {name}/{kind} in the checkpoint once, found "
                f"{covered} of {length} before a gap or an overlap"
            )
        return out


def _read_index(path: Path, text: str) -> dict[str, list[int]]:
    """Where each piece of a file stands. Raises CheckpointError."""
    try:
        index = json.loads(text)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or not all(
        isinstance(place, list) and len(place) == 2 and all(type(number) is int and number >= 0 for number in place)
        for place in index.values()
    ):
        raise CheckpointError(f"expected offset and length of every piece in {path}, found {text[:80]!r}")
    return index
