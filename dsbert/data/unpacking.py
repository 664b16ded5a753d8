"""Packed files as streams of bytes: .gz, .xz, .zst and .bz2, of any number of members one after the other."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PACKED = (".gz", ".xz", ".zst", ".bz2")
_READ_BYTES = 1 << 18


def open_packed(path: Path) -> IO[bytes]:
    """Open a file by its suffix. Raises OSError, and so does reading it, or EOFError, LZMAError, zlib.error."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))
    if path.suffix == ".xz":
        return io.BufferedReader(_Members(path, lzma.LZMADecompressor))
    if path.suffix == ".bz2":
        return io.BufferedReader(_Members(path, bz2.BZ2Decompressor))
    if path.suffix == ".zst":
        import pyarrow as pa

        stream: IO[bytes] = pa.input_stream(str(path), compression="zstd")
        return stream
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
