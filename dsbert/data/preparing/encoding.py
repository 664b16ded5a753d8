"""Text to token ids, at several times the speed of the tokenizer, and exactly as it does.

A BERT tokenizer normalises character by character and cuts text at white space before all else, so that the ids of a
text are the ids of its words, one after the other. Few words are new, in a language: the tokenizer is asked for each
word once, and the rest is one dictionary lookup a word and array arithmetic. Of any other tokenizer every sentence is
encoded.

Text is text: "[MASK]" in it is encoded as any other word, and no text gives the id of a special token but [UNK].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.preparing.scripts import cut_unspaced

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoded = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]
"""ids int32 [T]; lengths int64 [E], tokens of each sentence; sentences int64 [D], of each document."""

# What one worker remembers: about 200 MB. Then it forgets all and begins anew; the ids are the same.
_MAX_WORDS = 1 << 20


class _WordNumbers(dict[str, int]):
    """Numbers words in the order of their first look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


class Encoder:
    """Encodes documents; remembers words."""

    def __init__(self, tokenizer: Tokenizer, max_words: int = _MAX_WORDS) -> None:
        self._tokenizer = as_text(tokenizer)
        self._max_words = max_words
        self.by_word = is_word_local(tokenizer)
        self._forget()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of D documents, without special tokens.

        Args:
            texts: non-empty; sentences joined by line breaks, words by single spaces, as `split_sentences` makes them.

        Returns:
            ids int32 [T]; lengths int64 [E], tokens of each sentence, of which some may be 0; sentences int64 [D], of
            each document.
        """
        sentences = np.fromiter((text.count("\n") + 1 for text in texts), dtype=np.int64, count=len(texts))
        if not self.by_word:
            return *self._encode_sentences("\n".join(texts).split("\n") if texts else []), sentences
        joined = "\n".join(texts)
        words = joined.split()
        numbers = np.fromiter(map(self._numbers.__getitem__, words), dtype=np.int64, count=len(words))
        self._learn()
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        ids = self._ids[np.repeat(self._starts[numbers] - (ends - lengths), lengths) + np.arange(total)]
        # White space is what stands between words, one character each; the line breaks among it end sentences.
        between = np.frombuffer(joined.encode(), dtype=np.uint8)
        between = between[(between == 0x20) | (between == 0x0A)]
        last_words = np.append(np.flatnonzero(between == 0x0A), len(words) - 1)
        assert len(between) == len(words) - 1, "expected words apart by single spaces"
        if len(self._numbers) > self._max_words:
            self._forget()
        return ids, np.diff(ends[last_words], prepend=0), sentences

    def _forget(self) -> None:
        self._numbers = _WordNumbers()
        self._ids = np.zeros(0, dtype=np.int32)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)

    def _learn(self) -> None:
        """Have the tokenizer encode the words that are new."""
        if not self._numbers.new:
            return
        try:
            ids, lengths = self._encode_sentences(self._numbers.new)
        except BaseException:
            self._forget()  # numbers without ids
            raise
        self._numbers.new = []
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])

    def _encode_sentences(self, sentences: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encodings = self._tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        parts = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate([np.zeros(0, dtype=np.int32), *parts]), lengths


def as_text(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same ids that takes special tokens, where they stand in a text, for ordinary characters.

    It looks for none of them before it cuts text into words; and that no word is one of them (of a tokenizer that cuts
    at white space alone), the model knows them by names that no word can have.
    """
    import json

    from tokenizers import Tokenizer

    from dsbert.data.bert_tokenizer import SPECIAL_TOKENS

    state = json.loads(tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"] if token["special"]} | set(SPECIAL_TOKENS)
    names = {token: f"{token}\x00 " for token in special}
    model = state["model"]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    ordinary = [token for token in state["added_tokens"] if token["content"] not in special]
    return Tokenizer.from_str(json.dumps({**state, "added_tokens": ordinary, "model": model, "post_processor": None}))


def is_word_local(tokenizer: Any) -> bool:
    """Whether the ids of a text are those of its words: normaliser, cutting and model are BERT's, and nothing else."""
    import json

    state = json.loads(tokenizer.to_str())
    parts = [state[name]["type"] if state[name] else None for name in ("normalizer", "pre_tokenizer", "model")]
    plain = all(" " not in token["content"] for token in state["added_tokens"])
    cutting = json.loads(cut_unspaced().__getstate__())
    if state["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, cutting]}:
        parts[1] = "BertPreTokenizer"
    return parts == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and plain and not state["truncation"]
