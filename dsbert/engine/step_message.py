"""What ranks tell each other of a step: how much of each objective it has, flags, and how long each rank has worked.

The message is under way while the first micro-batch goes forward, and waited for where its counts are needed: before
the first backward. So nobody waits for log2 N messages (base/exchange.py), and flags still belong to their own step.
N ranks, O objectives, P phases of own_time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsbert.base.collectives import gather_ahead
from dsbert.base.own_time import OwnClock


@dataclass(frozen=True, eq=False)
class StepMessage:
    """What all ranks have said, equal on all of them: see StepResult for each. counts: [O]; own_times: [N, P + 1]."""

    counts: tuple[int, ...]
    tokens: int
    positions: int
    pairs: int
    stop: bool
    busy: bool
    own_times: Tensor


def tell_all(
    counts: Sequence[int], computed: Sequence[int], clock: OwnClock, *, stop: bool, busy: bool
) -> Callable[[], StepMessage]:
    """Tell the other ranks; what is returned waits for what they tell. Collective.

    counts: [O] of this rank's part of the step, and its tokens; computed: its positions and pairs; clock: of this rank,
    whose time since the last step's message is told.
    """
    said = [*counts, *computed, int(stop), int(busy)]
    mine = [round(seconds * 1e6) for seconds in clock.lap()]
    rows = gather_ahead(torch.tensor([*said, *mine, int(busy)], dtype=torch.int64))

    def heard() -> StepMessage:
        everybody = rows()
        *asked, tokens, positions, pairs, stops, busy_ranks = everybody[:, : len(said)].sum(0).tolist()
        own_times = everybody[:, len(said) :]
        return StepMessage(tuple(asked), tokens, positions, pairs, stops > 0, busy_ranks > 0, own_times)

    return heard
