"""Scripts that are written without spaces: what counts as a word in them, and where long runs are cut.

Of Chinese characters a BERT tokenizer makes words of their own. Kana, Thai and their like it leaves together, and a run
of more than 100 characters becomes one [UNK]; so runs are cut, before that and where no mark is torn from its letter.
Korean has spaces; what is written without them is cut as well.
"""

from __future__ import annotations

import re
from typing import Any

# Of a text of which more is in such scripts, long runs are cut.
UNSPACED_SHARE = 1e-3
_RUN_CHARS = 32  # short enough for whole words of it to be masked
_HANGUL_RUN_CHARS = 96  # of single jamo, which Hangul becomes where accents are stripped

_NAMES = (
    "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese", "Yi",
    "Bopomofo", "Hiragana", "Katakana", "Han",
)  # fmt: skip
# Kana with their marks of length and iteration, Bopomofo, Chinese characters, Thai to Tibetan's neighbours, Yi.
_KANA = "\u3005-\u3007\u3031-\u3035\u303b\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"
_HAN = "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SOUTH_EAST = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df\uaa60-\uaadf"
_OTHERS = "\u3105-\u312f\u31a0-\u31bf\ua000-\ua4cf"
_TIBETAN = "\u0f40-\u0f6c"  # whose marks between syllables a tokenizer cuts at
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"
_RUN_ON = re.compile(f"[{_KANA}{_SOUTH_EAST}{_OTHERS}{_HANGUL}]")
_WORDS = re.compile(f"[{_KANA}{_HAN}{_SOUTH_EAST}{_TIBETAN}{_OTHERS}{_HANGUL}]")


def is_run_on(char: str) -> bool:
    """Whether a tokenizer of BERT's leaves such characters together, so that a paragraph may be one word."""
    return _RUN_ON.match(char) is not None


def num_words(text: str, enough: int) -> int:
    """Words of a text, apart by white space; a character of a script without spaces is one. Exact below `enough`."""
    found = len(text.split(None, enough))  # of a long text no more than its beginning is looked at
    if found < enough and not text.isascii():
        found = sum(len(_WORDS.findall(word)) or 1 for word in text.split())
    return found


def cut_unspaced() -> Any:
    """A step of a tokenizer, after it has cut text into words, that cuts long runs; other words stay as they are."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    letter = "[" + "".join(f"\\p{{{name}}}" for name in _NAMES) + "\\x{30FC}\\x{FF70}]"
    run = rf"{letter}(?:{letter}|\p{{M}}){{0,{_RUN_CHARS - 1}}}\p{{M}}*"
    return Split(Regex(rf"{run}|\p{{Hangul}}{{1,{_HANGUL_RUN_CHARS}}}"), "isolated")
