"""Where the blocks of a run stood after any step: from the first draw of its recipe, moved by the journal masks.jsonl.

Shapes: K slots of a weight, R x C block positions (sparse/topology.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import CheckpointError, UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.base.records import valid_records
from dsbert.checkpoint.loading import published
from dsbert.checkpoint.state import CheckpointState, read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.sparse import BlockTopology
from dsbert.sparse.journal import replay, unpack
from dsbert.sparse.topology import combined_digest
from dsbert.training.attempts import UpdateRecord
from dsbert.training.first_topologies import first_topologies

JOURNAL = "masks.jsonl"
Slots = NDArray[np.int64]


def read_updates(run: Path) -> list[UpdateRecord]:
    """The lines of masks.jsonl that are some, oldest first; none where there is no file."""
    with suppress(OSError):
        return valid_records(JsonlFile(run / JOURNAL).read(skip_garbled=True), UpdateRecord)
    return []


def assert_complete(updates: Sequence[UpdateRecord]) -> None:
    """Raise ValueError unless they are the first so many."""
    for number, update in enumerate(updates, start=1):
        if update.update != number:
            raise ValueError(f"{JOURNAL}: expected update {number}, found update {update.update}")


def any_state(run: Path) -> CheckpointState:
    """What the newest checkpoint whose state.json can be read says of the run: recipe and shapes, which are those of
    all.

    Raises UserError where there is none.
    """
    with suppress(OSError):
        for path in reversed(published(run / "checkpoints")):
            with suppress(CheckpointError):
                return read_state(path)
    raise UserError(f"expected a checkpoint in {run / 'checkpoints'}, found none that can be read: wait for the first")


def topologies_after(run: Path, step: int, updates: Sequence[UpdateRecord]) -> dict[str, BlockTopology]:
    """Of every sparse weight after `step` optimizer steps, and after the update that follows that step if one does.

    updates: all of the run's.
    Raises UserError without a checkpoint, which says what the layers are; CheckpointError where the journal does not
    lead to the digest that it names.
    """
    state = any_state(run)
    topologies = first_topologies(run, recipe_from_dict(state.recipe.whole), state.layers)
    updates = [update for update in updates if update.step <= step]
    try:
        assert_complete(updates)
        topologies = replay(topologies, (update.to_json() for update in updates))
        digest = combined_digest({name: topology.digest() for name, topology in topologies.items()})
        if updates and digest != updates[-1].digest:
            raise ValueError(f"one that leads to {digest}")
    except (ValueError, KeyError, IndexError, RuntimeError, zlib.error) as error:
        found = " ".join(str(error).split())
        raise CheckpointError(
            f"expected a journal {run / JOURNAL} that leads to the topology after step {step}, found: {found}: see "
            "`dsbert verify`"
        ) from None
    return topologies


class LayerReplay:
    """One sparse weight, an update at a time.

    active, explored: bool [R, C]; born: of each slot the number of the update that put it where it is, int64 [K].
    """

    def __init__(self, first: BlockTopology) -> None:
        self._rows, self._cols = first.rows.numpy().copy(), first.cols.numpy().copy()
        self.active: NDArray[np.bool_] = first.mask().numpy()
        self.explored = self.active.copy()
        self.born = np.zeros(first.num_active, dtype=np.int64)

    def positions(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(rows, cols) of all slots."""
        return self._rows, self._cols

    def take(self, update: UpdateRecord, name: str) -> Slots:
        """Move what the update moves of this weight; return its slots. Raises ValueError for what does not fit."""
        try:
            change = update.layers[name]
            slots, rows, cols = (unpack(change[key]).numpy() for key in ("slots", "rows", "cols"))
            self.active[self._rows[slots], self._cols[slots]] = False
            if self.active[rows, cols].any():
                raise ValueError("two blocks at one place")
            self._rows[slots], self._cols[slots] = rows, cols
        except (KeyError, ValueError, IndexError, zlib.error) as error:
            raise ValueError(f"{JOURNAL}, update {update.update}: {' '.join(str(error).split())}") from None
        self.active[rows, cols] = self.explored[rows, cols] = True
        self.born[slots] = update.update
        return slots
