"""What became of blocks over a run: from masks.jsonl, the journal of updates, and the newest checkpoint's topology."""

from __future__ import annotations

import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsbert.base.errors import DsbertError
from dsbert.base.jsonl import JsonlFile
from dsbert.base.records import valid_records
from dsbert.checkpoint.loading import read_topology, resolve_checkpoint
from dsbert.checkpoint.state import read_state
from dsbert.sparse.journal import unpack
from dsbert.sparse.topology import unpack_bits
from dsbert.training.attempts import UpdateRecord

_PARTS = ("rows", "cols", "born", "explored")


@dataclass(frozen=True, eq=False)
class LayerHistory:
    """One sparse weight, R x C block positions of which K are taken.

    churn: of each update, the share of K that was re-pointed; new_again: of those, the share that the update before had
    put there; ages: updates that a block had lived when it was pruned, one number for each pruned block.
    """

    name: str
    churn: tuple[float, ...]
    new_again: tuple[float, ...]
    ages: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Where the blocks of one sparse weight stand in the newest checkpoint. active, explored: bool [R, C]; born: the
    number of the update that put a block there, -1 where none stands, int [R, C]."""

    name: str
    density: float
    explored_share: float
    empty_rows: int
    empty_cols: int
    active: np.ndarray
    explored: np.ndarray
    born: np.ndarray


def layer_histories(run: Path, maps: dict[str, LayerMap]) -> tuple[list[int], dict[str, LayerHistory]]:
    """(steps of the updates, histories by layer), of the layers that have a map."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError):
        lines = JsonlFile(run / "masks.jsonl").read(skip_garbled=True)
    updates = valid_records(lines, UpdateRecord)
    found = {}
    for name, layer in maps.items():
        born = np.zeros(int(layer.active.sum()), dtype=np.int64)
        churn, new_again, ages = [], [], []
        for update in updates:
            slots = _slots(update, name)
            slots = slots[(slots >= 0) & (slots < born.size)]
            age = update.update - born[slots]
            churn.append(float(slots.size / max(born.size, 1)))
            new_again.append(float((age == 1).mean()) if slots.size and update.update > 1 else 0.0)
            ages.extend(age.tolist())
            born[slots] = update.update
        found[name] = LayerHistory(name, tuple(churn), tuple(new_again), tuple(ages))
    return [update.step for update in updates], found


def _slots(update: UpdateRecord, name: str) -> np.ndarray:
    """Those that an update re-pointed; none where the line does not say."""
    try:
        found: np.ndarray = unpack(update.layers[name]["slots"]).numpy()
    except (KeyError, ValueError, zlib.error):
        return np.empty(0, np.int64)
    return found


def layer_maps(run: Path) -> dict[str, LayerMap]:
    """By layer, of the newest checkpoint; {} where there is none, or none that can be read, or nothing is sparse."""
    try:
        path = resolve_checkpoint(run)
        state, tensors = read_state(path), read_topology(path)
    except DsbertError:
        return {}
    found = {}
    for name, layer in state.layers.items():
        if layer.block_size is None or any(f"{name}.{part}" not in tensors for part in _PARTS):
            continue
        rows, cols = tensors[f"{name}.rows"].numpy(), tensors[f"{name}.cols"].numpy()
        grid = (layer.shape[0] // layer.block_size, layer.shape[1] // layer.block_size)
        active = np.zeros(grid, dtype=bool)
        active[rows, cols] = True
        born = np.full(grid, -1, dtype=np.int64)
        born[rows, cols] = tensors[f"{name}.born"].numpy()
        explored = unpack_bits(tensors[f"{name}.explored"], grid).numpy()
        found[name] = LayerMap(
            name=name,
            density=float(active.mean()),
            explored_share=float(explored.mean()),
            empty_rows=int((~active.any(1)).sum()),
            empty_cols=int((~active.any(0)).sum()),
            active=active,
            explored=explored,
            born=born,
        )
    return found
