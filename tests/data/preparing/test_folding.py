"""Copies and splits follow from what a model can tell apart."""

import random
import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dsbert.data.preparing.folding import Folder, letters
from dsbert.data.preparing.prepare import prepare
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.shards import TokenStore
from dsbert.data.tokenizer import load_tokenizer, save_tokenizer
from tests.data.conftest import make_text

BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
KINDS: dict[str, dict[str, Any] | None] = {
    "lower": BERT | {"lowercase": True, "strip_accents": True},
    "accents": BERT | {"lowercase": True, "strip_accents": False},
    "cased": BERT | {"lowercase": False, "strip_accents": False},
    "google": BERT | {"lowercase": True, "strip_accents": None},
    "custom": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    "none": None,
}
WORDS = st.text(
    st.sampled_from([*"abAB1. ,-é\u0301Éß\u0131İΣς中ﬁ\uff21½\x07\u200b\u00ad\u3000각"]), min_size=1, max_size=12
)


def normalizer_of(state):
    """The library's own, another way than the code's."""
    if state is None:
        return lambda text: text
    if state["type"] == "Sequence":
        return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]).normalize_str
    flags = {name: state[name] for name in ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")}
    return normalizers.BertNormalizer(**flags).normalize_str


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=5))
def test_copies_are_what_the_normaliser_makes_the_same(kind, words):
    text = " ".join(" ".join(words).split())
    if text:
        copy, split = Folder(KINDS[kind]).folded(text)
        normal = " ".join(normalizer_of(KINDS[kind])(text).split())
        assert copy.decode() == normal
        assert split.decode() == letters(normal)
        # Where sentences end is white space.
        assert Folder(KINDS[kind]).hashes(text.replace(" ", "\n")) == Folder(KINDS[kind]).hashes(text)


def test_what_is_folded_never_parts():
    plain, cased = Folder(KINDS["lower"]), Folder(KINDS["cased"])
    text = "The café is open. So it is."
    variants = [
        *(text, text.upper().replace(". ", ".\n"), unicodedata.normalize("NFD", text), text.lower().replace("é", "e")),
        text.replace("ca", "\u00adca\u200b").replace("is", "is\x07"),
    ]
    assert len({plain.hashes(text) for text in variants}) == 1
    assert len({cased.hashes(text)[0] for text in variants}) == 4  # other ids: no copies
    assert len({cased.hashes(text)[1] for text in variants}) == 1  # but on one side
    assert plain.hashes("\uff26\uff55\uff4c\uff4c \uff57\uff49\uff44\uff54\uff48")[1] == plain.hashes("full width!")[1]
    assert plain.hashes("One text")[1] != plain.hashes("another text")[1]
    assert plain.hashes("!!")[1] != plain.hashes("??")[1]  # without letters, what there is


def test_many_words_are_forgotten(monkeypatch):
    monkeypatch.setattr("dsbert.data.preparing.folding._MAX_WORDS", 3)
    text = "É á ñ ü é ö ô É á"
    assert Folder(KINDS["lower"]).folded(text)[0] == b"e a n u e o o e a"


def variant(text: str, number: int) -> str:
    """As it is, in capitals, decomposed, in full width, with other white space, with controls."""
    return (
        text, text.upper(), unicodedata.normalize("NFD", text), text.replace("a", "á").replace("o", "Ö"),
        text.replace(" ", " \u00a0 "), text.replace("e", "e\u00ad"),
    )[number]  # fmt: skip


def texts_of(data, split):
    tokenizer = load_tokenizer(data / "tokenizer")
    found = []
    for shard in TokenStore.open(data, split).shards:
        found += [tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in pairwise(shard.document_offsets.tolist())]
    return found


def test_no_document_is_held_out_and_trained_on(tmp_path):
    documents = [text.strip() for text in make_text(60).split("\n\n")]
    mixed = [variant(text, number) for number in range(6) for text in documents]
    random.Random(1).shuffle(mixed)
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(mixed))
    result = prepare([str(source)], tmp_path / "data", 200, validation=0.3)
    train, held_out = (texts_of(tmp_path / "data", split) for split in ("train", "validation"))
    # Copies to the model are copies: one of each is left.
    assert (result["documents"], result["duplicates"]) == (60, 300)
    assert len(train) + len(held_out) == 60
    assert not set(train) & set(held_out)
    assert held_out


def test_a_cased_vocabulary_keeps_all_and_still_parts_none(tmp_path):
    documents = [text.strip() for text in make_text(60).split("\n\n")]
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join([*documents, *(text.upper() for text in documents)]))
    result = prepare([str(source)], tmp_path / "data", 200, validation=0.3, cased=True)
    assert (result["documents"], result["duplicates"]) == (120, 0)
    train, held_out = (texts_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert not {letters(text) for text in train} & {letters(text) for text in held_out}
    assert len(held_out) % 2 == 0


def test_a_tokenizer_that_is_given_folds_as_it_does(tmp_path):
    tokenizer = train_tokenizer(make_text(40).split("\n"), 200)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("ko", "zi"), normalizers.Lowercase()])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    documents = [text.strip() for text in make_text(30).split("\n\n")]
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join([*documents, *(text.replace("ko", "zi") for text in documents)]))
    result = prepare([str(source)], tmp_path / "data", validation=0.3, tokenizer=str(tmp_path / "tokenizer"))
    assert result["documents"] == 30
    shards = TokenStore.open(tmp_path / "data", "train").shards
    assert all(np.all(np.diff(shard.document_offsets) > 0) for shard in shards)
