"""Sentences of any text: nothing is lost, nothing ends a preparation, and the time is linear."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsbert.data.preparing.prepare import prepare
from dsbert.data.preparing.sentences import Splitter, plain_sentences, split_sentences
from dsbert.data.preparing.streaming import StreamingSamples
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.tokenizer import save_tokenizer
from tests.commands import dsbert, dsbert_process
from tests.data.conftest import make_text

# "I", a no-break space and a full stop, twice: the library cuts the space in two and panics.
PANICS = "She said that she would, and so did I\u00a0.\u00a0I\u00a0. until the rain began."
SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace() and chr(code) != "\n"]
PIECES = (
    *SPACES,
    *"aAIbM.!?1 \"'()[]",
    *"\u201c\u201d\u2018\u00ab\u00bb\u2026\u3002\uff01\u300c\u300d\u0964",
    *"éßг中あ한אع😀\u0301\u3099\u200b\u200d\ufeff\x00\x07\ud800\udc00\U000e0001\u202e",
    *("Mr", "U.S", "etc"),
)
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=80).map("".join)


def without_spaces(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=500, deadline=None)
@given(HOSTILE)
@example(PANICS)
@example(".".join(f"I{space}" for space in SPACES) + ".")
def test_no_text_stops_the_splitter_and_none_is_lost(text):
    found = split_sentences([text])
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert without_spaces("".join(found)) == without_spaces(whole)
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in found)


def test_a_panic_is_mended_and_told():
    splitter = Splitter()
    assert splitter.split([PANICS]) == ["She said that she would, and so did I . I . until the rain began."]
    assert splitter.mended
    splitter.split(["Nothing odd here. I am plain."])
    assert not splitter.mended


def test_a_panic_that_nobody_foresaw_is_caught(monkeypatch):
    monkeypatch.setattr("dsbert.data.preparing.sentences._ODD_STOPS", [])
    splitter = Splitter()
    assert splitter.split([PANICS, "One. Two."]) == [
        "She said that she would, and so did I .", "I .", "until the rain began.", "One.", "Two.",
    ]  # fmt: skip
    assert splitter.mended


def test_a_paragraph_that_the_library_fails_on_is_split_by_a_plain_rule():
    splitter = Splitter()
    assert splitter.split(["One half \ud83d is no text. Two. 三。四\uff01"]) == [
        "One half \ufffd is no text.",
        "Two.",
        "三。",
        "四\uff01",
    ]
    assert splitter.mended
    assert plain_sentences("Who? Me! Yes… no. एक। दो। 中。文") == [
        "Who?",
        "Me!",
        "Yes…",
        "no.",
        "एक।",
        " दो।",
        " 中。",
        "文",
    ]


@pytest.mark.parametrize("unit", ["“a ", "今天天气很好。", "ภาษาไทย", "«", "I\u00a0.\u00a0", "This is one. ", "x"])
def test_a_long_line_takes_linear_time(unit):
    def seconds(chars: int) -> float:
        text = unit * (chars // len(unit))
        began = time.process_time()
        found = split_sentences([text])
        took = time.process_time() - began
        assert without_spaces("".join(found)) == without_spaces(text)
        return took

    small = min(seconds(20_000) for _ in range(3))
    # Eight times the text: a square would be 64 times as long.
    assert seconds(160_000) < 24 * small + 0.05


def test_windows_give_the_sentences_of_the_whole():
    sentences = [f"Number {number} of Mr. Smith's list is here, at 3.5 percent." for number in range(2000)]
    assert split_sentences([" ".join(sentences)]) == sentences
    # A sentence that is longer than a window stays one.
    long = "word " * 5000 + "end."
    assert split_sentences([f"First one. {long} Last one."]) == ["First one.", long, "Last one."]


def test_a_preparation_goes_on_and_says_where_it_mended(tmp_path):
    source = tmp_path / "odd.txt"
    source.write_text(make_text(20) + "\n" + PANICS + "\n\nAnother short text is here.\n")
    words = ["prepare", "--source", str(source), "--vocab-size", "100", "--validation", "0", "--json"]
    summaries = []
    for nproc in ("1", "2"):
        done = dsbert_process(*words, "--to", str(tmp_path / nproc), "--nproc", nproc)
        assert done.returncode == 0, done.stderr
        assert "panicked" not in done.stderr
        summaries.append(json.loads(done.stdout))
    one, two = summaries
    assert (one["documents"], one["mended"], one["digest"]) == (22, 1, two["digest"])
    assert one["mended_in"] == [
        f"{source}: the document that begins 'She said that she would, and so did I . I . until the rain b'"
    ]
    again = dsbert(*words, "--to", str(tmp_path / "1"))
    assert json.loads(again.stdout)["mended"] == 1  # of data that is there, too
    shown = dsbert("data", str(tmp_path / "1"), "--seq-len", "32", "--examples", "0")
    assert f"  mended       1 documents, e.g. {one['mended_in'][0]}" in shown.stdout


def test_streams_go_on(tmp_path):
    source = tmp_path / "odd.txt"
    source.write_text("\n\n".join([PANICS] * 5))
    save_tokenizer(train_tokenizer([PANICS], 80), tmp_path / "tokenizer")
    samples = StreamingSamples([str(source)], str(tmp_path / "tokenizer"), seq_len=32, seed=1)
    assert samples.batch(0, 4).num_samples == 4


def test_a_document_that_the_tokenizer_makes_nothing_of_is_counted(tmp_path):
    source = tmp_path / "odd.txt"
    source.write_text(make_text(20) + "\n\u200b\u200b \u200b \u200b \ufeff\u00ad\n")
    result = prepare([str(source)], tmp_path / "data", 100)
    assert (result["documents"], result["dropped"]["tokenless"]) == (20, 1)
