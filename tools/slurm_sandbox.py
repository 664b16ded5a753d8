"""A real SLURM on this machine, to try the scripts of slurm/ on: a controller, and nodes n1, n2, ... out of one folder.

    python tools/slurm_sandbox.py --nodes 2                         until Ctrl-C; prints the environment to export
    python tools/slurm_sandbox.py --nodes 2 -- srun -N2 hostname    one command inside, and its exit code

Needs root on Linux, and Debian's packages (`--install` gets them). All that SLURM reads and writes lies in a temporary
folder; each node has its own hostname, /etc/hosts and process tree, and all of it ends with this program. There are no
cgroups and no accounting. The daemons trust whoever reaches them, so they listen on 127.0.0.1 only.

Partitions: low (the default, requeues what it preempts; GraceTime 0), patient (the same with GraceTime 30), and high,
which preempts both. A job that exits with 75 is NOT requeued by this cluster itself, as on most sites.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "unshare", "setpriv")

_START_S = 20.0
_CONFIG = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# How long a requeued job waits is this and a second.
AuthInfo=cred_expire=5
# Nobody but this machine reaches daemons that trust whoever reaches them.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Nodes may have more CPUs than the machine.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
MailProg=/bin/true
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
EnforcePartLimits=ALL
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
{nodes}
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=7-00:00:00 State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=patient PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
_TREE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# What a node runs as process 1 of its own process tree: the daemon, and what the daemon leaves behind if it is killed.
_NODE = """
hostname "$1" && mount --make-rprivate / && mount --bind "$2" /etc/hosts || exit 1
shift 2
"$@" &
while :; do wait; sleep 1; done
"""


class SandboxError(Exception):
    """The cluster does not start; the message holds the end of its logs."""


class Sandbox:
    """A cluster of `nodes` nodes with `cpus` CPUs each, in a folder of its own. A context manager.

    extra: further lines of slurm.conf. Raises SandboxError from `start` if the nodes do not come up.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, extra: str = "") -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.extra = extra
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}  # by node; the parents of the roots
        self._roots: dict[str, int] = {}  # process 1 of each process tree

    def __enter__(self) -> Sandbox:
        # Below /tmp: a socket's path has at most 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill every process tree."""
        for name in list(self._daemons):
            self._kill_tree(name)
        shutil.rmtree(self.folder)

    def run(
        self, *command: str, timeout: float = 30.0, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command that finds this cluster. Raises SandboxError if it fails or takes longer than `timeout` seconds."""
        environment = os.environ | options.pop("env", {}) | self.environment
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, **options
            )
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{' '.join(command)}: no end after {timeout:g} s\n{self.logs()}") from None
        if check and done.returncode:
            raise SandboxError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def processes(self, node: str) -> dict[int, str]:
        """Every live process of a node but its process 1: {process id on this machine: command line}."""
        tree = _namespace(self._roots[node])
        lines = {pid: _read(pid, "cmdline").replace("\0", " ").strip() for pid in _pids() if _namespace(pid) == tree}
        return {pid: line for pid, line in lines.items() if line and pid != self._roots[node]}

    def kill_daemon(self, node: str) -> None:
        """kill -9 of a node's slurmd. Its jobs' processes live on, as they do on a real node."""
        (pid,) = [pid for pid, line in self.processes(node).items() if line.startswith("slurmd ")]
        os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node, anew if it runs: whatever still ran there ends."""
        if node in self._daemons:
            self._kill_tree(node)
        self._start_tree(
            node, "--uts", "sh", "-c", _NODE, "sh", node, str(self.folder / "hosts"),
            "slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node,
        )  # fmt: skip

    def logs(self, of: str = "", lines: int = 20) -> str:
        """The end of the logs, of every daemon or of some."""
        parts = []
        for path in sorted((self.folder / "log").glob(f"{of}*.log")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)

    def _configure(self) -> None:
        for name in ("state", "run", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={number} CPUs={self.cpus} RealMemory=4000"
            for node, number in zip(self.nodes, ports, strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(folder=self.folder, host=host, port=port, nodes="\n".join(nodes), extra=self.extra)
        )
        # slurmd looks for cgroups even where it is told to use none, and ends if it finds no mount.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *self.nodes)))

    def _start(self) -> None:
        self._start_tree("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        try:
            wait_for(lambda: self._idle() == set(self.nodes), _START_S, "idle nodes", step_s=0.1)
        except TimeoutError as error:
            raise SandboxError(f"{error}\n{self.logs()}") from None
        # Idle says that the nodes reach the controller, not that anybody reaches the nodes.
        self.run("srun", f"--nodes={len(self.nodes)}", "hostname", timeout=15)

    def _start_tree(self, name: str, *command: str) -> None:
        """Start a process tree, of which the command is the root. It dies with this process, even of KILL."""
        with (self.folder / "log" / "output.log").open("ab") as output:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_TREE, *command],
                env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for this program, which then stops the cluster
            )  # fmt: skip
        self._daemons[name] = daemon
        wait_for(lambda: bool(_child(daemon.pid)) or daemon.poll() is not None, 10, f"the process tree of {name}")
        self._roots[name] = _child(daemon.pid)

    def _kill_tree(self, name: str) -> None:
        """By its root, with which the kernel kills the rest; the parent then collects the root."""
        if self._roots.get(name):
            with suppress(ProcessLookupError):
                os.kill(self._roots[name], signal.SIGKILL)
        else:
            self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def _idle(self) -> set[str]:
        if any(daemon.poll() is not None for daemon in self._daemons.values()):
            raise SandboxError(f"expected daemons that run on, found one that has ended\n{self.logs()}")
        done = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", timeout=5, check=False)
        return {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")}


def wait_for(condition: Callable[[], bool], seconds: float, what: str, step_s: float = 0.02) -> None:
    """Raise TimeoutError, naming `what`, unless the condition holds within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {what} within {seconds:g} s")
        time.sleep(step_s)


def missing() -> str:
    """Why there can be no sandbox here, in one line; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "expected root on Linux: a node is a process tree with a hostname of its own"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"expected {', '.join(absent)} on the PATH, found none: {' '.join(INSTALL)}" if absent else ""


def install() -> None:
    """Install Debian's packages. Raises subprocess.CalledProcessError."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(("apt-get", "update"), env=environment, check=True, timeout=300)
    subprocess.run(INSTALL, env=environment, check=True, timeout=600)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # it has ended, or a container shows it without letting us look
        return ""


def _child(parent: int) -> int:
    """The child of a process that has at most one; 0 if it has none."""
    for pid in _pids():
        fields = _read(pid, "stat").rpartition(")")[2].split()
        if fields and int(fields[1]) == parent:
            return pid
    return 0


def _serve(sandbox: Sandbox, command: Sequence[str]) -> int:
    if command:
        return subprocess.run(command, env=os.environ | sandbox.environment, check=False).returncode
    for name, value in sandbox.environment.items():
        print(f"export {name}={value}")
    print(f"# {', '.join(sandbox.nodes)} are up; logs in {sandbox.folder}/log; Ctrl-C ends it", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


def main() -> int:
    """Start a cluster, run a command in it or wait for Ctrl-C, and stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=8, help="per node; may be more than the machine has")
    parser.add_argument("--install", action="store_true", help="apt-get the packages first")
    parser.add_argument("command", nargs="*", help="run this inside instead of waiting")
    options = parser.parse_args()
    if options.install:
        install()
    if missing():
        print(f"slurm_sandbox: {missing()}", file=sys.stderr)
        return 2
    # TERM ends a command as Ctrl-C does, through the context manager.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not options.command:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with Sandbox(options.nodes, options.cpus) as sandbox:
            return _serve(sandbox, options.command)
    except SandboxError as error:
        print(f"slurm_sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
