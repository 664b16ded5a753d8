"""The configuration of a sparse model: BERT's, and which linear layers of the encoder are blocks."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from dsbert.base.errors import UserError
from dsbert.sparse.kernels.dispatch import KERNELS


@strict
class DsbertConfig(BertConfig):
    """config.json of a sparse model: what transformers.BertConfig has, and

    block_size: rows and columns of a block. active_blocks: how many blocks each sparse linear layer has, by its name in
    the encoder's model ("encoder.layer.0.attention.self.query"); a layer that is not named is dense. low_rank: the rank
    of the term beside the blocks of each (sparse/low_rank.py); 0: none. kernels: a name of
    `dsbert.sparse.kernels.dispatch.KERNELS`. Raises UserError for what no sparse model can be.
    """

    model_type = "dsbert"

    block_size: int = 16
    active_blocks: dict[str, int] = field(default_factory=dict)
    low_rank: int = 0
    kernels: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.is_decoder or self.add_cross_attention:
            raise UserError("expected an encoder in config.json, found a decoder: set is_decoder to false")
        if self.kernels not in KERNELS:
            raise UserError(f"expected kernels of {', '.join(KERNELS)} in config.json, found {self.kernels!r}: set one")
