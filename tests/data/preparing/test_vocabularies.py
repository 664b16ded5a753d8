"""A folder with nothing but vocab.txt, as older models have it, is a tokenizer: that which transformers makes of it."""

import json
from pathlib import Path

import pytest

from dsbert.base.errors import UserError
from dsbert.data.tokenizer import find_tokenizer

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = sorted("abcdefghijklmnopqrstuvwxyz0123456789.,!?-é中")
TEXTS = ["The cafés, THE 中中 Éa!", "don't\tstop... 123abc", "ünïcödé Straße", "a" * 150 + " b"]


def write(folder: Path, capitals: bool, config: dict | None) -> Path:
    folder.mkdir()
    letters = [*LETTERS, *(letter.upper() for letter in LETTERS if capitals and letter.upper() != letter)]
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "the", "##afe"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("capitals", "config", "folds"),
    [
        (False, None, True),
        (True, None, False),
        (True, {"do_lower_case": False}, False),
        (True, {"do_lower_case": True, "strip_accents": False}, True),
        (False, {"do_lower_case": True, "tokenize_chinese_chars": False}, True),
    ],
)
def test_it_gives_the_ids_of_transformers(tmp_path, capitals, config, folds):
    from transformers import BertTokenizer

    folder = write(tmp_path / "tokenizer", capitals, config)
    ours = find_tokenizer(str(folder))
    theirs = BertTokenizer(vocab=str(folder / "vocab.txt"), **{"do_lower_case": folds, **(config or {})})
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##a\n", r"found no \[MASK\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##a\na\n", "found 'a' again"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n", "WordPiece vocabulary with ##"),
        (b"\xff\xfe", "cannot read the tokenizer"),
    ],
)
def test_one_that_is_none_is_one_line(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        find_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_flags_that_are_none_are_refused(tmp_path):
    folder = write(tmp_path / "tokenizer", False, {"do_lower_case": True, "strip_accents": "yes"})
    with pytest.raises(UserError, match=r"expected true, false or null as strip_accents in .*, found 'yes': mend it"):
        find_tokenizer(str(folder))


def test_the_file_itself_may_be_given(tmp_path):
    folder = write(tmp_path / "tokenizer", True, {"do_lower_case": False})
    assert find_tokenizer(str(folder / "vocab.txt")).to_str() == find_tokenizer(str(folder)).to_str()
