"""Extractive question answering: where in a text the answer begins and ends (Devlin et al. 2019, section 4.2).

A text that is longer than the model takes is read in windows that overlap by half; of all windows the span of the
highest sum of both scores is the answer. No answer is a span of its own, the first token alone: it is given where it
scores higher, if training has such questions.
Shapes: n windows of S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsbert.base.errors import UserError
from dsbert.hf.finetuning.task_metrics import answer_scores
from dsbert.hf.finetuning.task_tables import Split

_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
_BEST = 20  # starts and ends that are combined
_LONGEST = 30  # tokens of an answer


class AnswerTask:
    """What Trainer needs of such a task. may_have_none: whether a question may have no answer."""

    classes: tuple[str, ...] = ()
    label_columns = ("start_positions", "end_positions")
    loss = None  # transformers' models have it

    def __init__(self, tokenizer: Any, max_length: int, may_have_none: bool) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._may_have_none = may_have_none
        self._windows: dict[str, list[dict[str, Any]]] = {}

    @property
    def model_changes(self) -> dict[str, Any]:
        """Of the model's configuration: none."""
        return {}

    def dataset(self, split: Split) -> list[dict[str, Any]]:
        """The windows of a split, in the order of its rows. Raises UserError where a question leaves no room."""
        if split.name not in self._windows:
            windows: list[dict[str, Any]] = []
            columns = split.columns
            for row, question in enumerate(columns["question"]):
                answers = columns["answers"][row] if split.labelled else []
                windows += self._windows_of(row, question, columns["context"][row], answers)
            self._windows[split.name] = windows
        return self._windows[split.name]

    def _windows_of(
        self, row: int, question: str, context: str, answers: Sequence[tuple[str, int]]
    ) -> list[dict[str, Any]]:
        words = self._tokenizer(question, add_special_tokens=False)["input_ids"][: self._max_length // 2]
        room = self._max_length - len(words) - self._tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise UserError(f"expected room for a text beside the question, found --max-length {self._max_length}")
        asked = question if len(words) < self._max_length // 2 else self._tokenizer.decode(words)
        encoded = self._tokenizer(
            asked, context, truncation="only_second", max_length=self._max_length, stride=room // 2,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        windows = []
        for number, offsets in enumerate(encoded["offset_mapping"]):
            inside = [part == 1 for part in encoded.sequence_ids(number)]
            places = [place if mine else None for place, mine in zip(offsets, inside, strict=True)]
            start, end = _positions(places, answers)
            window = {name: encoded[name][number] for name in _INPUTS if name in encoded}
            windows.append(window | {"row": row, "offsets": places, "start_positions": start, "end_positions": end})
        return windows

    def collate(self, windows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, token_type_ids and attention_mask [n, S], start_positions and end_positions [n]."""
        inputs = [{name: window[name] for name in _INPUTS if name in window} for window in windows]
        batch = dict(self._tokenizer.pad(inputs, return_tensors="pt"))
        return batch | {name: torch.tensor([window[name] for window in windows]) for name in self.label_columns}

    @staticmethod
    def reduce(logits: tuple[Tensor, Tensor], labels: Any) -> tuple[Tensor, Tensor]:
        """What is kept of an evaluation's outputs: scores of starts and of ends [n, S]."""
        return logits

    def metrics(self, split: Split, outputs: Any) -> dict[str, float]:
        """Percentages."""
        answers = [[text for text, _ in row] for row in split.columns["answers"]]
        return answer_scores(self._answers(split, outputs), answers)

    def confusion(self, split: Split, outputs: Any) -> None:
        """Nothing is confused with anything."""

    def predictions(self, split: Split, outputs: Any) -> list[dict[str, Any]]:
        """A record per question; "": no answer."""
        return [
            {"id": name, "prediction": text}
            for name, text in zip(split.ids(), self._answers(split, outputs), strict=True)
        ]

    def _answers(self, split: Split, outputs: tuple[Any, Any]) -> list[str]:
        """The best span of all windows of each row."""
        best = [(-np.inf, "")] * len(split)
        none = [np.inf] * len(split)  # of all windows the least sure that there is no answer
        for window, starts, ends in zip(self.dataset(split), *map(np.asarray, outputs), strict=True):
            row = window["row"]
            none[row] = min(none[row], float(starts[0] + ends[0]))
            score, first, last = _best_span(window["offsets"], starts, ends)
            if score > best[row][0]:
                text = split.columns["context"][row]
                best[row] = (score, text[first:last])
        return ["" if self._may_have_none and none[row] > score else text for row, (score, text) in enumerate(best)]


def _positions(places: Sequence[Any], answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """First and last token of the first answer; the first token of all where the window does not hold it whole."""
    if answers:
        text, begin = answers[0]
        end = begin + len(text)
        inside = [number for number, place in enumerate(places) if place and place[0] < end and place[1] > begin]
        if inside and places[inside[0]][0] <= begin and places[inside[-1]][1] >= end:
            return inside[0], inside[-1]
    return 0, 0


def _best_span(places: Sequence[Any], starts: Any, ends: Any) -> tuple[float, int, int]:
    """The highest sum of scores, and the characters from and to which that span goes."""
    best = (-np.inf, 0, 0)
    outside = np.array([place is None for place in places])
    starts, ends = (np.where(outside, -np.inf, scores[: len(places)]) for scores in (starts, ends))
    lasts = np.argsort(-ends)[:_BEST].tolist()
    for first in np.argsort(-starts)[:_BEST].tolist():
        for last in lasts:
            if places[first] and places[last] and first <= last < first + _LONGEST:
                score = float(starts[first] + ends[last])
                if score > best[0]:
                    best = (score, places[first][0], places[last][1])
    return best
