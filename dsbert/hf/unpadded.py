"""Rows without their padding: the tokens of a padded batch one behind the other, as dsbert's encoders take them.

Shapes: B rows of S positions, T of which are tokens; H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpadded:
    """Where the tokens of rows [B, S] stand.

    places: int64 [T], of the B S positions, ascending; None: all are tokens. starts: int64 [B + 1] on the CPU, where
    each row's tokens begin, and T.
    """

    rows: int
    columns: int
    places: Tensor | None
    starts: Tensor

    @classmethod
    def of(cls, rows: int, columns: int, attention_mask: Tensor | None) -> Unpadded | None:
        """By a mask [B, S] of zeros and others; None: all are tokens.

        Returns None where the rows cannot be taken apart: a mask of pairs, no positions, or a first position that is
        padding, of which transformers' pooler makes something all the same.
        """
        if not rows * columns:
            return None
        whole = torch.arange(rows + 1) * columns
        if attention_mask is None:
            return cls(rows, columns, None, whole)
        if attention_mask.shape != (rows, columns):
            return None
        seen = attention_mask.to(torch.bool)
        counts = torch.stack([seen.sum(1), seen[:, 0]]).cpu()  # one wait for a card, not two
        if not counts[1].all():
            return None
        starts = torch.zeros_like(whole)
        torch.cumsum(counts[0], 0, out=starts[1:])
        if int(starts[-1]) == rows * columns:
            return cls(rows, columns, None, whole)
        return cls(rows, columns, seen.flatten().nonzero().flatten(), starts)

    def take(self, x: Tensor) -> Tensor:
        """[B, S, ...], or [1, S, ...] for rows that are alike -> [1, T, ...]."""
        flat = x.expand(self.rows, *x.shape[1:]).flatten(0, 1)
        return (flat if self.places is None else flat.index_select(0, self.places))[None]

    def put(self, x: Tensor) -> Tensor:
        """[1, T, H] -> [B, S, H], zeros where there is no token."""
        if self.places is None:
            return x.view(self.rows, self.columns, -1)
        empty = x.new_zeros(self.rows * self.columns, x.shape[2])
        return empty.index_copy(0, self.places, x[0]).view(self.rows, self.columns, -1)

    def first(self, x: Tensor) -> Tensor:
        """Of [1, T, H] each row's first token: [B, H]."""
        return x[0].index_select(0, self.starts[:-1].to(x.device))
