"""What the sparse library refuses, said of the recipe that asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsbert.base.errors import UserError
from dsbert.sparse.sparsity_errors import SparsityError


@contextmanager
def named_as_in_recipes(*, on_all_ranks: bool = False) -> Iterator[None]:
    """Raises UserError with the recipe's key for a `SparsityError` inside; on_all_ranks: all of them raise it."""
    try:
        yield
    except SparsityError as error:
        translated = UserError(error.within("sparsity"))
        translated.shared = on_all_ranks
        raise translated from None
