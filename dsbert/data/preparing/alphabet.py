"""The characters that a vocabulary must be able to spell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dsbert.data.preparing.scripts import UNSPACED_SHARE, is_run_on

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# So many characters are spelled, or there is no vocabulary; rarer ones while there is room, until few are left out.
_CORE_ALPHABET = 1000
_MAX_UNSPELLED = 1e-4
_AT_ONCE = 4096  # sentences whose characters are counted together


def find_alphabet(tokenizer: Tokenizer, sentences: Iterable[str], room: int) -> tuple[list[str], bool]:
    """The characters that the vocabulary must spell, sorted: the most frequent ones after normalisation.

    And whether the text is, to a part that counts, of scripts without spaces. room: for how many tokens there is room.
    """
    raw: Counter[str] = Counter()
    remaining = iter(sentences)
    while text := "".join(islice(remaining, _AT_ONCE)):
        points, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_counts=True)
        raw.update(dict(zip(map(chr, points.tolist()), numbers.tolist(), strict=True)))
    counts: Counter[str] = Counter()
    for char, count in raw.items():
        for normal in tokenizer.normalizer.normalize_str(char).strip():
            counts[normal] += count
    by_count = sorted(counts, key=lambda char: (-counts[char], char))
    chosen = by_count[:_CORE_ALPHABET]
    room -= sum(_num_tokens(tokenizer, char) for char in chosen)
    left_out, total = sum(counts[char] for char in by_count[_CORE_ALPHABET:]), counts.total()
    for char in by_count[_CORE_ALPHABET:]:
        room -= _num_tokens(tokenizer, char)
        if left_out <= _MAX_UNSPELLED * total or room < 0:
            break
        chosen.append(char)
        left_out -= counts[char]
    unspaced = sum(count for char, count in counts.items() if is_run_on(char)) > UNSPACED_SHARE * total
    return sorted(chosen), unspaced


def _num_tokens(tokenizer: Tokenizer, char: str) -> int:
    return 1 + continues_a_word(tokenizer, char)


def continues_a_word(tokenizer: Tokenizer, char: str) -> bool:
    """Letters and digits can stand inside a word; punctuation and Chinese characters are words of their own."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + char))) == 1
