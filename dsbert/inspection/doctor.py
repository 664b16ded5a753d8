"""`dsbert doctor`: whether a machine can train, and what to do where it cannot.

Each check is a function that yields findings. None of them trains, and none leaves anything behind but the compiled
kernels, which the first run would compile.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from dsbert.base.cores import usable_cores
from dsbert.base.errors import DsbertError
from dsbert.inspection.doctor_storage import storage_facts
from dsbert.training.provenance import versions
from dsbert.training.wandb_mode import server_url, wandb_mode

Verdict = Literal["ok", "note", "fail"]
_FEW_FILES = 1024  # that a process may open; a rank of a large job has a socket for each peer


class Finding(NamedTuple):
    """verdict: ok; note, where something is slower or missing that may be done without; fail, where nothing can be
    trained. text: what was found, and what to do."""

    about: str
    verdict: Verdict
    text: str


def examine(run_dir: Path, data: Path | None = None) -> list[Finding]:
    """All checks. run_dir, data: where runs are to be written, existing or not, and prepared data to be read."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "software": _software, "processor": _processor, "cuda": _cuda, "mpi": _mpi, "slurm": _slurm, "wandb": _wandb,
        "runs": lambda: _storage("runs", run_dir, writes=True), "data": lambda: _data(data), "ports": _network,
        "limits": _limits,
    }  # fmt: skip
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            found.extend(check())
        except Exception as error:  # what cannot be looked at is a finding as well
            found.append(Finding(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return found


def _software() -> Iterator[Finding]:
    found = versions()
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name in ("torch", "deepspeed", "transformers") if found.get(name) is None]
    if missing:
        yield Finding("software", "fail", f"{', '.join(missing)} missing: pip install -r requirements.txt")
        return
    yield Finding("software", "ok", listed)
    from dsbert.engine.ds_engine import why_not_importable

    why = why_not_importable()
    if why:
        yield Finding("software", "fail", f"deepspeed does not import: {why}")


def _processor() -> Iterator[Finding]:
    import torch

    from dsbert.sparse.half_precision import is_slow
    from dsbert.sparse.kernels.cpu.build import BuildError, instruction_set, remark, unavailable

    yield Finding("processor", "ok", f"{usable_cores()} cores that may be used of {os.cpu_count()}")
    why = unavailable()
    try:
        kind = instruction_set()
    except BuildError as error:
        kind = str(error)
    if why is None:
        note = remark()
        yield Finding("cpu kernels", "note" if note else "ok", f"compiled for {kind}{f'; {note}' if note else ''}")
    else:
        yield Finding("cpu kernels", "note", f"{why}; products then go through dense copies, several times slower")
    slow = is_slow(torch.zeros(1, dtype=torch.bfloat16))
    text = (
        "bf16 is emulated: recipes of fp32 (deepspeed.config=zero1_fp32) are faster here" if slow else "bf16 products"
    )
    yield Finding("precision", "note" if slow else "ok", text)


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            yield Finding("cuda", "ok", "no card")
        elif torch.version.cuda:
            text = "a driver is there, and no card may be used: ask for one (--gres), look at CUDA_VISIBLE_DEVICES"
            yield Finding("cuda", "note", text)
        else:
            text = "a driver is there, and torch is without CUDA: install a CUDA build of torch to train on a card"
            yield Finding("cuda", "note", text)
        return
    names = sorted({torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    yield Finding("cuda", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}, CUDA {torch.version.cuda}")
    yield Finding("nccl", "ok" if nccl else "fail", nccl or "missing: install a build of torch that has it")
    triton = importlib.util.find_spec("triton") is not None
    yield Finding("triton", "ok" if triton else "note", "there" if triton else "missing: products are dense on a card")


def _mpi() -> Iterator[Finding]:
    if importlib.util.find_spec("mpi4py") is None:
        yield Finding("mpi", "ok", "no mpi4py: needed under mpiexec alone (pip install 'dsbert[mpi]')")
        return
    from dsbert.cluster.endpoint import mpi_library

    try:
        yield Finding("mpi", "ok", mpi_library())
    except Exception as error:
        yield Finding("mpi", "note", f"mpi4py does not load ({error}): mpiexec will not do, srun and --nproc will")


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("slurm", "ok", "none here: `dsbert pretrain --nproc N`, torchrun or mpiexec start the ranks")
        return
    try:
        done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=20, check=False)
        up = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("slurm", "note", f"does not answer: {error}")
        return
    alive = up.returncode == 0 and "UP" in up.stdout
    version = done.stdout.strip() or "sbatch is there"
    yield Finding("slurm", "ok" if alive else "note", version if alive else f"{version}, no controller answers")


def _wandb() -> Iterator[Finding]:
    mode, why = wandb_mode()
    if importlib.util.find_spec("wandb") is None:
        yield Finding("wandb", "note", "not installed: pip install 'dsbert[wandb]', or log.wandb=false")
    elif mode == "online":
        yield Finding("wandb", "ok", f"online, {server_url()}")
    elif mode == "disabled":
        yield Finding("wandb", "ok", "disabled: nothing is recorded but metrics.jsonl")
    else:
        yield Finding(
            "wandb", "note" if why else "ok", why or f"{mode}: no key; `dsbert wandb-sync` sends the records later"
        )


def _storage(about: str, path: Path, *, writes: bool) -> Iterator[Finding]:
    for verdict, text in storage_facts(path, writes=writes):
        yield Finding(about, verdict, text)


def _data(path: Path | None) -> Iterator[Finding]:
    """As a start would see it."""
    if path is None:
        return
    from dsbert.data.manifest import load_manifest

    yield from _storage("data", path, writes=False)
    try:
        splits = load_manifest(path).splits
    except DsbertError as error:
        yield Finding("data", "fail", str(error))
        return
    yield Finding("data", "ok", f"prepared: {', '.join(f'{split.tokens:,} tokens {n}' for n, split in splits.items())}")


def _network() -> Iterator[Finding]:
    """Ranks on one machine meet on loopback, those of several by the machine's name."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            yield Finding("ports", "ok", "loopback takes connections")
    except OSError as error:
        yield Finding("ports", "fail", f"loopback takes none ({error.strerror}): ranks of one machine cannot meet")
    name = socket.gethostname()
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        yield Finding("name", "note", f"{name} has no address: ranks of several machines need MASTER_ADDR")
        return
    alone = all(address.startswith("127.") or address == "::1" for address in found)
    advice = ": on this machine alone, so that ranks of several need MASTER_ADDR" if alone else ""
    yield Finding("name", "note" if alone else "ok", f"{name} is {', '.join(found)}{advice}")


def _limits() -> Iterator[Finding]:
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < _FEW_FILES
    text = f"{files} open files for a process" + (
        f", below {_FEW_FILES}: raise `ulimit -n` for many ranks" if few else ""
    )
    yield Finding("limits", "note" if few else "ok", text)
    memory = psutil.virtual_memory()
    shown = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    little = memory.available < 2e9
    yield Finding("memory", "note" if little else "ok", f"{shown}{': a rank of the demo takes 1 GB' if little else ''}")
