"""Packed files as streams of bytes: .gz, .xz, .zst and .bz2, of any number of members one after the other."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKED = (".gz", ".xz", ".zst", ".bz2")
ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError)
_READ_BYTES = 1 << 18
# As `zstd --long=31` makes them: matches up to 2 GiB back. Memory is taken only for a file that asks for it.
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}


def packing(path: str | Path) -> str:
    """Which of `PACKED` a file's name ends with, in small letters or large ones; "" if none."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in PACKED else ""


def open_packed(path: Path) -> IO[bytes]:
    """Open a file by its suffix. Raises one of ERRORS, and so does reading it."""
    kind = packing(path)
    if kind == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))
    if kind == ".xz":
        return io.BufferedReader(_Members(path, lzma.LZMADecompressor))
    if kind == ".bz2":
        return io.BufferedReader(_Members(path, bz2.BZ2Decompressor))
    if kind == ".zst":
        return io.BufferedReader(_Members(path, lambda: zstd.ZstdDecompressor(options=_ZSTD)))
    raise ValueError(f"expected a suffix of {PACKED}, found {path}")


class _Members(io.RawIOBase):
    """As `lzma.open` and `bz2.open`, but that a damaged member is an error: these take it, and all that follows, for
    the end. Zeros between members are padding.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._new, self._at = decompressor, decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while True:
            if self._at.eof:
                packed = self._at.unused_data.lstrip(b"\0")
                while not packed and (more := self._file.read(_READ_BYTES)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return 0
                self._at = self._new()
            elif self._at.needs_input:
                packed = self._file.read(_READ_BYTES)
                if not packed:
                    raise EOFError("the file ends before its end was marked")
            else:
                packed = b""
            if data := self._at.decompress(packed, len(view)):
                view[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
