"""How a run fails: each rank leaves in bounded time, and whose fault it was is said and recorded."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dsbert.base.errors import (
    EXIT_INTERNAL,
    EXIT_PEER,
    DsbertError,
    LostPeerError,
    PeerError,
    StorageError,
    is_storage_failure,
    printable,
)
from dsbert.cluster import process_group
from dsbert.cluster.heartbeats import Culprit
from dsbert.engine.train_engine import TrainEngine
from dsbert.training.agreement import Agreement
from dsbert.training.attempts import Attempt, CulpritRecord

# A rank whose file system hangs as well must still leave.
_LEAVE_S = 15.0
# The first so many ranks, and every so-manyth of the others, read all heartbeats: not a thousand ranks as many files.
_WATCHMEN = 16


class Failures:
    """Of the ranks that have agreed on a run.

    attempt, engine: set as soon as there is one; what fails before says less of where it was.
    """

    attempt: Attempt | None = None
    engine: TrainEngine | None = None

    def __init__(self, agreed: Agreement) -> None:
        self._world, self._hosts, self._timeout_s = agreed.world, agreed.hosts, agreed.timeout_s
        self._directory, self._nonce, self._heartbeat = agreed.directory, agreed.nonce, agreed.heartbeat
        self._last_resort = threading.Timer(0, lambda: None)

    def watch(self) -> None:
        """Have the heartbeat beat, and end this rank where it hangs. From here on no collective ends by itself."""
        self._heartbeat.on_hang = lambda: threading.Thread(target=self._leave_hung).start()
        self._heartbeat.start()
        process_group.unlimit()

    @contextmanager
    def accounted_for(self) -> Iterator[None]:
        """Account for what goes wrong inside: in heartbeats, in status.json, and by a culprit in the message."""
        try:
            with self._said_plainly(), process_group.peer_failures(self._world):
                yield
        except LostPeerError as error:
            self._leave_at_last(EXIT_PEER)
            self._heartbeat.leave()
            if not _watches(self._world.rank):
                self._heartbeat.end(EXIT_PEER, str(error))
                raise
            raise PeerError(self._account_for_lost(str(error), self._heartbeat.culprits())) from error
        except Exception as error:
            code = error.exit_code if isinstance(error, DsbertError) else EXIT_INTERNAL
            culprits = [
                Culprit(rank, self._hosts[rank], self._step, None, "is at fault", code)
                for rank in (error.ranks if isinstance(error, DsbertError) else (self._world.rank,))
            ]
            self._leave_at_last(code)
            self._heartbeat.end(code, str(error))
            if self._world.is_main:
                self._record(str(error), culprits)
            elif isinstance(error, DsbertError) and not error.shared:  # by each for itself, but perhaps by all
                error.shared = self._directory.has_said(self._nonce, code, str(error))
            if isinstance(error, DsbertError) and culprits:
                error.args = ("; ".join([str(error), *map(str, culprits)]),)
            raise

    def close(self) -> None:
        """After all that could hang."""
        self._last_resort.cancel()

    @property
    def _step(self) -> int | None:
        """Optimizer steps taken; None before there is an engine."""
        return self.engine.step if self.engine else None

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """Where another attempt has taken the run over, that is what went wrong, whatever it looks like here; and what
        a disk refuses is no bug."""
        try:
            yield
        except (DsbertError, OSError) as error:
            self._leave_at_last(EXIT_PEER)
            if self.attempt and self._directory.owns(self.attempt) is False:
                self._directory.assert_owner(self.attempt)
            if isinstance(error, DsbertError) or not is_storage_failure(error):
                raise
            found = f"{error.filename or 'a file'}: {error.strerror}"
            plain = StorageError(
                f"could not read or write on {self._world.host}, found {found}; checkpoints are intact"
            )
            plain.ranks = (self._world.rank,)
            raise plain from error

    def _account_for_lost(self, found: str, culprits: list[Culprit]) -> str:
        """Record whose fault it is, and say it."""
        named = ", ".join(map(str, culprits[:8])) or "no rank is silent: see to the network between the nodes"
        self._heartbeat.end(EXIT_PEER, found)
        watchmen = {rank for rank in range(self._world.world_size) if _watches(rank)}
        watchmen -= {culprit.rank for culprit in culprits if culprit.rank != self._world.rank}
        is_first = self._world.rank == min(watchmen, default=self._world.rank)
        self._record(named, culprits, patience_s=0.0 if is_first else 2 * self._heartbeat.interval_s)
        return f"{named}; {found}"

    def _record(self, cause: str, culprits: list[Culprit], patience_s: float = 0.0) -> None:
        """patience_s: how long another rank may take to do it, which may be at fault and not be known to be."""
        if self.attempt is None:
            return
        deadline = time.monotonic() + patience_s
        while not self._directory.has_ended(self.attempt) and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._directory.owns(self.attempt) and not self._directory.has_ended(self.attempt):
            culprit = CulpritRecord.of(culprits[0]) if culprits else None
            with suppress(OSError):  # what has failed is said all the same
                self._directory.set_status(self.attempt, "failed", self._step, cause, culprit)

    def _leave_at_last(self, code: int) -> None:
        """Whatever hangs on the way out, the rank leaves in bounded time."""
        self._last_resort.cancel()
        self._last_resort = threading.Timer(2.5 * self._heartbeat.interval_s + _LEAVE_S, os._exit, [code])
        self._last_resort.daemon = True
        self._last_resort.start()

    def _leave_hung(self) -> None:
        """The main thread makes no progress, and its collectives do not end by themselves either."""
        self._leave_at_last(EXIT_PEER)
        found = f"rank {self._world.rank} on {self._world.host} made no progress for {self._timeout_s:g} s"
        if not _watches(self._world.rank):
            self._heartbeat.end(EXIT_PEER, found)
            print(f"dsbert: {found}", file=sys.stderr, flush=True)
            os._exit(EXIT_PEER)
        own = Culprit(self._world.rank, self._world.host, self._step, None, "lives but does not go on")
        # Who has waited for others in vain, as they for it, is cut off from them.
        culprits = self._heartbeat.culprits() or ([] if self._heartbeat.waited else [own])
        print(f"dsbert: {printable(self._account_for_lost(found, culprits))}", file=sys.stderr, flush=True)
        os._exit(EXIT_PEER)


def _watches(rank: int) -> bool:
    return rank < _WATCHMEN or rank % _WATCHMEN == 0
