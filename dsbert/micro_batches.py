"""How a global batch is cut into ranks, micro-batches and accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from dsbert.config import BatchConfig
from dsbert.data.stream import Batch


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch starts in the global batch, and how many of its rows are samples (the rest are filler)."""

    first: int
    count: int


def cut(batch: BatchConfig, rank: int, world_size: int, accumulation_steps: int) -> list[MicroBatch]:
    """The micro-batches of one rank; ranks have as many samples, or one less."""
    size, total = batch.micro_batch, batch.global_batch
    start, end = (number * total // world_size for number in (rank, rank + 1))
    firsts = [min(start + index * size, end) for index in range(accumulation_steps)]
    return [MicroBatch(first, min(size, end - first)) for first in firsts]


def counts_of(batches: list[Batch]) -> list[int]:
    """[masked tokens, NSP pairs that are asked about, tokens] of a rank's part of a step."""
    masked = sum(batch.mlm_labels.size for batch in batches)
    pairs = sum(int((batch.nsp_labels >= 0).sum()) for batch in batches)
    return [masked, pairs, sum(batch.num_tokens for batch in batches)]
