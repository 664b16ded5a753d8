"""The exceptions that end a run, each with its exit code (the table is in ARCHITECTURE.md).

A `DsbertError` is shown to the user as one line and never as a traceback; anything else that escapes is a bug of
ours and exits with 1.
"""

import errno
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_PEER = 3
EXIT_NO_CHECKPOINT = 4
EXIT_STORAGE = 74  # EX_IOERR of sysexits.h, as 75 is its EX_TEMPFAIL
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130
# Where ranks end differently, the cause outranks its consequences: a rank whose peer failed reports EXIT_PEER.
PRIORITY = (EXIT_USER, EXIT_INTERNAL, EXIT_NO_CHECKPOINT, EXIT_INTERRUPTED, EXIT_STORAGE, EXIT_PEER, EXIT_REQUEUE)
# What a file system answers that is full or broken.
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


class DsbertError(Exception):
    """A failure whose message is one line: what was expected, what was found, what to do.

    ranks: whose fault it is, where that is known. shared: all ranks raise it, and the first says it for them.
    """

    exit_code = EXIT_INTERNAL
    ranks: tuple[int, ...] = ()
    shared = False
    _by_name: ClassVar[dict[str, type["DsbertError"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Every class of this family can cross from one process to another, by its name."""
        super().__init_subclass__(**kwargs)
        assert cls.__name__ not in DsbertError._by_name, f"two errors are called {cls.__name__}"
        DsbertError._by_name[cls.__name__] = cls

    @staticmethod
    def named(name: str) -> type["DsbertError"]:
        """The class of that name, at any depth of the family; DsbertError for a name that nobody has here."""
        return DsbertError._by_name.get(name, DsbertError)

    def for_all(self) -> "DsbertError":
        """This error, which all ranks have agreed to raise."""
        self.shared = True
        return self


class UserError(DsbertError):
    """The user's mistake: a wrong recipe, path, or mixture of ranks."""

    exit_code = EXIT_USER


class PeerError(DsbertError):
    """Another rank died, hung, or holds a state that differs from ours."""

    exit_code = EXIT_PEER


class LostPeerError(PeerError):
    """A peer does not answer, and it is not said yet which one: heartbeats tell (health.py)."""


class CheckpointError(DsbertError):
    """A checkpoint is required, and none that verifies is there."""

    exit_code = EXIT_NO_CHECKPOINT


class DataError(DsbertError):
    """Prepared data is damaged: a shard is not what the manifest says."""

    exit_code = EXIT_NO_CHECKPOINT


class StorageError(DsbertError):
    """A file system is full or broken: nobody's mistake, and it may have room, or answer, at the next start."""

    exit_code = EXIT_STORAGE


def is_storage_failure(error: OSError) -> bool:
    """Whether the file system is full or broken; else a path is wrong, or closed to us, or it is a bug."""
    return error.errno in _STORAGE_ERRNOS


def disk_error(error: OSError, message: str) -> StorageError | UserError:
    """The error to raise with this message where a path that the user has chosen could not be read or written."""
    return StorageError(message) if is_storage_failure(error) else UserError(message)


def printable(text: object, *, lines: bool = False) -> str:
    """The text with everything escaped by which a stranger's words could steer a terminal or feign other text: control
    characters, escape sequences, marks that turn the direction of writing, what cannot be encoded; and new lines, but
    where `lines` may be several. Everything that is printed for people goes through here once."""
    return "".join(char if _is_harmless(char) or (lines and char == "\n") else _escaped(char) for char in str(text))


def _is_harmless(char: str) -> bool:
    # The two invisible marks are spelling in some scripts.
    return char.isprintable() or char in "\u200c\u200d" or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def combine_exit_codes(codes: Sequence[int]) -> int:
    """One exit code for all ranks: theirs if they agree, else the first of `PRIORITY` that occurs.

    A negative code, of a rank that a signal killed (as in `subprocess`), counts as `EXIT_PEER`.
    """
    found = {EXIT_PEER if code < 0 else code for code in codes}
    if len(found) == 1:
        return found.pop()
    return next((code for code in PRIORITY if code in found), max(found))
