"""Text of other scripts than Latin: kept, spelled, cut and read by transformers as it was trained on."""

import json
import time

import pytest

from dsbert.data.preparing.encoding import Encoder, is_word_local
from dsbert.data.preparing.prepare import prepare
from dsbert.data.preparing.scripts import num_words
from dsbert.data.preparing.sentences import split_sentences
from dsbert.data.preparing.tokenizer_check import check_saved
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.tokenizer import load_tokenizer
from tests.commands import complaint, dsbert

LANGUAGES = {
    "chinese": [
        "今天天气很好\uff0c我们一起去公园散步。",
        "他每天早上六点起床\uff0c然后喝一杯热茶。",
        "这本书讲述了一个农民和他儿子的故事。",
        "北京是中国的首都\uff0c也是一座古老的城市。",
        "孩子们在学校里学习数学、语文和音乐。",
    ],
    "japanese": [
        "きょうはとてもいいてんきですから、みんなでこうえんへいきましょう。",
        "彼は毎朝六時に起きて、コーヒーを飲みながら新聞を読む。",
        "わたしのいえのとなりにちいさなパンやさんがあります。",
        "東京は日本の首都で、世界で最も大きな都市のひとつです。",
        "コンピューターのプログラムをつくるしごとをしています。",
    ],
    "korean": [
        "오늘은 날씨가 아주 좋아서 우리는 공원에 갔습니다.",
        "그는 매일 아침 여섯 시에 일어나 커피를 마신다.",
        "서울은 대한민국의 수도이며 오래된 도시이다.",
        "아이들은 학교에서 수학과 음악을 배웁니다.",
        "띄어쓰기없이쓴문장도읽을수있어야합니다.",
    ],
    "thai": [
        "วันนี้อากาศดีมากเราจึงไปเดินเล่นที่สวนสาธารณะด้วยกัน",
        "เขาตื่นนอนหกโมงเช้าทุกวันแล้วดื่มกาแฟหนึ่งแก้วก่อนไปทำงาน",
        "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและมีประชากรมากที่สุด",
        "เด็กๆเรียนคณิตศาสตร์และดนตรีที่โรงเรียนใกล้บ้าน",
        "หนังสือเล่มนี้เล่าเรื่องของชาวนาและลูกชายของเขาในหมู่บ้านเล็กๆ",
    ],
    "hindi": [
        "आज मौसम बहुत अच्छा है, इसलिए हम बगीचे में घूमने गए।",
        "वह रोज़ सुबह छह बजे उठकर चाय पीता है।",
        "दिल्ली भारत की राजधानी है और एक पुराना शहर है।",
        "बच्चे विद्यालय में गणित और संगीत सीखते हैं।",
        "यह किताब एक किसान और उसके बेटे की कहानी है।",
    ],
}


def corpus_of(sentences: list[str]) -> str:
    """Documents of one unbroken paragraph each, all different."""
    count = len(sentences)
    order = [
        [sentences[(first + step * number) % count] for number in range(count)]
        for first in range(count)
        for step in range(1, count)
    ]
    return "\n\n".join("".join(document) for document in order) + "\n"


