"""A micro-batch as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsbert.data.stream import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch as tensors: see data.stream.Batch."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    mlm_positions: Tensor
    mlm_labels: Tensor
    nsp_labels: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> DeviceBatch:
        arrays = (getattr(batch, name) for name in cls.__dataclass_fields__)
        return cls(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def any_batch(rows: int, length: int, device: torch.device) -> DeviceBatch:
    """A batch in which every parameter has a part: ids [rows, length] of zeros, one position asked."""
    ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    return DeviceBatch(ids, ids, torch.ones_like(ids), first, first, ids[:, 0])
