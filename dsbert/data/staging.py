"""Prepared data on a node's own disk: copied there once, verified, and used from there by all ranks of the node."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import xxhash
from filelock import UnixFileLock

from dsbert.base.durable import copy_tree, differences, remove_tree
from dsbert.base.errors import DataError, StorageError, disk_error
from dsbert.data.indices import index_differences
from dsbert.data.manifest import MANIFEST, SPLITS, TOKENIZER, UNIGRAM, Manifest, ShardEntry, load_manifest
from dsbert.data.shards import shard_checksum
from dsbert.data.verification import wrong_file

_CHUNK_BYTES = 1 << 22


def stage(data_dir: Path, stage_to: Path | None, part: tuple[int, int] | None = None) -> Path:
    """Copy prepared data, with its sample indices, into a directory of `stage_to` named by its digest.

    Any number of processes of a node may call at once: one copies, the others wait. What is there already is verified
    by sizes, and of a part = (k, n) every n-th shard from the k-th on by its checksum; what is not as it was prepared
    is copied anew. A copy is verified by checksums as it is written and read back.

    Returns:
        The directory to read from: `data_dir` where nothing is to be staged.

    Raises:
        StorageError: the disk is full, or fails.
        UserError: it cannot be written.
        DataError: a shard is not what was prepared.
    """
    if stage_to is None:
        return data_dir
    manifest = load_manifest(data_dir)
    target = stage_to / manifest.digest
    shards = {shard.file: shard for split in SPLITS for shard in manifest.splits[split].shards}
    try:
        stage_to.mkdir(parents=True, exist_ok=True)
        with UnixFileLock(stage_to / f".{manifest.digest}.lock", fallback_to_soft=False):
            target.mkdir(exist_ok=True)
            for shard in shards.values():
                path = target / shard.file
                if wrong_file(path, shard.bytes):
                    _copy(data_dir / shard.file, path, shard)
            for shard in list(shards.values())[part[0] :: part[1]] if part else []:
                if shard_checksum(target / shard.file) != shard.xxh3:
                    _copy(data_dir / shard.file, target / shard.file, shard)
            for folder in (
                TOKENIZER,
                *(path.name for path in sorted((*data_dir.glob("pairs-*"), *data_dir.glob("spans-*")))),
            ):
                if _is_whole(target / folder, manifest):
                    continue
                temporary = target / f".{folder}.tmp"
                remove_tree(temporary)
                copy_tree(data_dir / folder, temporary)
                remove_tree(target / folder)
                temporary.rename(target / folder)
            for name in (UNIGRAM, MANIFEST):
                shutil.copyfile(data_dir / name, target / f".{name}.tmp")
                os.replace(target / f".{name}.tmp", target / name)
    except OSError as error:
        raise disk_error(
            error,
            f"expected to stage {data_dir} in {stage_to}, found: {error.strerror or error}: make room there, or leave "
            "out data.stage_to",
        ) from None
    return target


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether the staged tokenizer, or a staged index, is what was written."""
    if folder.name != TOKENIZER:
        return not index_differences(folder)
    files = {name: digest for name, digest in manifest.files.items() if name.startswith(f"{TOKENIZER}/")}
    return folder.is_dir() and not differences(folder.parent, files)


def _copy(source: Path, target: Path, entry: ShardEntry) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    digest = xxhash.xxh3_64()
    try:
        with source.open("rb") as read, temporary.open("wb") as written:
            while chunk := read.read(_CHUNK_BYTES):
                digest.update(chunk)
                written.write(chunk)
            written.flush()
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or the page cache would answer
        if digest.hexdigest() != entry.xxh3:
            raise DataError(f"expected {source} as it was prepared, found it changed: prepare the data again")
        if shard_checksum(temporary) != entry.xxh3:
            raise StorageError(f"{temporary} does not read back as it was written: see to that disk")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
