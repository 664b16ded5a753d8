"""Pictures of what became of blocks, and of where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsbert.reports.drawing import Picture, new_figure
from dsbert.reports.topology_history import LayerHistory, LayerMap

_MOST_MAPS = 6  # weights that are shown: those of the first layer come first
_MOST_CELLS = 256  # a side of a heat map; of larger grids, cells are means


def churn_picture(steps: Sequence[int], histories: Mapping[str, LayerHistory]) -> Picture:
    """Over the updates: how much was re-pointed, and how much of that was new at the update before; a line a weight,
    and their mean."""
    figure, (left, right) = new_figure(2)
    for axes, key in ((left, "churn"), (right, "new_again")):
        values = np.array([getattr(one, key) for one in histories.values()])
        for line in values:
            axes.plot(steps, line, color="0.75", linewidth=0.8)
        axes.plot(steps, values.mean(0), color="C0", label="mean of all weights")
    left.set(xlabel="step", ylabel="share of the blocks that was re-pointed", ylim=(0, None))
    right.set(xlabel="step", ylabel="share of those that was new", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize="small")
    return Picture(figure)


def age_picture(histories: Mapping[str, LayerHistory], num_updates: int) -> Picture:
    """How long a block had lived when it was pruned, in updates."""
    figure, (axes,) = new_figure()
    ages = np.concatenate([np.asarray(one.ages, dtype=np.int64) for one in histories.values()])
    bins = np.arange(0.5, max(num_updates, 1) + 1.5)
    axes.hist(ages, bins=bins.tolist(), color="C0")
    axes.set(xlabel="updates that a pruned block had lived", ylabel="pruned blocks")
    return Picture(figure)


def map_picture(maps: Mapping[str, LayerMap], last_update: int) -> Picture:
    """Where blocks stand, by how long they have; grey: seen and left."""
    shown = list(maps.values())[:_MOST_MAPS]
    figure, panels = new_figure(len(shown), height=4.8, rows=2 if len(shown) > 3 else 1)
    image = None
    for axes, layer in zip(panels, shown, strict=True):
        left = np.ma.masked_where(layer.active | ~layer.explored, np.ones_like(layer.born, dtype=float))
        age = np.ma.masked_where(~layer.active, (last_update - layer.born).astype(float))
        axes.imshow(_coarse(left), cmap="Greys", vmin=0, vmax=4, interpolation="nearest", aspect="equal")
        image = axes.imshow(_coarse(age), cmap="viridis_r", vmin=0, vmax=max(last_update, 1), interpolation="nearest")
        axes.set_title(_short(layer.name), fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    figure.colorbar(image, ax=panels, label="age in updates", shrink=0.8)
    return Picture(figure)


def _coarse(values: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """At most _MOST_CELLS a side: means of what is not masked."""
    factor = max(-(-side // _MOST_CELLS) for side in values.shape)
    if factor == 1:
        return values
    rows, cols = (side // factor * factor for side in values.shape)
    tiled = values[:rows, :cols].reshape(rows // factor, factor, cols // factor, factor)
    return np.ma.asarray(tiled.mean(axis=(1, 3)))


def _short(name: str) -> str:
    return ".".join(name.split(".")[-4:])
