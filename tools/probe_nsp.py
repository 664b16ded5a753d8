"""How much of next-sentence prediction can be answered without reading: rules and classifiers that see lengths only.

    python tools/probe_nsp.py DATA [--split validation] [--seq-len 128] [--epochs 1] [--json]

Each is given lengths, the kinds of the tokens at the edges of A and B, and how much punctuation they hold; the
quadratic one how much A and B resemble each other in it, kind by kind, as texts of one style do. 0.5 is chance.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.stream import SampleStream
from dsbert.data.token_kinds import CLOSING, COLON, COMMA, DASH, OPENING, QUOTE, SENTENCE_END, SPECIAL

_ROWS = 512
_FOLDS = 5
_KINDS = SPECIAL + 1
_PUNCTUATION = (SENTENCE_END, COMMA, COLON, OPENING, CLOSING, QUOTE, DASH)


def outside(stream: SampleStream, samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """What can be seen of the first samples that are asked about.

    Returns:
        lengths [n, 2] of A and B; edges and punctuation [n, F]: the kinds of the first and last tokens of A and B and
        those of A's last and B's first together, one-hot, and counts; labels [n].
    """
    lengths, edges, labels = [], [], []
    columns = np.arange(stream.seq_len)
    for first in range(0, samples, _ROWS):
        batch = stream.batch(first, min(_ROWS, samples - first))
        ids = batch.input_ids.copy()
        ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
        kinds, rows = stream.vocab.kinds[ids], np.arange(len(ids))
        b = batch.token_type_ids.sum(axis=1) - 1
        a = batch.attention_mask.sum(axis=1) - b - 3
        at = [kinds[rows, 1], kinds[rows, a], kinds[rows, a + 2], kinds[rows, a + 1 + b]]
        parts = [np.eye(_KINDS)[kind] for kind in at]
        parts.append(np.eye(_KINDS**2)[at[1].astype(int) * _KINDS + at[2]])
        for begin, length in ((np.ones_like(a), a), (a + 2, b)):
            inside = (columns >= begin[:, None]) & (columns < (begin + length)[:, None])
            parts.append(np.stack([(inside & (kinds == kind)).sum(axis=1) for kind in _PUNCTUATION], axis=1))
        asked = batch.nsp_labels >= 0
        lengths.append(np.stack([a, b], axis=1)[asked])
        edges.append(np.concatenate(parts, axis=1)[asked])
        labels.append(batch.nsp_labels[asked])
    return np.concatenate(lengths).astype(float), np.concatenate(edges).astype(float), np.concatenate(labels)


def features(lengths: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths with their squares, products and differences, and all of the edges."""
    a, b = lengths.T
    total = a + b
    near = [(b - a == difference).astype(float) for difference in (-1, 0, 1, 2)]
    full = [(total >= total.max() - room).astype(float) for room in (0, 1, 4)]
    return np.column_stack([a, b, total, np.abs(b - a), a * a, b * b, a * b, *near, *full, edges])


def resemblance(lengths: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths and punctuation of A and B, as counts and as densities: differences and products of each with each."""
    a, b = np.split(edges[:, -2 * len(_PUNCTUATION) :], 2, axis=1)
    parts = [lengths, lengths**2, lengths.prod(axis=1)[:, None]]
    for of_a, of_b in ((a, b), (a / lengths[:, :1], b / lengths[:, 1:])):
        parts += [of_a, of_b, np.abs(of_a - of_b)]
        centred = [np.sqrt(of) - np.sqrt(of).mean(axis=0) for of in (of_a, of_b)]
        parts.append((centred[0][:, :, None] * centred[1][:, None, :]).reshape(len(lengths), -1))
    return np.concatenate(parts, axis=1)


def length_rule(lengths: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Accuracy of: B follows where it is as long as A, or longer by one (which once was 78 % of the demo's pairs)."""
    difference = lengths[:, 1] - lengths[:, 0]
    follows = (difference == 0) | (difference == 1)
    return float((follows == (labels == 0)).mean())


def classified(seen: NDArray[np.float64], labels: NDArray[np.int64], seed: int = 0) -> float:
    """Accuracy of a logistic regression, cross-validated, of the features as they are, scaled."""
    spread = seen.std(axis=0)
    scaled = (seen[:, spread > 0] - seen[:, spread > 0].mean(axis=0)) / spread[spread > 0]
    fold = np.random.default_rng(seed).permutation(len(labels)) % _FOLDS
    hits = 0
    for held_out in range(_FOLDS):
        train, test = fold != held_out, fold == held_out
        weights = _fitted(scaled[train], labels[train])
        hits += int((((scaled[test] @ weights[:-1] + weights[-1]) > 0) == labels[test]).sum())
    return hits / len(labels)


def _fitted(scaled: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights and bias of the regression, by Newton's method with a ridge of one sample in a hundred."""
    inputs = np.column_stack([scaled, np.ones(len(scaled))])
    weights = np.zeros(inputs.shape[1])
    for _ in range(8):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        ridge = len(labels) / 100
        gradient = inputs.T @ (chance - labels) + ridge * weights
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + ridge * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return weights


def probe(stream: SampleStream, samples: int) -> dict[str, Any]:
    """Accuracies of the rule and of the regressions, and of how many samples the question is asked."""
    lengths, edges, labels = outside(stream, samples)
    return {
        "samples": samples,
        "asked": len(labels) / samples,
        "length rule": length_rule(lengths, labels),
        "logistic regression": classified(features(lengths, edges), labels),
        "quadratic": classified(resemblance(lengths, edges), labels),
        "standard error": 0.5 / np.sqrt(len(labels) / 2),  # partners share a coin
    }


def main() -> None:
    """Parse, measure, report."""
    from on_ranks import markdown

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for seq_len in arguments.seq_len:
        stream = SampleStream.open(arguments.data, arguments.split, seq_len, arguments.seed)
        rows.append({"seq_len": seq_len, **probe(stream, arguments.epochs * stream.num_samples)})
    print(json.dumps(rows) if arguments.json else markdown([{k: _cell(v) for k, v in row.items()} for row in rows]))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
