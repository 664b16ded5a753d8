"""Start the ranks of one machine: what `dsbert pretrain ... --nproc N` does, as torchrun would on one node.

The launcher imports no torch, keeps nothing but processes, and ends with the ranks' own exit code:

- The port of the rendezvous is bound here and its listening descriptor goes to rank 0, so no other program can take
  the port between choosing and using it.
- The ranks are told a secret, by which they know each other (secret.py).
- Each rank has its own session, so a terminal's Ctrl-C reaches the ranks once, through forwarding.
- A rank that fails gives the others a grace period, in which they can notice and say whose fault it is. Then they are
  stopped. No rank outlives `launch`, nor a launcher that was killed (`die_with_parent`).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from dsbert.base.awake import AwakeClock
from dsbert.base.cores import usable_cores
from dsbert.base.errors import EXIT_REQUEUE, combine_exit_codes, printable
from dsbert.cluster.memory_kills import memory_kills, why_killed
from dsbert.cluster.secret import SECRET_ENV, new_secret

LISTEN_FD_ENV = "DSBERT_LISTEN_FD"
PARENT_PID_ENV = "DSBERT_PARENT_PID"

GRACE_S = 20.0
TERM_S = 5.0
POLL_S = 0.05

# What each signal to the launcher becomes for the ranks. A terminal that closes asks for a save, as TERM does.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}

_PR_SET_PDEATHSIG = 1


def launch(
    command: Sequence[str],
    nproc: int,
    *,
    grace_s: float = GRACE_S,
    term_s: float = TERM_S,
    again: str = "",
    less_memory: str = "",
) -> int:
    """Run `command` as ranks 0..nproc-1 of this machine, and wait until all have ended.

    Signal handlers are replaced meanwhile, so only the main thread may call this. The ranks write to this process's
    own standard output and error, and read nothing.

    Args:
        command: the full argument vector of a rank, the same for all; see `module_command`.
        nproc: number of ranks, at least 1.
        grace_s: seconds that ranks keep after one has failed. Ranks that are to name a hung peer themselves need more
            than their own time limit.
        term_s: seconds between the TERM that follows the grace period and the KILL.
        again: the command that goes on with the run, for the line that acknowledges a first signal.
        less_memory: what to do about memory, for the line about a rank that was killed.

    Returns:
        The ranks' exit code if they agree, else the one that `combine_exit_codes` picks.

    Raises:
        ValueError: nproc is below 1.
        OSError: a rank cannot be started, or no port can be bound.
    """
    if nproc < 1:
        raise ValueError(f"expected at least 1 rank, got {nproc}")
    pending: list[signal.Signals] = []
    ranks: list[subprocess.Popen[bytes]] = []
    with _handlers(pending):
        try:
            kills = memory_kills()
            _start(command, nproc, ranks)
            _supervise(ranks, pending, grace_s, term_s, again, lambda: why_killed(kills, less_memory))
        finally:
            # Also what a rank has started itself ends here: nothing may hold a GPU or a file of the run.
            for rank in ranks:
                _kill_group(rank)
            for rank in ranks:
                rank.wait()
    return combine_exit_codes([rank.returncode for rank in ranks])


def acknowledgement(name: str, again: str) -> str:
    """What is said at once to a signal that asks for a save."""
    insist = "; a second Ctrl-C leaves at once, unsaved" if name == "SIGINT" else ""
    return f"{name}: saving after this step, then exit code {EXIT_REQUEUE}{insist}; to go on: {again}"


def module_command(module: str, *argv: str) -> list[str]:
    """The command of a process that runs a module of ours as this one would import it, whatever lies in the working
    directory (start.py). "dsbert.cli" is the command line."""
    return [sys.executable, str(Path(__file__).absolute().parents[1] / "start.py"), module, *argv]


def die_with_parent() -> bool:
    """Have the kernel kill this process when the launcher dies, even of KILL, and let forwarded signals in.

    Does nothing outside of `launch`; returns whether this is a rank of one.

    A rank calls this before its slow imports, and after it has set its signal handlers. It is no hook between fork and
    exec, where Python code can deadlock.

    Raises:
        OSError: the kernel refuses.
    """
    # Removed, so that a program started by this rank does not take the launcher for its own parent.
    parent = os.environ.pop(PARENT_PID_ENV, None)
    if parent is None:
        return False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if sys.platform != "linux":
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # the launcher died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
    return True


@contextmanager
def _handlers(pending: list[signal.Signals]) -> Iterator[None]:
    """Collect the forwarded signals in `pending`, and put the old handlers back afterwards."""

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(signal.Signals(number))

    # nohup and the like ignore HUP on purpose.
    numbers = [n for n in FORWARDED if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
    numbers.append(signal.SIGTSTP)
    previous = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], nproc: int, ranks: list[subprocess.Popen[bytes]]) -> None:
    """Start the ranks and append each to `ranks` at once, so that a failure on the way leaves none unknown."""
    # Our own copy is closed on return: with it open, ranks could still connect to the port after rank 0 has died,
    # and would wait for an answer.
    secret = new_secret()
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, nproc)) as listener, _blocked_signals():
        for rank in range(nproc):
            ranks.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    env=_environment(rank, nproc, listener, secret),
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                    start_new_session=True,
                )
            )


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Processes started meanwhile hold back what is forwarded, until `die_with_parent`: a signal that comes while the
    interpreter starts is not lost, and does not kill a rank that has no handler yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(rank: int, nproc: int, listener: socket.socket, secret: str) -> Mapping[str, str]:
    """The environment of one rank: ours, torchrun's variables, and those of this module."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        PARENT_PID_ENV: str(os.getpid()),
        SECRET_ENV: secret,
    }
    if rank == 0:
        environment[LISTEN_FD_ENV] = str(listener.fileno())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    return environment


