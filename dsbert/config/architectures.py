"""The encoders that `model.architecture` may name, and what a recipe must know of each before torch is imported."""

from __future__ import annotations

from typing import NamedTuple


class Architecture(NamedTuple):
    """An encoder with its heads.

    module: where its `SPEC` stands, a models.spec.ModelSpec. objectives: what it is trained for, names of
    models.spec.OBJECTIVES in the order of the loss vector; the first one is over masked tokens. encoder: a pattern
    (fnmatch) over the names of the encoder's linear layers: those that may be sparse, and are, unless
    `sparsity.modules` says which, and those that FLOPs count.
    """

    module: str
    objectives: tuple[str, ...]
    encoder: str


ARCHITECTURES = {
    "bert": Architecture("dsbert.models.bert", ("mlm", "nsp"), "*encoder.layer.*"),
    "modernbert": Architecture("dsbert.models.modern_bert", ("mlm",), "*model.layers.*"),
}
