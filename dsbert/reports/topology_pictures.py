"""Pictures of what became of blocks, and of where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsbert.reports.drawing import Picture, new_figure
from dsbert.reports.topology_history import GROUPS, LayerHistory, LayerMap

MOST_WEIGHTS = 6  # that are shown: those of the first layer come first
_MOST_CELLS = 256  # a side of a heat map; of larger grids, cells are means


def churn_picture(steps: Sequence[int], histories: Mapping[str, LayerHistory]) -> Picture:
    """Over the updates: how much was re-pointed, and how much of that was new at the update before; a line a weight,
    and their mean."""
    figure, (left, right) = new_figure(2)
    _lines(left, steps, [one.churn for one in histories.values()])
    _lines(right, steps, [one.removed_new_ratio for one in histories.values()])
    left.set(xlabel="step", ylabel="churn: share of blocks re-pointed", ylim=(0, None))
    right.set(xlabel="step", ylabel="removed-new ratio", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize="small")
    return Picture(figure)


def explored_picture(steps: Sequence[int], histories: Mapping[str, LayerHistory]) -> Picture:
    """Over the updates: which positions were ever taken, and which lines of blocks are empty."""
    figure, (left, right) = new_figure(2)
    _lines(left, steps, [one.explored for one in histories.values()])
    rows = _lines(right, steps, [one.empty_rows for one in histories.values()], "rows")
    cols = _lines(right, steps, [one.empty_cols for one in histories.values()], "columns", "C1")
    left.set(xlabel="step", ylabel="positions explored (DOF)", ylim=(0, 1.02))
    # Even where all are zero, which is good news, the axis has a unit.
    right.set(xlabel="step", ylabel="empty block rows, columns", ylim=(0, max(1.0, 1.05 * rows, 1.05 * cols)))
    right.legend(frameon=False, fontsize="small")
    return Picture(figure)


def norm_picture(steps: Sequence[int], histories: Mapping[str, LayerHistory]) -> Picture | None:
    """Over the updates: norms of the blocks that were kept and dropped, and of those that the update before had put
    there; bands from a tenth to nine tenths of the blocks. None where the journal has none."""
    means = {
        key: _mean([one.norms[key] for one in histories.values()])
        for key in next(iter(histories.values())).norms
    }  # fmt: skip
    if all(np.isnan(values).all() for values in means.values()):
        return None
    figure, (left, right) = new_figure(2)
    for group, color in zip(GROUPS, ("C0", "C3", "C1"), strict=True):
        left.plot(steps, means[f"{group}_p50"], color=color, label=group)
        left.fill_between(steps, means[f"{group}_p10"], means[f"{group}_p90"], color=color, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="norm of a block, mean of all weights", ylim=(0, None))
    left.legend(frameon=False, fontsize="small")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [np.divide(one.norms["new_p50"], one.norms["kept_p50"]).tolist() for one in histories.values()]
    _lines(right, steps, ratios)
    right.set(xlabel="step", ylabel="median norm, new over kept", ylim=(0, None))
    right.legend(frameon=False, fontsize="small")
    return Picture(figure)


def _lines(
    axes: Any,
    steps: Sequence[int],
    values: Sequence[Sequence[float]],
    name: str = "mean of all weights",
    color: str = "C0",
) -> float:
    """A line for each weight, and one for their mean. Returns the largest value."""
    for line in values:
        axes.plot(steps, line, color="0.75", linewidth=0.8)
    axes.plot(steps, _mean(values), color=color, label=name)
    return max((max(line) for line in values if line), default=0.0)


def _mean(values: Sequence[Sequence[float]]) -> np.ndarray:
    """Over weights, of what is known; NaN where nothing is."""
    table = np.asarray(values, dtype=float)
    known = ~np.isnan(table)
    sums, counts = np.where(known, table, 0.0).sum(0), known.sum(0)
    means: np.ndarray = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


def age_picture(histories: Mapping[str, LayerHistory]) -> Picture:
    """How long a block had lived when it was pruned, in updates."""
    figure, (axes,) = new_figure()
    deaths = np.sum([one.deaths for one in histories.values()], axis=0)
    axes.bar(np.arange(1, len(deaths)), deaths[1:], width=1.0, color="C0")
    axes.set(xlabel="updates that a pruned block had lived", ylabel="pruned blocks")
    return Picture(figure)


def map_picture(maps: Mapping[str, LayerMap]) -> Picture:
    """Where blocks of at most MOST_WEIGHTS stand, by how long they have; grey: seen and left."""
    shown = list(maps.values())[:MOST_WEIGHTS]
    last_update = max(int(layer.born.max(initial=0)) for layer in shown)
    figure, panels = new_figure(len(shown), height=4.8, rows=2 if len(shown) > 3 else 1)
    image = None
    for axes, layer in zip(panels, shown, strict=True):
        left = np.ma.masked_where(layer.active | ~layer.explored, np.ones_like(layer.born, dtype=float))
        age = np.ma.masked_where(~layer.active, (last_update - layer.born).astype(float))
        axes.imshow(_coarse(left), cmap="Greys", vmin=0, vmax=4, interpolation="nearest", aspect="equal")
        image = axes.imshow(_coarse(age), cmap="viridis_r", vmin=0, vmax=max(last_update, 1), interpolation="nearest")
        axes.set_title(short_name(layer.name), fontsize=8)
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


def short_name(name: str) -> str:
    """Of a weight, as a heading."""
    return ".".join(name.split(".")[-4:])
