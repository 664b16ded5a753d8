"""How a global batch is cut into ranks, micro-batches and accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from dsbert.config.sections import BatchConfig
from dsbert.data.stream import Batch
from dsbert.models.spec import Objective


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch starts in the global batch, and how many samples it has."""

    first: int
    count: int


def cut(batch: BatchConfig, rank: int, world_size: int) -> list[MicroBatch]:
    """The micro-batches of one rank: as many as any other has, or one less, and their places do not hang on the ranks.

    Where there are fewer of them than ranks, `BatchConfig.on_ranks` has made them small enough for each rank to have
    one, with as many samples as any other, or one less.
    """
    size, total = batch.micro_batch, batch.global_batch
    count = -(-total // size)
    if count < world_size:
        start, end = (number * total // world_size for number in (rank, rank + 1))
        return [MicroBatch(start, end - start)]
    mine = range(rank * count // world_size, (rank + 1) * count // world_size)
    return [MicroBatch(index * size, min(size, total - index * size)) for index in mine]


def counts_of(batches: list[Batch], objectives: tuple[Objective, ...]) -> list[int]:
    """[predictions asked for by each objective ..., tokens] of a rank's part of a step."""
    asked = [sum(objective.count(batch) for batch in batches) for objective in objectives]
    return [*asked, sum(batch.num_tokens for batch in batches)]
