"""Pictures and histograms of a run's mask updates, made again from masks.jsonl: for W&B and TensorBoard, whose
processes have nothing of the run but its files.

R x C block positions of a weight, of which K are active. A slot is an index 0..K-1 into the active ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsbert.base.durable import open_regular
from dsbert.base.jsonl import parse_object
from dsbert.checkpoint.loading import published
from dsbert.checkpoint.state import LayerRecord, read_state
from dsbert.config.recipe import recipe_from_dict
from dsbert.sparse.journal import replay, unpack
from dsbert.sparse.topology import BlockTopology, combined_digest
from dsbert.training.attempts import UpdateRecord
from dsbert.training.first_topologies import first_topologies
from dsbert.training.history import read_config

# Of all weights together: at block size 1 a large model has so many that drawing them would take a core of the run's.
_MOST_POSITIONS = 1 << 24
_MOST_BARS = 64
_PANEL, _GAP = 96, 4  # pixels: the longer side of a weight's map, and what lies between two
_NEVER, _LEFT = (255, 255, 255), (205, 205, 205)
# From the youngest block to the oldest: five of viridis's colors, which tell ages apart for everybody and in grey.
_AGES = np.array([(253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84)], dtype=np.float64)

_COLORS = "Yellow: blocks of this update; dark: old ones; grey: places that were tried and left; white: never used."


class Histogram(NamedTuple):
    """counts: int [n]; edges: float [n + 1]."""

    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, eq=False)
class UpdateMedia:
    """Of one mask update. blocks: uint8 [height, width, 3], a map of each sparse weight, which the caption explains;
    histograms: by name."""

    number: int
    blocks: np.ndarray
    caption: str
    histograms: dict[str, Histogram]


class TopologyMedia:
    """Follows the mask updates of a run.

    Args:
        journal: masks.jsonl, which may still grow.
        topologies: of all sparse weights, before the first update.

    Raises:
        ValueError: there is nothing to draw, or too much of it.
    """

    def __init__(self, journal: Path, topologies: Mapping[str, BlockTopology]) -> None:
        positions = sum(topology.grid[0] * topology.grid[1] for topology in topologies.values())
        if not 0 < positions <= _MOST_POSITIONS:
            raise ValueError(f"expected at most {_MOST_POSITIONS:,} block positions to draw, found {positions:,}")
        self._journal, self._topologies = journal, dict(topologies)
        self._born = {name: np.zeros(one.num_active, dtype=np.int64) for name, one in topologies.items()}
        self._explored = {name: one.mask().numpy() for name, one in topologies.items()}
        self._rows = _by_layer(list(topologies))
        self._offset = 0

    def after(self, step: int) -> UpdateMedia | None:
        """Of the update that followed `step`; None if none did. From call to call, steps must not fall.

        Raises:
            OSError: the journal cannot be read.
            ValueError: it is damaged, or does not lead on from the topologies so far.
        """
        found: tuple[int, np.ndarray] | None = None
        with open_regular(self._journal) as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = parse_object(line)
                update = UpdateRecord.from_json(entry)
                if update.step > step:
                    break
                self._offset += len(line)
                ages = self._take(update, entry or {})
                found = (update.update, ages) if update.step == step else None
        return self._media(*found) if found else None

    def _take(self, update: UpdateRecord, entry: dict[str, Any]) -> np.ndarray:
        """Go on by an update; returns the ages of the blocks that it pruned, in updates."""
        ages = []
        try:
            self._topologies = replay(self._topologies, [entry])
            for name, change in update.layers.items():
                slots = unpack(change["slots"]).numpy()
                ages.append(update.update - self._born[name][slots])
                self._born[name][slots] = update.update
                self._explored[name] |= self._topologies[name].mask().numpy()
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{self._journal}, update {update.update}: {error}") from None
        digest = combined_digest({name: topology.digest() for name, topology in self._topologies.items()})
        if digest != update.digest:
            raise ValueError(f"{self._journal}: expected update {update.update} to lead to {update.digest}")
        return np.concatenate(ages) if ages else np.empty(0, dtype=np.int64)

    def _media(self, number: int, ages_at_death: np.ndarray) -> UpdateMedia:
        masks = [topology.mask().numpy() for topology in self._topologies.values()]
        panels = [
            [_panel(self._topologies[name], self._born[name], self._explored[name], number) for name in row]
            for row in self._rows
        ]
        caption = f"A row for each layer, from the left: {', '.join(map(_in_layer, self._rows[0]))}. {_COLORS}"
        histograms = {
            "age": whole_histogram(number - np.concatenate(list(self._born.values()))),
            "age_at_death": whole_histogram(ages_at_death),
            "blocks_per_row": whole_histogram(np.concatenate([mask.sum(1) for mask in masks])),
            "blocks_per_column": whole_histogram(np.concatenate([mask.sum(0) for mask in masks])),
        }
        return UpdateMedia(number, _montage(panels), caption, histograms)


def open_media(run_dir: Path, layers: Mapping[str, LayerRecord] | None = None) -> TopologyMedia:
    """Of a run, from its first update on. layers: of every fully connected weight, by default those of a checkpoint.

    Raises:
        DsbertError, OSError, ValueError: the run's records do not say what it began with.
    """
    recipe = recipe_from_dict(read_config(run_dir)["recipe"])
    if layers is None:
        checkpoints = published(run_dir / "checkpoints")
        if not checkpoints:
            raise ValueError("expected a checkpoint, which knows the shapes of the weights, found none")
        layers = read_state(checkpoints[-1]).layers
    return TopologyMedia(run_dir / "masks.jsonl", first_topologies(run_dir, recipe, layers))


def whole_histogram(values: np.ndarray) -> Histogram:
    """Of whole numbers, none negative: a bar for each from 0 on, or for several where that would be too many."""
    most = int(values.max(initial=0))
    width = most // _MOST_BARS + 1
    edges = np.arange(-0.5, most + width, width)
    counts, _ = np.histogram(values, bins=edges)
    return Histogram(counts, edges)


def _panel(topology: BlockTopology, born: np.ndarray, explored: np.ndarray, number: int) -> np.ndarray:
    """float [height, width, 3]: where the blocks of a weight stand, by age. A cell of several blocks is their mean."""
    pixels = np.where(explored[..., None], np.array(_LEFT, np.float64), np.array(_NEVER, np.float64))
    age = (number - born) / max(number, 1) * (len(_AGES) - 1)
    places = np.arange(len(_AGES))
    colors = np.stack([np.interp(age, places, channel) for channel in _AGES.T], axis=1)
    pixels[topology.rows.numpy(), topology.cols.numpy()] = colors
    longest = max(pixels.shape[:2])
    if longest > _PANEL:
        return _shrunk(pixels, -(-longest // _PANEL))
    factor = _PANEL // longest
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _shrunk(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor cells; the last ones may be smaller."""
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], factor)
        sizes = np.diff(starts, append=pixels.shape[axis])
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        pixels = np.add.reduceat(pixels, starts, axis=axis) / sizes.reshape(shape)
    return pixels


def _montage(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """uint8 [height, width, 3]: rows of panels, on grey."""
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    width = max(sum(panel.shape[1] + _GAP for panel in row) - _GAP for row in rows)
    canvas = np.full((sum(heights) + _GAP * (len(rows) - 1), width, 3), 128, dtype=np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for panel in row:
            canvas[top : top + panel.shape[0], left : left + panel.shape[1]] = panel.round()
            left += panel.shape[1] + _GAP
        top += height + _GAP
    return canvas


def _by_layer(names: Sequence[str]) -> list[list[str]]:
    """Names of weights, those of a layer together: of those that have a number, it is the layer's."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(next(filter(str.isdigit, name.split(".")), ""), []).append(name)
    return list(rows.values())


def _in_layer(name: str) -> str:
    """The name of a weight in its layer."""
    parts = name.split(".")
    return ".".join(parts[next((at + 1 for at, part in enumerate(parts) if part.isdigit()), 0) :])
