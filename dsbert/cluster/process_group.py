"""Rank and world, from whichever launcher started us: the process group that all ranks join.

torch is imported at module level, so that `dsbert --help` must not import this.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsbert.base.errors import LostPeerError, PeerError, UserError
from dsbert.base.malloc import keep_freed_pages
from dsbert.cluster.endpoint import is_loopback, one_line
from dsbert.cluster.ranks import RankInfo, ranks_from_environment
from dsbert.cluster.rendezvous import meet

T = TypeVar("T")
# In the messages of gloo and NCCL, which have no exception type of their own for it.
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo", "NCCL")
_NO_LIMIT = timedelta(days=30)
# Else what a rank says of its address grows with the ranks, all read that of all, and ask for them one by one: 8 GB out
# of rank 0's store at 1,024 ranks.
_GLOO_AT_SCALE = ("GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER", "GLOO_ENABLE_STORE_V2_API")

_FILES_BESIDE = 1024  # that a rank has open: shards, checkpoints of as many ranks, libraries

_stores: list[dist.Store] = []  # torch holds on to a store, and that does not keep a Python object alive


@dataclass(frozen=True)
class World:
    """This process among its peers, which it has joined. (`ranks.RankInfo` is what a launcher said before.)

    device: where tensors live; host: for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    host: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_s: float = 300.0, directory: Path | None = None) -> World:
    """Join the other ranks; sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT for libraries that read them.

    NCCL for CUDA tensors, with the device of the local rank; gloo for CPU tensors, which all that the ranks say to each
    other about control is made of: it never waits for a GPU. Without a launcher: a world of one. directory: as
    `rendezvous.meet` says.
    Raises UserError for an incomplete environment or a port that is taken, PeerError if the peers do not come in time.
    """
    ranks = ranks_from_environment() or RankInfo(0, 1, 0)
    rank, world_size, local_rank = ranks.rank, ranks.world_size, ranks.local_rank
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    cuda = torch.cuda.is_available()
    device = _device(local_rank) if cuda else torch.device("cpu")
    if not cuda:
        keep_freed_pages()
    # NCCL's own watchdog would abort the process when a peer is gone, before it is known which: health.py ends it.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    meeting = meet(ranks, timeout_s, directory)
    if is_loopback(os.environ["MASTER_ADDR"]) and "lo" in (name for _, name in socket.if_nameindex()):
        # gloo's connections ask nobody who he is: those of one machine need not be within reach of others.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name in _GLOO_AT_SCALE:
        os.environ.setdefault(name, "1")
    _allow_connections(world_size)
    # NCCL asks the store from threads of its own, which must not wait for Python.
    store = meeting.open_store if cuda else meeting.store
    _stores.append(store)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            # Bound to a device, a world of one would split communicators that it never made.
            device_id=device if cuda and world_size > 1 else None,
        )  # fmt: skip
    except (dist.DistError, RuntimeError) as error:
        raise PeerError(
            f"expected {world_size} ranks to connect within {timeout_s:g} s, rank {rank} found: {one_line(error)}"
        ) from None
    return World(rank, world_size, local_rank, device, socket.gethostname())


def _device(local_rank: int) -> torch.device:
    """The GPU of a local rank: the only one where the launcher shows each rank its own. DeepSpeed reads LOCAL_RANK."""
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UserError(f"expected a GPU for local rank {local_rank}, found {count} GPUs: start one rank per GPU")
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _allow_connections(world_size: int) -> None:
    """gloo connects each rank to all others, in each of two groups, ours and DeepSpeed's: with the usual 1,024 open
    files 500 ranks could not start. As many more as the system lets a process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * world_size + _FILES_BESIDE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def unlimit() -> None:
    """Have no collective end by itself any more: from here on the heartbeat's watchdog keeps the time limit.

    gloo goes by a clock that runs on while a job is suspended: whoever waits then would be told of a timeout.
    """
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(_NO_LIMIT, group)


@contextmanager
def peer_failures(world: World) -> Iterator[None]:
    """Turn what torch raises when a peer is gone, or silent for the timeout, into LostPeerError."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = one_line(error)
        if isinstance(error, dist.DistError) or any(word in text for word in _PEER_WORDS):
            text = text.partition(" This is typically")[0].rpartition("] ")[2]  # gloo's advice, and its source line
            raise LostPeerError(f"rank {world.rank} on {world.host} lost a peer: {text}") from error
        raise
