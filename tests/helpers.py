"""Run a test function as several real processes.

    def check_sum(expected: int) -> int:            # a plain, module-level function of asserts
        torch.distributed.init_process_group("gloo")
        ...
        assert total == expected
        return total

    def test_sum() -> None:
        assert run_distributed(check_sum, world_size=2, args={"expected": 3}) == [3, 3]

The function runs once in each of `world_size` fresh processes, which share nothing but the variables that torchrun
sets, too. It starts torch.distributed itself. What it returns must have a JSON form.
"""

import functools
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import run_rank

POLL_S = 0.02
# How long the other ranks may run on after one has failed, to fail with a message of their own.
GRACE_S = 10.0
SHOWN_CHARS = 8000


def run_distributed(
    function: Callable[..., Any] | str,
    world_size: int,
    args: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    *,
    env: Mapping[str, str] | None = None,
    grace: float = GRACE_S,
) -> list[Any]:
    """Run `function` on ranks 0..world_size-1, one fresh process each, and return what each rank returns.

    Args:
        function: a module-level function, or its name as "module:function".
        world_size: number of ranks.
        args: keyword arguments, the same on every rank; they must have a JSON form.
        timeout: seconds until every rank is killed, and the test fails.
        env: further environment variables of the ranks.
        grace: seconds that the other ranks keep after one has failed.

    Raises:
        AssertionError: a rank failed or was killed; the message holds the output of each such rank.
    """
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    with started(function, world_size, args, env=env) as ranks:
        fate = _wait(ranks, timeout, grace)
        for rank in ranks:
            rank.kill()
        failed = [rank for rank in ranks if rank.exitcode != 0]
        if failed:
            reports = [_report(rank, fate[rank.number]) for rank in failed]
            raise AssertionError("\n".join([f"{name} failed on {len(failed)} of {world_size} ranks", *reports]))
        return [json.loads(rank.result.read_text()) for rank in ranks]


@dataclass(frozen=True)
class Rank:
    """A rank that was started. result: the file that what it returns is written to."""

    number: int
    process: BaseProcess
    log: Path
    result: Path

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """By group: what a rank has started must not outlive the test either."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()  # should it not have come as far as its own group
        self.process.join()


@contextmanager
def started(
    function: Callable[..., Any] | str,
    world_size: int,
    args: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
) -> Iterator[list[Rank]]:
    """Start the ranks of `run_distributed`, for a test that wants to see how each of them ends; none outlives it."""
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        ranks: list[Rank] = []
        try:
            port = str(_free_port())
            for number in range(world_size):
                ranks.append(_start(name, args or {}, number, world_size, port, env or {}, folder))
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


def _start(
    name: str, args: Mapping[str, Any], rank: int, world_size: int, port: str, env: Mapping[str, str], folder: Path
) -> Rank:
    """Start one rank in a session, and so a process group, of its own."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **env,
    }
    log, result = folder / f"{rank}.log", folder / f"{rank}.json"
    arguments = (name, json.dumps(args), environment, str(log), str(result))
    process = _context().Process(target=run_rank.main, args=arguments)
    process.start()
    return Rank(rank, process, log, result)


@functools.cache
def _context() -> ForkServerContext:
    """Ranks are forked off a server that has imported what is slow to import, which saves each of them five seconds.

    The server starts no thread and no process group: a rank that it forks is as fresh as one that was executed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "hypothesis", "deepspeed", "tests.workbench", "tests.run_rank"])
    return context


def _wait(ranks: list[Rank], timeout: float, grace: float) -> list[str]:
    """Wait until all ranks have ended, or may not run any longer. Returns what became of each, in words."""
    deadline = time.monotonic() + timeout
    why_killed = f"still running after {timeout:g} s: killed"
    failure_seen = False
    while time.monotonic() < deadline:
        codes = [rank.exitcode for rank in ranks]
        if None not in codes:
            break
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and not failure_seen:
            failure_seen = True
            if time.monotonic() + grace < deadline:
                deadline = time.monotonic() + grace
                why_killed = f"still running {grace:g} s after rank {failed[0]} had failed: killed"
        time.sleep(POLL_S)
    return [why_killed if rank.exitcode is None else "ended" for rank in ranks]


def _report(rank: Rank, fate: str) -> str:
    """What a failed rank has to say for itself."""
    output = rank.output
    if len(output) > SHOWN_CHARS:
        output = f"[...]\n{output[-SHOWN_CHARS:]}"
    how = f"exit code {rank.exitcode}" if fate == "ended" else fate
    return f"--- rank {rank.number}: {how}\n{output.rstrip()}"


def _free_port() -> int:
    """A port that nobody uses now. Somebody may take it before rank 0 does, but the kernel hands out others first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
