"""Done markers: a file <to>.json says that a task is done, what came of it, and which files it left, with
their checksums.

Files between the passes are not forced to the disk, which would take longer than to make them. What a power cut has
torn is found by the checksums when a preparation goes on, and made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsbert.base.durable import checksum

_FILES = "files"


def marker_path(task: dict[str, Any]) -> Path:
    """The marker of a task: task["to"] with .json appended."""
    return Path(f"{task['to']}.json")


def write_marker(task: dict[str, Any], found: dict[str, Any], files: Iterable[Path] = ()) -> dict[str, Any]:
    """Say that the task is done; returns `found`, plain JSON values. Raises OSError."""
    path = marker_path(task)
    document = {**found, _FILES: {str(file): checksum(file) for file in files}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def read_marker(task: dict[str, Any]) -> dict[str, Any]:
    """What came of a task that is done. Raises OSError, ValueError."""
    document: dict[str, Any] = json.loads(marker_path(task).read_text())
    del document[_FILES]
    return document


def drop_torn_markers(tasks: Sequence[dict[str, Any]]) -> None:
    """Remove the markers whose files are not what they were, or which are torn themselves."""
    for path in {marker_path(task) for task in tasks}:
        if not path.exists():
            continue
        try:
            files = json.loads(path.read_text())[_FILES]
            whole = all(checksum(Path(file)) == digest for file, digest in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            path.unlink(missing_ok=True)
