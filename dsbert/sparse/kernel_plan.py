"""Which kernels a whole model runs on: the same on every rank, kept from checkpoint to checkpoint.

Another kernel means other bits, so rank 0 chooses for all, and a resumed run goes on with what it began with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dsbert.base.collectives import gather_json, run_with_keepalive
from dsbert.sparse.kernels.backends import BACKENDS
from dsbert.sparse.kernels.cpu.build import instruction_set, remark
from dsbert.sparse.kernels.dispatch import KERNELS, Choice, choose
from dsbert.sparse.kernels.index import PRODUCTS
from dsbert.sparse.linear import BlockSparseLinear


@dataclass(frozen=True)
class KernelPlan:
    """record: what the checkpoint keeps, {"tokens", "dtype", "device", "instructions" (of the cpu kernels), "layers":
    {name: {product: {"backend", "ms", "speedup"}}}}; ms is of one call as measured (None: nothing was), speedup against
    the best dense product. notes: lines that a user should read."""

    record: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> Iterator[str]:
        """What the log says: the notes, then which backend computes what, and what it gains."""
        yield from self.notes
        if not self.record["layers"]:
            return
        parts = []
        for product in PRODUCTS:
            rows = [row[product] for row in self.record["layers"].values()]
            names = ", ".join(f"{name} x {count}" for name, count in Counter(row["backend"] for row in rows).items())
            gains = [row["speedup"] for row in rows if row["speedup"] is not None]
            gain = f" ({min(gains):.1f} to {max(gains):.1f} times dense)" if gains else ""
            parts.append(f"{product} {names}{gain}")
        yield "kernels: " + "; ".join(parts)


def plan_kernels(
    layers: dict[str, BlockSparseLinear],
    *,
    tokens: int,
    dtype: torch.dtype,
    stored: dict[str, Any] | None = None,
) -> KernelPlan:
    """Set every layer's `choice`, the same on all ranks: what `stored` (a plan's record) says where that can run and
    fits the layer's `kernels`, else what rank 0 measures for products of `tokens` tokens in `dtype`. What some rank
    cannot run, no rank runs. Collective.

    Raises UserError on every rank if kernels were asked for that cannot run on all of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        plan = _plan(layers, tokens, dtype, stored or {}, {})
    else:
        plan = _plan_together(layers, tokens, dtype, stored or {})
    for name, layer in layers.items():
        layer.choice = Choice(*(plan.record["layers"][name][product]["backend"] for product in PRODUCTS))
    return plan


def _plan_together(
    layers: dict[str, BlockSparseLinear], tokens: int, dtype: torch.dtype, stored: dict[str, Any]
) -> KernelPlan:
    without: dict[str, str] = {}  # backend -> which rank cannot run it, and why
    while True:
        plan = _of_rank_0(partial(_plan, layers, tokens, dtype, stored, without))
        missing = _missing_somewhere(plan, layers, dtype)
        if not missing:
            return plan
        without.update(missing)


def _of_rank_0(plan: Callable[[], KernelPlan]) -> KernelPlan:
    found: list[KernelPlan] = []
    run_with_keepalive(lambda: found.append(plan()))
    record, notes = gather_json([found[0].record, found[0].notes] if found else None)[0]
    return KernelPlan(record, tuple(notes))


def _missing_somewhere(plan: KernelPlan, layers: dict[str, BlockSparseLinear], dtype: torch.dtype) -> dict[str, str]:
    """Of the backends of a plan, those that some rank cannot run: the first such rank, and why."""
    unable: dict[str, str] = {}
    run_with_keepalive(lambda: unable.update(_unable(plan.record, layers, dtype)), everywhere=True)
    return {
        name: f"rank {rank}: {reason}"
        for rank, reasons in reversed(list(enumerate(gather_json(unable))))
        for name, reason in reasons.items()
    }


def _unable(record: dict[str, Any], layers: dict[str, BlockSparseLinear], dtype: torch.dtype) -> dict[str, str]:
    """Of the backends of a plan, those that this rank cannot run, and why."""
    found = {}
    for name, layer in layers.items():
        for row in record["layers"][name].values():
            reason = BACKENDS[row["backend"]].why_not(layer.rows.device, dtype, layer.block_size)
            if reason:
                found[row["backend"]] = reason
    return found


def _plan(
    layers: dict[str, BlockSparseLinear],
    tokens: int,
    dtype: torch.dtype,
    stored: dict[str, Any],
    without: Mapping[str, str],
) -> KernelPlan:
    rows: dict[str, Any] = {}
    changed: Counter[str] = Counter()
    device = next((layer.rows.device for layer in layers.values()), torch.device("cpu"))
    stored_rows = stored.get("layers", {})
    elsewhere = _why_elsewhere(stored, device, dtype)
    for name, layer in layers.items():
        if name in stored_rows:
            reason = elsewhere or _why_not_stored(stored_rows[name], layer, dtype, without)
            if reason is None:
                rows[name] = stored_rows[name]
                continue
            changed[reason] += 1
        decision = choose(layer.index, layer.kernels, tokens=tokens, dtype=dtype, without=without)
        gains = decision.gains()
        rows[name] = {}
        for product, backend in zip(PRODUCTS, decision.choice, strict=True):
            ms, speedup = gains.get(product, (None, None))
            rows[name][product] = {"backend": backend, "ms": ms, "speedup": speedup}
    notes = [f"{count} layers go on with other kernels than before: {reason}" for reason, count in changed.items()]
    record = {"tokens": tokens, "dtype": str(dtype), "device": _device_name(device), "layers": rows}
    record["instructions"] = instructions = _instructions(rows)
    before = stored.get("instructions")
    if instructions and before and instructions != before:
        notes.append(f"the cpu kernels use {instructions} here and used {before} before: sums are rounded otherwise")
    return KernelPlan(record, (*_missing(layers, device, dtype, without), *notes))


def _instructions(rows: dict[str, Any]) -> str | None:
    """Which vectors the cpu kernels of a plan use, if it has any: their bits depend on it."""
    in_use = any(product["backend"] == "cpu" for row in rows.values() for product in row.values())
    return instruction_set() if in_use else None


def _why_elsewhere(stored: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why what is stored says nothing about this device and dtype: the bits are others in any case."""
    before = stored.get("dtype", str(dtype))
    if before != str(dtype):
        return f"they were chosen for {before}, and the run is in {dtype}"
    before, now = stored.get("device", "cpu" if device.type == "cpu" else ""), _device_name(device)
    if (before == "cpu") != (now == "cpu"):
        return f"they were chosen for {before}, and the run is on {now}"
    return None


def _why_not_stored(
    row: dict[str, Any], layer: BlockSparseLinear, dtype: torch.dtype, without: Mapping[str, str]
) -> str | None:
    for product in PRODUCTS:
        name = row[product]["backend"]
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


def gain_of(plan: dict[str, Any]) -> float | None:
    """How many times faster than the best dense products those of a plan's record are, all layers together."""
    rows = [row[product] for row in plan["layers"].values() for product in PRODUCTS]
    if not rows or any(row["ms"] is None for row in rows):
        return None
    dense_ms: float = sum(row["ms"] * row["speedup"] for row in rows)
    sparse_ms: float = sum(row["ms"] for row in rows)
    return dense_ms / sparse_ms
