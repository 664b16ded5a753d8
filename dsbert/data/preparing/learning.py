"""The tokenizer of a preparation: trained once, by one rank, on the training documents; or the one that was given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.data.manifest import TOKENIZER, TokenizerEntry, load_unigram_counts
from dsbert.data.preparing.options import Options
from dsbert.data.preparing.split_assignment import TRAIN, SplitAssignment
from dsbert.data.preparing.spool import FACTS_BYTES, FACTS_LOW, key_of, load_facts, texts_of
from dsbert.data.preparing.tokenizer_check import check_saved
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.preparing.work_queue import Progress
from dsbert.data.tokenizer import (
    find_tokenizer,
    is_lowercase,
    is_plain_bert,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
)

# Of a tokenizer that is more than BERT's, what transformers makes of so many sentences is looked at.
_CHECKED_SENTENCES = 500
# More text than this changes a vocabulary no more than another sample of it would.
TRAIN_BYTES = 256 << 20


def make_tokenizer(
    directory: Path,
    pieces: Sequence[Path],
    assignment: SplitAssignment,
    options: Options,
    key: str,
    progress: Progress,
) -> tuple[Path, TokenizerEntry]:
    """A directory with the tokenizer, in `directory`, made unless it is there, and what the manifest says of it.

    key: what a training depends on, but for the options.
    Raises UserError if it cannot be trained or found, OSError if it cannot be written.
    """
    name, vocab_size = options.tokenizer, options.vocab_size or 0
    stage = "train tokenizer" if name == "train" else "tokenizer"
    folder = directory / f"tokenizer-{key_of(key, name, vocab_size, options.cased, options.keep_accents)}"
    if not folder.exists():
        progress(stage, 0, 0)
        if name == "train":
            # The validation documents train no part of the model, so not the tokenizer either.
            tokenizer = train_tokenizer(
                _Sample(pieces, assignment), vocab_size, lowercase=not options.cased,
                strip_accents=not (options.cased or options.keep_accents),
            )  # fmt: skip
        else:
            tokenizer = find_tokenizer(name)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_tokenizer(tokenizer, temporary)
        if not is_plain_bert(tokenizer):
            check_saved(temporary, islice(_Sample(pieces, assignment), _CHECKED_SENTENCES), name)
        temporary.rename(folder)
    progress(stage, 1, 1)
    made = load_tokenizer(folder)
    return folder, TokenizerEntry(tokenizer_digest(made), made.get_vocab_size(), is_lowercase(made))


def unknown_fraction(data: Path) -> float:
    """The fraction of [UNK] among the tokens of a data directory's training documents. Raises UserError if damaged."""
    counts = load_unigram_counts(data)
    unknown = load_tokenizer(data / TOKENIZER).token_to_id("[UNK]")
    return float(counts[unknown] / max(1, counts.sum()))


class _Sample:
    """The sentences of the training documents; of more text than `TRAIN_BYTES`, of a sample by their hashes."""

    def __init__(self, pieces: Sequence[Path], assignment: SplitAssignment, max_bytes: int | None = None) -> None:
        self._pieces, self._assignment = pieces, assignment
        total = sum(int(facts[mine, FACTS_BYTES].sum()) for facts, mine in map(self._of, range(len(pieces))))
        limit = max_bytes or TRAIN_BYTES
        self._limit = np.uint64(min((1 << 64) - 1, (1 << 64) * limit // max(total, 1)))

    def __iter__(self) -> Iterator[str]:
        for index, piece in enumerate(self._pieces):
            facts, mine = self._of(index)
            chosen = (mine & (facts[:, FACTS_LOW] <= self._limit)).tolist()
            at = 0
            for texts in texts_of(piece):
                for text, wanted in zip(texts, chosen[at : at + len(texts)], strict=True):
                    if wanted:
                        yield from text.split("\n")
                at += len(texts)

    def _of(self, index: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        facts = load_facts(self._pieces[index])
        first = int(self._assignment.offsets[index])
        return facts, self._assignment.splits[first : first + len(facts)] == TRAIN
