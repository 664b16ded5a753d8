"""How the ranks of one launch find each other, at the place that `meeting_place` reads off the environment.

Rank 0 serves a store there. The others try each port in turn, and join only a store that shows the launch's identity:
on a port there may as well be the store of another job, or a server that is no store at all. Then every rank writes its
host into the store, and rank 0 a verdict: a fresh nonce, or who is missing.

torch's store waits without any limit for a server that accepts and stays silent, or has been stopped. So whatever
touches a store runs in a thread that can be left behind.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin only since Python 3.11
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dsbert.errors import PeerError, UserError
from dsbert.meeting_place import POLL_S, Place, find_place, is_loopback, one_line, until
from dsbert.ranks import Ranks

T = TypeVar("T")
PROBE_S = 1.0  # what one look at a port may cost
BACK_OFF_S = 4.0  # at most, before another look at a port that proved to be somebody else's: torch is noisy about it
LINGER_S = 2.0  # how long rank 0 stays to tell those who came who did not
_SHOWN_RANKS = 8
_NOTHING = "nothing"
_IDENTITY = "dsbert/identity"


@dataclass(frozen=True)
class Meeting:
    """The ranks' common store, and a nonce: the same on every rank, another one at every meeting."""

    store: dist.Store
    nonce: str


def meet(ranks: Ranks, timeout_s: float) -> Meeting:
    """Find the other ranks; sets MASTER_ADDR and MASTER_PORT. Takes at most a few seconds longer than timeout_s.

    Raises UserError for an incomplete environment and for a port that is taken, PeerError naming the ranks that did
    not come within the timeout.
    """
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        return Meeting(dist.HashStore(), secrets.token_hex(16))
    deadline = time.monotonic() + timeout_s
    place = find_place(ranks, deadline)
    try:
        return _in_thread(lambda: _meet_at(place, ranks, deadline, timeout_s)).result(
            deadline - time.monotonic() + LINGER_S + PROBE_S
        )
    except FutureTimeoutError:
        raise _missing(ranks, str(place), timeout_s, [0], ", which does not answer") from None
    except (dist.DistError, RuntimeError) as error:
        raise _missing(ranks, str(place), timeout_s, [0], f", whose store is gone: {one_line(error)}") from None


def _meet_at(place: Place, ranks: Ranks, deadline: float, timeout_s: float) -> Meeting:
    store = _serve(place, timeout_s) if place.listener else _find(place, ranks, deadline, timeout_s)
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(store.port))
    # An agent's store outlives a restart of its ranks: keep attempts apart.
    common = dist.PrefixStore(f"dsbert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return Meeting(common, _confer(common, ranks, f"{place.address}:{store.port}", deadline, timeout_s, store))


def _serve(place: Place, timeout_s: float) -> dist.TCPStore:
    """Rank 0's store. The socket goes straight to it."""
    assert place.listener is not None
    port = place.listener.getsockname()[1]
    # The store is also a client of its own, and the name of a machine need not lead back to it.
    host = place.address if is_loopback(place.address) else "127.0.0.1"
    store = dist.TCPStore(
        host, port, None, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=place.listener.detach(),
    )  # fmt: skip
    if place.identity is not None:
        store.set(_IDENTITY, place.identity)
    return store


def _find(place: Place, ranks: Ranks, deadline: float, timeout_s: float) -> dist.TCPStore:
    """Look at the ports in turn until one has the right store. Raises PeerError, with what is on each port."""
    candidates = [_Candidate(place.address, port, place.identity) for port in place.ports]
    while time.monotonic() < deadline:
        for candidate in candidates:
            if store := candidate.look():
                store.set_timeout(timedelta(seconds=timeout_s))
                return store
            if time.monotonic() > deadline:
                break
        time.sleep(POLL_S)
    found = ", ".join(f"{candidate.found} at port {candidate.port}" for candidate in candidates)
    raise _missing(ranks, str(place), timeout_s, [0], f"; found {found}")


@dataclass
class _Candidate:
    """A port where rank 0 may be, and what was found there."""

    address: str
    port: int
    identity: str | None
    found: str = _NOTHING
    attempt: Future[dist.TCPStore | None] | None = None
    back_off_s: float = POLL_S
    next_look: float = 0.0

    def look(self) -> dist.TCPStore | None:
        """The store, if it is the right one; costs at most PROBE_S to connect and as much to hear.

        A server that says nothing keeps its one attempt: it may be rank 0 itself, before it has imported torch.
        """
        if self.attempt is None:
            # Connecting by ourselves first: torch would wait where nobody listens, and complain at length.
            if time.monotonic() < self.next_look or not self._listens():
                return None
            self.attempt = _in_thread(self._open)
            wait([self.attempt], PROBE_S)
        if not self.attempt.done():
            if self.found == _NOTHING:  # else an earlier attempt has found more than that
                self.found = "a server that does not answer"
            return None
        store = self.attempt.result()
        if store is None:
            self.next_look = time.monotonic() + self.back_off_s
            self.back_off_s = min(2 * self.back_off_s, BACK_OFF_S)
        self.attempt = None
        return store

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.address, self.port), PROBE_S).close()
        except (OSError, UnicodeError) as error:
            self.found = _NOTHING if isinstance(error, ConnectionRefusedError) else one_line(error)
            return False
        return True

    def _open(self) -> dist.TCPStore | None:
        try:
            store = dist.TCPStore(
                self.address, self.port, None, timeout=timedelta(seconds=PROBE_S / 2), wait_for_workers=False
            )
            shown = store.get(_IDENTITY).decode(errors="replace") if store.check([_IDENTITY]) else None
        except (dist.DistError, RuntimeError):
            self.found = "a server that is no store"
            return None
        if self.identity in (None, shown):
            return store
        self.found = f"the store of another job ({shown[:80]!r})" if shown else "the store of somebody else"
        return None


