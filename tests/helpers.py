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
from collections.abc import Callable, Mapping
from contextlib import suppress
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
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        ranks: list[BaseProcess] = []
        try:
            port = str(_free_port())
            for rank in range(world_size):
                ranks.append(_start(name, args or {}, rank, world_size, port, env or {}, folder))
            fate = _wait(ranks, timeout, grace)
        finally:
            # By group: what a rank has started must not outlive the test either.
            for process in ranks:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid or 0, signal.SIGKILL)
                process.kill()  # should it not have come as far as its own group
            for process in ranks:
                process.join()
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        if failed:
            reports = [_report(rank, ranks[rank].exitcode, fate[rank], folder) for rank in failed]
            raise AssertionError("\n".join([f"{name} failed on {len(failed)} of {world_size} ranks", *reports]))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _start(
    name: str, args: Mapping[str, Any], rank: int, world_size: int, port: str, env: Mapping[str, str], folder: Path
) -> BaseProcess:
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
    files = (str(folder / f"{rank}.log"), str(folder / f"{rank}.json"))
    process = _context().Process(target=run_rank.main, args=(name, json.dumps(args), environment, *files))
    process.start()
    return process


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


def _wait(ranks: list[BaseProcess], timeout: float, grace: float) -> list[str]:
    """Wait until all ranks have ended, or may not run any longer. Returns what became of each, in words."""
    deadline = time.monotonic() + timeout
    why_killed = f"still running after {timeout:g} s: killed"
    failure_seen = False
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in ranks]
        if None not in codes:
            break
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and not failure_seen:
            failure_seen = True
            if time.monotonic() + grace < deadline:
                deadline = time.monotonic() + grace
                why_killed = f"still running {grace:g} s after rank {failed[0]} had failed: killed"
        time.sleep(POLL_S)
    return [why_killed if process.exitcode is None else "ended" for process in ranks]


def _report(rank: int, code: int, fate: str, folder: Path) -> str:
    """What a failed rank has to say for itself."""
    output = (folder / f"{rank}.log").read_text(errors="replace")
    if len(output) > SHOWN_CHARS:
        output = f"[...]\n{output[-SHOWN_CHARS:]}"
    how = f"exit code {code}" if fate == "ended" else fate
    return f"--- rank {rank}: {how}\n{output.rstrip()}"


def _free_port() -> int:
    """A port that nobody uses now. Somebody may take it before rank 0 does, but the kernel hands out others first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
