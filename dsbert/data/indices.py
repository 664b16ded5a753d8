"""Indices of prepared data: arrays that follow from it, made once, kept beside it and mapped by every rank.

An index is a directory of .npy files and a meta.json, which says of what data it is and has the checksum of each file.
None is ever missed: what is lost or damaged is made again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.base.durable import checksum, differences, sealed, unsealed

Arrays = dict[str, NDArray[Any]]
_META = "meta.json"
_MAX_META_BYTES = 1 << 20
_LARGE_BYTES = 1 << 30


def find_or_make(
    target: Path, meta: dict[str, Any], make: Callable[[], tuple[Arrays, dict[str, int]]], suspect: Container[str] = ()
) -> tuple[Arrays, dict[str, int]]:
    """The arrays of an index, and its numbers: mapped from `target`, where the first caller writes what `make` gives.

    Any number of processes may call at once: each writes a directory of its own and renames it into place; the first
    rename wins, and all of them are equal. Where the directory is read-only the index stays in memory.

    Args:
        target: the index's directory.
        meta: what it must be of.
        make: gives the arrays and numbers anew.
        suspect: names of indices that are used only if all of their bytes are what was written.
    """
    found = _load(target, meta)
    if found is not None and not (target.name in suspect and index_differences(target)):
        return found
    if found is not None:
        print(f"dsbert: {target} is not what was written: made again from the shards", file=sys.stderr)
    arrays, numbers = make()
    try:
        _save(target, meta, arrays, numbers, replace=found is not None)
    except OSError:
        return arrays, numbers
    return _load(target, meta) or (arrays, numbers)


def index_differences(target: Path) -> dict[str, str]:
    """The files of an index on disk that are not what was written: name -> what is wrong."""
    try:
        files = dict(_read_meta(target)["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {_META: "it is not what was written"}
    unmapped = {}
    for name in files:  # whose heads say how much there is to read
        try:
            _map(target / name)
        except Exception:  # of many kinds, where a head is damaged
            unmapped[name] = "it is not what was written"
    return unmapped | differences(target, {name: files[name] for name in files if name not in unmapped})


def _read_meta(target: Path) -> dict[str, Any]:
    path = target / _META
    if not path.is_file() or path.stat().st_size > _MAX_META_BYTES:
        raise ValueError("it is no index")
    return unsealed(json.loads(path.read_text()))


def _load(target: Path, meta: dict[str, Any]) -> tuple[Arrays, dict[str, int]] | None:
    """None if there is no index for this data, or none that can be mapped."""
    try:
        found = _read_meta(target)
        files = found.pop("files")
        numbers = {name: int(found.pop(name)) for name in sorted(set(found) - set(meta))}
        if found != meta:
            return None
        return {name.removesuffix(".npy"): _map(target / name) for name in files}, numbers
    except Exception:  # of many kinds, where a file's head is damaged
        return None


def _map(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    mapped = np.load(path, mmap_mode="r")
    size = path.stat().st_size
    is_hole = size > _LARGE_BYTES and path.stat().st_blocks * 512 < size // 64
    if mapped.offset + mapped.nbytes != size or is_hole:
        raise ValueError(f"{path} holds something else than its array")
    # A plain view: indexing np.memmap pays for its subclass on every call.
    array: NDArray[Any] = mapped.view(np.ndarray)
    return array


def _save(target: Path, meta: dict[str, Any], arrays: Arrays, numbers: dict[str, int], replace: bool) -> None:
    """Write the index beside its place and rename it there; whoever comes second leaves the first one's.

    replace: also one that looks whole. Raises OSError where the directory cannot be written.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        files = {f"{name}.npy": checksum(temporary / f"{name}.npy") for name in arrays}
        (temporary / _META).write_text(json.dumps(sealed({**meta, **numbers, "files": files})) + "\n")
        temporary.chmod(0o755)
        if replace or (os.path.lexists(target) and _load(target, meta) is None):
            _remove(target)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    else:
        target.unlink(missing_ok=True)
