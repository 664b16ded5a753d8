"""What a rank computes on: two cards by their data sheets, or a YAML file with the same keys.

A CPU has no table: what a step takes there is timed (machine_timing.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dsbert.base.errors import UserError
from dsbert.base.fields import Number, Section, Text
from dsbert.config.complaints import explain, in_one_line
from dsbert.config.documents import read_mapping

Precision = Literal["fp32", "bf16", "fp16"]
CPU = "cpu"
_Positive = Field(gt=0)
_Share = Field(gt=0, le=1)


class Card(Section):
    """One GPU, and its way to the others.

    fp32_flops_per_s, half_flops_per_s: the most that dense products reach, without the cards' own 2:4 sparsity.
    memory_bytes, memory_bytes_per_s: on the card. link_bytes_per_s: of a rank to those of its node,
    network_bytes_per_s: to other nodes, each way. latency_s: of one step of a collective. dense_share, sparse_share: of
    the most, what dense products and block-sparse ones reach of the FLOPs that are kept; memory_share and link_share:
    of the bandwidths. launch_s: of a kernel, at least. host_bytes_per_s: from the card to page-locked memory.
    storage_bytes_per_s: what a rank writes to the run directory. source: where the figures are from.
    """

    name: Text
    fp32_flops_per_s: Number = _Positive
    half_flops_per_s: Number = _Positive
    memory_bytes: Number = _Positive
    memory_bytes_per_s: Number = _Positive
    link_bytes_per_s: Number = _Positive
    network_bytes_per_s: Number = _Positive
    latency_s: Number = Field(10e-6, gt=0)
    dense_share: Number = Field(0.5, gt=0, le=1)
    sparse_share: Number = Field(0.25, gt=0, le=1)
    memory_share: Number = Field(0.8, gt=0, le=1)
    link_share: Number = Field(0.8, gt=0, le=1)
    launch_s: Number = Field(5e-6, gt=0)
    host_bytes_per_s: Number = Field(20e9, gt=0)
    storage_bytes_per_s: Number = Field(0.5e9, gt=0)
    source: Text

    def peak_flops_per_s(self, precision: Precision) -> float:
        """Of dense products."""
        return self.fp32_flops_per_s if precision == "fp32" else self.half_flops_per_s


CARDS = {
    "h100": Card(
        name="H100 SXM 80 GB",
        fp32_flops_per_s=67e12,
        half_flops_per_s=989.4e12,
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        source="NVIDIA H100 data sheet; NVLink 900 GB/s both ways, one 400 Gbit/s port per card; shares are assumed",
    ),
    "a100": Card(
        name="A100 SXM 80 GB",
        fp32_flops_per_s=19.5e12,
        half_flops_per_s=312e12,
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        source="NVIDIA A100 data sheet; NVLink 600 GB/s both ways, one 200 Gbit/s port per card; shares are assumed",
    ),
}


def load_card(name: str) -> Card:
    """A card of the table, or of a YAML file. Raises UserError, one line."""
    if name in CARDS:
        return CARDS[name]
    path = Path(name)
    try:
        values, _ = read_mapping(path, "a card")
    except FileNotFoundError:
        raise UserError(f"expected {', '.join(CARDS)}, {CPU} or a YAML file as --card, found {name!r}") from None
    try:
        return Card.model_validate({"name": path.stem, "source": str(path)} | values)
    except ValidationError as error:
        raise UserError(f"card {path}: {in_one_line(explain(error, Card, 'card', {}))}") from None
