"""Which rank this process is, from the environment that its launcher made. Imports nothing slow."""

from __future__ import annotations

import os
from typing import NamedTuple

from dsbert.errors import UserError

# A SLURM batch shell carries SLURM_PROCID as well, and this step id where it is a step at all: it is not a rank.
_BATCH_STEP = "4294967291"
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed, dsbert itself
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


class Ranks(NamedTuple):
    """rank of world_size processes, local_rank among those of this machine."""

    rank: int
    world_size: int
    local_rank: int


def ranks_from_environment() -> Ranks | None:
    """None without a launcher. Raises UserError if the environment is incomplete or makes no sense."""
    env = os.environ
    for rank, size, local in _LAUNCHERS:
        if rank not in env or (rank == "SLURM_PROCID" and env.get("SLURM_STEP_ID", _BATCH_STEP) == _BATCH_STEP):
            continue
        if size not in env:
            raise UserError(
                f"expected {size} beside {rank}={env[rank]} in the environment, found none: start all ranks with one "
                "launcher, or use --nproc"
            )
        try:
            found = Ranks(int(env[rank]), int(env[size]), int(env.get(local, env[rank])))
        except ValueError:
            raise UserError(f"expected whole numbers in {rank}, {size} and {local}, found {env[rank]!r}") from None
        if not 0 <= found.rank < found.world_size:
            raise UserError(f"expected 0 <= {rank} < {size}, found {found.rank} and {found.world_size}")
        return found
    return None
