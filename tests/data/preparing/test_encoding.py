import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.data.preparing.encoding import Encoder, is_word_local
from dsbert.data.preparing.sentences import split_sentences
from dsbert.data.preparing.wordpiece import train_tokenizer
from tests.data.conftest import make_text

TOKENIZER = train_tokenizer(make_text(40).split("\n") + ["naïve Größe 中文 [MASK] don't ¿qué? ﬁx É"] * 3, 300)


def plainly(texts: list[str]) -> list[list[list[int]]]:
    """A sentence at a time, by the tokenizer itself, to which special tokens are text."""
    TOKENIZER.encode_special_tokens = True
    return [
        [TOKENIZER.encode(sentence, add_special_tokens=False).ids for sentence in text.split("\n")] for text in texts
    ]


def unpacked(ids, lengths, sentences):
    parts = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    edges = np.cumsum(sentences).tolist()
    return [parts[last - count : last] for last, count in zip(edges, sentences.tolist(), strict=True)]


def cleaned(documents: list[list[str]]) -> list[str]:
    return [text for document in documents if (text := "\n".join(split_sentences(document)))]


HARD = st.text(
    st.sampled_from(
        list("abkoBKO .,!?-'\"[]()") + list("éÉßıİΣς中文ﬁ\u0301\u200b\u200d\u00ad\ufeff\x00\x1f\x85\u2028\u3000😀각")
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(HARD, min_size=1, max_size=4), min_size=1, max_size=4))
def test_ids_are_those_of_the_tokenizer(documents):
    texts = cleaned(documents)
    if texts:
        assert unpacked(*Encoder(TOKENIZER).encode(texts)) == plainly(texts)


@pytest.mark.parametrize("max_words", [1, 50, 1 << 20])
def test_forgetting_changes_nothing(max_words):
    encoder = Encoder(TOKENIZER, max_words)
    assert encoder.by_word
    for seed in range(4):
        texts = cleaned([document.split("\n") for document in make_text(5, seed).split("\n\n")] + [["[MASK] [SEP]."]])
        assert unpacked(*encoder.encode(texts)) == plainly(texts)


def test_other_tokenizers_see_whole_sentences():
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    other = Tokenizer.from_str(TOKENIZER.to_str())
    assert is_word_local(other)
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer()])
    assert not is_word_local(other)
    other = Tokenizer.from_str(TOKENIZER.to_str())
    # What no word shows: that the text around it is changed.
    other.normalizer = normalizers.Replace("ba ko", "lim")
    encoder = Encoder(other)
    assert not encoder.by_word
    expected = other.encode("ba ko ba", add_special_tokens=False).ids
    assert unpacked(*encoder.encode(["ba ko ba"])) == [[expected]]
    assert unpacked(*Encoder(TOKENIZER).encode(["ba ko ba"])) != [[expected]]


SPECIAL_TEXT = (
    "a [MASK] and [SEP] or x[PAD]y [CLS][CLS] [UNK] [mask] [ MASK ] \uff3bMASK\uff3d [unused1] <ent> ba ko end"
)


def special_ids(tokenizer) -> set[int]:
    return {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}


def by_white_space(tokenizer):
    """A tokenizer to which "[MASK]" is a word of the model itself."""
    from tokenizers import Tokenizer, pre_tokenizers

    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return other


def with_added_tokens(tokenizer):
    """Special ones of its own, one that is not special, and BERT's as if they were ordinary."""
    import json

    from tokenizers import AddedToken, Tokenizer

    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    other = Tokenizer.from_str(json.dumps(state))
    other.add_special_tokens(["[unused1]", "<ent>"])
    other.add_tokens([AddedToken("ba ko", normalized=True)])
    return other


@pytest.mark.parametrize("change", [lambda tokenizer: tokenizer, by_white_space, with_added_tokens])
def test_no_text_gives_the_id_of_a_special_token(change):
    tokenizer = change(train_tokenizer([*make_text(40).split("\n"), SPECIAL_TEXT.replace("<ent>", "")] * 2, 200))
    ids, lengths, sentences = Encoder(tokenizer).encode([SPECIAL_TEXT, f"{SPECIAL_TEXT}\n[MASK]"])
    assert lengths.tolist()[:2] == [lengths[0], lengths[0]]
    assert sentences.tolist() == [1, 2]
    assert not special_ids(tokenizer) & set(ids.tolist())
    added = {tokenizer.token_to_id(token) for token in ("[unused1]", "<ent>")} - {None}
    assert not added & set(ids.tolist())
    ordinary = tokenizer.token_to_id("ba ko")
    assert ordinary is None or ordinary in ids  # a token that somebody added and that is not special stays one
    if change is not by_white_space:
        words = tokenizer.encode("[ mask ]", add_special_tokens=False).ids
        assert Encoder(tokenizer).encode(["[MASK]"])[0].tolist() == words
        assert tokenizer.token_to_id("[UNK]") not in words


def test_the_vocabulary_is_learned_from_special_tokens_as_text():
    vocabulary = train_tokenizer(["[MASK] masked [SEP] sep"] * 9, 31).get_vocab()
    assert {"mask", "sep", "[", "]"} <= vocabulary.keys()
    assert len([token for token in vocabulary if "MASK" in token]) == 1
