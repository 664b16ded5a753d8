"""What a file system must do for runs: rename over what is there, write through, lock, and tell the time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

_SLOW_S = 0.5  # for a small file to be on disk: a save writes a few dozen
_SKEW_S = 5.0  # between the file system's clock and ours: heartbeats are judged by both
_LITTLE = 2e9  # bytes free


def storage_facts(path: Path, *, writes: bool) -> Iterator[tuple[Literal["ok", "note", "fail"], str]]:
    """(verdict, text) of the file system at a path, or at the nearest folder above that exists."""
    place = _existing(path)
    if not place.is_dir():
        yield "fail", f"{place} is a file: name a folder"
        return
    kind = _kind_of(place)
    if not os.access(place, os.R_OK | os.X_OK):
        yield "fail", f"{place} cannot be read: give another place, or its permissions"
        return
    if not writes and place != path.absolute():
        yield "fail", f"{path} is not there: name the folder that `dsbert prepare` wrote"
        return
    if not writes:
        yield "ok", f"{place} on {kind} can be read"
        return
    if not os.access(place, os.W_OK):
        yield "fail", f"{place} cannot be written: give another --run-dir"
        return
    free = shutil.disk_usage(place).free
    little = free < _LITTLE
    yield "note" if little else "ok", f"{place} on {kind}, {free / 1e9:.1f} GB free{': little' if little else ''}"
    try:
        with tempfile.TemporaryDirectory(prefix=".dsbert-doctor-", dir=place) as folder:
            yield from _tried(Path(folder))
    except OSError as error:
        yield "fail", f"{place}: {error.strerror}: give a --run-dir on another file system"


def _tried(folder: Path) -> Iterator[tuple[Literal["ok", "note", "fail"], str]]:
    start = time.monotonic()
    written = folder / "file"
    with written.open("wb") as file:
        file.write(b"1" * 4096)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    skew = time.time() - written.stat().st_mtime
    (folder / "old").write_text("old")
    os.replace(written, folder / "old")
    if (folder / "old").read_bytes() != b"1" * 4096 or written.exists():
        yield "fail", "a rename does not replace what is there: checkpoints could not be published"
    slow = seconds > _SLOW_S
    yield (
        "note" if slow else "ok",
        f"written through in {seconds * 1000:.1f} ms{': saves will be slow' if slow else ''}",
    )
    if abs(skew) > _SKEW_S:
        yield "note", f"its clock is {skew:+.0f} s off: `dsbert status` judges heartbeats by it; set the clocks right"
    try:
        with FileLock(folder / "lock", timeout=0):
            pass
    except (OSError, NotImplementedError, Timeout) as error:
        yield "note", f"no locks ({type(error).__name__}): two preparations or experiments at a time may meet"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def _kind_of(path: Path) -> str:
    """As the system calls the file system."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "an unknown file system"
