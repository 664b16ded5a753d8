"""The model's seam: all that the rest of dsbert knows of an encoder and what it is trained for.

A model is an nn.Module with `config`, its transformers configuration, whose modules and parameters have the names of
the transformers model that it is exported to, and

    forward(batch: DeviceBatch) -> (losses, hits)

losses: the summed cross-entropy of each objective, fp32 [objectives]; hits: how many of its predictions are right,
int64 [objectives], zero while training. Sums, not means: the mean is over the global batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from dsbert.config.architectures import ARCHITECTURES, Architecture
from dsbert.config.sections import ModelConfig
from dsbert.data.stream import Batch


@dataclass(frozen=True)
class Objective:
    """Something that is predicted, and whose mean cross-entropy over the global batch is part of the loss.

    name: in records and messages, as `loss_<name>`. count: how many predictions a batch asks for. logs_accuracy:
    whether metrics.jsonl has the held-out accuracy beside the held-out loss.
    """

    name: str
    count: Callable[[Batch], int]
    logs_accuracy: bool = True


OBJECTIVES = {
    "mlm": Objective("mlm", lambda batch: batch.mlm_labels.size),
    "nsp": Objective("nsp", lambda batch: int((batch.nsp_labels >= 0).sum()), logs_accuracy=False),
}


@dataclass(frozen=True)
class ModelSpec:
    """One encoder.

    build: the model of a recipe's section, a vocabulary size and the id of [PAD], dense; called on the meta device.
    fill_buffers: give what `build` left of buffers on the meta device their values, on a device.
    initial_std: of the matrix with this name, a truncated normal's.
    fuse_activations: leave to sparse layers the activations that come right after them, in place.
    attention_pairs: pairs of a query and a key that see each other, over all layers, in sequences of so many tokens.
    exported: the transformers class that an export is loaded with.
    special_tokens: the name in `config` of the id of a special token, and its name in data.tokenizer.Vocabulary.
    """

    architecture: Architecture
    build: Callable[[ModelConfig, int, int], nn.Module]
    fill_buffers: Callable[[Any, torch.device], None]
    initial_std: Callable[[str, ModelConfig], float]
    fuse_activations: Callable[[nn.Module], None]
    attention_pairs: Callable[[ModelConfig, ArrayLike], int]
    exported: type[Any]
    special_tokens: Mapping[str, str]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """In the order of the loss vector."""
        return tuple(OBJECTIVES[name] for name in self.architecture.objectives)


def model_spec(config: ModelConfig) -> ModelSpec:
    """The spec of the architecture that a recipe names."""
    spec: ModelSpec = importlib.import_module(ARCHITECTURES[config.architecture].module).SPEC
    return spec


def losses_and_hits(predictions: Sequence[tuple[Tensor, Tensor]], training: bool) -> tuple[Tensor, Tensor]:
    """What `forward` returns, of a pair of logits [n, classes] and labels [n] (-100: not asked) for each objective."""
    # An empty selection sums to a zero that still has a gradient: a micro-batch without a masked token is legal.
    losses = torch.stack(
        [functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) for logits, labels in predictions]
    )
    hits = torch.zeros(len(predictions), dtype=torch.int64, device=losses.device)
    if not training:
        for number, (logits, labels) in enumerate(predictions):
            hits[number] = (logits.argmax(-1) == labels).sum()
    return losses, hits


def shape_of(model: ModelConfig, vocab_size: int, pad_token_id: int) -> dict[str, Any]:
    """A recipe's section as transformers' configurations of encoders call it, but for dropout, which each calls its own
    way."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.initializer_std,
        "pad_token_id": pad_token_id,
    }
