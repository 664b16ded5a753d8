"""Whether transformers reads a saved tokenizer as the one that text is encoded with: a model is trained on its ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dsbert.base.errors import UserError
from dsbert.data.bert_tokenizer import SPECIAL_TOKENS
from dsbert.data.preparing.encoding import Encoder
from dsbert.data.tokenizer import load_tokenizer, vocabulary_of

# What tokenizers differ in: case, accents and their compositions, full width, digits, scripts, white space, controls.
_HOSTILE = (
    "The Quick BROWN fox\u2019s 3,141.59 km/h (e.g. U.S.A.) don't re-enter caf\u00e9 cafe\u0301 na\u00efve Stra\u00dfe",
    "\u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u2460 \u00bd \uff21\uff22\uff11 \ufb01ne \u0132 1a2b3c",
    "\u4e2d\u6587\u6f22\u5b57 \u306e\u3072\u3089\u304c\u3068\u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1 \u0639\u0631",
    "a\u00a0b\u200bc\u00add \u2014 \u201cx\u201d \u2026 \U0001f600\u200d\U0001f4bb \ufffd \x07 http://a.b/c?d=e&f a_b",
    "x" * 99 + " " + "y" * 101 + " " + "\u0e01" * 150,
)
_VOCABULARY_WORDS = 5000
_SHOWN_CHARS = 60
_SHOWN_TOKENS = 12


def check_saved(directory: Path, texts: Iterable[str] = (), name: str = "") -> None:
    """Compare `Encoder` with transformers' AutoTokenizer on hostile text, words of the vocabulary and `texts`.

    name: what to call the tokenizer in an error, if not by the directory. Raises UserError, showing a text and both
    tokenisations, if the directory gives other ids.
    """
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(directory)
    encoder, auto = Encoder(tokenizer), AutoTokenizer.from_pretrained(str(directory))
    tokens = vocabulary_of(tokenizer)
    words = [token.removeprefix("##") for token in tokens[:: 1 + len(tokens) // _VOCABULARY_WORDS]]
    apart = [" ".join(text.split()) for text in [*_HOSTILE, *words, *texts]]
    # Special tokens are text to an encoder only.
    special = {*SPECIAL_TOKENS, *auto.all_special_tokens}
    checked = [text for text in apart if text and not any(token in text for token in special)]
    found = auto(checked, add_special_tokens=False)["input_ids"]
    ids, lengths, _ = encoder.encode(checked)
    expected = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    differing = [row for row in zip(checked, expected, found, strict=True) if row[1] != row[2]]
    if differing:
        text, ours, theirs = min(differing, key=lambda row: len(row[0]))
        shown = f"{_shown(ours, tokens)} in training and {_shown(theirs, tokens)} after loading"
        raise UserError(
            f"expected AutoTokenizer to give the ids of the tokenizer {name or directory}, found for "
            f"{text[:_SHOWN_CHARS]!r}: {shown}: give a tokenizer that transformers reads as it is"
        )
    known = {name: getattr(auto, f"{name.strip('[]').lower()}_token_id") for name in SPECIAL_TOKENS}
    if others := [name for name, number in known.items() if number != tokenizer.token_to_id(name)]:
        raise UserError(
            f"expected AutoTokenizer to know the special tokens of {name or directory}, found others for "
            f"{', '.join(others)}: give a tokenizer that transformers reads as it is"
        )


def _shown(ids: list[int], tokens: list[str]) -> str:
    return " ".join(tokens[number] for number in ids[:_SHOWN_TOKENS]) or "nothing"
