"""How ranks meet, with real processes and sockets. The launchers themselves: test_launchers.py."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dsbert.base.errors import DsbertError, UserError
from dsbert.cluster.endpoint import candidate_ports, find_endpoint, first_node
from dsbert.cluster.handshake import Party
from dsbert.cluster.ranks import RankInfo, ranks_from_environment
from dsbert.cluster.secret import Secret
from tests.commands import SMALL
from tests.fault_rows import FaultTable
from tests.helpers import run_distributed

LAUNCHERS = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|(SLURM|PMI|OMPI|MPI|TORCHELASTIC)_.*)$")
SLACK_S = 4.0  # what a failure may take beyond its time limit


def _launched_by(environment: dict[str, str]) -> None:
    """This process has these variables of a launcher, and no others."""
    for name in list(os.environ):
        if LAUNCHERS.match(name):
            del os.environ[name]
    os.environ.update(environment)


def _slurm(job: str, rank: int, world_size: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_CLUSTER_NAME": "here", "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(world_size), "SLURM_LOCALID": str(rank), "SLURM_STEP_NODELIST": "localhost", **more,
    }  # fmt: skip


def _environment(port: int, rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def _new_job() -> tuple[str, tuple[int, ...]]:
    job = str(secrets.randbelow(10**9))
    return job, candidate_ports(job, "0", "0")


def check_meeting(timeout: float, environments: list[dict[str, str]], mpi4py: bool = True) -> list[Any]:
    """Meet as the environment of this process says. What came of it, in words, and the seconds that it took."""
    from dsbert.cluster.rendezvous import meet

    _launched_by(environments[int(os.environ["RANK"])])
    if not mpi4py:
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
    begin = time.monotonic()
    try:
        ranks = ranks_from_environment()
        assert ranks is not None
        meeting = meet(ranks, timeout)
    except DsbertError as error:
        return [type(error).__name__, str(error), time.monotonic() - begin, list(error.ranks)]
    if ranks.rank == 0:
        meeting.store.set("word", secrets.token_hex(16))
    word = meeting.store.get("word").decode()
    meeting.store.set(f"use/{ranks.rank}", "works")
    meeting.store.wait([f"use/{rank}" for rank in range(ranks.world_size)])
    # Who comes after a meeting, as the next program of the same step may, must not take its store for a new one.
    inside: Any = meeting.open_store
    assert not inside.underlying_store.check(["dsbert/identity"])
    assert not inside.underlying_store.check(["dsbert/about"])
    meeting.store.add("leaving", 1)
    while ranks.rank == 0 and meeting.store.add("leaving", 0) < ranks.world_size:
        time.sleep(0.01)  # rank 0 has the store
    return ["met", word, int(os.environ["MASTER_PORT"]), os.environ["MASTER_ADDR"]]


def _meet(timeout: float, environments: list[dict[str, str]], **more: Any) -> list[list[Any]]:
    args = {"timeout": timeout, "environments": environments, **more}
    return run_distributed(check_meeting, len(environments), args, timeout=timeout + 30)


@contextmanager
def _foreign(kind: str, port: int) -> Iterator[None]:
    """Somebody else's server at a port of this machine."""
    import torch.distributed as dist

    with closing(socket.create_server(("127.0.0.1", port))) as listener:
        if kind == "mute":  # the kernel accepts, and nobody answers
            yield
        elif kind == "web server":
            threading.Thread(target=_refuse_politely, args=(listener,), daemon=True).start()
            yield
            listener.shutdown(socket.SHUT_RDWR)
        else:
            store = dist.TCPStore(
                "127.0.0.1",
                port,
                None,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=os.dup(listener.fileno()),
            )
            if kind != "store":
                store.set("dsbert/identity", kind)
            yield
            told = [key for key in store.list_keys() if not key.startswith("dsbert/")]
            assert not told, "a rank wrote into a store that is not its own"


def _refuse_politely(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    ("hostlist", "first"),
    [
        ("n1", "n1"),
        ("n3,n1", "n3"),
        ("n[3-4,7],gpu-a01", "n3"),
        ("n[7,3-4]", "n7"),
        ("n[003-010,12]", "n003"),
        ("gpu-a01,n[3-4]", "gpu-a01"),
        ("rack[1-2]n[04-08],x", "rack1n04"),
        ("r[2,4]-[1-9].cluster.example", "r2-1.cluster.example"),
        ("[10-12]", "10"),
        ("", None),
        ("n[3-4", None),
        ("n]3", None),
        ("n[],m", None),
    ],
)
def test_the_first_node_of_a_hostlist(hostlist: str, first: str | None) -> None:
    assert first_node(hostlist) == first


