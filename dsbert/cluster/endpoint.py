"""Where the ranks of one launch meet, from the environment that the launcher made. The only importer of mpi4py.

launcher                       address and port                                  whose store it is
--nproc, torchrun, deepspeed   MASTER_ADDR:MASTER_PORT                           each rank may come once
srun                           the first node, the first free of five ports      it shows the job's identity
mpiexec                        rank 0 binds any free port and broadcasts it      nobody else knows the port
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from dsbert.base.errors import PeerError, UserError
from dsbert.cluster.launcher import LISTEN_FD_ENV
from dsbert.cluster.ranks import RankInfo

POLL_S = 0.05
_FIRST_PORT, _END_PORT, _NUM_PORTS = 10000, 30000, 5  # below the ports that systems give out by themselves


@dataclass(frozen=True)
class Endpoint:
    """Where to meet: one of `ports`, first come first served.

    identity: what the right store shows; None where the environment has nothing that tells one launch from another.
    listener: rank 0's bound socket. It is handed on and never closed in between, so nobody else can take the port.
    """

    address: str
    ports: tuple[int, ...]
    identity: str | None = None
    listener: socket.socket | None = None

    def __str__(self) -> str:
        return f"{self.address}:{'|'.join(map(str, self.ports))}"


def find_endpoint(ranks: RankInfo, deadline: float) -> Endpoint:
    """The endpoint of this launch; rank 0 binds its port, unless torchrun's agent serves there already.

    Raises UserError for an incomplete environment and for ports that are taken, PeerError where rank 0 does not
    broadcast before the deadline (of `time.monotonic`).
    """
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)]
    if ranks.launcher == "slurm":
        return _slurm_endpoint(ranks)
    if ranks.launcher == "mpi" and len(given) < 2:
        return _mpi_endpoint(ranks, deadline)
    if len(given) < 2:
        raise UserError(
            f"expected MASTER_ADDR and MASTER_PORT in the environment of {ranks.world_size} ranks, found "
            f"{' and '.join(given) or 'neither'}: export the address of rank 0's machine and a free port"
        )
    address, ports = os.environ["MASTER_ADDR"], (_given_port(),)
    if listen_fd := os.environ.pop(LISTEN_FD_ENV, None):
        return Endpoint(address, ports, listener=socket.socket(fileno=int(listen_fd)))
    # torchrun's agent already serves a store at this address; then rank 0 is a client like everybody else.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Endpoint(
        address, ports, listener=_listener(address, ports, given=True) if ranks.rank == 0 and not agent else None
    )


def first_node(hostlist: str) -> str | None:
    """The first name of a SLURM hostlist, as n03 of `n[03-10,12],gpu-a01`; None if it is empty or malformed."""
    found = re.match(r"((?:[^\[\],\s]|\[[\d,-]+\])+)(?:,|$)", hostlist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[1]) if found else None


def candidate_ports(job_id: str, step_id: str, restart_count: str) -> tuple[int, ...]:
    """Five different ports in 10000-29999, the same for all ranks of an attempt and hardly for another's."""
    digest = hashlib.sha256(f"{job_id}/{step_id}/{restart_count}".encode()).digest()
    span = _END_PORT - _FIRST_PORT
    start = int.from_bytes(digest[:8], "big")
    # Each job has a stride of its own as well: two that share one port hardly share the next.
    stride = 1 + int.from_bytes(digest[8:16], "big") % (span // _NUM_PORTS - 1)
    return tuple(_FIRST_PORT + (start + index * stride) % span for index in range(_NUM_PORTS))


def until(condition: Callable[[], bool], deadline: float) -> bool:
    """Ask again and again, ever more slowly: a thousand ranks may ask one. False if the deadline passes first."""
    pause_s = POLL_S / 8
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 4 * POLL_S)
    return True


def one_line(error: Exception) -> str:
    """The text of an error of torch or MPI, which may fill a screen, as one line of bounded length."""
    return " ".join(str(error).split())[:300]


