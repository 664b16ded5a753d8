"""Files that survive a power cut, and are what they were when they come back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import xxhash

_CHUNK_BYTES = 1 << 20
_CHUNKS_A_SYNC = 64
_SEAL = "xxh3"
# No file of dsbert's has a gap of this size; reading one would take hours, and find nothing.
_GAP_BYTES = 1 << 30
_MAX_GAPS = 1000
# What a network file system may take to show one machine the names and sizes that another has made (NFS: acdirmax).
SHOWN_WITHIN_S = 60.0
# JSON, YAML and pointers: far above what any of them holds.
SMALL_BYTES = 1 << 26


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError for what reading might wait for, or never end: pipes, sockets, devices,
    directories, and files that are mostly a hole."""
    _assert_regular(os.stat(path), path)  # before it is opened, which may do something to a device
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        status = os.fstat(file.fileno())
        _assert_regular(status, path)
        _assert_no_gap(file.fileno(), status.st_size, path)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int = SMALL_BYTES) -> bytes:
    """All of a file that has at most `limit` bytes. Raises OSError, as `open_regular` does."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EINVAL, f"more than the {limit} bytes that such a file may have", str(path))
    return data


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


def checksum(
    path: Path,
    count: Callable[[int], object] = lambda nbytes: None,
    algorithm: type[xxhash.xxh3_128 | xxhash.xxh3_64] = xxhash.xxh3_128,
) -> str:
    """Of a file, in hexadecimal. count: told the bytes of every piece. Raises OSError."""
    hasher = algorithm()
    with open_regular(path) as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
            count(len(chunk))
    return hasher.hexdigest()


def _assert_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _assert_no_gap(descriptor: int, size: int, path: Path) -> None:
    """Where a file system knows no holes, everything is data."""
    position = 0
    for _ in range(_MAX_GAPS if size > _GAP_BYTES else 0):
        gap = os.lseek(descriptor, position, os.SEEK_HOLE)
        if gap >= size:
            break
        try:
            position = os.lseek(descriptor, gap, os.SEEK_DATA)
        except OSError:  # no data beyond
            position = size
        if position - gap > _GAP_BYTES:
            raise OSError(errno.EINVAL, f"{size} bytes with a hole of {position - gap}", str(path))
        if position >= size:
            break
    os.lseek(descriptor, 0, os.SEEK_SET)


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


# What a look at a file finds that another machine has made or replaced a moment ago.
_MAY_BE_LATE = (errno.ENOENT, errno.ESTALE)


def is_shown(look: Callable[[], bool], patience_s: float = SHOWN_WITHIN_S) -> bool:
    """Whether this machine sees what another has written, by a look that may raise OSError: at once, or within the
    patience that the caches of network file systems need. What no cache heals, such as a lack of rights, is no."""
    deadline, pause_s = time.monotonic() + patience_s, 0.01
    while True:
        try:
            if look():
                return True
        except OSError as error:
            if error.errno not in _MAY_BE_LATE:
                return False
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)


def clock_of(directory: Path) -> float:
    """What time it is by the clock that dates the files of a directory, which may be a server's: in seconds since 1970.
    Ours where nothing can be written there."""
    with suppress(OSError), tempfile.TemporaryFile(dir=directory) as file:  # without a name, where the system can
        return os.fstat(file.fileno()).st_mtime
    return time.time()


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder and all files in it, as new files of ours: whoever may not write the source may still write and
    remove the copy. Raises OSError."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def remove_tree(path: Path) -> None:
    """Remove a folder with all in it, also where modes were copied that forbid it. What cannot be removed stays."""
    if path.is_symlink():
        return
    with suppress(OSError):
        os.chmod(path, 0o700)
    for directory, folders, _ in os.walk(path):
        for folder in (Path(directory) / name for name in folders):
            with suppress(OSError):
                if not folder.is_symlink():
                    os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Have the disk hold a directory's names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
