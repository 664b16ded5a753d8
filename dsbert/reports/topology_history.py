"""What became of blocks over a run: from masks.jsonl, the journal of updates, and the newest checkpoint's topology.

Shapes: a sparse weight has R x C block positions, of which K are taken; U updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsbert.base.errors import DsbertError
from dsbert.checkpoint.loading import read_topology, resolve_checkpoint
from dsbert.checkpoint.state import read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.inspection.topologies import JOURNAL, LayerReplay, assert_complete
from dsbert.monitoring.step_records import is_number
from dsbert.sparse import BlockTopology
from dsbert.sparse.topology import unpack_bits
from dsbert.sparse.update_norms import SUMMARY
from dsbert.training.attempts import UpdateRecord
from dsbert.training.first_topologies import first_topologies

_PARTS = ("rows", "cols", "born", "explored")
GROUPS = ("kept", "dropped", "new")


@dataclass(eq=False)
class LayerHistory:
    """One sparse weight; a number for each update, if not said otherwise.

    churn: the share of K that was re-pointed; removed_new_ratio: of those, the share that the update before had put
    there; explored: the share of positions that was taken at any time so far (degrees of freedom); empty_rows,
    empty_cols: block rows and columns without a block, after it; norms: by group of blocks "<group>_<statistic>"
    (sparse/update_norms.py), NaN where the journal has none. deaths: how many blocks had lived so many updates when
    they were pruned, by that number, int64 [U + 1].
    """

    name: str
    churn: list[float] = field(default_factory=list)
    removed_new_ratio: list[float] = field(default_factory=list)
    explored: list[float] = field(default_factory=list)
    empty_rows: list[int] = field(default_factory=list)
    empty_cols: list[int] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=dict)
    deaths: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def add(self, update: UpdateRecord, layer: LayerReplay) -> None:
        """The next update. Raises ValueError where it does not fit what was before."""
        before = layer.born.copy()
        slots = layer.take(update, self.name)
        ages = update.update - before[slots]
        self.churn.append(slots.size / max(before.size, 1))
        self.removed_new_ratio.append(float((ages == 1).mean()) if slots.size and update.update > 1 else 0.0)
        self.explored.append(float(layer.explored.mean()))
        self.empty_rows.append(int((~layer.active.any(1)).sum()))
        self.empty_cols.append(int((~layer.active.any(0)).sum()))
        counts = np.bincount(ages, minlength=update.update + 1)
        self.deaths = counts + np.pad(self.deaths, (0, len(counts) - len(self.deaths)))
        said = update.norms.get(self.name, {})
        for group in GROUPS:
            for statistic, value in zip(SUMMARY, [*said.get(group, ()), *[math.nan] * len(SUMMARY)], strict=False):
                self.norms.setdefault(f"{group}_{statistic}", []).append(value if is_number(value) else math.nan)


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Where the blocks of one sparse weight stand in the newest checkpoint, after so many steps. active, explored: bool
    [R, C]; born: the number of the update that put a block there, -1 where none stands, int [R, C]. first: where they
    stood at first."""

    name: str
    step: int
    density: float
    explored_share: float
    empty_rows: int
    empty_cols: int
    active: np.ndarray
    explored: np.ndarray
    born: np.ndarray
    first: BlockTopology


def layer_histories(updates: Sequence[UpdateRecord], maps: Mapping[str, LayerMap]) -> dict[str, LayerHistory]:
    """Of the layers that have a map. Raises ValueError for updates that do not fit each other, or do not lead there."""
    assert_complete(updates)
    found = {}
    for name, layer in maps.items():
        replayed, found[name] = LayerReplay(layer.first), LayerHistory(name)
        mapped = [update for update in updates if update.step <= layer.step]
        for update in mapped:
            found[name].add(update, replayed)
        if not np.array_equal(replayed.active, layer.active):
            raise ValueError(f"{JOURNAL} does not lead to where the blocks of {name} stand after step {layer.step}")
        for update in updates[len(mapped) :]:
            found[name].add(update, replayed)
    return found


def layer_maps(run: Path) -> dict[str, LayerMap]:
    """By layer, of the newest checkpoint; {} where there is none, or none that can be read, or nothing is sparse."""
    try:
        path = resolve_checkpoint(run)
        state, tensors = read_state(path), read_topology(path)
        first = first_topologies(run, recipe_from_dict(state.recipe.whole), state.layers)
    except (DsbertError, ValueError):
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
            step=state.step,
            density=float(active.mean()),
            explored_share=float(explored.mean()),
            empty_rows=int((~active.any(1)).sum()),
            empty_cols=int((~active.any(0)).sum()),
            active=active,
            explored=explored,
            born=born,
            first=first[name],
        )
    return found
