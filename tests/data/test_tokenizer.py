import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dsbert.base.errors import UserError
from dsbert.data.bert_tokenizer import SPECIAL_TOKENS
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.tokenizer import (
    Vocabulary,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    word_start_table,
)
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
    tokens = sorted(vocab, key=vocab.__getitem__)
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


def test_padding_and_truncation_are_left_behind(tmp_path):
    tokenizer = train_tokenizer(TIES, 100)
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "any.json"))
    found = find_tokenizer(str(tmp_path / "any.json"))
    assert len(found.encode("aio bjp ckq dlr", add_special_tokens=False).ids) not in (4, 16)
    assert (found.padding, found.truncation) == (None, None)


def test_tokenizers_that_do_not_serve(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TIES, 100).save(str(path))
    state = json.loads(path.read_text())
    state["model"]["vocab"]["late"] = 200
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"ids without gaps .* 101 tokens with ids up to 200"):
        find_tokenizer(str(tmp_path))
    del state["model"]["vocab"]["late"]
    path.write_text(json.dumps(state | {"model": state["model"] | {"unk_token": "<unk>"}}))
    with pytest.raises(UserError, match=r"expected an unk_token of the vocabulary in .*, found '<unk>'"):
        find_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="found an empty name"):
        find_tokenizer("")
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "a", "##b", "ab"])}
    Tokenizer(models.BPE(vocab, [("a", "##b")], continuing_subword_prefix="##")).save(str(path))
    with pytest.raises(UserError, match=r"expected a WordPiece vocabulary .* found none \(BPE\)"):
        find_tokenizer(str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_a_full_disk_is_an_oserror(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(train_tokenizer(TIES, 100), tmp_path)


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
