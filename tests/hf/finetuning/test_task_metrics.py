"""The metrics are those of scikit-learn 1.9, scipy 1.17, seqeval 1.2 and SQuAD's script, whose numbers stand here."""

from __future__ import annotations

import numpy as np
import pytest

from dsbert.hf.finetuning.task_metrics import (
    answer_scores,
    classification_scores,
    confusion,
    entities,
    regression_scores,
    tag_scores,
)

TWO = "11100000011111111111011001101110010100000000011101"
TAKEN_FOR = "10000000111100111111111010111110110100000010010111"
FOUR = "0132132301331112030112223300023323300303"
TAKEN_FOR_FOUR = "1112232211030102000102203301223023300113"
SCORES = [3.5, 4.7, 0.6, 4.3, 0.3, 1.9, 2.1, 2.4, 4.9, 3.9, 1.5, 1.3, 4.3, 4.4, 2.6, 1.7, 5.0, 1.6, 0.9, 4.4]
GUESSES = [4.4, 5.1, 1.2, 4.1, -1.2, 2.9, 0.2, 2.2, 4.7, 2.9, 2.1, 1.1, 3.9, 4.9, 2.1, 3.1, 5.4, 1.1, -1.0, 3.1]


def digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text])


def test_classes() -> None:
    two = classification_scores(confusion(digits(TAKEN_FOR), digits(TWO), 2))
    assert two == pytest.approx(
        {
            "accuracy": 0.74,
            "f1": 0.7636363636363637,
            "macro_f1": 0.7373737373737375,
            "matthews_correlation": 0.47534745630546277,
        }
    )
    four = classification_scores(confusion(digits(TAKEN_FOR_FOUR), digits(FOUR), 4))
    assert four == pytest.approx(
        {"accuracy": 0.6, "macro_f1": 0.601010101010101, "matthews_correlation": 0.47974068083812216}
    )
    # A class that neither is nor was predicted does not count, and one prediction for all correlates with nothing.
    assert classification_scores(confusion(np.array([0, 0]), np.array([0, 1]), 3)) == pytest.approx(
        {"accuracy": 0.5, "macro_f1": 1 / 3, "matthews_correlation": 0.0}
    )


def test_confusion_has_labels_in_rows() -> None:
    assert confusion(np.array([1, 1, 0]), np.array([0, 0, 0]), 2).tolist() == [[1, 2], [0, 0]]


def test_numbers() -> None:
    assert regression_scores(np.array(GUESSES), np.array(SCORES)) == pytest.approx(
        {"pearson": 0.8744817286592639, "spearmanr": 0.8813114785751168, "mse": 0.902, "mae": 0.78}
    )
    assert regression_scores(np.ones(3), np.arange(3.0))["pearson"] == 0.0


def test_entities() -> None:
    tags = ["O B-PER I-PER O B-LOC", "I-ORG I-ORG O B-PER B-PER", "B-LOC I-PER O I-LOC O"]
    found = ["O B-PER I-PER O O", "B-ORG I-ORG O B-PER I-PER", "B-LOC I-LOC O I-LOC B-PER"]
    scores = tag_scores([row.split() for row in found], [row.split() for row in tags])
    assert scores == pytest.approx({"accuracy": 10 / 15, "precision": 0.5, "recall": 0.375, "f1": 0.42857142857142855})
    mixed = ["B-A", "I-A", "I-B", "O", "B-B", "B-B"]
    assert list(entities(mixed)) == [(0, 2, "A"), (2, 3, "B"), (4, 5, "B"), (5, 6, "B")]
    assert tag_scores([["NN", "VB"]], [["NN", "NN"]]) == {"accuracy": 0.5}


def test_answers() -> None:
    """The second and third are examples of the metric's own documentation and of its normalisation."""
    assert answer_scores(["1976"], [["1976"]]) == {"exact_match": 100.0, "f1": 100.0}
    assert answer_scores(["The  Beyoncé, and"], [["beyoncé"]]) == pytest.approx({"exact_match": 0.0, "f1": 200 / 3})
    assert answer_scores(["an apple!"], [["pear", "Apple"]]) == {"exact_match": 100.0, "f1": 100.0}
    # Questions without an answer, of version 2.
    assert answer_scores(["", "x"], [[], []]) == {"exact_match": 50.0, "f1": 50.0}
