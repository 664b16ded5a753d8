"""A micro-batch as the model takes it: real tokens alone, one sequence behind the other.

The rows of a Batch are of one length, and what its samples do not fill, a quarter and more, is padding: no layer sees
any. A micro-batch without samples is one token that is asked for nothing: every rank has to take every step, and
transformers' layers take no tokens for a mistake.

Legend: n sequences, T tokens in all of them, m of those asked for, S columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsbert.data.stream import IGNORE, Batch


@dataclass(frozen=True)
class DeviceBatch:
    """All on the model's device but `starts`, which stays on the CPU: kernels are launched by it, and nobody waits.

    input_ids, token_type_ids and position_ids (from 0 in every sequence): int64 [T]. starts int64 [n + 1]: where each
    sequence begins, and T; first_tokens int64 [n]: the same without T. mlm_positions int64 [m]: of the T tokens,
    ascending; mlm_labels int64 [m]. nsp_labels int64 [n]: -100 where it is not asked.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    starts: Tensor
    first_tokens: Tensor
    mlm_positions: Tensor
    mlm_labels: Tensor
    nsp_labels: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> DeviceBatch:
        """The samples of a batch without their padding.

        Raises ValueError for a sample without tokens, or one that is asked for padding.
        """
        if not batch.num_samples:
            return _unasked(device)
        rows = batch.attention_mask.astype(np.bool_)
        real = np.flatnonzero(rows)  # flat index row * S + column, ascending: the tokens in their order
        asked = np.searchsorted(real, batch.mlm_positions)
        if not rows.any(axis=1).all() or not np.array_equal(real[asked[asked < real.size]], batch.mlm_positions):
            raise ValueError("expected samples of at least one token, asked for tokens alone, found padding")
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(rows, axis=1), out=starts[1:])
        arrays = (
            batch.input_ids.reshape(-1)[real],
            batch.token_type_ids.reshape(-1)[real],
            real % rows.shape[1],
            starts[:-1],
            asked,
            batch.mlm_labels,
            batch.nsp_labels,
        )
        ids, kinds, positions, *rest = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        return cls(ids, kinds, positions, torch.from_numpy(starts), *rest)

    @property
    def num_tokens(self) -> int:
        """T: the positions that are computed."""
        return self.input_ids.numel()


def any_batch(rows: int, length: int, device: torch.device) -> DeviceBatch:
    """A batch in which every parameter has a part: sequences of zeros, of one length, with one position asked."""
    starts = torch.arange(0, rows * length + 1, length)
    ids = torch.zeros(rows * length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device).repeat(rows)
    first, labels = ids[:1], ids[:rows]
    return DeviceBatch(ids, ids, positions, starts, starts[:-1].to(device), first, first, labels)


def _unasked(device: torch.device) -> DeviceBatch:
    """One token that weighs nothing: losses and gradients are zero, and every parameter has one."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    none = zero[:0]
    return DeviceBatch(zero, zero, zero, torch.tensor([0, 1]), zero, none, none, zero + IGNORE)
