"""A thousand ranks as threads of one process, whose messages go through memory and are counted."""

from __future__ import annotations

import queue
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch


class Wires:
    """Messages between threads, in order by sender, receiver and tag; counts what each sends."""

    def __init__(self, ranks: int) -> None:
        self._queues: dict[tuple[int, int, int], queue.SimpleQueue[torch.Tensor]] = {}
        self._making = threading.Lock()
        self.ranks, self.messages, self.nbytes = ranks, [0] * ranks, [0] * ranks

    def between(self, *place: int) -> queue.SimpleQueue[torch.Tensor]:
        with self._making:
            return self._queues.setdefault((place[0], place[1], place[2]), queue.SimpleQueue())


class ThreadGroup:
    """A rank's end of the wires, with what `exchange_rows` asks of a process group."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self._wires, self._rank = wires, rank

    def size(self) -> int:
        return self._wires.ranks

    def rank(self) -> int:
        return self._rank

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        self._wires.messages[self._rank] += 1
        self._wires.nbytes[self._rank] += tensors[0].nbytes
        self._wires.between(self._rank, to, tag).put(tensors[0].clone())
        return SimpleNamespace(wait=lambda limit: None)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        come = self._wires.between(source, self._rank, tag)
        return SimpleNamespace(wait=lambda limit: tensors[0].copy_(come.get(timeout=limit.total_seconds())))

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(seconds=120)))
