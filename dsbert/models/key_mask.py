"""What an attention mask hides: keys, for all queries of a sequence alike, and those that are far away.

transformers hands on masks of every pair of positions, [b, 1, S, S]; kernels want to know which keys are padding, and
how far a query sees. Shapes: b sequences, S positions.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class KeyMask(NamedTuple):
    """visible: bool [b or 1, S], the keys that are seen; None: all. window: tokens to each side; None: all."""

    visible: Tensor | None
    window: int | None


# All layers of a forward pass are given the same few masks: each is read once.
_read: list[tuple[weakref.ref[Tensor], int, int | None, KeyMask | None]] = []


def key_mask(mask: Tensor | None, positions: int, sliding_window: int | None = None) -> KeyMask | None:
    """What a mask, bool [b or 1, 1, S or 1, S], says; None if that is more than which keys are padding and how far is
    seen. sliding_window: a hint, the first distance that is not seen (the way in which transformers' layers count)."""
    if mask is None:
        return KeyMask(None, None)
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != positions:
        return None
    if mask.is_inference():  # nothing tells whether it has changed
        return _look(mask, sliding_window)
    for known, version, hint, found in _read:
        if known() is mask and version == mask._version and hint == sliding_window:
            return found
    found = _look(mask, sliding_window)
    _read[:] = [entry for entry in _read if entry[0]() is not None][-3:]
    _read.append((weakref.ref(mask), mask._version, sliding_window, found))
    return found


def _look(mask: Tensor, sliding_window: int | None) -> KeyMask | None:
    pairs = mask[:, 0]  # [b, S or 1, S]
    if pairs.shape[1] == 1 or pairs.stride(1) == 0:
        return KeyMask(pairs[:, 0].clone(), None)  # a view would keep all of the mask
    if pairs.shape[1] != pairs.shape[2]:
        return None
    visible = pairs.diagonal(dim1=1, dim2=2).clone()  # [b, S]: whoever is seen is seen by himself
    if torch.equal(pairs, visible[:, None].expand_as(pairs)):
        return KeyMask(visible, None)
    if sliding_window is None:
        return None
    places = torch.arange(pairs.shape[1], device=mask.device)
    near = (places - places[:, None]).abs() < sliding_window
    return KeyMask(visible, sliding_window - 1) if torch.equal(pairs, visible[:, None] & near) else None
