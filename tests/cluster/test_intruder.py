"""Somebody else's process at the ranks' store: it reads, overwrites, claims a rank, repeats what it heard, floods."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dsbert.base.errors import DsbertError, UserError
from dsbert.cluster.endpoint import _bind, _own_address
from dsbert.cluster.secret import SECRET_ENV, SECRET_FILE, find_secret
from tests.cluster.test_rendezvous import _environment, _launched_by, _new_job, _slurm
from tests.helpers import run_distributed

SECRET = {SECRET_ENV: "only the ranks know this, all of them"}


def _await(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody made {path}"
        time.sleep(0.01)


def _join(environment: dict[str, str], timeout_s: float = 30) -> list[Any]:
    """What comes of a rank: a word of rank 0 in the store and a sum over all, or the one line that it ends with."""
    import torch

    from dsbert.base.collectives import all_reduce, gather_json
    from dsbert.cluster import process_group

    _launched_by(environment)
    os.environ.pop(SECRET_ENV, None)
    os.environ.update({name: value for name, value in environment.items() if name == SECRET_ENV})
    try:
        world = process_group.init(timeout_s)
    except DsbertError as error:
        return [type(error).__name__, str(error)]
    total = float(all_reduce(torch.ones(1)))
    store = process_group._stores[-1]
    if world.is_main:
        store.set("word", secrets.token_hex(16))
    word = store.get("word").decode()
    gather_json(None)  # rank 0 has the store
    return ["met", word, total]


def _store_at(port: int) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return dist.TCPStore("127.0.0.1", port, None, timeout=timedelta(seconds=5), wait_for_workers=False)
        except OSError:
            time.sleep(0.01)


def _bound(port: int) -> socket.socket:
    """The port, as soon as rank 0 has left it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _heard(store: Any) -> dict[str, bytes]:
    """All that a store holds, as far as it is not taken away meanwhile."""
    found = {}
    for key in store.list_keys():
        with suppress(RuntimeError):
            if store.check([key]):
                found[key] = store.get(key)
    return found


