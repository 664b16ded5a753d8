"""What is no file where files are to be read: reading a pipe or a device may never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dsbert.checkpoint.loading import Problem

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def special_files(path: Path, only: str | None = None) -> list[Problem]:
    """The pipes, sockets and devices in a folder and below it, behind links as well, but not in folders behind links.
    only: the one folder to look into. What cannot be looked at is left to who reads it.
    """
    found = []
    for folder, inside, names in os.walk(path):
        if only is not None and folder == str(path):
            inside[:] = [only] if only in inside else []
        for file in (Path(folder, name) for name in sorted(names)):
            if (kind := special(file)) is not None:
                message = f"expected a file, found {kind}, of which nothing is read: remove it"
                found.append(Problem(str(file.relative_to(path)), message))
    return found


def special(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder, in words; None for these, and where nothing is."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return None