def _slurm_endpoint(ranks: RankInfo) -> Endpoint:
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        raise UserError("expected SLURM_JOB_ID beside SLURM_PROCID in the environment, found none: start with srun")
    attempt = env["SLURM_JOB_ID"], env["SLURM_STEP_ID"], env.get("SLURM_RESTART_COUNT", "0")
    address = env.get("MASTER_ADDR")
    if not address:
        hostlist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        node = first_node(hostlist)
        address = node if node and _resolves(node) else env.get("SLURM_LAUNCH_NODE_IPADDR")
        if not address:
            raise UserError(
                f"expected a first node that resolves in SLURM_STEP_NODELIST, or SLURM_LAUNCH_NODE_IPADDR, found "
                f"{hostlist!r} and none: export MASTER_ADDR"
            )
    ports = (_given_port(),) if env.get("MASTER_PORT") else candidate_ports(*attempt)
    identity = "/".join((env.get("SLURM_CLUSTER_NAME", ""), *attempt))
    given = bool(env.get("MASTER_ADDR"))
    return Endpoint(address, ports, identity, _listener(address, ports, given=given) if ranks.rank == 0 else None)


def _mpi_endpoint(ranks: RankInfo, deadline: float) -> Endpoint:
    """Rank 0 binds a port and tells it by an MPI broadcast, of bytes: mpi4py's broadcast of objects unpickles."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"expected mpi4py under mpiexec, found: {one_line(error)}: pip install 'dsbert[mpi]', or export "
            "MASTER_ADDR and MASTER_PORT"
        ) from None
    if (size := MPI.COMM_WORLD.Get_size()) != ranks.world_size:
        raise UserError(
            f"expected an MPI world of {ranks.world_size} ranks, found {size}: take mpiexec from the MPI library that "
            "mpi4py uses, or export MASTER_ADDR and MASTER_PORT"
        )
    listener, here = None, ""
    if ranks.rank == 0 and (address := _own_address()):
        listener = _bind(address, 0)
        here = f"{address} {listener.getsockname()[1]}"
    buffer = bytearray(here.encode().ljust(300))
    if not until(MPI.COMM_WORLD.Ibcast([buffer, MPI.BYTE], root=0).Test, deadline):
        raise PeerError(
            f"expected {ranks.world_size} ranks in an MPI broadcast, missing: rank 0, which does not answer"
        )
    if not (words := buffer.decode().split()):
        raise UserError(
            "expected the name of rank 0's machine to resolve, found no address: export MASTER_ADDR and MASTER_PORT"
        )
    return Endpoint(words[0], (int(words[1]),), listener=listener)


def _given_port() -> int:
    text = os.environ["MASTER_PORT"]
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise UserError(f"expected MASTER_PORT of 1 to 65535, found {text!r}: export a free port")
    return int(text)


def _listener(address: str, ports: tuple[int, ...], *, given: bool) -> socket.socket:
    """The first of the ports that is free here."""
    for port in ports:
        try:
            return _bind(address, port, given=given)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"expected to bind port {port} on rank 0's machine, found: {error.strerror}") from None
    if len(ports) == 1:
        raise UserError(
            f"expected MASTER_PORT={ports[0]} to be free on rank 0's machine, found it in use: export another, or see "
            "what an earlier run has left there"
        )
    raise UserError(
        f"expected a free port among this job's candidates {', '.join(map(str, ports))} on rank 0's machine, found all "
        "in use: export MASTER_PORT"
    )


def _bind(address: str, port: int, *, given: bool = False) -> socket.socket:
    """Listen at the address where it is a number, or given by the user, and one of this machine's; else at all
    addresses, of IPv4 and IPv6: what a name is here need not be what it is on other nodes."""
    own = address if is_loopback(address) else _own_number(address, given)
    if own:
        return socket.create_server((own, port), family=socket.AF_INET6 if ":" in own else socket.AF_INET, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _own_number(address: str, given: bool) -> str | None:
    """The numeric address of this machine that is meant, where other machines may mean the same."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=0 if given else socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    numbers = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    # Many systems give their own name a loopback address, which is of no use to others.
    if any(is_loopback(number) for number in numbers):
        return None
    for number in numbers:
        with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in number else socket.AF_INET) as probe:
            probe.bind((number, 0))
            return number
    return None


def is_loopback(address: str) -> bool:
    """Whether the address, as it is written, can only mean this machine."""
    return address in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", address) is not None


def _own_address() -> str | None:
    """An address that other machines may reach: that of the route outwards, else that of the host's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737); a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def mpi_library() -> str:
    """The MPI that mpi4py has found, one line. Raises whatever mpi4py raises where it finds none."""
    import mpi4py

    # Asking for its name needs no MPI_Init, by which some MPIs end a process that srun has started.
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().split())[:60]
