"""Standard output and standard error that cannot be written: what is said may be lost, and what is done may not.

A terminal goes, a pipe's reader leaves, a log's disk is full, a descriptor was closed before we came. `protect` has
every write to standard error succeed, by whomever it comes: our lines, bars, warnings, libraries, tracebacks.
Standard output stays strict, as it is what most commands are for, until `lose_output_too`.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from dsbert.base.errors import DsbertError

# A reader that stands still (a stopped pager, a terminal on hold) holds up a run this long, and loses lines then.
_STALL_S = 1.0


def protect() -> None:
    """For the start of a process, before anything opens a file: see above."""
    _open_closed_descriptors()
    sys.stderr = _text(_Lossy(2), sys.stderr, each_line=True)
    sys.stdout = _text(_Strict(1), sys.stdout, each_line=os.isatty(1))


def lose_output_too() -> None:
    """After `protect`, for commands that are not about what they print: standard output may be lost as well."""
    if isinstance(getattr(getattr(sys.stdout, "buffer", None), "raw", None), _Strict):
        sys.stdout = _text(_Lossy(1), sys.stdout, each_line=True)


def flush() -> None:
    """Write what is held back.

    Raises:
        DsbertError: standard output cannot be written.
        OSError: its reader has gone.
    """
    sys.stderr.flush()
    sys.stdout.flush()


def _open_closed_descriptors() -> None:
    """The number of a closed descriptor would go to the next file that is opened, and lines for people into that file.
    Standard output is opened for reading: who writes there is told."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free


def _text(raw: io.RawIOBase, before: TextIO | None, *, each_line: bool) -> TextIO:
    """A text stream in the place of `before`, which may be missing."""
    encoding, errors = getattr(before, "encoding", "utf-8"), getattr(before, "errors", "backslashreplace")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=each_line)


class _Descriptor(io.RawIOBase):
    """Bytes to a descriptor that stays open."""

    def __init__(self, number: int) -> None:
        self.name = self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


class _Strict(_Descriptor):
    """What cannot be written is an error, once: a DsbertError, or BrokenPipeError for a reader that has seen enough."""

    def write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except BlockingIOError:
            select.select([], [self._number], [])
            return 0
        except OSError as error:
            with suppress(OSError):  # for the interpreter, which flushes on its way out
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._number)
            if error.errno == errno.EPIPE:
                raise
            raise DsbertError(
                f"expected to write the answer to standard output, found: {error.strerror}; it is not complete"
            ) from None


class _Lossy(_Descriptor):
    """Writes what can be written now."""

    _patience_s = _STALL_S

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with suppress(OSError, ValueError):
            while view:
                # What a pipe is ready for, a pipe takes without holding the writer.
                if not select.select([], [self._number], [], self._patience_s)[1]:
                    self._patience_s = 0.0
                    break
                view = view[os.write(self._number, view[: select.PIPE_BUF]) :]
                self._patience_s = _STALL_S
        return len(data)
