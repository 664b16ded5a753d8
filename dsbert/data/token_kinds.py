"""What a token is from outside: the little of it that can be seen without reading.

Texts whose first and last tokens are of the same kinds begin and end alike to whoever looks at word starts, capitals,
digits and punctuation only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CONTINUATION = "##"
KIND_BITS = 4
INSIDE, LOWER, CAPITAL, NUMBER, SENTENCE_END, COMMA, COLON, OPENING, CLOSING, QUOTE, DASH, SYMBOL, SPECIAL = range(13)
_BY_CATEGORY = {"Ps": OPENING, "Pe": CLOSING, "Pi": QUOTE, "Pf": QUOTE, "Pd": DASH}
_BY_CHARACTER = {
    **dict.fromkeys((".", "!", "?", "\u3002", "\u0964"), SENTENCE_END),
    **dict.fromkeys((",", "\u3001"), COMMA),
    **dict.fromkeys((":", ";"), COLON),
    **dict.fromkeys(('"', "'", "`"), QUOTE),
}


def token_kinds(tokens: Sequence[str], special: Sequence[int]) -> NDArray[np.uint8]:
    """uint8 [V]: the kind of each token, in the order of ids. special: the ids that are no text."""
    kinds = np.array([_kind(token) for token in tokens], dtype=np.uint8)
    kinds[list(special)] = SPECIAL
    return kinds


def _kind(token: str) -> int:
    if token.startswith(CONTINUATION):
        return INSIDE
    first = unicodedata.normalize("NFKC", token)[:1]
    if first.isdigit():
        return NUMBER
    if first.isalpha():
        return CAPITAL if first.isupper() else LOWER
    by_category = _BY_CATEGORY.get(unicodedata.category(first), SYMBOL) if first else SYMBOL
    return _BY_CHARACTER.get(first, by_category)
