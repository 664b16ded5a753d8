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

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from dsbert.base.errors import DsbertError, PeerError, disk_error
from dsbert.base.exchange import ExchangeAhead, exchange_rows
from dsbert.base.own_time import waiting

T = TypeVar("T")
# Up to here time is that of messages which wait for each other, beyond it that of bytes.
MOST_EXCHANGED_BYTES = 1024


def all_reduce(tensor: Tensor, op: str = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """In-place reduction over all ranks ("sum" or "max"); nothing to do in a world of one or without torch.distributed.

    Small tensors on the CPU take log2(ranks) messages and are summed in the order of ranks; large ones are the
    backend's, whose order of summation is its own.
    """
    of_backend, of_rows = _REDUCTIONS[op]
    if _is_alone(group):
        return tensor
    if tensor.device.type == "cpu" and tensor.nbytes <= MOST_EXCHANGED_BYTES and tensor.dtype in _OF_NUMPY:
        return tensor.copy_(of_rows(gather(tensor.detach(), group)))
    with waiting():
        dist.all_reduce(tensor, of_backend, group=group)
    return tensor


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[...] on every rank -> [world, ...] on every rank; same shape everywhere. On the CPU, log2(ranks) messages."""
    if _is_alone(group):
        return tensor.unsqueeze(0)
    with waiting():
        if tensor.device.type == "cpu":
            return exchange_rows(tensor, group)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gather_ahead(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Callable[[], Tensor]:
    """`gather` of a tensor on the CPU, begun now; what is returned waits for its result, and gives it as often as it is
    asked. Nobody may begin the next one before."""
    if _is_alone(group):
        return lambda: tensor.unsqueeze(0)
    under_way = ExchangeAhead(tensor, group)

    def rows() -> Tensor:
        with waiting():
            return under_way.rows()

    return rows


def sum_of_rows(rows: Tensor) -> Tensor:
    """[ranks, ...] -> [...], on the CPU: added one after the other, so that floats have the same bits on all ranks and
    all machines."""
    values = rows.numpy()
    with np.errstate(all="ignore"):  # what is not finite is the caller's to see
        return torch.from_numpy(np.asarray(np.add.accumulate(values, axis=0, dtype=values.dtype)[-1]))


_REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "sum": (dist.ReduceOp.SUM, sum_of_rows),
    "max": (dist.ReduceOp.MAX, lambda rows: rows.amax(0)),
}
_OF_NUMPY = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON value, by rank, on every rank. (torch's object collectives would unpickle what peers send.)"""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = gather(torch.tensor([data.numel()]), group).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = gather(padded, group)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank, and raise its DsbertError on EVERY rank if it failed on any.

    Keeps a mistake that only one rank can see from leaving the others in a collective. Raises StorageError or UserError
    for an OSError of `work`. Returns this rank's result.
    """
    result, failure = _attempt(work)
    failures = gather_json(failure)
    if (first := next((rank for rank, found in enumerate(failures) if found), None)) is not None:
        everywhere = all(found == failures[first] for found in failures)
        name, message = failures[first]
        raised = DsbertError.named(name)(message if everywhere else f"rank {first}: {message}")
        raised.ranks = () if everywhere else (first,)
        raise raised.for_all()
    return result  # type: ignore[return-value]  # where nobody failed, there is one


def on_main_rank(work: Callable[[], T], *, keepalive: bool = False) -> T | None:
    """Run `work` on rank 0 alone, and raise its DsbertError on EVERY rank if it failed. Returns its result there, None
    elsewhere. keepalive: as in `run_with_keepalive`.

    Raises StorageError or UserError for an OSError of `work`.
    """
    own: Callable[[], T | None] = work if _rank() == 0 else _nothing
    result, failure = _attempt(_kept_alive(own) if keepalive else own)
    if (failed := gather_json(failure)[0]) is not None:
        name, message = failed
        raise DsbertError.named(name)(message).for_all()
    return result


def run_with_keepalive(work: Callable[[], T]) -> T:
    """`raise_on_all_ranks` for work that takes long on some rank: who has done asks again and again whether all have,
    so that no collective waits long."""
    return raise_on_all_ranks(_kept_alive(work))


def _kept_alive(work: Callable[[], T]) -> Callable[[], T]:
    """Run `work` in a thread until all ranks have done theirs; what is returned gives its result, or raises."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        busy = True
        while busy:
            wait([future], timeout=0.5)
            busy = bool(all_reduce(torch.tensor([int(not future.done())])))
    return future.result


def _attempt(work: Callable[[], T]) -> tuple[T | None, tuple[str, str] | None]:
    """The result, or name and message of the DsbertError that was raised."""
    try:
        return work(), None
    except DsbertError as error:
        return None, (type(error).__name__, str(error))
    except OSError as error:
        message = f"expected to read and write {error.filename or 'a file'}, found: {error.strerror or error}"
        return None, (type(disk_error(error, message)).__name__, message)


def _nothing() -> None:
    """What a rank does that only waits."""


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def assert_replicas_agree(what: str, values: dict[str, int], group: dist.ProcessGroup | None = None) -> None:
    """Compare 64-bit values by name over all ranks. Raises PeerError on every rank, naming the first entry that differs
    and the ranks that hold something else than most (or than rank 0, where there is no majority)."""
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values.values()]
    mine = torch.tensor(signed, dtype=torch.int64)
    # One number first: that of all values, a thousand times on each rank, are megabytes, and nearly always alike.
    of_all = gather(torch.tensor(xxhash.xxh3_64_intdigest(mine.numpy().tobytes()) >> 1), group)
    if bool((of_all == of_all[0]).all()):
        return
    rows = gather(mine, group)
    column = int((rows != rows[0]).any(0).nonzero()[0])
    held = [f"{value % (1 << 64):016x}" for value in rows[:, column].tolist()]
    expected = Counter([held[0], *held]).most_common(1)[0][0]
    odd = {rank: f"rank {rank} has {value}" for rank, value in enumerate(held) if value != expected}
    error = PeerError(
        f"expected {what} of {list(values)[column]} equal on all ranks ({expected}), found: {', '.join(odd.values())}"
    )
    error.ranks = tuple(odd)
    raise error.for_all()
