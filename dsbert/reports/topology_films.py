"""A weight's topology at any update, and as an animation: small pictures of one colour a cell, drawn by Pillow.

Shapes: R x C block positions; a frame is h x w cells, each a position, or of larger grids a square of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import UserError
from dsbert.inspection.topologies import LayerReplay
from dsbert.reports.topology_history import LayerMap
from dsbert.training.attempts import UpdateRecord

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FRAMES = 33  # of longer runs, evenly spread updates
_MOST_CELLS = 128  # a side; of larger grids a cell shows how many of its positions are taken
_FRAME_MS = 300
_PIXELS = 384  # about the longer side of a file's picture
_HEAD = 16  # pixels of its caption

Colour = tuple[int, int, int]
# What a cell that is one position shows.
STATES: dict[str, Colour] = {
    "never taken": (255, 255, 255),
    "left": (208, 215, 222),
    "taken": (9, 80, 160),
    "taken since the picture before": (225, 111, 36),
}
_LEVELS = 16


@dataclass(frozen=True, eq=False)
class Film:
    """frames: uint8 [h, w], indices into the palette; captions: one each. scale: what the palette means, by colour."""

    name: str
    palette: Sequence[Colour]
    scale: dict[str, Colour]
    frames: Sequence[NDArray[np.uint8]]
    captions: Sequence[str]

    def png(self, number: int) -> bytes:
        """A frame, a pixel a cell."""
        buffer = io.BytesIO()
        self._image(self.frames[number]).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def still(self) -> bytes:
        """The last frame as PNG, enlarged, with its caption."""
        buffer = io.BytesIO()
        self._captioned(len(self.frames) - 1).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def gif(self) -> bytes:
        """All frames, enlarged, with their captions, again and again."""
        images = [self._captioned(number) for number in range(len(self.frames))]
        buffer = io.BytesIO()
        images[0].save(
            buffer, "GIF", save_all=True, append_images=images[1:], duration=_FRAME_MS, loop=0, optimize=False
        )
        return buffer.getvalue()

    def _image(self, frame: NDArray[np.uint8]) -> Image:
        image: Image = _pillow().fromarray(frame)
        image.putpalette([value for colour in self.palette for value in colour])
        return image

    def _captioned(self, number: int) -> Image:
        from PIL import ImageDraw

        frame = self.frames[number]
        times = max(1, _PIXELS // max(frame.shape))
        cells = np.kron(frame, np.ones((times, times), dtype=np.uint8))
        whole = np.zeros((cells.shape[0] + _HEAD, max(cells.shape[1], _PIXELS)), dtype=np.uint8)
        whole[_HEAD:, : cells.shape[1]] = cells
        image = self._image(whole)
        darkest = min(range(len(self.palette)), key=lambda index: sum(self.palette[index]))
        ImageDraw.Draw(image).text((2, 2), self.captions[number], fill=darkest)
        return image


def film(layer: LayerMap, updates: Sequence[UpdateRecord]) -> Film:
    """Of a weight from its first topology on. updates: those that fit, from the first on. Raises UserError where Pillow
    is missing."""
    _pillow()
    shown = _spread(len(updates), MOST_FRAMES)
    replayed = LayerReplay(layer.first)
    states, captions, before = [], [], 0
    for number in range(len(updates) + 1):
        if number:
            replayed.take(updates[number - 1], layer.name)
        if number in shown:
            states.append(_states(replayed, before))
            step = f"update {number}, step {updates[number - 1].step:,}" if number else "at the start"
            captions.append(f"{step}: {replayed.explored.mean():.1%} explored")
            before = number
    factor = max(-(-side // _MOST_CELLS) for side in layer.active.shape)
    if factor == 1:
        return Film(layer.name, list(STATES.values()), STATES, states, captions)
    shares = [_shares(state, factor) for state in states]
    most = max(float(share.max()) for share in shares) or 1.0
    ramp = [_blend(level / (_LEVELS - 1)) for level in range(_LEVELS)]
    frames = [np.rint(share / most * (_LEVELS - 1)).astype(np.uint8) for share in shares]
    scale = {"none taken": ramp[0], f"{most:.0%} of {factor} x {factor} positions taken": ramp[-1]}
    return Film(layer.name, ramp, scale, frames, captions)


def _spread(last: int, most: int) -> set[int]:
    """At most so many of 0..last, evenly, both ends among them."""
    count = min(last + 1, most)
    return {round(index * last / max(count - 1, 1)) for index in range(count)}


def _states(layer: LayerReplay, since: int) -> NDArray[np.uint8]:
    """[R, C], in the order of STATES."""
    states: NDArray[np.uint8] = layer.explored.astype(np.uint8) + layer.active.astype(np.uint8)
    rows, cols = layer.positions()
    late = layer.born > since
    states[rows[late], cols[late]] = 3
    return states


def _shares(states: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """The share of each square's positions that is taken; those at the lower and right edges may be smaller."""
    taken = states >= 2
    edges = [np.arange(0, side, factor) for side in taken.shape]
    sums = np.add.reduceat(np.add.reduceat(taken.astype(np.int64), edges[0], 0), edges[1], 1)
    sizes = [np.diff(np.append(starts, side)) for starts, side in zip(edges, taken.shape, strict=True)]
    shares: NDArray[np.float64] = sums / np.outer(sizes[0], sizes[1])
    return shares


def _blend(share: float) -> Colour:
    """From never taken to taken."""
    start, end = STATES["never taken"], STATES["taken"]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("expected Pillow for pictures, found none: pip install 'dsbert[experiment]'") from None
    return Image
