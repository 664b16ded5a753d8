"""What tasks with classes have alike, of texts and of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ClassTask:
    """classes: in the order of the model's outputs; max_length: of an example, in tokens."""

    label_columns = ("labels",)

    def __init__(self, tokenizer: Any, classes: Sequence[str], max_length: int) -> None:
        self.classes = tuple(classes)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._numbers = {name: number for number, name in enumerate(classes)}

    @property
    def model_changes(self) -> dict[str, Any]:
        """Of the model's configuration."""
        return {"id2label": dict(enumerate(self.classes)), "label2id": self._numbers}
