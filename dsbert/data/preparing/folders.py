"""The files of a folder: those that hold text, by their names; and the others, each with why it is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsbert.base.errors import printable
from dsbert.data.manifest import LeftOutFiles
from dsbert.data.preparing.kinds import kind_of

HIDDEN, UNKNOWN, DESCRIPTION = "hidden", "unknown kind", "description of a data set"
DANGLING, NO_FILE, UNREADABLE, SEEN = "link to nothing", "no regular file", "unreadable", "folder read already"
EMPTY, NO_TEXT = "empty", "no text"

# What `datasets` writes beside the files of a data set.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_NAMED = 1000  # names that are kept of each reason; all are counted
_SHOWN = 5


class LeftOut(NamedTuple):
    """A file, or a folder with all that is in it, that is not read. reason: one of those above."""

    path: str
    reason: str


def files_below(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """What can be read in a folder and the folders in it, behind links too, by the order of the names.

    left_out: what cannot be is added to it; of a hidden folder no more than its name.
    """
    return sorted(_below(folder, left_out, set()))


def _below(folder: Path, left_out: list[LeftOut], seen: set[str]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in seen:
        left_out.append(LeftOut(f"{folder}/", SEEN))
        return
    seen.add(place)
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        left_out.append(LeftOut(f"{folder}/", UNREADABLE))
        return
    for path in inside:
        reason = _reason(path)
        if reason is not None:
            left_out.append(LeftOut(str(path), reason))
        elif path.is_dir():
            yield from _below(path, left_out, seen)
        else:
            yield path


def _reason(path: Path) -> str | None:
    """Why a path is left out; None for a folder, and a file that can be read."""
    if path.name[0] in "._":
        return HIDDEN
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return (
            DANGLING if path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) else UNREADABLE
        )
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        return NO_FILE
    if path.name in _DESCRIPTIONS:
        return DESCRIPTION
    if kind_of(path) is None:
        return UNKNOWN
    return None if os.access(path, os.R_OK) else UNREADABLE


def summarized(left_out: Iterable[LeftOut]) -> dict[str, LeftOutFiles]:
    """By reason, as plain JSON values."""
    found: dict[str, LeftOutFiles] = {}
    for path, reason in sorted(set(left_out), key=lambda one: (one.reason, one.path)):
        entry = found.setdefault(reason, {"files": 0, "names": []})
        entry["files"] += 1
        if len(entry["names"]) < _NAMED:
            entry["names"].append(printable(path))
    return found


def left_out_lines(summary: dict[str, LeftOutFiles]) -> list[str]:
    """What `summarized` gave, for people: a line for each reason."""
    lines = []
    for reason, entry in summary.items():
        names = ", ".join(entry["names"][:_SHOWN])
        more = f" and {entry['files'] - _SHOWN:,} more" if entry["files"] > _SHOWN else ""
        lines.append(f"{entry['files']:,} {reason}: {names}{more}")
    return lines
