"""What fails on one rank fails on all, as what it is; what one rank has to say, all know."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsbert.base.errors import (
    EXIT_STORAGE,
    EXIT_USER,
    DsbertError,
    StorageError,
    UserError,
    disk_error,
    is_storage_failure,
)
from tests.helpers import run_distributed


def family(kind: type[DsbertError] = DsbertError) -> Iterator[type[DsbertError]]:
    """A class and all that follow from it, of every package."""
    import dsbert.data.preparing.work_queue  # noqa: F401  # has one of its own

    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


def failures_of_one_rank() -> list[list[Any]]:
    """What this rank sees of failures on rank 1, then on rank 0 alone, then on all: class, words, ranks, exit code, and
    whether rank 0 says it for all."""
    from dsbert.base.collectives import on_main_rank, raise_on_all_ranks, run_with_keepalive
    from dsbert.cluster import process_group

    rank = process_group.init(60).rank
    seen: list[list[Any]] = []

    def note(call: Callable[..., object], error: Exception, ranks: tuple[int, ...]) -> None:
        def work() -> int:
            if rank in ranks:
                raise error
            return rank

        try:
            call(work)
        except DsbertError as caught:
            seen.append([type(caught).__name__, str(caught), list(caught.ranks), caught.exit_code, caught.shared])

    for kind in family():
        note(raise_on_all_ranks, kind("so it is"), (1,))
    note(run_with_keepalive, StorageError("full"), (1,))
    note(raise_on_all_ranks, UserError("wrong"), (0, 1))
    for call in (on_main_rank, lambda work: on_main_rank(work, keepalive=True)):
        note(call, StorageError("full"), (0,))
        note(call, StorageError("full"), (1,))  # which is not asked
    note(raise_on_all_ranks, OSError(errno.ENOSPC, "No space left on device", "/a"), (1,))
    note(raise_on_all_ranks, OSError(errno.ENOENT, "No such file or directory", "/a"), (1,))
    # What is returned, where nothing fails.
    assert raise_on_all_ranks(lambda: rank) == run_with_keepalive(lambda: rank) == rank
    assert on_main_rank(lambda: "said") == on_main_rank(lambda: "said", keepalive=True) == (None if rank else "said")
    return seen


def test_an_error_of_every_class_is_of_that_class_on_all_ranks() -> None:
    first, second = run_distributed(failures_of_one_rank, 2)
    assert first == second
    crossed, rest = first[: -len(CASES)], first[-len(CASES) :]
    kinds = list(family())
    assert len(kinds) >= 8
    assert crossed == [[kind.__name__, "rank 1: so it is", [1], kind.exit_code, True] for kind in kinds]
    assert rest == [[*case, True] for case in CASES]


CASES = [
    ["StorageError", "rank 1: full", [1], EXIT_STORAGE],
    ["UserError", "wrong", [], EXIT_USER],
    ["StorageError", "full", [], EXIT_STORAGE],
    ["StorageError", "full", [], EXIT_STORAGE],
    [
        *("StorageError", "rank 1: expected to read and write /a, found: No space left on device"),
        *([1], EXIT_STORAGE),
    ],
    ["UserError", "rank 1: expected to read and write /a, found: No such file or directory", [1], EXIT_USER],
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_full_or_broken_disk_is_nobodys_mistake(number: int) -> None:
    error = disk_error(OSError(number, os.strerror(number), "/a"), "said")
    assert (type(error), error.exit_code, str(error)) == (StorageError, 74, "said")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, None])
def test_a_path_that_cannot_be_is_the_users_to_mend(number: int | None) -> None:
    error = OSError(number, "?") if number else OSError("?")
    assert not is_storage_failure(error)
    assert type(disk_error(error, "said")) is UserError


def test_no_two_errors_have_one_name() -> None:
    with pytest.raises(AssertionError, match="two errors are called UserError"):
        type("UserError", (DsbertError,), {})