def test_candidate_ports() -> None:
    jobs = [candidate_ports(str(job), "0", "0") for job in range(2000)]
    for ports in jobs:
        assert len(set(ports)) == 5
        assert all(10000 <= port <= 29999 for port in ports)
    # Neighbours, and jobs a thousand apart, are the ones that run at the same time. With 20,000 ports a first one in
    # common is chance; a first and a second one, hardly.
    assert len({ports[0] for ports in jobs}) > 1850
    assert len({ports[:2] for ports in jobs}) == 2000
    others = {candidate_ports("7", step, restart) for step in ("0", "1") for restart in ("0", "1")}
    assert len(others) == 4
    assert candidate_ports("7", "0", "0") == candidate_ports("7", "0", "0")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        (_environment(1, 1, 4), RankInfo(1, 4, 1, "environment")),
        (_slurm("7", 1, 4), RankInfo(1, 4, 1, "slurm")),
        (_slurm("7", 0, 4) | {"SLURM_STEP_ID": "4294967291"}, None),  # the batch shell
        (_slurm("7", 1, 4) | {"WORLD_SIZE": "4", "MASTER_PORT": "12000"}, RankInfo(1, 4, 1, "slurm")),
        (_slurm("7", 1, 4) | _environment(1, 2, 8), RankInfo(2, 8, 2, "environment")),  # torchrun under srun
        (_slurm("7", 1, 4) | {"PMI_RANK": "1", "PMI_SIZE": "4"}, RankInfo(1, 4, 1, "slurm")),  # srun --mpi=pmi2
        # mpiexec in a batch script: the step is that of its helpers, one on each node
        (_slurm("7", 1, 2) | {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}, RankInfo(5, 8, 1, "mpi")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, RankInfo(1, 2, 0, "mpi")),
    ],
)
def test_who_launched_us(
    environment: dict[str, str], expected: RankInfo | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(environment))
    assert ranks_from_environment() == expected


def test_rank_0_never_lets_go_of_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsbert.cluster import rendezvous

    job, ports = _new_job()
    monkeypatch.setattr(os, "environ", _slurm(job, 0, 2))
    place = find_endpoint(RankInfo(0, 2, 0, "slurm"), time.monotonic() + 5)
    assert (place.address, place.ports, place.identity) == ("localhost", ports, f"here/{job}/0/0")
    assert place.listener is not None
    descriptor = place.listener.fileno()
    assert place.listener.getsockname() == ("127.0.0.1", ports[0])
    inode = os.fstat(descriptor).st_ino
    store = rendezvous._serve(Party(RankInfo(0, 2, 0, "slurm"), place, Secret(), 0, 5))
    assert store.port == ports[0]
    assert os.fstat(descriptor).st_ino == inode


