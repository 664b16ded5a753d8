"""What a plan is made of: figures, each with its unit, how it is known, and the formula it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

# measured: timed or read on this machine, for this plan. computed: follows from shapes and counts. estimated: rests on
# a rate that nobody has measured here, or on an algorithm that others choose.
Kind = Literal["measured", "computed", "estimated"]
Unit = Literal["bytes", "s", "FLOP", "FLOP/s", "tokens/s", "tokens", "share", "steps", "h", ""]
_SURE: tuple[Kind, ...] = ("computed", "measured", "estimated")


@dataclass(frozen=True)
class Figure:
    """value: in `unit`; share is of one, "" a count. how: the formula, in words that name its parts."""

    name: str
    value: float
    unit: Unit
    kind: Kind
    how: str

    def to_json(self) -> dict[str, Any]:
        """As --json has it."""
        return {"value": self.value, "unit": self.unit, "kind": self.kind, "how": self.how}


@dataclass(frozen=True)
class Part:
    """Figures that belong together, under one heading."""

    name: str
    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> Figure:
        """Raises KeyError."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {figure.name: figure.to_json() for figure in self.figures}


def total(name: str, figures: Iterable[Figure], how: str) -> Figure:
    """Their sum, as sure as the least sure of them."""
    found = tuple(figures)
    return Figure(name, sum(figure.value for figure in found), found[0].unit, least_sure(found), how)


def least_sure(figures: Iterable[Figure]) -> Kind:
    """How what follows from all of them is known."""
    return max((figure.kind for figure in figures), key=_SURE.index, default="computed")
