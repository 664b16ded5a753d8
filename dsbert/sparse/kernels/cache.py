"""Where compiled kernels and measured choices are kept between processes: a folder of this user alone.

What is read there decides what runs in this process, so that nobody else may be able to write it (trust.py).
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsbert.sparse.kernels.trust import UntrustedError, assert_trusted, open_trusted

_MOST_BYTES = 1 << 26  # of a file that is read whole


def cache_directory() -> Path:
    """This user's folder in DSBERT_CACHE, which users may share, else dsbert below XDG_CACHE_HOME or ~/.cache; made if
    need be, links resolved.

    Raises UntrustedError where another user could have written to it, OSError where none can be had.
    """
    shared = os.environ.get("DSBERT_CACHE")
    try:
        above = Path(shared or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container that runs under a user without a name
        raise OSError(errno.ENOENT, "no home directory", "~") from None
    name = f"uid-{os.geteuid()}" if shared else "dsbert"
    try:
        above.mkdir(parents=True, exist_ok=True)
        folder = above.resolve() / name
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise OSError(error.errno, f"{above} cannot be written: {error.strerror}", str(above)) from None
    assert_trusted(folder)  # whoever made a link decides where we write
    folder = folder.resolve()
    assert_trusted(folder)
    return folder


def read_cached(path: Path) -> bytes:
    """A file of the cache. Raises UntrustedError, OSError."""
    with open(open_trusted(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise UntrustedError(f"{path} is too large to be ours")
        return file.read()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which takes its place at the end, whole: several processes may do so at once.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o600)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
