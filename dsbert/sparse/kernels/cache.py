"""Where compiled kernels and measured choices are kept between processes."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_directory() -> Path:
    """DSBERT_CACHE, else dsbert below XDG_CACHE_HOME or ~/.cache. Raises OSError if none of them is known."""
    own = os.environ.get("DSBERT_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsbert"
    except RuntimeError:  # a container that runs under a user without a name
        raise OSError(errno.ENOENT, "no home directory", "~") from None


def readable_by_all(path: str | Path, executable: bool = False) -> None:
    """A cache may be shared by users, and temporary files are made for one alone."""
    os.chmod(path, 0o755 if executable else 0o644)
