"""The runs below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from dsbert.monitoring.run_files import JOBS

# A run's own folders hold none, and may hold very many files.
_DEEPEST = 4


def find_runs(folder: Path) -> list[Path]:
    """Run directories at or below a folder, by name, each once; what cannot be listed is left out."""
    found, seen = [], set()
    for path, folders, files in os.walk(folder, followlinks=True):  # runs are often links to larger disks
        here = Path(path)
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if {"attempts.jsonl", JOBS} & set(files):
            found.append(here)
            folders.clear()
        if len(here.relative_to(folder).parts) >= _DEEPEST:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found)
