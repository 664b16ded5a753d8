"""What forward keeps for backward, in bytes, from the shapes: of each layer, of what stands around them, and of the
heads.

Hidden states are those of real tokens alone, [1, T, H] (models/device_batch.py). On a CPU with dsbert's kernels neither
dropout masks nor scores of attention are kept, and logits exist for some rows at a time (models/vocabulary_loss.py). On
a card torch's own passes run, which keep masks of dropout and all logits.

Legend: n sequences, T tokens in all, m predictions; H hidden, I the feed-forward layer's inner size, h heads, V
vocabulary, r rank of a low-rank term; e bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsbert.config.sections import ModelConfig
from dsbert.jobs.capacity.model_size import ModelSize
from dsbert.models.vocabulary_loss import CHUNK_BYTES

_FP32 = 4


@dataclass(frozen=True)
class MicroBatchShape:
    """sequences n, tokens T, predictions m, element_bytes e; on_card: whether on a GPU; widened: half precision that
    dense products take fp32 copies of, as on a CPU that does not multiply it (sparse/half_precision.py)."""

    sequences: int
    tokens: int
    predictions: int
    element_bytes: int
    on_card: bool = False
    widened: bool = False


@dataclass(frozen=True)
class ActivationBytes:
    """kept: for backward, when forward ends, without the heads. head: what the heads keep, the gradients among it that
    the loss makes in forward. head_working, head_gradient: what the loss needs beside, for a moment, in forward and in
    backward. layer_working: what backward of a layer holds beside what it has not freed yet."""

    kept: float
    head: float
    head_working: float
    head_gradient: float
    layer_working: float


def activation_bytes(size: ModelSize, shape: MicroBatchShape) -> ActivationBytes:
    """Of one micro-batch."""
    model = size.recipe.model
    hidden: float = shape.tokens * model.hidden_size * shape.element_bytes
    layer = _LAYERS[model.architecture](model, shape) + _beside_layers(size, shape) / model.num_layers
    around = 2 * hidden + 8 * shape.tokens  # the embeddings' sum and their norm
    kept: float = around + model.num_layers * layer
    inner = shape.tokens * model.intermediate_size * shape.element_bytes
    working = inner + hidden
    if model.activation_checkpointing:  # inputs alone, and one layer again
        kept, working = around + model.num_layers * hidden, working + layer
    return ActivationBytes(kept, *_head(size, shape), working)


def _bert_layer(model: ModelConfig, shape: MicroBatchShape) -> float:
    """q, k, v, what attention returns, two sums and their norms; before and after GELU; lse and statistics of rows."""
    tokens, e = shape.tokens, shape.element_bytes
    masks = 2 * tokens * model.hidden_size if shape.on_card and model.dropout else 0
    rows = _FP32 * tokens * (model.num_heads + 4)
    return tokens * e * (8 * model.hidden_size + 2 * model.intermediate_size) + rows + masks


def _modern_bert_layer(model: ModelConfig, shape: MicroBatchShape) -> float:
    """Two norms, q k v, q and k turned, what attention returns, two sums; the first layer's outputs, GELU of one half,
    and its product with the other."""
    tokens, e = shape.tokens, shape.element_bytes
    masks = tokens * model.hidden_size if shape.on_card and model.dropout else 0
    rows = _FP32 * tokens * (model.num_heads + 4)
    return tokens * e * (10 * model.hidden_size + 4 * model.intermediate_size) + rows + masks


_LAYERS: dict[str, Callable[[ModelConfig, MicroBatchShape], float]] = {
    "bert": _bert_layer,
    "modernbert": _modern_bert_layer,
}


def _beside_layers(size: ModelSize, shape: MicroBatchShape) -> float:
    """What linear layers of all encoder layers keep beside their inputs: X V^T and U^T of low-rank terms, and fp32
    copies of inputs and weights where dense products of half precision are widened. In place of what they are copies
    of, as far as nothing else keeps that: two norms' outputs and the second layer's input, where all are dense."""
    model = size.recipe.model
    narrow = shape.tokens * (2 * model.hidden_size + model.intermediate_size) * shape.element_bytes
    found = -float(model.num_layers * narrow) if shape.widened and not size.layers else 0.0
    for name, (out, inner, _) in size.linears.items():
        sparse = size.layers.get(name)
        if sparse and sparse.low_rank:
            found += sparse.low_rank * (shape.tokens + out) * shape.element_bytes
        if not sparse and shape.widened:
            found += _FP32 * (shape.tokens * inner + out * inner)
    return found


def _head(size: ModelSize, shape: MicroBatchShape) -> tuple[float, float, float]:
    """(kept, beside it for a moment in forward, and in backward) of the prediction of masked tokens; of sentence pairs
    it is next to nothing."""
    hidden, e, m, v = size.recipe.model.hidden_size, shape.element_bytes, shape.predictions, size.vocab_size
    transform = 3 * m * hidden * e + 2 * shape.sequences * hidden * e
    if shape.widened:
        transform += _FP32 * (m * hidden + hidden * hidden)
    if shape.on_card:  # logits, in fp32, their log_softmax; then the gradients of both
        return transform + m * v * (e + 2 * _FP32), 0, m * v * (_FP32 + e)
    gradients = _FP32 * (m * hidden + v * hidden + v)
    parts = max(1, math.ceil(m * v * _FP32 / CHUNK_BYTES))
    logits = _FP32 * v * math.ceil(m / parts)
    if e == _FP32:
        return transform + gradients, logits, 0
    copies = (v + m) * hidden
    return (
        transform + gradients,
        logits + _FP32 * copies,
        (_FP32 + e) * copies,
    )  # in fp32 with their factor, then narrow
