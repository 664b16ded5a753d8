"""How each product is launched: a static table, and what measurement on a card puts in its place.

A table and not Triton's autotuner, which cannot run in the interpreter, times again in every process, and may choose
differently on two ranks: other tiles mean other bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from dsbert.sparse.kernels.index import Product

Kind = Literal["half", "float"]  # bf16 and fp16 are launched alike
KINDS: tuple[Kind, ...] = ("half", "float")
# Compute capabilities that the table is made for; a card gets the last that is not above its own. What is made for 80
# stays below 99 KiB of shared memory, which is what the smaller cards (8.6, 8.9, 12.x) have.
ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class LinearConfig:
    """forward and dgrad. One program: `tokens` x `lines` block lines, `depth` inner values at a time.

    cache: where tiles of X may stay, "" for L2 only, ".ca" for L1 as well: of use where one program walks over many
    lines, since the same tile of X then comes again and again.
    """

    tokens: int
    depth: int
    lines: int = 1
    cache: str = ""
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class WgradConfig:
    """wgrad. One program: `width` gathered columns of one block row, `depth` tokens at a time.

    Tokens are split so that about `programs` of them, per multiprocessor, are there at once.
    """

    width: int
    depth: int
    programs: int = 8
    cache: str = ""
    warps: int = 4
    stages: int = 3


Config = LinearConfig | WgradConfig
Key = tuple[Product, int, Kind, int]

_HALF_LINEAR = {
    16: LinearConfig(tokens=128, depth=64, stages=2),
    32: LinearConfig(tokens=128, depth=64, stages=2),
    64: LinearConfig(tokens=128, depth=64, stages=2),
    128: LinearConfig(tokens=128, depth=64, warps=8, stages=3),
}
_HALF_WGRAD = {
    16: WgradConfig(width=128, depth=64),
    32: WgradConfig(width=128, depth=64),
    64: WgradConfig(width=128, depth=64),
    128: WgradConfig(width=128, depth=64, programs=4, warps=8),
}
# Products in fp32 are split into three of TF32: the operands live in registers, so the tiles are smaller.
_FLOAT_LINEAR = {
    16: LinearConfig(tokens=128, depth=32, stages=2),
    32: LinearConfig(tokens=128, depth=32, stages=2),
    64: LinearConfig(tokens=64, depth=32, stages=2),
    128: LinearConfig(tokens=64, depth=32, warps=8, stages=2),
}
_FLOAT_WGRAD = {
    16: WgradConfig(width=64, depth=32, stages=2),
    32: WgradConfig(width=64, depth=32, stages=2),
    64: WgradConfig(width=64, depth=32, stages=2),
    128: WgradConfig(width=128, depth=32, programs=4, warps=8, stages=2),
}


def _table() -> dict[Key, Config]:
    table: dict[Key, Config] = {}
    for arch in ARCHITECTURES:
        for block_size in _HALF_LINEAR:
            for product in ("forward", "dgrad"):
                table[product, block_size, "half", arch] = _HALF_LINEAR[block_size]
                table[product, block_size, "float", arch] = _FLOAT_LINEAR[block_size]
            table["wgrad", block_size, "half", arch] = _HALF_WGRAD[block_size]
            table["wgrad", block_size, "float", arch] = _FLOAT_WGRAD[block_size]
    return table


TABLE: dict[Key, Config] = _table()
# What was measured in this process, and goes before the table.
_measured: dict[Key, Config] = {}


def kind_of(dtype: torch.dtype) -> Kind:
    """The part of the table that a dtype belongs to."""
    return "float" if dtype == torch.float32 else "half"


@cache
def architecture(device: torch.device) -> int:
    """The column of the table for a device."""
    if device.type != "cuda":
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability(device)
    # 12.x is later than 9.0, and has the shared memory of 8.6.
    return 90 if 90 <= 10 * major + minor < 120 else 80


def config_of(product: Product, block_size: int, dtype: torch.dtype, device: torch.device) -> Config:
    """How a product is launched there."""
    key = (product, block_size, kind_of(dtype), architecture(device))
    return _measured.get(key) or TABLE[key]


def set_config(product: Product, block_size: int, dtype: torch.dtype, device: torch.device, config: Config) -> None:
    """Launch a product so from now on, in this process."""
    _measured[product, block_size, kind_of(dtype), architecture(device)] = config


def forget_measured() -> None:
    """Back to the table."""
    _measured.clear()
