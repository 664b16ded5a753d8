"""What computes the products of a model, and what it gains: decided by dispatch, kept by checkpoints, shown to people.

Its JSON form stands in a checkpoint's state.json:
{"tokens", "dtype", "device", "layers": {name: {product: {"backend", "ms", "speedup"}}}, "instructions"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from dsbert.sparse.kernels.index import PRODUCTS, Product


class Choice(NamedTuple):
    """The names of the backends of the three products."""

    forward: str
    dgrad: str
    wgrad: str


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class ProductRecord(_Record):
    """ms: of one call as measured; speedup: against the best dense product. None: nothing was measured."""

    backend: str
    ms: float | None
    speedup: float | None


class ProductsRecord(_Record):
    """The three products of a layer."""

    forward: ProductRecord
    dgrad: ProductRecord
    wgrad: ProductRecord

    def choice(self) -> Choice:
        """The names of the backends."""
        return Choice(*(product.backend for _, product in self.by_name()))

    def by_name(self) -> Iterator[tuple[Product, ProductRecord]]:
        """(name, record) of each product, in the order of `PRODUCTS`."""
        yield from zip(PRODUCTS, (self.forward, self.dgrad, self.wgrad), strict=True)


class KernelRecord(_Record):
    """layers: by name; measured for products of `tokens` tokens. instructions: of the cpu kernels, if they are in use.

    Older checkpoints lack dtype, device and instructions.
    """

    tokens: int
    dtype: str = ""
    device: str = ""
    layers: dict[str, ProductsRecord]
    instructions: str | None = None

    @classmethod
    def from_json(cls, found: object) -> KernelRecord:
        """What `to_json` returned. Raises pydantic's ValidationError, a ValueError, for anything else."""
        return cls.model_validate(found)

    def to_json(self) -> dict[str, Any]:
        """As in state.json; what was read from an older one without a field still lacks it."""
        return self.model_dump(exclude_unset=True)

    def gain(self) -> float | None:
        """How many times faster than the best dense products these are, all layers together; None: not measured."""
        dense_ms = sparse_ms = 0.0
        for products in self.layers.values():
            for _, product in products.by_name():
                if product.ms is None or product.speedup is None:
                    return None
                dense_ms += product.ms * product.speedup
                sparse_ms += product.ms
        return dense_ms / sparse_ms if self.layers else None
