import random
import subprocess
import sys

import numpy as np
import pytest

from dsbert.data.tokenizer import (
    SPECIAL_TOKENS,
    Vocabulary,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    train_tokenizer,
    word_start_table,
)
from dsbert.errors import UserError
from tests.data.conftest import make_text

# Many ties: each of these words occurs once, so that merges have equal counts.
TIES = [f"{a}{b}{c} {c}{a}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst"]


def test_training_is_deterministic_in_any_order():
    first = train_tokenizer(TIES, 120)
    for seed in range(4):
        shuffled = TIES.copy()
        random.Random(seed).shuffle(shuffled)
        again = train_tokenizer(shuffled, 120)
        assert again.get_vocab() == first.get_vocab()
        assert tokenizer_digest(again) == tokenizer_digest(first)


def test_training_is_deterministic_across_processes():
    program = (
        "from tests.data.test_tokenizer import TIES, train_tokenizer, tokenizer_digest;"
        "print(tokenizer_digest(train_tokenizer(TIES, 120)))"
    )
    digest = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    assert digest == tokenizer_digest(train_tokenizer(TIES, 120))


def test_ids_are_special_tokens_then_sorted():
    tokenizer = train_tokenizer(TIES, 100)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert tokens[:5] == list(SPECIAL_TOKENS)
    assert tokens[5:] == sorted(tokens[5:])
    assert len(tokens) == 100
    assert sorted(vocab.values()) == list(range(100))


def test_normalises_like_bert():
    tokenizer = train_tokenizer(["the cafe was open, was it?"] * 3, 60)
    encoding = tokenizer.encode("The CAFÉ,was", add_special_tokens=False)
    assert tokenizer.decode(encoding.ids) == "the cafe, was"
    assert encoding.tokens == ["the", "cafe", ",", "was"]
    # Any word of known letters can be spelled, even where training never saw a letter inside a word.
    assert "[UNK]" not in tokenizer.encode("aeow").tokens
    assert tokenizer.encode("a").tokens == ["[CLS]", "a", "[SEP]"]


def test_digest_depends_on_the_vocabulary_and_the_normalisation():
    from tokenizers import normalizers

    tokenizer = train_tokenizer(TIES, 100)
    digests = {tokenizer_digest(tokenizer), tokenizer_digest(train_tokenizer(TIES, 101))}
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert len(digests | {tokenizer_digest(tokenizer)}) == 3


def test_auto_tokenizer_loads_it(tmp_path):
    from transformers import AutoTokenizer

    text = make_text(10)
    tokenizer = train_tokenizer(text.splitlines(), 200)
    save_tokenizer(tokenizer, tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    sample = "Bako LIMTÓR, unknown ☃ quasha."
    assert auto(sample)["input_ids"] == tokenizer.encode(sample).ids
    pair = auto("bako", "limtor")
    assert pair["input_ids"] == tokenizer.encode("bako", "limtor").ids
    assert pair["token_type_ids"] == tokenizer.encode("bako", "limtor").type_ids
    assert [auto.pad_token_id, auto.unk_token_id, auto.cls_token_id, auto.sep_token_id, auto.mask_token_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert len(auto) == tokenizer.get_vocab_size()


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = train_tokenizer(TIES, 100)
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(tokenizer)
    assert (tmp_path / "vocab.txt").read_text().splitlines()[:5] == list(SPECIAL_TOKENS)


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary():
    with pytest.raises(UserError, match=r"vocab_size 20 is too small .* its 20 characters alone need 45 tokens"):
        train_tokenizer(TIES, 20)
    assert train_tokenizer(TIES, 46).get_vocab_size() == 46


def test_vocabulary_and_word_starts():
    tokenizer = train_tokenizer(TIES, 100)
    table = word_start_table(tokenizer)
    assert table.shape == (100,)
    assert all(table[number] == (not token.startswith("##")) for token, number in tokenizer.get_vocab().items())
    vocab = Vocabulary.of(tokenizer)
    assert (vocab.pad, vocab.unk, vocab.cls, vocab.sep, vocab.mask, vocab.size) == (0, 1, 2, 3, 4, 100)
    assert np.array_equal(vocab.ordinary_ids, np.arange(5, 100))
