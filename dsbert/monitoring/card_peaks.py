"""What a card does at most, by its maker's data sheet: the yardstick of MFU, the share of it that a run makes use
of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# FLOP/s of dense products in half precision, by how the driver calls the card. The first that the name begins with.
_HALF_PRECISION = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,
}


def peak_flops_per_s(config: Mapping[str, Any]) -> float | None:
    """Of one rank's card; None where it is not known: on a CPU, in fp32, with several kinds of cards. config: that of a
    run, config.yaml."""
    numerics, deepspeed = config.get("numerics"), config.get("deepspeed")
    name = numerics.get("device") if isinstance(numerics, dict) else None
    if not isinstance(name, str) or not isinstance(deepspeed, dict):
        return None
    halves = [deepspeed.get(dtype) for dtype in ("bf16", "fp16")]
    if not any(isinstance(one, dict) and one.get("enabled") is True for one in halves):
        return None
    return next((peak for known, peak in _HALF_PRECISION.items() if name.startswith(known)), None)