@pytest.mark.parametrize("kind", ["nobody", "mute", "web server", "store", "here/JOB/0/1", "there/JOB/0/0"])
def test_ranks_of_a_slurm_step_meet(kind: str) -> None:
    """Whatever has their first port: then at the second. An older attempt and another cluster's job are strangers."""
    job, ports = _new_job()
    # As with --mpi=pmi2; names that do not resolve leave the address that srun says.
    more = {"SLURM_STEP_NODELIST": "n[3-4].invalid", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    environments = [_slurm(job, r, 3, **more, PMI_RANK=str(r), PMI_SIZE="3") for r in range(3)]
    with ExitStack() as stack:
        if kind != "nobody":
            stack.enter_context(_foreign(kind.replace("JOB", job), ports[0]))
        met = _meet(15, environments, mpi4py=False)
    assert met[0][0] == "met", met
    assert met == [["met", met[0][1], ports[kind != "nobody"], "127.0.0.1"]] * 3


def check_late(job: str, seen: str) -> list[Any]:
    """Rank 0 comes when rank 1 has looked for it in vain."""
    from dsbert.cluster import rendezvous

    rank, looks = int(os.environ["RANK"]), rendezvous._Candidate._listens

    def listens(candidate: rendezvous._Candidate) -> bool:
        found = looks(candidate)
        if not found and candidate.port == candidate_ports(job, "0", "0")[-1]:
            Path(seen).touch()
        return found

    rendezvous._Candidate._listens = listens  # type: ignore[assignment]  # in place of the method
    while rank == 0 and not Path(seen).exists():
        time.sleep(0.01)
    return check_meeting(15, [_slurm(job, rank, 2) for rank in range(2)])


def test_a_late_rank_0_is_waited_for(tmp_path: Path) -> None:
    job, ports = _new_job()
    met = run_distributed(check_late, 2, {"job": job, "seen": str(tmp_path / "seen")}, timeout=40)
    assert met[0] == met[1] == ["met", met[0][1], ports[0], "localhost"]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_missing_ranks_are_named(launcher: str) -> None:
    job, ports = _new_job()
    make = {"srun": lambda r: _slurm(job, r, 4), "torchrun": lambda r: _environment(ports[0], r, 4)}[launcher]
    found = _meet(1, [make(rank) for rank in range(2)])
    host = {"srun": "localhost", "torchrun": "127.0.0.1"}[launcher]
    message = f"expected 4 ranks to meet at {host}:{ports[0]} within 1 s, missing: rank 2, rank 3"
    for kind, text, seconds, ranks in found:
        assert (kind, text, ranks) == ("PeerError", message, [2, 3])
        assert seconds < 1 + SLACK_S


def test_a_missing_rank_0_is_named_with_its_address_and_what_is_there() -> None:
    """For a job whose ports are all silent, taken by others, or free; and for a port that is given."""
    job, ports = _new_job()
    with _foreign("mute", ports[0]), _foreign("here/8/0/0", ports[1]), _foreign("web server", ports[2]):
        given = _environment(ports[0], 1, 2)  # as where rank 0 has been stopped before it serves
        first, second, third = _meet(4, [_slurm(job, 1, 3), _slurm(job, 2, 3), given])
    for kind, text, seconds, ranks in (first, second):
        assert (kind, ranks) == ("PeerError", [0])
        assert (
            f"localhost:{'|'.join(map(str, ports))} within 4 s, missing: rank 0; found a server that does not " in text
        )
        assert f"answer at port {ports[0]}, the store of another job ('here/8/0/0') at port {ports[1]}, " in text
        assert f"a server that is no store at port {ports[2]}, nothing at port {ports[3]}, nothing at " in text
        assert seconds < 4 + SLACK_S
    assert third[1].endswith(
        f":{ports[0]} within 4 s, missing: rank 0; found a server that does not answer at port {ports[0]}"
    )
    assert third[2] < 4 + SLACK_S


def check_stopped(port: int, process: str) -> list[Any]:
    """Rank 0 is stopped when its store is up and rank 1 has joined."""
    from dsbert.cluster import rendezvous
    from dsbert.cluster.sealed_store import SealedStore

    rank = int(os.environ["RANK"])
    if rank == 0:
        peek = SealedStore.peek

        def stop(store: SealedStore, key: str) -> bytes | None:
            found = peek(store, key)
            if found and key == "hello/1":
                Path(process).write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return found

        SealedStore.peek = stop  # type: ignore[assignment]  # in place of the method
        _launched_by(_environment(port, 0, 2))
        rendezvous.meet(RankInfo(0, 2, 0), 60)
        return []
    found = check_meeting(1, [_environment(port, rank, 2) for rank in range(2)])
    os.kill(int(Path(process).read_text()), signal.SIGCONT)
    return found


def test_a_rank_0_that_is_stopped_holds_nobody_up(tmp_path: Path) -> None:
    _, ports = _new_job()
    _, (kind, text, seconds, ranks) = run_distributed(
        check_stopped, 2, {"port": ports[0], "process": str(tmp_path / "pid")}, timeout=40
    )
    assert (kind, ranks) == ("PeerError", [0])
    assert text.endswith(f":{ports[0]} within 1 s, missing: rank 0, which does not answer")
    assert seconds < 1 + SLACK_S


def test_a_rank_that_comes_twice_is_refused() -> None:
    """As from a second job that was given the same port."""
    _, ports = _new_job()
    found = _meet(1, [_environment(ports[0], rank, 3) for rank in (0, 1, 1)])
    assert sorted(kind for kind, *_ in found) == ["PeerError", "PeerError", "UserError"]
    (twice,) = (text for kind, text, *_ in found if kind == "UserError")
    assert twice.startswith(f"expected one rank 1 to come to 127.0.0.1:{ports[0]}, found another one there already")


def check_pretrain(cases: list[list[Any]], words: list[str], output: str) -> list[Any]:
    """The command in an environment that has something amiss; its exit code, and all that came to standard error."""
    from dsbert.cli import app

    case = int(os.environ["RANK"])
    environment, mpi = cases[case]
    _launched_by(environment)
    if mpi == "absent":
        sys.modules["mpi4py"] = None  # type: ignore[assignment]
    elif mpi == "foreign":
        sys.modules["mpi4py"] = module = ModuleType("mpi4py")
        module.MPI = SimpleNamespace(COMM_WORLD=SimpleNamespace(Get_size=lambda: 1))  # type: ignore[attr-defined]
    log = Path(output) / f"{case}.txt"
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    code = app.run(["pretrain", "demo", "--run-dir", f"{output}/run", "--timeout", "10", *words])
    sys.stderr.flush()
    return [code, log.read_text()]


def _mistakes(busy: int, all_busy: str) -> list[tuple[dict[str, str], str, str]]:
    """Environment, what mpi4py is there, and what the one line says."""

    def without(name: str) -> dict[str, str]:
        return {key: value for key, value in _environment(busy, 1, 2).items() if key != name}

    step = _slurm("7", 0, 2)
    unresolved = step | {"SLURM_STEP_NODELIST": "n[3-4].invalid"}
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    openmpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    mpich_in_step = _slurm("7", 0, 1) | mpich
    ports = ", ".join(map(str, candidate_ports(all_busy, "0", "0")))
    return [
        (without("RANK"), "", "expected RANK beside WORLD_SIZE=2"),
        (without("WORLD_SIZE"), "", "expected WORLD_SIZE beside RANK=1"),
        (without("LOCAL_RANK"), "", "expected LOCAL_RANK beside RANK=1"),
        (without("MASTER_ADDR"), "", "found MASTER_PORT: export the address"),
        (without("MASTER_PORT"), "", "found MASTER_ADDR: export the address"),
        (without("") | {"MASTER_PORT": "tcp://1"}, "", "expected MASTER_PORT of 1 to 65535, found 'tcp://1'"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "", "expected SLURM_STEP_NUM_TASKS beside SLURM_PROCID=0"),
        ({k: v for k, v in step.items() if k != "SLURM_JOB_ID"}, "", "expected SLURM_JOB_ID beside SLURM_PROCID"),
        (unresolved, "", "found 'n[3-4].invalid' and none: export MASTER_ADDR"),
        (mpich, "absent", "pip install 'dsbert[mpi]', or export"),
        (openmpi, "absent", "pip install 'dsbert[mpi]', or export"),
        (mpich_in_step, "foreign", "expected an MPI world of 2 ranks, found 1"),
        (_environment(busy, 0, 2), "", f"expected MASTER_PORT={busy} to be free on rank 0's machine, found it in use"),
        (step | {"MASTER_PORT": str(busy)}, "", f"expected MASTER_PORT={busy} to be free on rank 0's machine"),
        (_slurm(all_busy, 0, 2), "", f"expected a free port among this job's candidates {ports}"),
    ]


def test_an_environment_with_something_amiss_gives_one_line(
    data: Path, tmp_path: Path, fault_table: FaultTable
) -> None:
    start = time.time()
    job, ports = _new_job()
    mistakes = _mistakes(ports[0], job)
    words = [f"data.path={data}", *SMALL]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(_foreign("mute", port))
        args = {"cases": [mistake[:2] for mistake in mistakes], "words": words, "output": str(tmp_path)}
        found = run_distributed(check_pretrain, len(mistakes), args, timeout=60)
    for (environment, _, expected), (code, text) in zip(mistakes, found, strict=True):
        assert code == UserError.exit_code, (environment, text)
        assert text.startswith("dsbert: expected "), (environment, text)
        assert text.count("\n") == 1, (environment, text)
        assert expected in text, (environment, text)
    assert not (tmp_path / "run").exists()
    what = f"{len(mistakes)} environments: ports busy, no mpi4py, incomplete SLURM or torchrun variables: one line each"
    fault_table.row("19", what, time.time() - start, [code for code, _ in found], None)
