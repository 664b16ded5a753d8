"""The models: transformers' BERT and its heads, with block-sparse layers and dsbert's kernels in the encoder.

Names of modules and parameters are those of transformers' models; a sparse layer has `blocks`, `rows` and `cols` in the
place of `weight`. Heads, losses and outputs are transformers' own.
Shapes: B rows of S positions, T of which are tokens; H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.output_capturing import capture_outputs

from dsbert.base.errors import UserError
from dsbert.hf.configuration import DsbertConfig
from dsbert.hf.unpadded import Unpadded
from dsbert.models.bert import SPEC
from dsbert.models.fast_layers import ATTENTION, replace_layers_
from dsbert.models.residual_norm import fuse_norms_
from dsbert.sparse import BlockSparseLinear, BlockTopology
from dsbert.sparse.draw import DrawKey, draw_positions
from dsbert.sparse.topology import grid


class DsbertPreTrainedModel(BertPreTrainedModel):
    """What all models here share: the attention, unless another is asked for, and initial values.

    attn_implementation: "dsbert", the default, computes no padding; with "eager", "sdpa" or another of transformers'
    rows stay padded, and the sparse layers are the same.
    """

    config_class = DsbertConfig
    config: DsbertConfig

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        found: str = super().get_correct_attn_implementation(requested_attention or ATTENTION, is_init_check)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As of any model, of what was not loaded; and every layer's topology, loaded or not, is made ready.

        Raises UserError where that is none.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.LayerNorm):  # transformers knows them by the name of their class
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, BlockSparseLinear):
            initialization.trunc_normal_(module.blocks, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                initialization.zeros_(module.bias)
            if module.low_rank:
                initialization.zeros_(module.low_rank_u)
                initialization.trunc_normal_(module.low_rank_v, std=std, a=-2 * std, b=2 * std)
            try:
                module.set_topology(module.topology)  # kernels read where it sends them
            except ValueError as error:
                raise UserError(f"a sparse layer of the model has no topology: {error}: export it again") from None


class DsbertModel(DsbertPreTrainedModel, BertModel):
    """transformers' BertModel with sparse layers, which computes the tokens of a padded batch and no padding.

    In last_hidden_state and hidden_states positions of padding are zero; elsewhere outputs are the dense model's.
    """

    def __init__(self, config: DsbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        sparsify_encoder_(self, config)
        replace_layers_(self)
        fuse_norms_(self)
        if config.hidden_act == "gelu":
            SPEC.fuse_activations(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As transformers' BertModel. input_ids, attention_mask, token_type_ids: [B, S]; position_ids: [1 or B, S],
        counting columns where None. Raises ValueError for output_attentions with dsbert's attention."""
        tokens = self._tokens(input_ids, inputs_embeds, attention_mask, options)
        if tokens is None:
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **options,
            )
        if position_ids is None:
            position_ids = torch.arange(tokens.columns, device=self.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        given = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return_dict = options.pop("return_dict", None)
        embedded = {name: tokens.take(rows) for name, rows in given.items() if rows is not None}
        outputs = self._encode(tokens, embedded, return_dict=True, **options)
        outputs.last_hidden_state = tokens.put(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(None if x is None else tokens.put(x) for x in outputs.hidden_states)
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def _tokens(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        options: dict[str, Any],
    ) -> Unpadded | None:
        """None: the rows are computed as they are, as transformers does."""
        given = inputs_embeds if input_ids is None else input_ids
        is_one = (input_ids is None) != (inputs_embeds is None)
        if not is_one or given is None or self.config._attn_implementation != ATTENTION:
            return None
        if options.get("output_attentions", getattr(self.config, "output_attentions", False)):
            found = f"expected attn_implementation='eager' for output_attentions, found {ATTENTION!r}"
            raise ValueError(f"{found}, which keeps no scores: load the model with it")
        if self.config.chunk_size_feed_forward:  # of columns
            return None
        return Unpadded.of(given.shape[0], given.shape[1], attention_mask)

    @capture_outputs
    def _encode(self, tokens: Unpadded, embedded: dict[str, Tensor], **options: Any) -> Any:
        """Hidden states [1, T, H] of what goes into the embeddings, [1, T] each, and the pooled ones [B, H]."""
        hidden = self.embeddings(**embedded)
        hidden = self.encoder(hidden, starts=tokens.starts, **options).last_hidden_state
        # The pooler takes the first token of each row: it is given rows of one token.
        pooled = None if self.pooler is None else self.pooler(tokens.first(hidden)[:, None])
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


class _Head(DsbertPreTrainedModel):
    """A head of transformers over a sparse encoder in the place of its dense one."""

    bert: BertModel

    def __init__(self, config: DsbertConfig) -> None:
        super().__init__(config)
        add_pooling_layer = self.bert.pooler is not None
        del self.bert
        replace_layers_(self)
        fuse_norms_(self)
        self.bert = DsbertModel(config, add_pooling_layer)
        self.post_init()  # the ties lead to the embeddings of the new encoder


class DsbertForPreTraining(_Head, BertForPreTraining):
    """Masked tokens and whether two sentences are neighbours: what dsbert trains."""


class DsbertForMaskedLM(_Head, BertForMaskedLM):
    """Masked tokens."""


class DsbertForSequenceClassification(_Head, BertForSequenceClassification):
    """Classes, or numbers, of sequences."""


class DsbertForTokenClassification(_Head, BertForTokenClassification):
    """Classes of tokens."""


class DsbertForQuestionAnswering(_Head, BertForQuestionAnswering):
    """Where answers begin and end."""


def sparsify_encoder_(model: BertModel, config: DsbertConfig) -> None:
    """Replace, in place, the linear layers that `config.active_blocks` names. On the meta device their topology is a
    place for the one that is loaded; elsewhere it is drawn at random. Raises UserError for what does not fit."""
    modules = dict(model.named_modules())
    for name, count in config.active_blocks.items():
        parent, _, child = name.rpartition(".")
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"expected linear layers in active_blocks of config.json, found {name!r}: export it again")
        shape = (linear.out_features, linear.in_features)
        topology = _topology(name, shape, count, config.block_size, linear.weight.device.type == "meta")
        if not 0 <= config.low_rank <= min(shape):
            raise UserError(f"expected low_rank up to {min(shape)} in config.json, found {config.low_rank}")
        layer = BlockSparseLinear.from_linear(linear, topology, kernels=config.kernels, low_rank=config.low_rank)
        setattr(model.get_submodule(parent), child, layer)


def _topology(name: str, shape: tuple[int, int], count: int, block_size: int, is_meta: bool) -> BlockTopology:
    try:
        num_rows, num_cols = grid(shape, block_size)
    except ValueError as error:
        raise UserError(f"{name} of config.json: {error}") from None
    if not 1 <= count <= num_rows * num_cols:
        raise UserError(f"expected 1 to {num_rows * num_cols} active_blocks of {name} in config.json, found {count}")
    with torch.device("cpu"):  # whatever device the model is made on
        positions = torch.arange(count)
        if not is_meta:
            eligible = torch.ones(num_rows * num_cols, dtype=torch.bool)
            positions = draw_positions(DrawKey(0, "init", 0, name), eligible, count)
        return BlockTopology(shape, block_size, (positions // num_cols).int(), (positions % num_cols).int())
