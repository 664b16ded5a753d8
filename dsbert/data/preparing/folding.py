"""What is left of a text when all that a model cannot tell apart is folded into one: it decides copies and splits.

A COPY is a text that the tokenizer's normaliser makes the same, but for white space: to the model it is the same text.
The SPLIT goes further and looks at letters and digits alone, without case, accents, compatibility forms and
punctuation: texts that differ in nothing else fall on one side, whatever the tokenizer folds.

Few words are new, in a language: each is folded once and remembered, as encoding.py does.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import xxhash

# What one worker remembers, of each of two foldings; then it forgets all and begins anew.
_MAX_WORDS = 1 << 19
_CONTROLS = bytes(code for code in range(0x20) if code != 0x0A) + b"\x7f"
# By tables without a byte to delete, which take a fifth of the time: of controls they make zeros, which are looked for.
_PLAIN = bytes.maketrans(b"\n" + _CONTROLS, b" " + bytes(len(_CONTROLS)))
_LOWER = bytes(_PLAIN).lower()
_NO_LETTERS = bytes(code for code in range(0x80) if not chr(code).isalnum())


class _Memory(dict[str, str]):
    def __init__(self, fold: Callable[[str], str]) -> None:
        super().__init__()
        self._fold = fold

    def __missing__(self, word: str) -> str:
        if len(self) >= _MAX_WORDS:
            self.clear()
        folded = self[word] = self._fold(word)
        return folded


class Folder:
    """Folds texts as a tokenizer's normaliser does. Texts as `Encoder.encode` takes them."""

    def __init__(self, normalizer: dict[str, Any] | None) -> None:
        """normalizer: as in tokenizer.json."""
        self._normal = _normalizing(normalizer)
        bert = normalizer is not None and normalizer["type"] == "BertNormalizer"
        # BERT's goes character by character, so that a text is its words'; and of ASCII it changes only case.
        self._by_word = bert or normalizer is None
        self._ascii = _LOWER if normalizer is not None and bert and normalizer["lowercase"] else _PLAIN
        self._words = _Memory(self._word)
        self._letters = _Memory((lambda word: letters(self._word(word))) if self._by_word else letters)

    def _word(self, word: str) -> str:
        if word.isascii() and word.isprintable():
            return word.lower() if self._ascii is _LOWER else word
        return " ".join(self._normal(word).split())

    def hashes(self, text: str) -> tuple[int, int]:
        """128 bits that copies have in common, and 64 bits that decide the split: neither must ever change."""
        copy, split = self.folded(text)
        return xxhash.xxh3_128_intdigest(copy), xxhash.xxh3_64_intdigest(split or copy)

    def folded(self, text: str) -> tuple[bytes, bytes]:
        """What copies have in common, and the letters and digits alone."""
        if self._by_word and text.isascii():
            data = text.encode()
            copied = data.translate(self._ascii)
            if 0 not in copied:
                return copied, copied.translate(_LOWER, _NO_LETTERS)
        if not self._by_word:
            text = " ".join(self._normal(sentence) for sentence in text.split("\n"))
            words = text.split()
            copy = " ".join(words)
        else:
            words = text.split()
            copy = " ".join(filter(None, map(self._words.__getitem__, words)))
        return copy.encode(), "".join(map(self._letters.__getitem__, words)).encode()


@lru_cache(maxsize=1)
def folder_of(normalizer: str) -> Folder:
    """The folder of a normaliser as JSON, with what this process remembers."""
    return Folder(json.loads(normalizer))


def letters(text: str) -> str:
    """Letters and digits, without case, accents and compatibility forms."""
    if text.isascii():
        return "".join(filter(str.isalnum, text.lower()))
    bare = "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text)))
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", bare.casefold())))


def _normalizing(state: dict[str, Any] | None) -> Callable[[str], str]:
    from tokenizers import Tokenizer

    if state is None:
        return str
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    tokenizer = Tokenizer.from_str(
        json.dumps({"version": "1.0", "normalizer": state, "added_tokens": [], "model": model})
    )
    normalize: Callable[[str], str] = tokenizer.normalizer.normalize_str
    return normalize
