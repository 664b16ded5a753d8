"""The journal of mask updates: enough to replay any topology from the first one.

One object per update: step, update, digest, pruned, per layer the re-pointed slots with their new rows and cols, and
per layer the norms of blocks that were kept and dropped, by group as update_norms.py sums them up (older journals have
none).
Lists are plain JSON up to 4,096 entries and base64 of zlib-compressed little-endian int32 differences beyond (B = 1 on
BERT-Base re-points four million slots at once).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dsbert.sparse.topology import BlockTopology, TopologyUpdate

if TYPE_CHECKING:
    from dsbert.sparse.mask_manager import MaskUpdate

_PLAIN = 4096


def journal_entry(update: MaskUpdate) -> dict[str, Any]:
    """The journal's object for an update."""
    layers = {
        name: {"slots": pack(change.slots), "rows": pack(change.rows), "cols": pack(change.cols)}
        for name, change in update.layers.items()
    }
    return {
        "step": update.step,
        "update": update.number,
        "digest": update.digest,
        "pruned": update.num_pruned,
        "layers": layers,
        "norms": update.norms,
    }


def replay(topologies: dict[str, BlockTopology], entries: Iterable[dict[str, Any]]) -> dict[str, BlockTopology]:
    """The topologies after `entries`, from those before. Raises ValueError if an entry does not fit."""
    topologies = dict(topologies)
    for entry in entries:
        for name, change in entry["layers"].items():
            slots, rows, cols = (unpack(change[key]) for key in ("slots", "rows", "cols"))
            topologies[name] = topologies[name].replace(TopologyUpdate(slots, rows.int(), cols.int()))
    return topologies


def pack(values: Tensor) -> list[int] | str:
    """int [n] as JSON."""
    if values.numel() <= _PLAIN:
        numbers: list[int] = values.tolist()
        return numbers
    differences = np.diff(values.to(torch.int32).numpy(), prepend=np.int32(0)).astype("<i4")
    return base64.b64encode(zlib.compress(differences.tobytes())).decode()


def unpack(packed: list[int] | str) -> Tensor:
    """int64 [n] from what `pack` returned."""
    if isinstance(packed, list):
        return torch.tensor(packed, dtype=torch.int64)
    differences = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<i4")
    return torch.from_numpy(np.cumsum(differences, dtype=np.int64))
