"""Metrics of the tasks: the numbers of scikit-learn, scipy, seqeval and SQuAD's own script, which the library
`evaluate` hands on. All between -1 and 1 but for SQuAD's, which are percentages, and mse and mae, in the labels' units.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Entity = tuple[int, int, str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def confusion(predicted: Ints, labels: Ints, num_classes: int) -> Ints:
    """How often label i (row) was taken for j (column): [C, C], of [N] and [N]."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def classification_scores(counts: Ints) -> dict[str, float]:
    """Of a confusion matrix [C, C]: accuracy, the mean F1 of the classes that occur, Matthews' correlation, and of two
    classes the F1 of the second."""
    counts = counts.astype(np.float64)
    total, hits = counts.sum(), np.diag(counts)
    true, predicted = counts.sum(1), counts.sum(0)
    both = true + predicted
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    spread = np.sqrt((total**2 - (true**2).sum()) * (total**2 - (predicted**2).sum()))
    covariance = hits.sum() * total - (true * predicted).sum()
    scores = {
        "accuracy": float(hits.sum() / total),
        "macro_f1": float(f1[both > 0].mean()),
        "matthews_correlation": float(covariance / spread) if spread else 0.0,
    }
    return scores | ({"f1": float(f1[1])} if len(counts) == 2 else {})


def regression_scores(predicted: Floats, labels: Floats) -> dict[str, float]:
    """Of [N] and [N]: Pearson's and Spearman's correlation (0 where all are alike), mean squared and absolute error."""
    error = predicted - labels
    return {
        "pearson": _pearson(predicted, labels),
        "spearmanr": _pearson(_ranks(predicted), _ranks(labels)),
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
    }


def _pearson(one: Floats, other: Floats) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / scale) if scale else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values have the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts - 1) / 2)[where]


def tag_scores(predicted: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy over words; where tags are those of entities, precision, recall and F1 of whole entities as well."""
    pairs = [pair for row, true in zip(predicted, tags, strict=True) for pair in zip(row, true, strict=True)]
    scores = {"accuracy": sum(one == other for one, other in pairs) / max(len(pairs), 1)}
    if not has_entities({other for _, other in pairs}):
        return scores
    found = [set(entities(row)) for row in predicted]
    true_entities = [set(entities(row)) for row in tags]
    hits = sum(len(one & other) for one, other in zip(found, true_entities, strict=True))
    num_found, num_true = sum(map(len, found)), sum(map(len, true_entities))
    f1 = 2 * hits / max(num_found + num_true, 1)
    return scores | {"precision": hits / max(num_found, 1), "recall": hits / max(num_true, 1), "f1": f1}


def has_entities(tags: set[str]) -> bool:
    """Whether tags are those of entities: O, and B- and I- before a kind."""
    return any(tag.startswith("B-") for tag in tags) and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """(first word, end, kind) of each entity, as CoNLL's script finds them: an I- that continues nothing begins one."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        continues = tag[:2] == "I-" and tag[2:] == kind
        if kind and not continues:
            yield start, place, kind
            kind = ""
        if tag != "O" and not kind:
            start, kind = place, tag[2:]


def answer_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's percentages: exactly right, and the F1 of words, each against the best of the answers. Where there is no
    answer, "" is right."""
    exact = f1 = 0.0
    for text, true in zip(predicted, answers, strict=True):
        golden = [answer for answer in true if _normal(answer)] or [""]
        exact += max(float(_normal(text) == _normal(answer)) for answer in golden)
        f1 += max(_word_f1(text, answer) for answer in golden)
    count = max(len(predicted), 1)
    return {"exact_match": 100 * exact / count, "f1": 100 * f1 / count}


def _normal(text: str) -> str:
    """Without case, punctuation, articles and more than one blank between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _word_f1(text: str, answer: str) -> float:
    found, true = _normal(text).split(), _normal(answer).split()
    if not found or not true:
        return float(found == true)
    common = sum((Counter(found) & Counter(true)).values())
    return 2 * common / (len(found) + len(true))
