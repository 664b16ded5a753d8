"""ModernBERT for pre-training, from a transformers configuration: rotary positions, gated feed-forward layers, norms
before the layers and not after, attention to near tokens only in two layers of three, no biases, masked tokens alone.

Source: Warner et al. 2024, arXiv:2412.13663. Module and parameter names: those of transformers.ModernBertForMaskedLM.
Shapes: n sequences of T tokens in all, H hidden, V vocabulary, m masked tokens in the whole micro-batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.sections import ModelConfig
from dsbert.models.device_batch import DeviceBatch
from dsbert.models.fast_layers import use_fast_layers_
from dsbert.models.residual_norm import fuse_norms_
from dsbert.models.spec import ModelSpec, shape_of
from dsbert.models.vocabulary_loss import VocabularyLinear

# Matrices that add to the residual stream, or lead to the logits, begin smaller (`_init_weights` of transformers).
_OUTPUTS = (".Wo", "head.dense")


class _Rotary(ModernBertRotaryEmbedding):
    """Rotary positions whose frequencies stay fp32 in a model of half precision, as transformers loads them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Rotary:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class SparseModernBert(nn.Module):
    """ModernBertForMaskedLM; logits only where a token is masked. forward: see models/spec.py."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        whole = ModernBertForMaskedLM(config)
        use_fast_layers_(whole)
        fuse_norms_(whole)
        whole.decoder.__class__ = VocabularyLinear
        self.config = config
        self.model = whole.model
        self.head = whole.head
        self.decoder = whole.decoder

    def forward(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        # No masks: attention is told where sequences begin, and each layer how far it sees.
        masks = dict.fromkeys(set(self.config.layer_types))
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        outputs = self.model(ids, attention_mask=masks, position_ids=positions, starts=batch.starts)
        hidden = outputs.last_hidden_state[0]  # [T, H]
        masked = self.head(hidden.index_select(0, batch.mlm_positions))  # [m, H]
        loss, hits = self.decoder(masked, batch.mlm_labels)
        return loss.view(1), hits.view(1)


def modern_bert_config(model: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> ModernBertConfig:
    """The transformers configuration of the recipe's model. Special tokens but for [PAD] get their ids on export."""
    return ModernBertConfig(
        **shape_of(model, vocab_size, pad_token_id),
        attention_dropout=model.dropout,
        embedding_dropout=model.dropout,
        mlp_dropout=model.dropout,
        bos_token_id=None,
        cls_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )


def _build(model: ModelConfig, vocab_size: int, pad_token_id: int) -> SparseModernBert:
    return SparseModernBert(modern_bert_config(model, vocab_size, pad_token_id))


def _fill_buffers(model: SparseModernBert, device: torch.device) -> None:
    """The frequencies of rotary positions, which are no parameters."""
    model.model.rotary_emb = _Rotary(model.config).to(device)


def _initial_std(name: str, model: ModelConfig) -> float:
    layer = name.rpartition(".")[0]
    return model.initializer_std / (math.sqrt(2 * model.num_layers) if layer.endswith(_OUTPUTS) else 1.0)


def _attention_pairs(model: ModelConfig, lengths: ArrayLike) -> int:
    """Layers of local attention see `sliding_window` tokens to each side."""
    lengths = np.asarray(lengths)
    window, kinds = _reach_and_kinds(model.num_layers)
    reach = np.minimum(window, lengths - 1)
    near = lengths * (2 * reach + 1) - reach * (reach + 1)
    pairs = {"full_attention": int(np.square(lengths).sum()), "sliding_attention": int(near.sum())}
    return sum(pairs[kind] for kind in kinds)


@functools.cache
def _reach_and_kinds(num_layers: int) -> tuple[int, tuple[str, ...]]:
    """How many tokens to each side local attention sees, and which attention each layer has."""
    config = ModernBertConfig(num_hidden_layers=num_layers)
    return config.sliding_window, tuple(config.layer_types)


SPEC = ModelSpec(
    architecture=ARCHITECTURES["modernbert"],
    build=_build,
    fill_buffers=_fill_buffers,
    initial_std=_initial_std,
    fuse_activations=lambda model: None,  # its GELU acts on half of what the first layer returns
    attention_pairs=_attention_pairs,
    exported=ModernBertForMaskedLM,
    special_tokens={
        "pad_token_id": "pad",
        "bos_token_id": "cls",
        "cls_token_id": "cls",
        "eos_token_id": "sep",
        "sep_token_id": "sep",
    },
)