def _confer(store: dist.Store, ranks: Ranks, where: str, deadline: float, timeout_s: float, root: dist.TCPStore) -> str:
    """Say that we are here, and wait until rank 0 has seen everybody. Returns the nonce."""
    if store.add(f"meet/claim/{ranks.rank}", 1) > 1:
        raise UserError(
            f"expected one rank {ranks.rank} to come to {where}, found another one there already: give each job a "
            "MASTER_PORT of its own"
        )
    store.set(f"meet/host/{ranks.rank}", socket.gethostname())
    hosts = [f"meet/host/{rank}" for rank in range(ranks.world_size)]
    if ranks.rank == 0:
        complete = until(lambda: store.check(hosts), deadline)
        root.delete_key(_IDENTITY)  # who comes now is too late, and must not take this store for a new one
        missing = [] if complete else [rank for rank, key in enumerate(hosts) if not store.check([key])]
        store.set("meet/verdict", json.dumps({"nonce": secrets.token_hex(16), "missing": missing}))
        if missing:
            told = [f"meet/told/{rank}" for rank in range(1, ranks.world_size) if rank not in missing]
            until(lambda: store.check(told), time.monotonic() + LINGER_S)
    elif not until(lambda: store.check(["meet/verdict"]), deadline):
        missing = [rank for rank, key in enumerate(hosts) if not store.check([key])] or [0]
        store.set(f"meet/told/{ranks.rank}", "")
        raise _missing(ranks, where, timeout_s, missing)
    verdict = json.loads(store.get("meet/verdict"))
    store.set(f"meet/told/{ranks.rank}", "")
    if verdict["missing"]:
        raise _missing(ranks, where, timeout_s, verdict["missing"])
    return str(verdict["nonce"])


def _missing(ranks: Ranks, where: str, timeout_s: float, missing: Sequence[int], why: str = "") -> PeerError:
    names = ", ".join(f"rank {rank}" for rank in missing[:_SHOWN_RANKS])
    more = f" and {len(missing) - _SHOWN_RANKS} more" if len(missing) > _SHOWN_RANKS else ""
    error = PeerError(
        f"expected {ranks.world_size} ranks to meet at {where} within {timeout_s:g} s, missing: {names}{more}{why}"
    )
    error.ranks = tuple(missing)
    return error


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that nobody has to wait for, not even the interpreter when it ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