def check_vandal(folder: str, port: int) -> list[Any]:
    """Ranks 0 and 1, the late one; and an intruder, who knows all of the protocol but not the secret."""
    rank, done = int(os.environ["RANK"]), Path(folder) / "done"
    if rank < 2:
        if rank == 1:
            _await(done)
        found = _join(_environment(port, rank, 2) | SECRET)
        (Path(folder) / f"met {rank}").touch()
        _await(Path(folder) / "heard")  # rank 0 has the store
        return found
    store = _store_at(port)
    mute = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(200)]
    for word in (b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\xff" * 1000):
        with socket.create_connection(("127.0.0.1", port), 5) as other:
            other.sendall(word)
    heard: set[bytes] = set()
    while len(heard) < 2:
        heard |= set(_heard(store).values())
    for key in store.list_keys():
        store.set(key, "mine")
    for key in ("meet/claim/1", "claim/1", "meet/host/1", "hello/1", "verdict", "dsbert/0/meet/verdict"):
        store.set(key, '{"nonce": "mine", "missing": [], "numbers": ["", ""]}')
    for key in store.list_keys():
        store.delete_key(key)
    done.touch()
    while not all((Path(folder) / f"met {rank}").exists() for rank in (0, 1)):
        heard |= set(_heard(store).values())
    heard |= set(_heard(store).values())
    (Path(folder) / "heard").touch()
    for connection in mute:
        connection.close()
    return [value.decode("latin1") for value in heard]


@pytest.mark.slow
def test_a_vandal_at_the_store_changes_nothing_and_hears_nothing(tmp_path: Path) -> None:
    port = _new_job()[1][0]
    first, second, heard = run_distributed(check_vandal, 3, {"folder": str(tmp_path), "port": port}, timeout=90)
    assert first == second == ["met", first[1], 2.0]
    assert len(heard) > 4, "the intruder heard nothing: the test could not fail"
    said = "\0".join(heard)
    assert first[1] not in said
    assert bytes.fromhex(first[1]).decode("latin1") not in said
    assert socket.gethostname() not in said.replace('"host": "' + socket.gethostname(), "")


def check_relay(folder: str, job: str, ports: list[int]) -> list[Any]:
    """Somebody has the first port, and says there whatever rank 0 says at the second."""
    rank, done = int(os.environ["RANK"]), Path(folder) / "done"
    bound = Path(folder) / "bound"
    if rank < 2:
        _await(done if rank else bound)
        found = _join(_slurm(job, rank, 2) | SECRET)
        (Path(folder) / f"met {rank}").touch()
        return [*found, int(os.environ["MASTER_PORT"])]
    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", ports[0])) as listener:
        fd = os.dup(listener.fileno())
    own = dist.TCPStore("127.0.0.1", ports[0], None, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    bound.touch()
    store = _store_at(ports[1])
    while len(said := _heard(store)) < 3:
        time.sleep(0.01)
    for key, value in said.items():
        own.set(key, value)  # type: ignore[arg-type]  # torch's stub knows text only
    done.touch()
    _await(Path(folder) / "met 1")
    return [sorted(set(own.list_keys()) - set(said))]


def test_what_rank_0_said_is_not_believed_at_another_port(tmp_path: Path) -> None:
    job, ports = _new_job()
    args = {"folder": str(tmp_path), "job": job, "ports": ports}
    first, second, answered = run_distributed(check_relay, 3, args, timeout=90)
    assert first == second == ["met", first[1], 2.0, ports[1]]
    # What rank 1 said there is that it does not believe it: no host, no claim.
    assert answered == [[]]


def check_replay(folder: str, ports: list[int]) -> list[Any]:
    """A meeting of which somebody keeps all that was said; then rank 1 comes to his store with the same secret."""
    rank, done, kept = int(os.environ["RANK"]), Path(folder) / "done", Path(folder) / "kept"
    if rank < 2:
        if rank == 1:
            _await(Path(folder) / "listening")
        first = _join(_environment(ports[0], rank, 2) | SECRET)
        (Path(folder) / f"met {rank}").touch()
        _await(kept)  # rank 0 has the store
        return first
    if rank == 3:
        _await(done)
        found = _join(_environment(ports[0], 1, 2) | SECRET)
        (Path(folder) / "given up").touch()
        return found
    import torch.distributed as dist

    said: dict[str, bytes] = {}
    store = _store_at(ports[0])
    while len(said) < 2:  # who it is, and the challenge, which is taken away when all have come
        said |= _heard(store)
    (Path(folder) / "listening").touch()
    while not all((Path(folder) / f"met {rank}").exists() for rank in (0, 1)):
        said |= _heard(store)
    said |= _heard(store)
    # Counters apart: a rank that has been claimed already leaves at once.
    said = {key: value for key, value in said.items() if not value.isdigit()}
    kept.touch()
    listener = _bound(ports[0])
    own = dist.TCPStore(
        "127.0.0.1", ports[0], None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    for key, value in said.items():
        own.set(key, value)  # type: ignore[arg-type]  # torch's stub knows text only
    before = set(own.list_keys())
    done.touch()
    while set(own.list_keys()) == before and not (Path(folder) / "given up").exists():
        time.sleep(0.01)
    for key, value in said.items():  # and again, after rank 1 has spoken
        own.set(key, value)  # type: ignore[arg-type]  # torch's stub knows text only
    _await(Path(folder) / "given up")
    return [len(said), sorted(set(own.list_keys()) - before) != []]


def test_an_old_meeting_cannot_be_played_again(tmp_path: Path) -> None:
    _, ports = _new_job()
    first, _, replayed, third = run_distributed(check_replay, 4, {"folder": str(tmp_path), "ports": ports}, timeout=90)
    assert first[0] == "met"
    assert replayed[0] > 4
    assert replayed[1], f"rank 1 was not let in: the test could not fail: {third}"
    assert third[0] == "PeerError", third
    assert "\n" not in third[1]
    assert "missing: rank 0" in third[1]


def check_wrong_secret(port: int) -> list[Any]:
    rank = int(os.environ["RANK"])
    return _join(_environment(port, rank, 2) | {SECRET_ENV: f"{rank} {SECRET[SECRET_ENV]}"}, timeout_s=12 - 8 * rank)


@pytest.mark.slow
def test_who_does_not_know_the_secret_is_no_rank() -> None:
    port = _new_job()[1][0]
    first, second = run_distributed(check_wrong_secret, 2, {"port": port}, timeout=60)
    assert first == ["PeerError", f"expected 2 ranks to meet at 127.0.0.1:{port} within 12 s, missing: rank 1"]
    assert second[0] == "PeerError"
    assert second[1].endswith(f"missing: rank 0; found the store of somebody else at port {port}")


MAKE = "import os, sys; os.umask(0)\nfrom pathlib import Path\nfrom dsbert.cluster.secret import find_secret\n"
MAKE += "sys.stdout.write(find_secret(Path(sys.argv[1])).key.decode())"


def test_all_ranks_find_one_secret_that_others_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    command = [sys.executable, "-c", MAKE, str(tmp_path / "a" / "run")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(6)]
    found = {rank.communicate(timeout=60)[0] for rank in ranks}
    assert len(found) == 1
    assert len(found.pop()) == 64
    path = tmp_path / "a" / "run" / SECRET_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert find_secret(tmp_path / "b").key != find_secret(tmp_path / "a" / "run").key


@pytest.mark.parametrize("how", ["mode", "owner", "link", "fifo", "empty", "file", "short"])
def test_a_secret_that_others_may_know_is_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    monkeypatch.setattr("dsbert.cluster.secret._PATIENCE_S", 0.1)
    directory = tmp_path / "run"
    find_secret(directory)
    path = directory / SECRET_FILE
    expected = f"expected {path}, the ranks' secret, to be a file of user {os.geteuid()} that nobody else may read"
    if how == "mode":
        path.chmod(0o640)
    elif how == "owner":
        if os.geteuid():
            pytest.skip("needs root, to give a file away")
        os.chown(path, 65534, 65534)
    elif how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        expected = f"expected to keep the ranks' secret in {path}, found: "
    elif how == "fifo":
        path.unlink()
        os.mkfifo(path, 0o600)
    elif how == "empty":
        path.write_text("")
        expected = f"expected the ranks' secret in {path}, found 0 bytes: remove it"
    elif how == "file":
        directory = path
        expected = f"expected to keep the ranks' secret in {path / SECRET_FILE}, found: "
    else:
        monkeypatch.setenv(SECRET_ENV, "short")
        expected = f"expected at least 32 characters in {SECRET_ENV}, found 5"
    with pytest.raises(UserError) as error:
        find_secret(directory)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_the_store_listens_where_the_address_says(monkeypatch: pytest.MonkeyPatch) -> None:
    address = _own_address()
    if address is None or address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    for given in (False, True):
        with _bind(address, 0, given=given) as listener:
            assert listener.getsockname()[0] == address
        with _bind("192.0.2.7", 0, given=given) as listener:  # nobody's: as where another address is forwarded to ours
            assert listener.getsockname()[0] in ("::", "0.0.0.0")
    with _bind("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
