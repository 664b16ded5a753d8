"""Which rank this process is, from the environment that its launcher made. Imports nothing slow."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from dsbert.base.errors import UserError

# A SLURM batch shell carries SLURM_PROCID as well, and this step id where it is a step at all: it is not a rank.
_BATCH_STEP = "4294967291"
_LAUNCHERS: tuple[tuple[Literal["environment", "slurm", "mpi"], str, str, str], ...] = (
    ("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed, dsbert itself
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class RankInfo(NamedTuple):
    """What a launcher says of this process: rank of world_size, local_rank among those of this machine.

    launcher: whose variables say so; "environment" is torchrun's, which others set too.
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: Literal["environment", "slurm", "mpi"] = "environment"


def rank_variables() -> list[str]:
    """What in the environment makes this process a rank: to be unset where it is none."""
    return [name for _, *names in _LAUNCHERS for name in names if name in os.environ]


def ranks_from_environment() -> RankInfo | None:
    """None without a launcher. Raises UserError if the environment is incomplete or makes no sense."""
    env = os.environ
    in_step = "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", _BATCH_STEP) != _BATCH_STEP
    for launcher, rank, size, local in _LAUNCHERS:
        if rank not in env or (launcher == "slurm" and not in_step):
            continue
        # Both are set by `srun --mpi=pmi2`, whose step says all, and by an mpiexec that starts its helpers as a SLURM
        # step, which then is the helpers' step. Only mpiexec sets a local rank of its own.
        if rank == "PMI_RANK" and in_step and local not in env:
            continue
        if size not in env:
            raise UserError(
                f"expected {size} beside {rank}={env[rank]} in the environment, found none: start all ranks with one "
                "launcher, or use --nproc"
            )
        try:
            found = RankInfo(int(env[rank]), int(env[size]), int(env.get(local, env[rank])), launcher)
        except ValueError:
            raise UserError(f"expected whole numbers in {rank}, {size} and {local}, found {env[rank]!r}") from None
        if not 0 <= found.rank < found.world_size:
            raise UserError(f"expected 0 <= {rank} < {size}, found {found.rank} and {found.world_size}")
        if launcher == "environment" and found.world_size > 1 and local not in env:
            raise UserError(f"expected {local} beside {rank}={env[rank]} in the environment, found none: export it")
        return found
    if env.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"expected RANK beside WORLD_SIZE={env['WORLD_SIZE']} in the environment, found none: start all ranks with "
            "one launcher, or unset WORLD_SIZE"
        )
    return None
