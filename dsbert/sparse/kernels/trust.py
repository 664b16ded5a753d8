"""What may be loaded into this process: files that nobody but this user and the administrator can have written.

The rule is ssh's: a file and every folder above it belong to this user or to root, and nobody else may write to them,
but that a folder of all, as /tmp, may keep what users put there apart (the sticky bit).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UntrustedError(OSError):
    """Another user can have put there what is found there; `strerror` is one line."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPERM, why)


def assert_trusted(path: Path) -> None:
    """Raises UntrustedError unless the path, which holds no links, fits the rule as far as it is there; OSError."""
    for place in (path, *path.parents):
        with suppress(FileNotFoundError):
            _assert_ours(str(place), os.lstat(place), shared=place != path)


def open_trusted(path: Path) -> int:
    """A descriptor of a file, read-only: what was looked at is what is read. Raises UntrustedError unless the file, and
    not only its name, fits the rule; OSError. The folders are the caller's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedError(f"{path} is no file")
        _assert_ours(str(path), found)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_all(path: Path) -> bool:
    """Whether any user could replace a program, by its file or by a folder above. (Whose it is says nothing: clusters
    have accounts for software.)"""
    places = {place for name in (path.absolute().parent, path.resolve()) for place in (name, *name.parents)}
    return any(mode & stat.S_IWOTH and not _keeps_apart(mode) for mode in (os.stat(p).st_mode for p in places))


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new folder for this process alone, gone at the end. It is named by a descriptor, so that it does not matter who
    may write to the folders above. Raises OSError."""
    made = tempfile.mkdtemp()
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _assert_ours(made, os.fstat(descriptor))
        if os.listdir(descriptor):
            raise UntrustedError(f"{made} is not the folder that was made there")
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        for name in os.listdir(descriptor):
            os.unlink(name, dir_fd=descriptor)
        os.close(descriptor)
        with suppress(OSError):
            os.rmdir(made)


def _assert_ours(name: str, found: os.stat_result, shared: bool = False) -> None:
    """shared: a folder of all may stand there if it keeps users apart."""
    if found.st_uid not in (0, os.geteuid()):
        raise UntrustedError(f"{name} belongs to {_user(found.st_uid)}")
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others & stat.S_IWGRP and _is_private_group(found.st_gid):
        others &= ~stat.S_IWGRP
    if others and not (shared and _keeps_apart(found.st_mode)) and not stat.S_ISLNK(found.st_mode):
        raise UntrustedError(f"others may write to {name}")


def _keeps_apart(mode: int) -> bool:
    return bool(stat.S_ISDIR(mode) and mode & stat.S_ISVTX)


def _is_private_group(gid: int) -> bool:
    """Whether it is the group of this user alone, which many systems make for each: its name is the user's."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except KeyError:
        return f"user {uid}"
