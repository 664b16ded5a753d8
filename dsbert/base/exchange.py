"""What every rank has to say, on every rank, in log2 N messages one behind the other.

gloo passes its all-gathers and all-reduces round a ring: N - 1 or 2 (N - 1) messages that wait for each other, 51 ms at
1,024 ranks and 25 us a message. Here every rank sends all that it knows to the one 1, 2, 4, ... places before it, and
knows twice as much after each round (Bruck et al. 1997, doi:10.1109/71.642949): ceil(log2 N) messages for any N, and no
more bytes than a ring's all-gather. Whoever wants a sum adds up the rows by himself, in the order of ranks: then it has
the same bits on all ranks, whatever the network does. Ranks of one node that follow each other are partners in the
first rounds, so that a tree of nodes would save nothing.

Point to point over the CPU's backend of the ranks' own group. N ranks, ROW: the shape of a row, the same on all.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Exchanges of a thread come in one order on all ranks; those of two threads must not be taken for each other.
_TAG, _TAG_AHEAD = 0x645B, 0x645C


def num_rounds(ranks: int) -> int:
    """Messages that a rank sends in an exchange, each after it has received the one before."""
    return (ranks - 1).bit_length()


def exchange_rows(row: Tensor, group: dist.ProcessGroup | None = None, *, tag: int = _TAG) -> Tensor:
    """[ROW] on every rank -> [N, ROW] on every rank, by rank; on the CPU. Collective; N > 1.

    Raises what torch raises where a peer is gone, or silent for the group's time limit: RuntimeError.
    """
    group = group or dist.group.WORLD
    assert group is not None
    ranks, rank, limit = group.size(), group.rank(), _time_limit(group)
    # Row i is that of the rank i places behind this one, until the end.
    rows = torch.empty((ranks, *row.shape), dtype=row.dtype, device="cpu")  # whatever torch's default is
    rows[0] = row
    if not row.numel():
        return rows
    rounds = [(distance, min(distance, ranks - distance)) for distance in (1 << n for n in range(num_rounds(ranks)))]
    # Whom nobody has asked yet must not send: all are asked before the first is waited for.
    received = [group.recv([rows[far : far + count]], (rank + far) % ranks, tag) for far, count in rounds]
    sent = []
    for (far, count), work in zip(rounds, received, strict=True):
        sent.append(group.send([rows[:count]], (rank - far) % ranks, tag))
        _wait_for_peer(work, limit)
    for work in sent:
        _wait_for_peer(work, limit)
    return rows.roll(rank, 0)


class ExchangeAhead:
    """`exchange_rows` in a thread of its own: begun when the row is known, waited for when the others' are needed. One
    at a time. Nothing has to be closed: a thread that waits for a peer for ever ends with the process."""

    def __init__(self, row: Tensor, group: dist.ProcessGroup | None = None) -> None:
        self._row, self._group = row, group
        self._rows: Tensor | None = None
        self._failure: BaseException | None = None
        self._done = threading.Event()
        _begun(os.getpid()).put(self)

    def rows(self) -> Tensor:
        """[N, ROW], waiting for them. Raises as `exchange_rows`."""
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        assert self._rows is not None
        return self._rows

    def run(self) -> None:
        """In the thread."""
        try:
            self._rows = exchange_rows(self._row, self._group, tag=_TAG_AHEAD)
        except BaseException as error:  # handed to whoever asks for the rows
            self._failure = error
        self._done.set()


@cache
def _begun(process: int) -> SimpleQueue[ExchangeAhead]:
    """What the thread takes its work from. One thread for all steps: to start one takes longer than its messages."""
    queue: SimpleQueue[ExchangeAhead] = SimpleQueue()

    def run() -> None:
        while True:
            queue.get().run()

    threading.Thread(target=run, name="dsbert-exchange", daemon=True).start()
    return queue


def waits_for_a_peer() -> CodeType:
    """The code that a thread is in while it waits for a message: for watchdogs."""
    return _wait_for_peer.__code__


def _wait_for_peer(work: Any, limit: timedelta) -> None:
    work.wait(limit)


def _time_limit(group: dist.ProcessGroup) -> timedelta:
    """Of the group's collectives, as it is now; messages from rank to rank know only the one that it was made with."""
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit
