"""Embeddings of sentences by mean pooling, as sentence-transformers makes them of a model without a pooling of its own:
`SentenceTransformer("exports/sparse")` after `import dsbert.hf` gives the same.

Shapes: B sentences of S positions, H hidden.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsbert.hf.from_checkpoint import from_run, tokenizer_from_run
from dsbert.hf.modeling import DsbertModel


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over each row's tokens: [B, S, H] and [B, S] -> [B, H]; zeros for a row without any."""
    seen = attention_mask.to(hidden.dtype)[..., None]
    return (hidden * seen).sum(1) / seen.sum(1).clamp(min=1e-9)


class SentenceEmbedder:
    """Sentences -> embeddings. model: with `last_hidden_state`, as DsbertModel; tokenizer: transformers'."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> SentenceEmbedder:
        """Of a directory that `dsbert export` or `save_pretrained` wrote, or a name on the hub."""
        from transformers import AutoModel, AutoTokenizer

        return cls(AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path))

    @classmethod
    def from_run(cls, path: str | os.PathLike[str]) -> SentenceEmbedder:
        """Of a run or a checkpoint. Raises UserError or CheckpointError."""
        return cls(from_run(path, DsbertModel), tokenizer_from_run(path))

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str], batch_size: int = 32) -> Tensor:
        """[sentences, H] in the model's dtype, on its device. What is longer than the model takes is cut."""
        found = [torch.empty(0, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)]
        for first in range(0, len(sentences), batch_size):
            texts = list(sentences[first : first + batch_size])
            rows = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            found.append(mean_pooled(self.model(**rows).last_hidden_state, rows["attention_mask"]))
        return torch.cat(found)
