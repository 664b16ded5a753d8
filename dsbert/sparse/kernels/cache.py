"""Where compiled kernels and measured choices are kept between processes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def whole_file(path: Path, executable: bool = False) -> Iterator[Path]:
    """Another name to write a file under, which takes its place at the end, whole: several processes may do so at once.

    Readable by all, for a cache may be shared by users. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o755 if executable else 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
