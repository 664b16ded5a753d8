"""BERT for pre-training, from a transformers configuration: masked tokens, and whether two sentences are neighbours.

Module and parameter names are those of transformers.BertForPreTraining, so that export is a matter of densifying.
Shapes: n sequences of T tokens in all, H hidden, V vocabulary, m masked tokens in the whole micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate

from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.sections import ModelConfig
from dsbert.models.device_batch import DeviceBatch
from dsbert.models.fast_layers import use_fast_layers_
from dsbert.models.residual_norm import fuse_norms_
from dsbert.models.spec import ModelSpec, losses_and_hits, shape_of
from dsbert.models.vocabulary_loss import VocabularyLinear
from dsbert.sparse import BlockSparseLinear


class SparseBert(nn.Module):
    """BertForPreTraining's trunk and heads; MLM logits only where a token is masked. forward: see models/spec.py."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        whole = BertForPreTraining(config)
        use_fast_layers_(whole)
        fuse_norms_(whole)
        whole.cls.predictions.decoder.__class__ = VocabularyLinear
        self.config = config
        self.bert = whole.bert
        self.cls = whole.cls

    def forward(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        hidden = self.bert.embeddings(
            batch.input_ids[None], token_type_ids=batch.token_type_ids[None], position_ids=batch.position_ids[None]
        )
        hidden = self.bert.encoder(hidden, starts=batch.starts).last_hidden_state[0]  # [T, H]
        head = self.cls.predictions
        masked = head.transform(hidden.index_select(0, batch.mlm_positions))  # [m, H]
        mlm_loss, mlm_hits = head.decoder(masked, batch.mlm_labels)
        # The pooler takes the first token of each row: it is given rows of one token.
        pooled = self.bert.pooler(hidden.index_select(0, batch.first_tokens)[:, None])  # [n, H]
        nsp_logits = self.cls.seq_relationship(pooled).float()  # [n, 2]
        losses, hits = losses_and_hits([(nsp_logits, batch.nsp_labels)], self.training)
        return torch.cat([mlm_loss.view(1), losses]), torch.cat([mlm_hits.view(1), hits])


def bert_config(model: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> BertConfig:
    """The transformers configuration of the recipe's model. The embedding of pad_token_id is zero at
    first, and padded positions do not move it (the MLM decoder, which is tied to it, does)."""
    return BertConfig(
        **shape_of(model, vocab_size, pad_token_id),
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
    )


def _build(model: ModelConfig, vocab_size: int, pad_token_id: int) -> SparseBert:
    return SparseBert(bert_config(model, vocab_size, pad_token_id))


def _fill_buffers(model: SparseBert, device: torch.device) -> None:
    embeddings = model.bert.embeddings
    positions = model.config.max_position_embeddings
    embeddings.position_ids = torch.arange(positions, device=device).expand((1, -1))
    embeddings.token_type_ids = torch.zeros((1, positions), dtype=torch.long, device=device)


def _fuse_gelu(model: nn.Module) -> None:
    """Leave the activation of every FFN whose first layer is sparse to that layer's kernel, in place."""
    for module in model.modules():
        if isinstance(module, BertIntermediate) and isinstance(module.dense, BlockSparseLinear):
            assert isinstance(module.intermediate_act_fn, GELUActivation)
            module.dense.activation = "gelu"
            module.intermediate_act_fn = nn.Identity()


SPEC = ModelSpec(
    architecture=ARCHITECTURES["bert"],
    build=_build,
    fill_buffers=_fill_buffers,
    initial_std=lambda name, model: model.initializer_std,
    fuse_activations=_fuse_gelu,
    attention_pairs=lambda model, lengths: model.num_layers * int(np.square(lengths).sum()),
    exported=BertForPreTraining,
    special_tokens={"pad_token_id": "pad"},
)