@pytest.mark.parametrize("rule", [{}, {"cased": True}, {"keep_accents": True}], ids=["lower", "cased", "accents"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_fitting_vocabulary_spells_all(tmp_path, language, rule):
    source = tmp_path / "text.txt"
    source.write_text(corpus_of(LANGUAGES[language]))
    result = prepare([str(source)], tmp_path / "data", 800, validation=0.2, **rule)
    assert result["documents"] == 20
    assert result["dropped"]["tiny"] == 0
    assert result["unknown"] < 0.01
    check_saved(tmp_path / "data" / "tokenizer", LANGUAGES[language])
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    assert is_word_local(tokenizer)
    text = "".join(LANGUAGES[language])
    tokens = Encoder(tokenizer).encode([text])[0].tolist()
    spelled = "".join(tokenizer.id_to_token(number).removeprefix("##") for number in tokens)
    if rule:  # nothing is stripped
        assert spelled == "".join(text.split())


def test_accents_are_kept_where_they_are_asked_for(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"Über Straße हिन्दी {number}, Cafe\u0301 Größe." for number in range(30)))
    words = ["prepare", "--source", str(source), "--vocab-size", "100", "--json"]
    seen = {}
    for name, flags in {"lower": [], "accents": ["--keep-accents"], "cased": ["--cased"]}.items():
        done = dsbert(*words, "--to", str(tmp_path / name), *flags)
        assert done.returncode == 0, done.stderr
        config = json.loads((tmp_path / name / "tokenizer" / "tokenizer_config.json").read_text())
        ids = Encoder(load_tokenizer(tmp_path / name / "tokenizer")).encode(["Über हिन्दी"])[0].tolist()
        tokenizer = load_tokenizer(tmp_path / name / "tokenizer")
        spelled = "".join(tokenizer.id_to_token(number).removeprefix("##") for number in ids)
        seen[name] = (config["do_lower_case"], config["strip_accents"], config["tokenizer_class"], spelled)
        check_saved(tmp_path / name / "tokenizer")
    assert seen == {
        "lower": (True, True, "BertTokenizer", "uberहिनदी"),
        "accents": (True, False, "BertTokenizer", "überहिन्दी"),
        "cased": (False, False, "BertTokenizer", "Überहिन्दी"),
    }
    line = complaint(dsbert(*words, "--to", str(tmp_path / "lower"), "--cased"))
    assert "cased False instead of True" in line
    given = ["--to", str(tmp_path / "x"), "--tokenizer", str(tmp_path / "lower" / "tokenizer"), "--cased"]
    assert "expected --cased and --keep-accents for a tokenizer that is trained" in complaint(dsbert(*words, *given))


def test_the_alphabet_grows_to_the_vocabulary():
    chars = [chr(0x4E00 + number) for number in range(2500)]
    sentences = ["".join(chars[first : first + 50]) for first in range(0, 2500, 50)] * 3
    text = "".join(chars)

    def unknown(vocab_size: int) -> float:
        tokenizer = train_tokenizer(sentences, vocab_size)
        assert tokenizer.get_vocab_size() <= vocab_size
        return float((Encoder(tokenizer).encode([text])[0] == 1).mean())

    assert unknown(2600) == 0
    assert 0.15 < unknown(2100) < 0.2  # as far as it goes
    latin = [f"word{chr(0x4E00 + number)}" for number in range(1100)] + ["plain words of latin letters only"] * 50_000
    assert train_tokenizer(latin, 3000).get_vocab_size() < 1200  # the rarest 100 are not worth a place


def test_unknown_text_is_warned_of(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"plain words {chr(0x4E00 + number)} here {number}" for number in range(1500)))
    words = ["prepare", "--source", str(source), "--json", "--vocab-size"]
    done = dsbert(*words, "1100", "--to", str(tmp_path / "small"))
    assert done.returncode == 0, done.stderr
    share = json.loads(done.stdout)["unknown"]
    assert share > 0.01
    assert f"{share:.1%} of the tokens are [UNK]" in done.stderr
    assert f"{share:.2%} of the tokens are [UNK]" in dsbert("data", str(tmp_path / "small")).stdout
    done = dsbert(*words, "2000", "--to", str(tmp_path / "large"))
    assert json.loads(done.stdout)["unknown"] < 0.001
    assert "[UNK]" not in done.stderr


def test_words_are_characters_where_there_are_no_spaces():
    texts = ("one two", "one\ntwo three", "中文字", "中 文", "ไทย", "한국어", "カナ", "中文 ok", "éé", "a中b")
    assert [num_words(text, 5) for text in texts] == [2, 3, 3, 2, 3, 3, 2, 3, 1, 1]
    assert num_words("a b c d", 3) >= 3
    assert num_words("\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42\u0f0b", 3) >= 3  # Tibetan


def test_sentences_end_where_these_scripts_end_them():
    assert split_sentences(["今天天气很好。我们去公园\uff01你呢\uff1f"]) == [
        "今天天气很好。",
        "我们去公园\uff01",
        "你呢\uff1f",
    ]
    assert split_sentences(["वह चाय पीता है। वह घर गया।"]) == ["वह चाय पीता है।", "वह घर गया।"]


@pytest.mark.parametrize("unit", ["ภาษาไทย", "ひらがな", "한국어", "今天天气很好", "x"])
def test_a_line_without_spaces_takes_linear_time(unit):
    def seconds(chars: int) -> float:
        text = unit * (chars // len(unit))
        began = time.process_time()
        ids = Encoder(train_tokenizer([text], 200)).encode([text])[0]
        assert unit == "x" or 1 not in ids
        return time.process_time() - began

    small = min(seconds(10_000) for _ in range(3))
    assert seconds(80_000) < 24 * small + 0.1


def test_marks_stay_with_their_letters():
    thai = "".join(LANGUAGES["thai"])
    pieces = train_tokenizer([thai], 200).pre_tokenizer.pre_tokenize_str(thai)
    assert "".join(piece for piece, _ in pieces) == thai
    assert max(len(piece) for piece, _ in pieces) <= 36
    assert not any(piece[0] in "\u0e31\u0e34\u0e35\u0e36\u0e37\u0e38\u0e39\u0e47\u0e48\u0e49" for piece, _ in pieces)
