"""Which sample stands at which position of a job: position p is in epoch p // N, at place p % N of that epoch's order.

Without a window an epoch is one keyed permutation of all samples. With a window it is shuffled in two levels, for
storage on which random reads are slow: chunks of neighbouring samples are put in a random order, and then the samples
inside each window of many chunks are shuffled, so that what is read at one time comes from a few places. Either way
every sample stands in an epoch once, nothing is stored, and any position can be asked for at any time.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import CHUNKS, ORDER, WINDOWS, hash_int
from dsbert.data.permutation import permute

Int64s = NDArray[np.int64]

# Positions that are worked out together, since arrays of a batch are too short to be fast; over so many epochs at most.
_BLOCK, _BLOCK_EPOCHS = 4096, 16
_KEPT_BLOCKS = 8
_CHUNKS_PER_WINDOW = 16


class Order:
    """The order of N samples for one seed. window: samples that are shuffled together; 0: all of an epoch."""

    def __init__(self, num_samples: int, seed: int, window: int = 0) -> None:
        """Raises ValueError for a negative window."""
        if window < 0:
            raise ValueError(f"expected a window of at least 0 samples, found {window}")
        self.num_samples = num_samples
        self._seed = seed
        self._window = window if window < num_samples else 0
        self._block_size = min(_BLOCK, _BLOCK_EPOCHS * num_samples)
        self._chunk = max(1, window // _CHUNKS_PER_WINDOW)
        self._blocks: dict[int, Int64s] = {}
        self._chunk_orders: dict[int, tuple[Int64s, Int64s]] = {}

    def at(self, position: int, count: int) -> tuple[Int64s, Int64s]:
        """Epoch and sample of the positions [position, position + count): int64 [count] both."""
        positions = np.arange(position, position + count, dtype=np.int64)
        blocks = range(position // self._block_size, -(-(position + count) // self._block_size))
        samples = np.concatenate([np.zeros(0, np.int64), *map(self._block, blocks)])
        first = position - blocks.start * self._block_size
        return positions // self.num_samples, samples[first : first + count]

    def _block(self, number: int) -> Int64s:
        """The samples at a block of positions. A batch after the other asks for the same few blocks."""
        found = self._blocks.get(number)
        if found is None:
            epochs, places = np.divmod(
                np.arange(number * self._block_size, (number + 1) * self._block_size), self.num_samples
            )
            found = np.empty_like(places)
            for epoch in _distinct(epochs):
                here = epochs == epoch
                found[here] = self._of_epoch(epoch, places[here])
            while len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)), None)
            self._blocks[number] = found
        return found

    def _of_epoch(self, epoch: int, places: Int64s) -> Int64s:
        if not self._window:
            return permute(places, self.num_samples, hash_int(self._seed, ORDER, epoch))
        shuffled = np.empty_like(places)
        windows = places // self._window
        for window in _distinct(windows):
            here = windows == window
            first = window * self._window
            size = min(self._window, self.num_samples - first)
            key = hash_int(self._seed, WINDOWS, epoch, window)
            shuffled[here] = first + permute(places[here] - first, size, key)
        chunks, starts = self._chunk_order(epoch)
        slots = np.searchsorted(starts, shuffled, side="right") - 1
        return chunks[slots] * self._chunk + shuffled - starts[slots]

    def _chunk_order(self, epoch: int) -> tuple[Int64s, Int64s]:
        """The epoch's order of chunks, and where each begins in it; the data's last chunk may be a short one."""
        found = self._chunk_orders.get(epoch)
        if found is None:
            count = -(-self.num_samples // self._chunk)
            chunks = permute(np.arange(count), count, hash_int(self._seed, CHUNKS, epoch))
            sizes = np.minimum(self._chunk, self.num_samples - chunks * self._chunk)
            found = chunks, np.cumsum(sizes) - sizes
            while len(self._chunk_orders) > 1:
                self._chunk_orders.pop(next(iter(self._chunk_orders)), None)
            self._chunk_orders[epoch] = found
        return found


def _distinct(values: Int64s) -> Iterable[int]:
    distinct: list[int] = np.unique(values).tolist()
    return distinct
