"""What transformers reads from a saved tokenizer: the ids that text was encoded with, or a refusal."""

import json
import shutil

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from dsbert.base.errors import UserError
from dsbert.data.preparing.prepare import prepare
from dsbert.data.preparing.tokenizer_check import check_saved
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.tokenizer import find_tokenizer, is_plain_bert, save_tokenizer
from tests.data.conftest import make_text

TEXT = "Ba KO \uff22\uff41 1234 dru-lim \ufb01 \u00e9 e\u0301 [MASK] don't"


def changed(tokenizer: Tokenizer, part: str) -> Tokenizer:
    made = Tokenizer.from_str(tokenizer.to_str())
    if part == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    elif part == "no normalizer":
        made.normalizer = None
    elif part == "controls":
        made.normalizer = normalizers.BertNormalizer(clean_text=False)
    elif part == "digits":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    elif part == "regex":
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|-"), "removed")
    elif part == "long words":
        state = json.loads(made.to_str())
        state["model"]["max_input_chars_per_word"] = 10
        made = Tokenizer.from_str(json.dumps(state))
    elif part == "added":
        made.add_tokens(["dru-lim"])
    elif part == "template":
        made.post_processor = None
    return made


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([*make_text(40).lower().split("\n"), "0 1 2 3 4 - ' f i e"], 200)


@pytest.mark.parametrize(
    "part", ["", "normalizer", "no normalizer", "controls", "digits", "regex", "long words", "added", "template"]
)
def test_auto_tokenizer_gives_the_ids_of_any_tokenizer(tmp_path, trained, part):
    from transformers import AutoTokenizer

    changed(trained, part).save(str(tmp_path / "given.json"))
    given = find_tokenizer(str(tmp_path / "given.json"))
    save_tokenizer(given, tmp_path / "saved")
    check_saved(tmp_path / "saved", make_text(5).split("\n"))
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert auto(TEXT)["input_ids"] == given.encode(TEXT).ids
    assert auto("ba", "ko")["input_ids"] == given.encode("ba", "ko").ids
    assert auto(TEXT)["input_ids"][0] == auto.cls_token_id  # as the model sees text, whatever the file said
    assert auto.mask_token_id in auto(TEXT)["input_ids"]  # to those who fill it, [MASK] is what it is
    plain = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"
    assert plain == (part in ("", "template")) == is_plain_bert(given)


def test_a_directory_that_gives_other_ids_is_refused(tmp_path, trained):
    save_tokenizer(changed(trained, "normalizer"), tmp_path)
    check_saved(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(
        UserError, match=r"expected AutoTokenizer to give the ids .* in training and .* after"
    ) as caught:
        check_saved(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_custom_tokenizer_is_prepared_with_and_checked(tmp_path, trained, monkeypatch):
    changed(trained, "normalizer").save(str(tmp_path / "given.json"))
    (tmp_path / "text.txt").write_text(make_text(20))
    words = ([str(tmp_path / "text.txt")], tmp_path / "data")
    prepare(*words, tokenizer=str(tmp_path / "given.json"))
    check_saved(tmp_path / "data" / "tokenizer", make_text(5).split("\n"))
    shutil.rmtree(tmp_path / "data")
    # As if transformers could not be told: the preparation is refused, before anything is encoded.
    monkeypatch.setattr("dsbert.data.tokenizer.is_plain_bert", lambda tokenizer: True)
    with pytest.raises(
        UserError, match=r"expected AutoTokenizer to give the ids of the tokenizer .*given\.json, found"
    ):
        prepare(*words, tokenizer=str(tmp_path / "given.json"))
    assert not (tmp_path / "data").exists()
