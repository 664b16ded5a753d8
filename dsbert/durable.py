"""Files that survive a power cut, and are what they were when they come back."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

_CHUNK_BYTES = 1 << 20
_CHUNKS_A_SYNC = 64
_SEAL = "xxh3"
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def refusal(error: OSError) -> str | None:
    """What the file system says where it is full or broken, in words; None for an error that may as well be a bug."""
    return f"{error.filename or 'a file'}: {error.strerror}" if error.errno in _REFUSALS else None


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and have the disk hold it before returning. Raises OSError, which names the file."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new one, never a part, whoever else writes. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    write_durably(temporary, data)
    os.replace(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Put a file that was written beside its place there, once the disk holds it. Raises OSError."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_and_read_back(
    path: Path,
    data: bytes | memoryview,
    count: Callable[[int], object] = lambda nbytes: None,
    max_bytes_per_s: float | None = None,
    hurry: threading.Event | None = None,
) -> str:
    """Write a file durably, compare what the disk gives back, and return its xxh3_128 in hexadecimal.

    count: told the bytes of every piece that was written or read. max_bytes_per_s: until `hurry` is set, no faster.
    Raises OSError.
    """
    view, hasher = memoryview(data), xxhash.xxh3_128()
    hurry = hurry or threading.Event()
    start = time.monotonic()
    with path.open("wb") as file:
        for first in range(0, len(view), _CHUNK_BYTES):
            chunk = view[first : first + _CHUNK_BYTES]
            file.write(chunk)
            hasher.update(chunk)
            count(len(chunk))
            if (first // _CHUNK_BYTES + 1) % _CHUNKS_A_SYNC == 0:  # or the last sync would take long, and show nothing
                file.flush()
                os.fdatasync(file.fileno())
            if max_bytes_per_s:
                hurry.wait(max(0.0, start + (first + len(chunk)) / max_bytes_per_s - time.monotonic()))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # or the page cache would answer for the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if checksum(path, count) != hasher.hexdigest():
        raise OSError(f"{path} does not read back as it was written")
    return hasher.hexdigest()


def checksum(path: Path, count: Callable[[int], object] = lambda nbytes: None) -> str:
    """xxh3_128 of a file, in hexadecimal. count: told the bytes of every piece. Raises OSError."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
            count(len(chunk))
    return hasher.hexdigest()


def differences(directory: Path, files: dict[str, str]) -> dict[str, str]:
    """Which of the files (name -> `checksum`) of a directory are not what was written: name -> what is wrong."""
    found = {}
    for name, expected in files.items():
        try:
            wrong = None if checksum(directory / name) == expected else "the checksum differs"
        except OSError as error:
            wrong = f"unreadable: {error.strerror}"
        if wrong:
            found[name] = wrong
    return found


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself."""
    return {**document, _SEAL: xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())}


def unsealed(document: dict[str, Any]) -> dict[str, Any]:
    """What was given to `sealed`; one without a seal is taken as it is. Raises ValueError if it has changed."""
    inside = {key: value for key, value in document.items() if key != _SEAL}
    if _SEAL in document and sealed(inside) != document:
        raise ValueError("it is not what was written")
    return inside


def sync_directory(path: Path) -> None:
    """Have the disk hold a directory's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
