"""Batches made ahead of the steps that need them."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dsbert.data.stream import Batch


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class Prefetcher:
    """A thread that makes the batches of steps start, start + 1, ..., at most `depth` steps ahead.

    Nothing is lost by closing it: the batches of a step are a function of its number.
    """

    def __init__(self, make: Callable[[int], list[Batch]], start: int, depth: int = 2) -> None:
        self._make = make
        self._ready: queue.Queue[list[Batch] | _Failure] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._failure: _Failure | None = None
        self._thread = threading.Thread(target=self._produce, args=(start,), name="dsbert-prefetch", daemon=True)
        self._thread.start()

    def next(self) -> list[Batch]:
        """The next step's batches, waiting for them if they are not ready.

        Raises whatever `make` raised, at the step that it failed for and ever after; RuntimeError after `close`.
        """
        if self._closed.is_set():
            raise RuntimeError("the prefetcher is closed")
        if self._failure is None:
            item = self._ready.get()
            if not isinstance(item, _Failure):
                return item
            self._failure = item
        raise self._failure.error

    def close(self) -> None:
        """Stop the thread and wait for it, at most for the step it is making. May be called twice."""
        self._closed.set()
        while self._thread.is_alive():
            # The thread may stand in put(): make room until it has seen that we closed.
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _produce(self, step: int) -> None:
        while not self._closed.is_set():
            try:
                item: list[Batch] | _Failure = self._make(step)
            except BaseException as error:  # handed to the caller, whatever it is
                item = _Failure(error)
            self._ready.put(item)
            if isinstance(item, _Failure):
                return
            step += 1
