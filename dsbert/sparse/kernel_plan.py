"""Which kernels a whole model runs on: the same on every rank, kept from checkpoint to checkpoint.

Another kernel means other bits, so rank 0 chooses for all, and a resumed run goes on with what it began with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from dsbert.base.collectives import gather_json, on_main_rank, run_with_keepalive
from dsbert.sparse.kernels.backends import BACKENDS
from dsbert.sparse.kernels.cpu.build import instruction_set, remark
from dsbert.sparse.kernels.dispatch import KERNELS, choose
from dsbert.sparse.kernels.index import PRODUCTS
from dsbert.sparse.kernels.record import KernelRecord, ProductsRecord
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.sparsity_errors import KernelError


@dataclass(frozen=True)
class KernelPlan:
    """record: what a checkpoint keeps. notes: lines that a user should read."""

    record: KernelRecord
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What the log says: the notes, then which backend computes what, and what it gains."""
        yield from self.notes
        if not self.record.layers:
            return
        parts = []
        for product in PRODUCTS:
            rows = [getattr(products, product) for products in self.record.layers.values()]
            names = ", ".join(f"{name} x {count}" for name, count in Counter(row.backend for row in rows).items())
            gains = [row.speedup for row in rows if row.speedup is not None]
            gain = f" ({min(gains):.1f} to {max(gains):.1f} times dense)" if gains else ""
            parts.append(f"{product} {names}{gain}")
        yield "kernels: " + "; ".join(parts)


def plan_kernels(
    layers: dict[str, BlockSparseLinear],
    *,
    tokens: int,
    dtype: torch.dtype,
    stored: KernelRecord | None = None,
) -> KernelPlan:
    """Set every layer's `choice`, the same on all ranks: what `stored` (an earlier plan's) says where that can run and
    fits the layer's `kernels`, else what rank 0 measures for products of `tokens` tokens in `dtype`. What some rank
    cannot run, no rank runs. Collective.

    Raises KernelError on every rank if kernels were asked for that cannot run on all of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        plan = _plan(layers, tokens, dtype, stored, {})
    else:
        plan = _plan_together(layers, tokens, dtype, stored)
    for name, layer in layers.items():
        layer.choice = plan.record.layers[name].choice()
    return plan


def _plan_together(
    layers: dict[str, BlockSparseLinear], tokens: int, dtype: torch.dtype, stored: KernelRecord | None
) -> KernelPlan:
    without: dict[str, str] = {}  # backend -> which rank cannot run it, and why
    while True:
        plan = _of_rank_0(partial(_plan, layers, tokens, dtype, stored, without))
        missing = _missing_somewhere(plan, layers, dtype)
        if not missing:
            return plan
        without.update(missing)


def _of_rank_0(plan: Callable[[], KernelPlan]) -> KernelPlan:
    """What rank 0 plans, on every rank; its KernelError as well."""

    def work() -> list[object]:
        try:
            made = plan()
            return [made.record.to_json(), made.notes, None]
        except KernelError as error:
            return [None, None, [error.kernels, error.reason]]

    record, notes, refusal = gather_json(on_main_rank(work, keepalive=True))[0]
    if refusal is not None:
        raise KernelError(*refusal)
    return KernelPlan(KernelRecord.from_json(record), tuple(notes))


def _missing_somewhere(plan: KernelPlan, layers: dict[str, BlockSparseLinear], dtype: torch.dtype) -> dict[str, str]:
    """Of the backends of a plan, those that some rank cannot run: the first such rank, and why."""
    unable = run_with_keepalive(lambda: _unable(plan.record, layers, dtype))
    return {
        name: f"rank {rank}: {reason}"
        for rank, reasons in reversed(list(enumerate(gather_json(unable))))
        for name, reason in reasons.items()
    }


def _unable(record: KernelRecord, layers: dict[str, BlockSparseLinear], dtype: torch.dtype) -> dict[str, str]:
    """Of the backends of a plan, those that this rank cannot run, and why."""
    found = {}
    for name, layer in layers.items():
        for backend in record.layers[name].choice():
            reason = BACKENDS[backend].why_not(layer.rows.device, dtype, layer.block_size)
            if reason:
                found[backend] = reason
    return found


def _plan(
    layers: dict[str, BlockSparseLinear],
    tokens: int,
    dtype: torch.dtype,
    stored: KernelRecord | None,
    without: Mapping[str, str],
) -> KernelPlan:
    chosen: dict[str, ProductsRecord] = {}
    changed: Counter[str] = Counter()
    device = next((layer.rows.device for layer in layers.values()), torch.device("cpu"))
    elsewhere = _why_elsewhere(stored, device, dtype) if stored else None
    for name, layer in layers.items():
        if stored is not None and name in stored.layers:
            reason = elsewhere or _why_not_stored(stored.layers[name], layer, dtype, without)
            if reason is None:
                chosen[name] = stored.layers[name]
                continue
            changed[reason] += 1
        chosen[name] = choose(layer.index, layer.kernels, tokens=tokens, dtype=dtype, without=without).record()
    notes = [f"{count} layers go on with other kernels than before: {reason}" for reason, count in changed.items()]
    instructions = _instructions(chosen)
    record = KernelRecord(
        tokens=tokens, dtype=str(dtype), device=_device_name(device), layers=chosen, instructions=instructions
    )
    before = stored.instructions if stored else None
    if instructions and before and instructions != before:
        notes.append(f"the cpu kernels use {instructions} here and used {before} before: sums are rounded otherwise")
    return KernelPlan(record, (*_missing(layers, device, dtype, without), *notes))


def _instructions(chosen: dict[str, ProductsRecord]) -> str | None:
    """Which vectors the cpu kernels of a plan use, if it has any: their bits depend on it."""
    in_use = any("cpu" in products.choice() for products in chosen.values())
    return instruction_set() if in_use else None


def _why_elsewhere(stored: KernelRecord, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why what is stored says nothing about this device and dtype: the bits are others in any case."""
    if stored.dtype and stored.dtype != str(dtype):
        return f"they were chosen for {stored.dtype}, and the run is in {dtype}"
    now = _device_name(device)
    if stored.device and (stored.device == "cpu") != (now == "cpu"):
        return f"they were chosen for {stored.device}, and the run is on {now}"
    return None


def _why_not_stored(
    products: ProductsRecord, layer: BlockSparseLinear, dtype: torch.dtype, without: Mapping[str, str]
) -> str | None:
    for name in products.choice():
        if name not in BACKENDS:
            return f"this version has no kernels {name!r}"
        if name not in KERNELS[layer.kernels]:
            return f"the recipe asks for {layer.kernels}"
        reason = without.get(name) or BACKENDS[name].why_not(layer.rows.device, dtype, layer.block_size)
        if reason:
            return reason
    return None


def _missing(
    layers: dict[str, BlockSparseLinear], device: torch.device, dtype: torch.dtype, without: Mapping[str, str]
) -> list[str]:
    """Why the kernels made for this device cannot be had, where they cannot; or what is amiss with how they can."""
    own = "triton" if device.type == "cuda" else "cpu"
    sizes = {layer.block_size for layer in layers.values() if layer.kernels == "auto"}
    reasons = {without.get(own) or BACKENDS[own].why_not(device, dtype, size) for size in sizes} - {None}
    lines = [f"the {own} kernels cannot be used, sparse products run through torch: {reason}" for reason in reasons]
    return [*lines, *filter(None, [remark()])]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
