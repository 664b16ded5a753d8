"""What one would run instead of dsbert: BertForPreTraining of transformers under plain torch, on one device.

Scaled-dot-product attention, dropout as in the recipe, AdamW in one pass, gradients clipped to a norm of 1 (as in
ds_configs/, and as transformers' Trainer does unasked), bf16 by autocast. Rows are padded to the sequence length, with
an attention mask where there is padding, and the MLM head sees every position: that is how it comes.

Shapes: b sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BertForPreTraining

from dsbert.config.recipe import Recipe
from dsbert.data.stream import IGNORE, Batch
from dsbert.models.bert import bert_config

_MAX_GRAD_NORM = 1.0


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """A Batch as BertForPreTraining's arguments, on the CPU: int64 [b, S], next_sentence_label int64 [b]."""
    labels = torch.full(batch.input_ids.shape, IGNORE, dtype=torch.int64)
    labels.view(-1)[torch.from_numpy(batch.mlm_positions)] = torch.from_numpy(batch.mlm_labels)
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids),
        "token_type_ids": torch.from_numpy(batch.token_type_ids),
        "labels": labels,
        "next_sentence_label": torch.from_numpy(batch.nsp_labels),
    }
    # Without padding there is nothing to mask, and attention without a mask is faster: a user would leave it out.
    if not batch.attention_mask.all():
        inputs["attention_mask"] = torch.from_numpy(batch.attention_mask)
    return inputs


class TransformersPeer:
    """The dense model of a recipe, ready to step.

    recipe: its model section and optim are used. batches: what every step is made of. dtype: fp32, or bf16 by autocast.
    """

    def __init__(
        self, recipe: Recipe, vocab_size: int, batches: Sequence[Batch], device: torch.device, dtype: str
    ) -> None:
        self.model = BertForPreTraining(bert_config(recipe.model, vocab_size))
        self.model.set_attn_implementation("sdpa")
        self.model.to(device).train()
        self._inputs = [padded_inputs(batch) for batch in batches]
        self._device, self._half = device, dtype == "bf16"
        optim = recipe.optim
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-4,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """One optimizer step of all batches; their mean loss before it."""
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for inputs in self._inputs:
            on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                loss = self.model(**on_device).loss
            (loss / len(self._inputs)).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        return float(torch.stack(losses).mean())
