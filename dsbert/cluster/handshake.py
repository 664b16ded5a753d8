"""What the ranks of a launch say to each other when they meet, in a store that anybody can reach.

Rank 0 puts a fresh challenge there, bound to its port. The others answer with a number of their own, under a key that
follows from the launch's secret and the challenge. Then rank 0 tells each who is missing, repeats its number, and gives
it the session's, which is the same for all. What ranks say afterwards is sealed with a key that follows from secret,
challenge and session: nothing that was said at another meeting, or on another port, is of use at this one.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dsbert.base.errors import PeerError, UserError
from dsbert.cluster.endpoint import Endpoint, until
from dsbert.cluster.ranks import RankInfo
from dsbert.cluster.sealed_store import SealedStore
from dsbert.cluster.secret import Secret, derive

LINGER_S = 2.0  # how long rank 0 stays to tell those who came who did not
APART_S = 5.0  # after so long without the right one, a rank of the same launch with another secret is taken for ours
# What rank 0 says to all: whose store it is, to be told apart in messages. Nothing rests on it.
IDENTITY, ABOUT = "dsbert/identity", "dsbert/about"
_SHOWN_RANKS = 8


@dataclass(frozen=True)
class Party:
    """Who meets, where, how they know each other, and until when."""

    ranks: RankInfo
    endpoint: Endpoint
    secret: Secret
    deadline: float
    timeout_s: float

    @property
    def key(self) -> bytes:
        """What seals the first words: the same for all ranks of an attempt, before they have said anything."""
        # An agent's store outlives a restart of its ranks: keep attempts apart.
        return self.secret.derive(
            "meet", self.endpoint.identity or "", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        )

    def about(self) -> dict[str, str]:
        """What may be known to all."""
        return {
            "secret": self.secret.derive("fingerprint").hex()[:16],
            "host": socket.gethostname(),
            "path": str(self.secret.directory.resolve()) if self.secret.directory else "",
        }

    def missing(self, missing: Sequence[int], why: str = "", where: str = "") -> PeerError:
        """Ranks that have not come, and why, to `where` if it is known better than by the place."""
        names = ", ".join(f"rank {rank}" for rank in missing[:_SHOWN_RANKS])
        more = f" and {len(missing) - _SHOWN_RANKS} more" if len(missing) > _SHOWN_RANKS else ""
        error = PeerError(
            f"expected {self.ranks.world_size} ranks to meet at {where or self.endpoint} within {self.timeout_s:g} s, "
            f"missing: {names}{more}{why}"
        )
        error.ranks = tuple(missing)
        return error

    def apart(self, rank: int, theirs: dict[str, str], first: dict[str, str]) -> UserError:
        """A rank that has the secret of another directory than rank 0."""
        port = "" if self.endpoint.identity else ", and give each job a MASTER_PORT of its own"
        return UserError(
            f"run directory is not shared: rank {rank} on {theirs['host']} does not see in {theirs['path']} what rank "
            f"0 on {first['host']} wrote to {first['path']}: choose a directory on a file system of all nodes, the "
            f"same on all ranks{port}"
        )


def hint(store: dist.Store, key: str) -> dict[str, str] | None:
    """What somebody says of himself in the open: three words of bounded length, or None."""
    try:
        said = json.loads(store.get(key)) if store.check([key]) else None
        return {name: str(said[name])[:200] for name in ("secret", "host", "path")} if said else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def challenge_at(by_secret: SealedStore, port: int) -> str | None:
    """Rank 0's, if it stands there for this port: one that was carried over from another is not meant for us."""
    said = json.loads(by_secret.peek("challenge") or "{}")
    return said.get("challenge") if said.get("port") == port else None


def gather_ranks(party: Party, store: dist.TCPStore, by_secret: SealedStore) -> bytes:
    """Rank 0 waits for all, and says who has come. by_secret: the store, sealed with the party's key; what follows is
    sealed by the challenge as well. Returns the key of the session."""
    challenge, world = secrets.token_hex(16), party.ranks.world_size
    by_challenge = SealedStore(store, derive(party.key, challenge))
    heard: dict[int, dict[str, Any]] = {0: {}}
    strangers: dict[int, float] = {}
    if party.endpoint.identity is not None:
        store.set(IDENTITY, party.endpoint.identity)
    store.set(ABOUT, json.dumps(party.about()))

    def everybody() -> bool:
        if by_secret.peek("challenge") is None:  # or somebody has done away with it
            by_secret.set("challenge", json.dumps({"challenge": challenge, "port": store.port}))
        for rank in set(range(1, world)) - heard.keys():
            if said := by_challenge.peek(f"hello/{rank}"):
                heard[rank] = json.loads(said)
            elif party.secret.directory and (said_openly := hint(store, f"{ABOUT}/{rank}")):
                since = strangers.setdefault(rank, time.monotonic())
                if time.monotonic() > since + APART_S:
                    raise party.apart(rank, said_openly, party.about())
        return len(heard) == world

    until(everybody, party.deadline)
    for key in (IDENTITY, ABOUT):  # who comes now is too late, and must not take this store for a new one
        store.delete_key(key)
    by_secret.delete_key("challenge")
    missing = [rank for rank in range(world) if rank not in heard]
    session = secrets.token_hex(16)
    for rank in range(1, world):  # to each a word of its own: what all read must not grow with their number
        number = heard[rank]["number"] if rank in heard else ""
        by_challenge.set(f"verdict/{rank}", json.dumps({"number": number, "session": session, "missing": missing}))
    if missing:
        told = [f"told/{rank}" for rank in heard if rank]
        until(lambda: by_challenge.check(told), time.monotonic() + LINGER_S)
        raise party.missing(missing, where=f"{party.endpoint.address}:{store.port}")
    return derive(party.key, challenge, session)


def join_ranks(party: Party, store: dist.TCPStore, by_secret: SealedStore) -> bytes:
    """Say that we are here, and wait until rank 0 has seen everybody. Returns the key of the session."""
    rank, where = party.ranks.rank, f"{party.endpoint.address}:{store.port}"
    challenge = challenge_at(by_secret, store.port)
    if challenge is None:
        raise party.missing([0], ", which has left", where)
    by_challenge = SealedStore(store, derive(party.key, challenge))
    number = secrets.token_hex(16)
    if by_challenge.add(f"claim/{rank}", 1) > 1:
        raise UserError(
            f"expected one rank {rank} to come to {where}, found another one there already: give each job a "
            "MASTER_PORT of its own"
        )
    hello = json.dumps({"number": number, "host": socket.gethostname()})

    def decided() -> bool:
        if by_challenge.peek(f"hello/{rank}") is None:  # at first, or where somebody has done away with it
            by_challenge.set(f"hello/{rank}", hello)
        return by_challenge.peek(f"verdict/{rank}") is not None

    came = until(decided, party.deadline)
    by_challenge.set(f"told/{rank}", "")
    if not came:
        hellos = [f"hello/{other}" for other in range(1, party.ranks.world_size)]
        raise party.missing([n for n, key in enumerate(hellos, 1) if not by_challenge.check([key])] or [0], where=where)
    verdict = json.loads(by_challenge.get(f"verdict/{rank}"))
    if verdict["missing"]:
        raise party.missing(verdict["missing"], where=where)
    if verdict["number"] != number:
        raise party.missing([0], ", which answers somebody else", where)
    return derive(party.key, challenge, verdict["session"])
