"""How the ranks of one launch find each other, at the endpoint that `endpoint.py` reads off the environment.

Rank 0 serves a store there, which anybody can reach. So all that ranks say in it is sealed with the launch's secret
(secret.py, sealed_store.py), and the others join only a store with a challenge that rank 0 has sealed (handshake.py):
on a port there may as well be the store of another job, a server that is no store at all, or somebody who would like to
be a rank.

torch's store waits without any limit for a server that accepts and stays silent, or has been stopped. So whatever
touches a store runs in a thread that can be left behind.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin only since Python 3.11
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from dsbert.cluster.endpoint import POLL_S, find_endpoint, one_line, until
from dsbert.cluster.handshake import (
    ABOUT,
    APART_S,
    IDENTITY,
    LINGER_S,
    Party,
    challenge_at,
    gather_ranks,
    hint,
    join_ranks,
)
from dsbert.cluster.ranks import RankInfo
from dsbert.cluster.sealed_store import SealedStore
from dsbert.cluster.secret import derive, find_secret

T = TypeVar("T")
PROBE_S = 1.0  # what one look at a port may cost
BACK_OFF_S = 4.0  # at most, before another look at a port that proved to be somebody else's: torch is noisy about it
_NOTHING = "nothing"


@dataclass(frozen=True)
class Meeting:
    """The ranks' common store. open_store: the same one, for what cannot use a store that is written in Python."""

    store: dist.Store
    open_store: dist.Store


def meet(ranks: RankInfo, timeout_s: float, directory: Path | None = None) -> Meeting:
    """Find the other ranks; sets MASTER_ADDR and MASTER_PORT. Takes at most a few seconds longer than timeout_s.

    directory: where the ranks keep their secret if their launcher has told them none; all ranks share it. Without
    either, strangers are told apart by what they say alone.
    Raises UserError for an incomplete environment, for a port that is taken and for a directory that is not shared,
    PeerError naming the ranks that did not come within the timeout.
    """
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        store = dist.HashStore()
        return Meeting(store, store)
    deadline = time.monotonic() + timeout_s
    endpoint = find_endpoint(ranks, deadline)
    party = Party(ranks, endpoint, find_secret(directory), deadline, timeout_s)
    try:
        return _in_thread(lambda: _meet_at(party)).result(deadline - time.monotonic() + LINGER_S + PROBE_S)
    except FutureTimeoutError:
        raise party.missing([0], ", which does not answer") from None
    except (dist.DistError, RuntimeError) as error:
        raise party.missing([0], f", whose store is gone: {one_line(error)}") from None


def _meet_at(party: Party) -> Meeting:
    endpoint = party.endpoint
    store = _serve(party) if endpoint.listener else _find(party)
    os.environ.update(MASTER_ADDR=endpoint.address, MASTER_PORT=str(store.port))
    by_secret = SealedStore(store, party.key)
    if party.ranks.rank == 0:
        session = gather_ranks(party, store, by_secret)
    else:
        session = join_ranks(party, store, by_secret)
    common = SealedStore(store, derive(session, "store"))
    return Meeting(common, dist.PrefixStore(derive(session, "open").hex(), store))


def _serve(party: Party) -> dist.TCPStore:
    """Rank 0's store. The socket goes straight to it."""
    listener = party.endpoint.listener
    assert listener is not None
    address, port = listener.getsockname()[:2]
    # The store is also a client of its own, and the name of a machine need not lead back to it.
    host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    return dist.TCPStore(
        host, port, None, is_master=True, timeout=timedelta(seconds=party.timeout_s), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _find(party: Party) -> dist.TCPStore:
    """Look at the ports in turn until one has the right store. Raises PeerError, with what is on each port."""
    candidates = [_Candidate(party, port) for port in party.endpoint.ports]
    patience = time.monotonic() + APART_S
    while time.monotonic() < party.deadline:
        for candidate in candidates:
            if store := candidate.look():
                store.set_timeout(timedelta(seconds=party.timeout_s))
                return store
            if time.monotonic() > party.deadline:
                break
        apart = next((candidate.apart for candidate in candidates if candidate.apart), None)
        if apart and time.monotonic() > patience:
            raise party.apart(party.ranks.rank, party.about(), apart)
        time.sleep(POLL_S)
    found = ", ".join(f"{candidate.found} at port {candidate.port}" for candidate in candidates)
    raise party.missing([0], f"; found {found}")


@dataclass
class _Candidate:
    """A port where rank 0 may be, and what was found there. apart: what a rank 0 with another secret says of itself."""

    party: Party
    port: int
    found: str = _NOTHING
    apart: dict[str, str] | None = None
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
            socket.create_connection((self.party.endpoint.address, self.port), PROBE_S).close()
        except (OSError, UnicodeError) as error:
            self.found = _NOTHING if isinstance(error, ConnectionRefusedError) else one_line(error)
            return False
        return True

    def _open(self) -> dist.TCPStore | None:
        try:
            store = dist.TCPStore(
                self.party.endpoint.address,
                self.port,
                None,
                timeout=timedelta(seconds=PROBE_S / 2),
                wait_for_workers=False,
            )
            if self.party.ranks.rank == 0:  # at the agent's store, where it comes first
                return store
            by_secret = SealedStore(store, self.party.key)
            if until(lambda: challenge_at(by_secret, self.port) is not None, time.monotonic() + PROBE_S / 2):
                return store
            self._judge(store)
        except (dist.DistError, RuntimeError):
            self.found = "a server that is no store"
        return None

    def _judge(self, store: dist.TCPStore) -> None:
        """Whose store it says that it is; if ours, tell rank 0 that we have not its secret."""
        shown = store.get(IDENTITY).decode(errors="replace") if store.check([IDENTITY]) else ""
        if shown and shown != self.party.endpoint.identity:
            self.found = f"the store of another job ({shown[:80]!r})"
            return
        self.found = "the store of somebody else"
        self.back_off_s = POLL_S  # or of an agent, to which rank 0 comes yet
        first = hint(store, ABOUT)
        mine = self.party.about()
        if first and self.party.secret.directory and first["secret"] != mine["secret"]:
            self.apart = first
            store.set(f"{ABOUT}/{self.party.ranks.rank}", json.dumps(mine))


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
