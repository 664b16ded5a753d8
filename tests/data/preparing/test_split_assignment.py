"""Which documents are held out: by their text alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.data.preparing.folding import Folder
from dsbert.data.preparing.pieces import cut
from dsbert.data.preparing.sources import resolve
from dsbert.data.preparing.split_assignment import VALIDATION, assign_splits
from dsbert.data.preparing.spool import spool_piece

# Which of the first hundred documents below are held out: must never change.
GOLDEN_HELD_OUT = [10, 23, 49, 84, 89]


def is_held_out(document: list[str], fraction: float) -> bool:
    """The rule: a document's hash, as a number from 0 to 1, is below the fraction."""
    return Folder(None).hashes("\n".join(document))[1] / 2**64 < fraction


def held_out(folder: Path, documents: list[list[str]], *fractions: float) -> list[NDArray[np.bool_]]:
    """Of each document, for each of the fractions, through the files of a preparation."""
    text = folder / "text.txt"
    text.write_text("\n\n".join("\n".join(document) for document in documents))
    (source,) = resolve([str(text)], ["blank-line"])
    pieces = [piece.as_json() for piece in cut(source.files[0], "blank-line", "text")]
    spooled = folder / "spooled"
    task = {"pieces": pieces, "to": str(spooled), "min_words": 1, "near": False, "normalizer": "null"}
    counts = spool_piece(task)
    assert counts["documents"] == len(documents)
    return [assign_splits([spooled], [len(documents)], fraction, False).splits == VALIDATION for fraction in fractions]


def test_fraction_and_golden(tmp_path: Path) -> None:
    documents = [[f"Sentence {number}.", "The end."] for number in range(10_000)]
    (found,) = held_out(tmp_path, documents, 0.05)
    assert abs(found.mean() - 0.05) < 4 * (0.05 * 0.95 / len(documents)) ** 0.5
    assert np.flatnonzero(found[:100]).tolist() == GOLDEN_HELD_OUT
    assert found.tolist() == [is_held_out(document, 0.05) for document in documents]


def test_a_larger_fraction_keeps_what_was_held_out(tmp_path: Path) -> None:
    small, large, none = held_out(tmp_path, [[str(number)] for number in range(2000)], 0.1, 0.2, 0.0)
    assert large[small].all()
    assert large.sum() > small.sum() > 0
    assert not none.any()
