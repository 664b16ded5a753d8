"""Whether what is about to be read of prepared data is what was written: before a run, an evaluation, or a look."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dsbert.base.durable import checksum
from dsbert.base.errors import DataError
from dsbert.data.indices import index_differences
from dsbert.data.manifest import SPLITS, load_manifest
from dsbert.data.pairs import pair_index_name
from dsbert.data.shards import shard_checksum
from dsbert.data.spans import span_index_name

_MAX_FILE_BYTES = 1 << 30  # of a tokenizer, or of counts


def verify_data(
    data_dir: str | Path, seq_len: int, splits: Sequence[str] = SPLITS, part: tuple[int, int] = (0, 1)
) -> list[str]:
    """Read shards, tokenizer, counts and sample indices, and compare them with their checksums.

    part = (k, n): every n-th of them from the k-th on.

    Returns:
        Names of indices that are there and are not what was written: `suspect` for who opens them.

    Raises:
        UserError: there is no prepared data.
        DataError: a shard or another file is not what was prepared.
    """
    root, manifest = Path(data_dir), load_manifest(data_dir)
    shards = {shard.file: shard for split in splits for shard in manifest.splits[split].shards}
    indices = [name(split, seq_len) for split in splits for name in (span_index_name, pair_index_name)]
    suspect = []
    for name in [*shards, *manifest.files, *indices][part[0] :: part[1]]:
        path = root / name
        if name in indices:
            if os.path.lexists(path) and index_differences(path):
                suspect.append(name)
            continue
        if name in shards:
            whole = not wrong_file(path, shards[name].bytes) and shard_checksum(path) == shards[name].xxh3
        else:
            whole = not wrong_file(path) and checksum(path) == manifest.files[name]
        if not whole:
            raise DataError(f"expected {path} as it was prepared, found it missing or changed: prepare the data again")
    return suspect


def wrong_file(path: Path, expected_bytes: int | None = None) -> str | None:
    """What is wrong with a file before a byte of it is read: reading a pipe, a device or a terabyte of nothing would
    not end. None: nothing. Raises OSError."""
    if not path.is_file():
        return "missing" if not os.path.lexists(path) else "expected a file, found something else"
    found = path.stat().st_size
    if expected_bytes is None and found > _MAX_FILE_BYTES:
        return f"expected at most {_MAX_FILE_BYTES} bytes, found {found}"
    if expected_bytes is not None and found != expected_bytes:
        return f"expected {expected_bytes} bytes, found {found}: the checksum differs"
    if found > _MAX_FILE_BYTES and path.stat().st_blocks * 512 < found // 64:
        return f"expected {found} bytes of data, found a hole"
    return None