def _supervise(
    ranks: Sequence[subprocess.Popen[bytes]],
    pending: list[signal.Signals],
    grace_s: float,
    term_s: float,
    again: str,
    explain_kill: Callable[[], str],
) -> None:
    """Forward signals until all ranks have ended, or until those that outstay a failure have to be killed."""
    ended: set[int] = set()
    clock = AwakeClock(1.0)
    term_at = kill_at = float("inf")
    while len(ended) < len(ranks):
        while pending:
            number = pending.pop(0)
            if number == signal.SIGTSTP:
                _suspend(ranks)
                continue
            if again:
                _say(acknowledgement(number.name, again))
                again = ""
            _signal_all(ranks, FORWARDED[number])
        for index, rank in enumerate(ranks):
            if index in ended or rank.poll() is None:
                continue
            ended.add(index)
            _report_signal(index, rank, explain_kill)
            if rank.returncode != 0:
                term_at = min(term_at, clock.now() + grace_s)
        now = clock.now()
        if now >= kill_at:
            return
        if now >= term_at and len(ended) < len(ranks):
            left = ", ".join(str(number) for number in range(len(ranks)) if number not in ended)
            _say(f"still running {grace_s:g} s after another rank failed, stopping: rank {left}")
            _signal_all(ranks, signal.SIGTERM)
            term_at, kill_at = float("inf"), now + term_s
        time.sleep(POLL_S)


def _report_signal(number: int, rank: subprocess.Popen[bytes], explain_kill: Callable[[], str]) -> None:
    """One line for a rank that a signal killed: it could not write one itself."""
    if rank.returncode < 0:
        why = explain_kill() if rank.returncode == -signal.SIGKILL else ""
        _say(f"rank {number} (process {rank.pid}) was killed by {_signal_name(-rank.returncode)}{why}")


def _signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send a signal to the ranks that still run, but not to what they have started: that may not expect it."""
    for rank in ranks:
        rank.send_signal(number)


def _suspend(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ctrl-Z: the ranks, which have sessions of their own, stand still for as long as this process does."""
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, number)
        if number == signal.SIGSTOP:
            os.kill(os.getpid(), number)  # returns when we are woken


def _kill_group(rank: subprocess.Popen[bytes]) -> None:
    """Kill a rank, if it still runs, and what it has left in its session's process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)


def _say(message: str) -> None:
    """One line on standard error, flushed: the ranks write there too."""
    print(f"dsbert: {printable(message)}", file=sys.stderr, flush=True)
