"""Classification of words: parts of speech, names. The first piece of a word speaks for it.

Shapes: n sentences of S positions, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsbert.hf.finetuning.class_task import ClassTask
from dsbert.hf.finetuning.task_metrics import Ints, confusion, tag_scores
from dsbert.hf.finetuning.task_tables import Split

_UNSEEN = -100  # of a position whose tag nobody asks for


class TokenTask(ClassTask):
    """What Trainer needs of such a task. classes: the tags in the order of the model's outputs."""

    def dataset(self, split: Split) -> list[dict[str, Any]]:
        """An example per sentence."""
        # Where the tags are not known, any: the positions are asked for all the same.
        tags = (
            split.columns["tags"] if split.labelled else [[self.classes[0]] * len(x) for x in split.columns["tokens"]]
        )
        return [{"tokens": words, "tags": own} for words, own in zip(split.columns["tokens"], tags, strict=True)]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, S]; labels [n, S]: the tag at each word's first piece, else -100."""
        batch = self._encode([row["tokens"] for row in rows])
        labels = torch.full(batch["input_ids"].shape, _UNSEEN)
        for number, row in enumerate(rows):
            for place, word in _first_pieces(batch.word_ids(number)):
                labels[number, place] = self._numbers[row["tags"][word]]
        return dict(batch) | {"labels": labels}

    def _encode(self, sentences: Sequence[Sequence[str]]) -> Any:
        return self._tokenizer(
            list(sentences), is_split_into_words=True, padding=True, truncation=True, max_length=self._max_length,
            return_tensors="pt",
        )  # fmt: skip

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The cross-entropy of these words, summed, over the number of words of the whole step (by default these)."""
        logits = outputs["logits"].float()
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_UNSEEN, reduction="sum")
        return total / ((labels != _UNSEEN).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    @staticmethod
    def reduce(logits: Tensor, labels: Tensor) -> Tensor:
        """What is kept of an evaluation's outputs: the best tag of each position, int64 [n, S]."""
        return logits.argmax(-1)

    def metrics(self, split: Split, outputs: Any) -> dict[str, float]:
        """Over the words that the model has seen: of what is too long the end is cut off."""
        return tag_scores(*self._seen(split, outputs))

    def confusion(self, split: Split, outputs: Any) -> Ints | None:
        """Rows: what it is; columns: what it was taken for."""
        predicted, tags = (
            np.array([self._numbers[tag] for row in rows for tag in row]) for rows in self._seen(split, outputs)
        )
        return confusion(predicted, tags, len(self.classes))

    def predictions(self, split: Split, outputs: Any) -> list[dict[str, Any]]:
        """A record per sentence, with null for each word that the model has not seen."""
        records = []
        for number, (name, found) in enumerate(zip(split.ids(), self._by_word(split, outputs), strict=True)):
            row = {"id": name, "tokens": split.columns["tokens"][number], "prediction": found}
            records.append(row | ({"tags": split.columns["tags"][number]} if split.labelled else {}))
        return records

    def _seen(self, split: Split, outputs: Any) -> tuple[list[list[str]], list[list[str]]]:
        predicted, tags = [], []
        for found, true in zip(self._by_word(split, outputs), split.columns["tags"], strict=True):
            predicted.append([tag for tag in found if tag is not None])
            tags.append([tag for tag, seen in zip(true, found, strict=True) if seen is not None])
        return predicted, tags

    def _by_word(self, split: Split, outputs: Any) -> list[list[str | None]]:
        """The tag of every word of every sentence; None where the model has not seen it."""
        tags = []
        for words, row in zip(split.columns["tokens"], np.asarray(outputs), strict=True):
            found: list[str | None] = [None] * len(words)
            for place, word in _first_pieces(self._encode([words]).word_ids(0)):
                found[word] = self.classes[int(row[place])]
            tags.append(found)
        return tags


def _first_pieces(word_ids: Sequence[int | None]) -> list[tuple[int, int]]:
    """(position, number of the word) of each word's first piece."""
    return [
        (place, word)
        for place, word in enumerate(word_ids)
        if word is not None and (place == 0 or word_ids[place - 1] != word)
    ]
