"""Collectives over gloo, and agreement between ranks: what fails on one fails on all.

Everything here works without torch.distributed as well, as in a world of one. torch is imported at module level:
`dsbert --help` must not import this.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsbert.base.errors import DsbertError, PeerError, UserError

T = TypeVar("T")


def all_reduce(tensor: Tensor, op: str = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """In-place reduction over all ranks; nothing to do in a world of one or without torch.distributed."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return tensor


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[...] on every rank -> [world, ...] on every rank; same shape everywhere."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON value, by rank, on every rank. (torch's object collectives would unpickle what peers send.)"""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = gather(torch.tensor([data.numel()]), group).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = gather(padded, group)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def raise_on_all_ranks(work: Callable[[], T], *, only_main: bool = False) -> T | None:
    """Run `work` on every rank (or on rank 0 alone) and raise its DsbertError on EVERY rank if it failed on any.

    Keeps a mistake that only one rank can see from leaving the others in a collective.
    """
    result, failure = None, None
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 or not only_main:
        try:
            result = work()
        except DsbertError as error:
            failure = [type(error).__name__, str(error)]
        except OSError as error:
            failure = [
                UserError.__name__,
                f"expected to read and write {error.filename or 'a file'}, found: {error.strerror or error}",
            ]
    failures = gather_json(failure)
    first = next((index for index, found in enumerate(failures) if found), None)
    if first is not None:
        name, message = failures[first]
        kind = next((kind for kind in DsbertError.__subclasses__() if kind.__name__ == name), DsbertError)
        everywhere = all(found == failures[first] for found in failures)
        raised = kind(message if everywhere or only_main else f"rank {first}: {message}")
        raised.ranks = () if everywhere or only_main else (first,)
        raise raised.for_all()
    return result


def run_with_keepalive(work: Callable[[], object], *, everywhere: bool = False) -> None:
    """Run `work` on rank 0, or on all ranks, however long it takes: who has done asks again and again, so that no
    collective waits long.

    Raises its DsbertError on every rank.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work) if rank == 0 or everywhere else None
        busy = True
        while busy:
            if future is not None:
                wait([future], timeout=0.5)
            busy = bool(all_reduce(torch.tensor([int(future is not None and not future.done())])))
    raise_on_all_ranks(lambda: future and future.result(), only_main=not everywhere)


def assert_replicas_agree(what: str, values: dict[str, int], group: dist.ProcessGroup | None = None) -> None:
    """Compare 64-bit values by name over all ranks. Raises PeerError on every rank, naming the first entry that differs
    and the ranks that hold something else than most (or than rank 0, where there is no majority)."""
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values.values()]
    rows = gather(torch.tensor(signed, dtype=torch.int64), group)
    if bool((rows == rows[0]).all()):
        return
    column = int((rows != rows[0]).any(0).nonzero()[0])
    held = [f"{value % (1 << 64):016x}" for value in rows[:, column].tolist()]
    expected = Counter([held[0], *held]).most_common(1)[0][0]
    odd = {rank: f"rank {rank} has {value}" for rank, value in enumerate(held) if value != expected}
    error = PeerError(
        f"expected {what} of {list(values)[column]} equal on all ranks ({expected}), found: {', '.join(odd.values())}"
    )
    error.ranks = tuple(odd)
    raise error.for_all()
