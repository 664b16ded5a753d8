"""Which backend computes which product: measured on first use, and remembered on disk.

A choice depends on product, shape, block size, active blocks, tokens, dtype and device. Timings are kept in the cache
directory, in a file for this hardware, this number of threads and these versions; what they mean is decided anew each
time, by `decide`, so that the rule can change without measuring again.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
import xxhash
from torch import Tensor

import dsbert
from dsbert.sparse.kernels.backends import BACKENDS, DENSE
from dsbert.sparse.kernels.cache import cache_directory, read_cached, whole_file
from dsbert.sparse.kernels.index import PRODUCTS, Backend, KernelIndex
from dsbert.sparse.kernels.record import Choice, ProductRecord, ProductsRecord
from dsbert.sparse.sparsity_errors import KernelError

# The names that a configuration may give, and what each leaves to measure.
KERNELS: dict[str, tuple[str, ...]] = {
    "auto": ("triton", "cpu", "reference", *DENSE),
    "reference": ("reference",),
    "cpu": ("cpu",),
    "triton": ("triton",),
    "dense": DENSE,
}
# Sparse must be so much faster than the best dense product before it is chosen.
_ADVANTAGE = 1.05
# More tokens than this take longer to measure and change no ranking.
_MOST_TOKENS = {"cpu": 512, "cuda": 16384}
_TURNS, _LEAST_TURNS, _BUDGET_S = 9, 3, 0.05
_HOPELESS, _SHORT_MS = 3.0, 20.0

Timings = dict[str, dict[str, float]]  # product -> backend -> milliseconds


@dataclass(frozen=True)
class Decision:
    """choice, and the timings it rests on: {} where there was nothing to choose from."""

    choice: Choice
    timings: Timings

    def record(self) -> ProductsRecord:
        """The choice with its milliseconds, and how much faster than the best dense product it is."""
        return ProductsRecord(
            **{product: self._product(product, name) for product, name in self.choice._asdict().items()}
        )

    def _product(self, product: str, name: str) -> ProductRecord:
        measured = self.timings.get(product, {})
        dense = [measured[other] for other in DENSE if other in measured]
        if name not in measured or not dense:
            return ProductRecord(backend=name, ms=None, speedup=None)
        return ProductRecord(backend=name, ms=measured[name], speedup=min(dense) / measured[name])


def candidates(
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    without: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """The backends that `kernels` leaves to measure there; `without`: backend -> why it is ruled out elsewhere.

    Raises KernelError if none of them can run.
    """
    named = KERNELS[kernels]
    reasons = {name: without.get(name) or BACKENDS[name].why_not(device, dtype, block_size) for name in named}
    able = tuple(name for name, reason in reasons.items() if reason is None)
    if not able:
        raise KernelError(kernels, next(filter(None, reasons.values())))
    if kernels == "auto" and device.type == "cuda":
        return tuple(name for name in able if name != "reference")  # only a yardstick there
    return able


def decide(timings: dict[str, float]) -> str:
    """The backend to use, from milliseconds by backend: the fastest sparse one if it is at least 5 % faster than the
    best dense one, scatter included, else the best dense one."""
    dense = {name: ms for name, ms in timings.items() if name in DENSE}
    sparse = {name: ms for name, ms in timings.items() if name not in DENSE}
    if not dense or not sparse:
        return min(timings, key=lambda name: timings[name])
    best_dense, best_sparse = min(dense, key=lambda name: dense[name]), min(sparse, key=lambda name: sparse[name])
    return best_sparse if sparse[best_sparse] * _ADVANTAGE <= dense[best_dense] else best_dense


def choose(
    index: KernelIndex,
    kernels: str,
    *,
    tokens: int,
    dtype: torch.dtype,
    without: Mapping[str, str] = MappingProxyType({}),
) -> Decision:
    """The choice for one layer; measures what no process on this hardware has measured before. Raises KernelError."""
    device = index.rows.device
    names = candidates(kernels, device, dtype, index.block_size, without)
    if len(names) == 1:
        return Decision(Choice(names[0], names[0], names[0]), {})
    measured_tokens = tokens_to_measure(tokens, device)
    out_features, in_features = index.shape
    key = f"{out_features}x{in_features}/B{index.block_size}/K{index.num_active}/T{measured_tokens}/{dtype}"
    table = _Table(device)
    timings = table.read(key)
    missing = [name for name in names if any(name not in timings.get(product, {}) for product in PRODUCTS)]
    if missing:
        for product, ms in _measure(index, names, measured_tokens, dtype).items():
            timings.setdefault(product, {}).update(ms)
        table.write(key, timings)
    kept: Timings = {product: {name: timings[product][name] for name in names} for product in PRODUCTS}
    return Decision(Choice(*(decide(kept[product]) for product in PRODUCTS)), kept)


def tokens_to_measure(tokens: int, device: torch.device) -> int:
    """With how many tokens a choice for so many is measured: the next power of two, up to where no ranking changes."""
    return min(_MOST_TOKENS.get(device.type, 512), 1 << max(tokens - 1, 0).bit_length())


@torch.no_grad()
def _measure(index: KernelIndex, names: tuple[str, ...], tokens: int, dtype: torch.dtype) -> Timings:
    """Milliseconds of every product and backend, on random numbers, on the topology of `index`."""
    device, size = index.rows.device, index.block_size
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, dy = random(tokens, index.shape[1]), random(tokens, index.shape[0])
    blocks, bias = random(index.num_active, size, size), random(index.shape[0])

    def calls(backend: Backend) -> dict[str, Callable[[], object]]:
        return {
            "forward": lambda: backend.forward(x, blocks, index, bias),
            "dgrad": lambda: backend.dgrad(dy, blocks, index),
            "wgrad": lambda: backend.wgrad(dy, x, index),
        }

    by_name = {name: calls(BACKENDS[name]) for name in names}
    return {product: _race({name: by_name[name][product] for name in names}, device) for product in PRODUCTS}


def _race(contenders: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Milliseconds of the fastest of a few warm calls of each, in turns: what the machine does besides, it does to all.

    Who is out of reach is not waited for again. A short call must be slow twice for that: once may be an interruption.
    """
    least: dict[str, float] = {}
    for name, call in contenders.items():
        call()
        least[name] = _milliseconds(call, device)
    start = time.perf_counter()
    for turn in range(1, _TURNS):
        if turn >= _LEAST_TURNS and time.perf_counter() - start > _BUDGET_S:
            break
        out_of_reach = _HOPELESS * min(least.values())
        for name, call in contenders.items():
            again = least[name] <= out_of_reach or (turn == 1 and least[name] <= _SHORT_MS)
            if again:
                least[name] = min(least[name], _milliseconds(call, device))
    return least


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    before = time.perf_counter()
    call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Table:
    """The timings of this hardware and these versions: in memory, and in a file that other processes share."""

    _memory: ClassVar[dict[tuple[str, str], Timings]] = {}

    def __init__(self, device: torch.device) -> None:
        self._about = {"hardware": _hardware(device), "versions": _versions()}
        self._name = xxhash.xxh3_64_hexdigest(json.dumps(self._about).encode())

    def read(self, key: str) -> Timings:
        known = self._memory.get((self._name, key))
        return {product: dict(ms) for product, ms in (known or self._file().get(key, {})).items()}

    def write(self, key: str, timings: Timings) -> None:
        self._memory[self._name, key] = timings
        with suppress(OSError):  # without a cache, the next process measures again
            text = json.dumps(self._about | {"milliseconds": self._file() | {key: timings}}, indent=1)
            with whole_file(self._path()) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _path(self) -> Path:
        return cache_directory() / f"timings-{self._name}.json"

    def _file(self) -> dict[str, Timings]:
        try:
            found = json.loads(read_cached(self._path()))["milliseconds"]
            return {
                str(key): {product: {str(n): float(ms) for n, ms in row.items()} for product, row in timings.items()}
                for key, timings in found.items()
            }
        # None yet, a torn one, or one that another user could have written: measure.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} {torch.get_num_threads()} threads {os.environ.get('DSBERT_CPU_ISA', '')}"


@functools.cache
def _cpu_model() -> str:
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "cpu family", "model\t", "flags")
        model = " ".join(line.partition(":")[2].strip() for line in lines[:40] if line.startswith(wanted))
    return model


@functools.cache
def _versions() -> str:
    hasher = xxhash.xxh3_64()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            hasher.update(path.read_bytes())
    return f"dsbert {dsbert.__version__} torch {torch.__version__} kernels {hasher.hexdigest()}"
