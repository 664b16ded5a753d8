"""Sentences of paragraphs, by the library `sentencex`: in linear time, and whatever the text is.

The library panics on an initial with an odd space before its full stop, and its cost grows with the square of what it
is given. Odd spaces before full stops are made plain; long paragraphs are cut into windows; and a paragraph that it
fails on all the same is split by a plain rule. None of it loses a character that is not white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# A paragraph of ordinary length is split in one go; so many characters of a longer one at a time.
_WINDOW_CHARS = 1 << 12
# The splitter looks back to the last white space from each full stop: text without spaces takes smaller windows.
_UNSPACED_WINDOW_CHARS = 1 << 10
_UNSPACED_WORD_CHARS = 32
# All white space that takes several bytes: between an initial and its full stop the splitter would cut it in two.
_ODD_STOPS = [f"{char}." for char in map(chr, range(0x80, 0x3001)) if char.isspace()]
# After marks of Latin and before white space; after those of Chinese and Japanese, Hindi, Arabic and Urdu anywhere.
_PLAIN_END = re.compile("(?<=[.!?\u2026])\\s+|(?<=[\u3002\uff01\uff1f\u0964\u0965\u061f\u06d4])")


class Splitter:
    """Splits documents. `mended` says whether the last one had a paragraph that the library fails on."""

    def __init__(self) -> None:
        self.mended = False

    def split(self, paragraphs: Iterable[str]) -> list[str]:
        """As `split_sentences`."""
        self.mended = False
        sentences = (sentence for paragraph in paragraphs for sentence in self._sentences(paragraph))
        return [normal for sentence in sentences if (normal := " ".join(sentence.split()))]

    def _sentences(self, paragraph: str) -> list[str]:
        if not paragraph.isascii():
            for stop in _ODD_STOPS:
                if stop in paragraph:
                    paragraph, self.mended = paragraph.replace(stop, " ."), True
        try:
            return list(_in_windows(paragraph))
        except UnicodeEncodeError:  # half a character
            paragraph = paragraph.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except BaseException as error:  # a panic in Rust is no Exception
            if not is_panic(error):
                raise
        self.mended = True
        return plain_sentences(paragraph)


def split_sentences(paragraphs: Iterable[str]) -> list[str]:
    """Sentences of a document without line breaks, runs of white space collapsed, none of them empty."""
    return Splitter().split(paragraphs)


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up: a fault of this input, not of the process."""
    return type(error).__name__ == "PanicException"


def plain_sentences(paragraph: str) -> list[str]:
    """By a rule that cannot fail."""
    return _PLAIN_END.split(paragraph)


def _in_windows(text: str) -> Iterator[str]:
    """Sentences of a paragraph; the last one of a window is looked at again at the start of the next one."""
    import sentencex

    size = _WINDOW_CHARS
    if len(text) > _UNSPACED_WINDOW_CHARS and text.count(" ") * _UNSPACED_WORD_CHARS < len(text):
        size = _UNSPACED_WINDOW_CHARS
    at = 0
    begun: list[str] = []  # parts of a sentence that is longer than a window
    while at < len(text):
        window = text[at : at + size]
        *whole, last = sentencex.segment("en", window)
        ended = at + size >= len(text)
        if not whole and not ended:
            # At white space, so that the rest of a word or an abbreviation is not taken for a beginning.
            space = max(window.rfind(" ", size // 2), window.rfind("\t", size // 2)) + 1
            begun.append(window[: space or size])
            at += len(begun[-1])
            continue
        for sentence in [*whole, last] if ended else whole:
            yield "".join([*begun, sentence])
            begun = []
        at += len(window) if ended else len(window) - len(last)
