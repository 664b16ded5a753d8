"""The tables of tools/bench_card.py, as Markdown."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from card_problems import Timer


def render(
    timer: Timer, rates: dict[str, float], parity: list[dict[str, Any]], configs: list[dict[str, Any]],
    records: list[dict[str, Any]], seconds: float,
) -> str:  # fmt: skip
    """Everything, in one page."""
    card = torch.cuda.get_device_name(timer.device) if timer.device.type == "cuda" else "Triton's interpreter: no times"
    wrong = sum(not row["passed"] for row in parity)
    lines = [
        f"# {card}", "",
        f"torch {torch.__version__}, triton {triton.__version__}, {seconds:.0f} s. "
        + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()), "",
        "## Parity with float64", "", f"{len(parity)} checks, {wrong} wrong. Largest error (Frobenius, relative):", "",
        *_parity(parity), "",
        "## Forward and backward over the sparse products of a layer", "", *_layers(records), "",
        "## Every product", "", *_products(records), "",
    ]  # fmt: skip
    if configs:
        lines += ["## Fastest launches, bf16", "", *_configs(configs), ""]
    return "\n".join(lines)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]]


def _parity(parity: list[dict[str, Any]]) -> list[str]:
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for row in parity:
        key = (row["dtype"], row["product"])
        worst[key] = max(worst[key], row["rel_error"] if math.isfinite(row["rel_error"]) else math.inf)
    products = sorted({product for _, product in worst})
    rows = [
        [dtype, *(f"{worst[dtype, product]:.1e}" for product in products)] for dtype in sorted({d for d, _ in worst})
    ]
    return _table(["dtype", *products], rows)


def _layers(records: list[dict[str, Any]]) -> list[str]:
    """Sums over shapes and products, where a backend has all of them."""
    sums: dict[tuple[int, int, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        sums[record["hidden"], record["block"], record["backend"]].append(record)
    rows = []
    for (hidden, block, backend), every in sorted(sums.items()):
        if backend != "dense" and len(every) == len(sums[hidden, block, "dense"]):
            ours, dense = (sum(record[key] for record in every) for key in ("ms", "dense_ms"))
            rows.append([str(hidden), str(block), backend, f"{ours:.3f}", f"{dense:.3f}", f"{dense / ours:.2f}"])
    return _table(["H", "B", "backend", "ms", "cuBLAS ms", "times faster"], rows)


def _products(records: list[dict[str, Any]]) -> list[str]:
    heads = [
        "layer",
        "in",
        "out",
        "B",
        "product",
        "backend",
        "ms",
        "cuBLAS ms",
        "times faster",
        "GFLOP/s kept",
        "error",
    ]
    rows = [
        [record["layer"], str(record["in"]), str(record["out"]), str(record["block"]), record["product"],
         record["backend"], f"{record['ms']:.4f}", f"{record['dense_ms']:.4f}", f"{record['speedup_vs_dense']:.2f}",
         f"{record['gflops']:.0f}", f"{record['rel_error']:.1e}"]
        for record in records
    ]  # fmt: skip
    return _table(heads, rows)


def _configs(configs: list[dict[str, Any]]) -> list[str]:
    """The first of each, and how much slower the table's own entry or the second best is."""
    rows = []
    for first in (row for row in configs if row["rank"] == 0):
        launch = {key: value for key, value in first.items() if key not in ("product", "block", "rank", "ms", "kind")}
        words = ", ".join(f"{key}={value!r}" for key, value in launch.items())
        rows.append([first["product"], str(first["block"]), f"{first['ms']:.3f}", f"`{first['kind']}({words})`"])
    return _table(["product", "B", "ms over the four shapes", "launch"], rows)
