"""Random choices without a random generator.

Every position of a weight gets a 64-bit hash of (seed, purpose, update, layer, position); the smallest hashes win.
No generator state exists, so none can be lost, saved wrongly or advance differently on two ranks. Integer arithmetic
only: the same on CPU, GPU and every release. Golden vectors stand in tests/sparse/test_draw.py.
"""

import math
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), its constants written as signed 64-bit integers: int64 wraps, as it must.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_SIGN = -(1 << 63)
# A chunk and its temporaries stay in a core's L2 cache; a whole BERT-Base weight at B = 1 does not.
_CPU_CHUNK = 1 << 15


@dataclass(frozen=True)
class DrawKey:
    """What a draw depends on, apart from the position. Two draws that differ in any field are independent."""

    seed: int
    purpose: str
    update: int
    layer: str

    def word(self) -> int:
        """The key as one signed 64-bit integer."""
        text = f"{self.seed}\0{self.purpose}\0{self.update}\0{self.layer}"
        word = xxhash.xxh3_64_intdigest(text.encode())
        return word - (1 << 64) if word >= 1 << 63 else word


def hash_positions(key: DrawKey, positions: Tensor) -> Tensor:
    """Hashes of `positions` (int64, any shape) under `key`, as int64 whose SIGNED order is the order of the hashes."""
    x = positions * _GOLDEN
    x += key.word()
    x += _GOLDEN
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _MIX_1
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _MIX_2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x ^ _SIGN


def smallest(values: Tensor, count: int) -> Tensor:
    """Indices (int64 [count], ascending) of the `count` smallest of the 1-D `values`; ties go to the lower index."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    threshold = values.kthvalue(count).values
    below = (values < threshold).nonzero().flatten()
    ties = (values == threshold).nonzero().flatten()[: count - below.numel()]
    return torch.cat([below, ties]).sort().values


def draw_positions(key: DrawKey, eligible: Tensor, count: int) -> Tensor:
    """The `count` eligible positions with the smallest hashes.

    eligible: bool [N]. Returns int64 [count], ascending. Raises ValueError if fewer than `count` are eligible.
    """
    available = int(eligible.sum())
    if count > available:
        raise ValueError(f"expected at least {count} eligible positions, found {available}")
    if count == available:
        return eligible.nonzero().flatten()
    # Only hashes below a threshold that `count` positions pass almost surely are kept, so that nothing of size N is
    # ordered. The threshold never changes the answer: when too few pass, it is raised and the scan repeated.
    fraction = count / available
    fraction += 6 * math.sqrt(fraction / available) + 16 / available
    while True:
        positions, hashes = _candidates(key, eligible, fraction)
        if positions.numel() >= count:
            return positions[smallest(hashes, count)]
        fraction *= 2


def _candidates(key: DrawKey, eligible: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Eligible positions, ascending, whose hash lies in the lowest `fraction` of all hashes, and those hashes."""
    size = eligible.numel()
    chunk = _CPU_CHUNK if eligible.device.type == "cpu" else size
    threshold = min(int(fraction * 2.0**64), (1 << 64) - 1) + _SIGN
    found, values = [], []
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        hashes = hash_positions(key, torch.arange(start, stop, device=eligible.device))
        keep = ((hashes <= threshold) & eligible[start:stop]).nonzero().flatten()
        found.append(keep + start)
        values.append(hashes[keep])
    return torch.cat(found), torch.cat(values)
