"""Classification and regression of texts, or of pairs of texts.

Shapes: n examples of S positions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsbert.hf.finetuning.class_task import ClassTask
from dsbert.hf.finetuning.task_metrics import Ints, classification_scores, confusion, regression_scores
from dsbert.hf.finetuning.task_tables import Split


class SequenceTask(ClassTask):
    """What Trainer needs of such a task. classes: in the order of the model's outputs; none: regression."""

    @property
    def model_changes(self) -> dict[str, Any]:
        """Of the model's configuration."""
        if not self.classes:
            return {"num_labels": 1, "problem_type": "regression"}
        return super().model_changes | {"problem_type": "single_label_classification"}

    def dataset(self, split: Split) -> list[dict[str, Any]]:
        """An example per row."""
        names = [name for name in ("text", "text_pair", "label") if name in split.columns]
        columns = [split.columns[name] for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids and attention_mask [n, S], labels [n]; texts are cut at the model's length, the longer of a pair
        first."""
        texts = [[row[name] for row in rows] for name in ("text", "text_pair") if name in rows[0]]
        batch = dict(
            self._tokenizer(*texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        )
        if "label" in rows[0]:
            labels = [self._numbers[row["label"]] if self.classes else row["label"] for row in rows]
            batch["labels"] = torch.tensor(labels, dtype=torch.long if self.classes else torch.float)
        return batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum over these examples, over the number of examples of the whole step (by default these): cross-entropy
        in nats, or the squared error."""
        logits = outputs["logits"].float()
        if self.classes:
            total = functional.cross_entropy(logits, labels, reduction="sum")
        else:
            total = functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    @staticmethod
    def reduce(logits: Tensor, labels: Tensor) -> Tensor:
        """What is kept of an evaluation's outputs: all."""
        return logits

    def metrics(self, split: Split, outputs: Any) -> dict[str, float]:
        """Of the logits [N, C] of a split's examples, in order."""
        if not self.classes:
            return regression_scores(_values(outputs), np.asarray(split.columns["label"], dtype=np.float64))
        return classification_scores(np.asarray(self.confusion(split, outputs)))

    def confusion(self, split: Split, outputs: Any) -> Ints | None:
        """Rows: what it is; columns: what it was taken for. None for regression."""
        if not self.classes:
            return None
        labels = np.array([self._numbers[name] for name in split.columns["label"]])
        return confusion(np.asarray(outputs).argmax(-1), labels, len(self.classes))

    def predictions(self, split: Split, outputs: Any) -> list[dict[str, Any]]:
        """A record per row; probability: of what was predicted."""
        if not self.classes:
            found = [{"prediction": value} for value in _values(outputs).tolist()]
        else:
            probabilities = torch.as_tensor(np.asarray(outputs)).double().softmax(-1).max(-1)
            found = [
                {"prediction": self.classes[number], "probability": round(value, 6)}
                for value, number in zip(probabilities.values.tolist(), probabilities.indices.tolist(), strict=True)
            ]
        labels = split.columns["label"] if split.labelled else [None] * len(split)
        return [
            {"id": name} | record | ({"label": label} if split.labelled else {})
            for name, record, label in zip(split.ids(), found, labels, strict=True)
        ]


def _values(outputs: Any) -> Any:
    return np.asarray(outputs, dtype=np.float64).reshape(-1)
