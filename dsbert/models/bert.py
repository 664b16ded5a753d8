"""BERT for pre-training, from a transformers configuration, with the encoder's linear layers block-sparse.

Module and parameter names are those of transformers.BertForPreTraining, so that export is a matter of densifying.
Shapes: b sequences, S positions, H hidden, V vocabulary, m masked positions in the whole micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining

from dsbert.base.errors import UserError
from dsbert.config.recipe import Recipe
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.data.stream import Batch
from dsbert.models.bert_layers import fuse_gelu_, lighten_
from dsbert.sparse import BlockSparseLinear, sparsify_


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch as tensors: see data.stream.Batch."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    mlm_positions: Tensor
    mlm_labels: Tensor
    nsp_labels: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> DeviceBatch:
        arrays = (getattr(batch, name) for name in cls.__dataclass_fields__)
        return cls(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


class SparseBert(nn.Module):
    """BertForPreTraining's trunk and heads; MLM logits only where a token is masked.

    forward(batch) -> (losses, hits). losses: summed cross-entropies [mlm, nsp], fp32; hits: how many predictions are
    right [mlm, nsp], int64, zero while training. Sums, not means: the mean is over the global batch.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        whole = BertForPreTraining(config)
        lighten_(whole)
        self.config = config
        self.bert = whole.bert
        self.cls = whole.cls

    def forward(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        outputs = self.bert(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids)
        hidden = outputs.last_hidden_state.flatten(0, 1)  # [b S, H]
        mlm_logits = self.cls.predictions(hidden.index_select(0, batch.mlm_positions)).float()  # [m, V]
        nsp_logits = self.cls.seq_relationship(outputs.pooler_output).float()  # [b, 2]
        # An empty selection sums to a zero that still has a gradient: a micro-batch without a masked token is legal.
        losses = torch.stack(
            [
                functional.cross_entropy(mlm_logits, batch.mlm_labels, reduction="sum"),
                functional.cross_entropy(nsp_logits, batch.nsp_labels, reduction="sum", ignore_index=-100),
            ]
        )
        hits = torch.zeros(2, dtype=torch.int64, device=losses.device)
        if not self.training:
            hits[0] = (mlm_logits.argmax(-1) == batch.mlm_labels).sum()
            hits[1] = (nsp_logits.argmax(-1) == batch.nsp_labels).sum()
        return losses, hits


def bert_config(recipe: Recipe, vocab_size: int, pad_token_id: int = 0) -> BertConfig:
    """The transformers configuration of the recipe's model. The embedding of pad_token_id is zero at
    first, and padded positions do not move it (the MLM decoder, which is tied to it, does)."""
    model = recipe.model
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_positions,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        initializer_range=model.initializer_std,
        pad_token_id=pad_token_id,
    )


def build_model(
    recipe: Recipe, vocab_size: int, device: torch.device | str = "cpu", pad_token_id: int = 0
) -> tuple[SparseBert, dict[str, BlockSparseLinear]]:
    """The initialised model and its sparse layers by name: the same on every rank, a function of the seed alone.

    Built on the meta device, so that no dense encoder weight ever exists. Raises UserError for a pattern that the
    model's shapes do not allow.
    """
    with torch.device("meta"):
        model = SparseBert(bert_config(recipe, vocab_size, pad_token_id))
    with named_as_in_recipes():
        layers = sparsify_(model, recipe.sparsity, seed=recipe.seed)
    outside = [name for name in layers if ".encoder." not in name]
    if outside:
        raise UserError(f"expected sparsity.modules to match linear layers of the encoder only, found {outside[0]}")
    fuse_gelu_(model)
    _materialize_(model, torch.device(device), recipe.model.initializer_std, recipe.seed)
    return model, layers


def encoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The fully connected weights of the encoder, dense or sparse, by name: what the paper's FLOPs count."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | BlockSparseLinear) and ".encoder." in name
    }


def _materialize_(model: SparseBert, device: torch.device, std: float, seed: int) -> None:
    """Give every meta parameter memory and its initial value, keeping ties.

    Matrices: normal truncated at two std (paper: 0.02; Glorot and variance-preserving scaling were not better), each
    from a generator of its own, keyed by (seed, name). LayerNorm 1, biases 0.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            if meta not in made:
                made[meta] = _initial(f"{prefix}.{name}", module, meta, device, std, seed)
            module.register_parameter(name, made[meta])
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    embeddings = model.bert.embeddings
    positions = model.config.max_position_embeddings
    embeddings.position_ids = torch.arange(positions, device=device).expand((1, -1))
    embeddings.token_type_ids = torch.zeros((1, positions), dtype=torch.long, device=device)


def _initial(name: str, module: nn.Module, meta: Tensor, device: torch.device, std: float, seed: int) -> nn.Parameter:
    value = torch.empty(meta.shape, dtype=meta.dtype)
    if isinstance(module, nn.LayerNorm):
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    elif meta.dim() == 1:
        value.zero_()
    else:
        word = xxhash.xxh3_64_intdigest(f"{seed}\0init\0{name}".encode())
        generator = torch.Generator().manual_seed(word % 2**63)
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
    return nn.Parameter(value.to(device))


def layer_shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape [out, in], block size (None where dense) and kept weights of every fully connected encoder weight."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, module in encoder_linears(model).items():
        if isinstance(module, BlockSparseLinear):
            shapes[name] = {"shape": list(module.shape), "block_size": module.block_size, "kept": module.blocks.numel()}
        else:
            assert isinstance(module, torch.nn.Linear)
            shape = [module.out_features, module.in_features]
            shapes[name] = {"shape": shape, "block_size": None, "kept": shape[0] * shape[1]}
    return shapes


def any_batch(rows: int, length: int, device: torch.device) -> DeviceBatch:
    """A batch in which every parameter has a part: ids [rows, length] of zeros, one position asked."""
    ids = torch.zeros((rows, length), dtype=torch.int64, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    return DeviceBatch(ids, ids, torch.ones_like(ids), first, first, ids[:, 0])
