from dataclasses import fields

import numpy as np
import pytest

from dsbert.base.errors import UserError
from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import IGNORE, Batch, SampleStream, joined
from dsbert.data.tokenizer import Vocabulary

S = 32
PAD, CLS, SEP, MASK = 0, 2, 3, 4


@pytest.fixture(scope="module")
def stream(data_dir) -> SampleStream:
    return SampleStream.open(data_dir, "train", S, seed=11)


def original(batch: Batch) -> np.ndarray:
    """input_ids before masking."""
    ids = batch.input_ids.copy()
    ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
    return ids


def parts(row: np.ndarray) -> tuple[list[int], list[int]]:
    """A and B of a row [CLS] A [SEP] B [SEP] padding."""
    first, second = np.flatnonzero(row == SEP).tolist()
    return row[1:first].tolist(), row[first + 1 : second].tolist()


def assert_equal(left: Batch, right: Batch) -> None:
    for field in fields(Batch):
        assert np.array_equal(getattr(left, field.name), getattr(right, field.name)), field.name


def long_documents(documents: int = 40, sentences: int = 30, length: int = 5) -> TokenStore:
    """Token 100 * d + s is in sentence s of document d, so that a token tells where it is from."""
    return TokenStore.from_documents(
        [[[100 * (d + 1) + s] * length for s in range(sentences)] for d in range(documents)]
    )


def numbered_stream(store: TokenStore, **options) -> SampleStream:
    vocab = Vocabulary(10_000, pad=PAD, unk=1, cls=CLS, sep=SEP, mask=MASK, word_start=np.ones(10_000, dtype=bool))
    return SampleStream(store, SpanIndex.build(store, S), vocab=vocab, seq_len=S, **{"seed": 5, **options})


# Samples 7 and 8 of three documents with six sentences of five tokens.
GOLDEN_IDS = [
    "2 4 105 3 205 205 205 3 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "2 200 200 200 200 200 201 201 201 201 4 4 202 4 202 202 3 203 203 203 203 203 204 204 204 4 204 3 0 0 0 0",
]


class TestDeterminism:
    def test_cuts_change_nothing(self, stream):
        for position in (0, 37, stream.num_samples - 3, 10 * stream.num_samples - 1):
            whole = stream.batch(position, 8)
            assert_equal(whole, joined([stream.batch(position + i, 1) for i in range(8)]))
            assert_equal(whole, joined([stream.batch(position, 3), stream.batch(position + 3, 5)]))

    def test_every_call_and_process_gives_the_same(self, stream, data_dir):
        again = SampleStream.open(data_dir, "train", S, seed=11)
        again.batch(1000, 5)
        assert_equal(again.batch(4, 9), stream.batch(4, 9))

    def test_seeds_and_epochs_differ(self, stream, data_dir):
        N = stream.num_samples
        first, second = stream.batch(0, N), stream.batch(N, N)
        other = SampleStream.open(data_dir, "train", S, seed=12).batch(0, N)
        for batch in (second, other):
            assert (original(first) == original(batch)).all(axis=1).mean() < 0.1

    def test_masks_of_one_sample_differ_between_epochs(self):
        stream = numbered_stream(long_documents(2, 4), nsp=False)  # one span per document
        assert stream.num_samples == 2
        rows: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for batch in (stream.batch(2 * epoch, 2) for epoch in range(8)):
            for row in range(2):
                text = tuple(original(batch)[row].tolist())
                rows.setdefault(text, set()).add(
                    tuple((batch.mlm_positions[batch.mlm_positions // S == row] % S).tolist())
                )
        assert len(rows) == 2
        assert all(len(masks) > 4 for masks in rows.values())

    def test_golden(self):
        batch = numbered_stream(long_documents(3, 6)).batch(1, 2)
        assert [" ".join(map(str, row)) for row in batch.input_ids.tolist()] == GOLDEN_IDS
        assert batch.nsp_labels.tolist() == [1, 0]


class TestOrder:
    def spans(self, stream: SampleStream, position: int, count: int) -> list[tuple[int, ...]]:
        ids = original(stream.batch(position, count))
        return [tuple(row[1 : row.tolist().index(SEP)].tolist()) for row in ids]

    def test_an_epoch_has_each_span_once(self, data_dir):
        stream = SampleStream.open(data_dir, "train", S, seed=1, nsp=False)
        index, store = SpanIndex.build(TokenStore.open(data_dir, "train"), S), TokenStore.open(data_dir, "train")
        tokens = store.shards[0].tokens
        edges = zip(index.start.tolist(), index.length.tolist(), strict=True)
        expected = sorted(tuple(tokens[start : start + length].tolist()) for start, length in edges)
        N = stream.num_samples
        for epoch in range(3):
            cut = N // 3
            found = self.spans(stream, epoch * N, cut) + self.spans(stream, epoch * N + cut, N - cut)
            assert sorted(found) == expected
        # Any window of N samples that starts inside an epoch ends inside the next.
        crossing = self.spans(stream, N - 4, 8)
        assert crossing == self.spans(stream, N - 4, 4) + self.spans(stream, N, 4)

    def test_one_batch_may_span_many_epochs(self):
        stream = numbered_stream(long_documents(2, 4), nsp=False)
        found = self.spans(stream, 1, 11)
        assert all(len(set(found[i : i + 2])) == 2 for i in range(1, 11, 2))


class TestLayout:
    def test_of_a_pair(self, stream):
        batch = stream.batch(0, stream.num_samples)
        ids = original(batch)
        assert ids.shape == batch.token_type_ids.shape == batch.attention_mask.shape == (stream.num_samples, S)
        assert {getattr(batch, f.name).dtype for f in fields(Batch) if f.name[:3] != "num"} == {np.dtype(np.int64)}
        for row, types, mask in zip(ids, batch.token_type_ids, batch.attention_mask, strict=True):
            a, b = parts(row)
            end = len(a) + len(b) + 3
            assert a
            assert b
            assert row.tolist() == [CLS, *a, SEP, *b, SEP] + [PAD] * (S - end)
            assert types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (S - end)
            assert mask.tolist() == [1] * end + [0] * (S - end)
        assert batch.num_samples == stream.num_samples
        assert batch.num_tokens == batch.attention_mask.sum()

    def test_of_a_single_text(self, data_dir):
        batch = SampleStream.open(data_dir, "train", S, seed=1, nsp=False).batch(0, 20)
        for row, mask in zip(original(batch), batch.attention_mask, strict=True):
            end = mask.sum()
            assert (row[0], row[end - 1]) == (CLS, SEP)
            assert (row[1 : end - 1] > MASK).all()
            assert (row[end:] == PAD).all()
        assert (batch.nsp_labels == IGNORE).all()
        assert not batch.token_type_ids.any()

    def test_only_text_is_masked(self, stream):
        batch = stream.batch(0, stream.num_samples)
        assert batch.mlm_labels.min() > MASK
        now = batch.input_ids.reshape(-1)[batch.mlm_positions]
        assert set(now[now <= MASK].tolist()) == {MASK}
        assert (np.bincount(batch.mlm_positions // S, minlength=stream.num_samples) >= 1).all()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return numbered_stream(long_documents()).batch(0, 4000)


class TestNextSentence:
    def test_halves_are_balanced(self, batch):
        """Two samples share a coin."""
        asked = batch.nsp_labels[batch.nsp_labels != IGNORE]
        assert len(asked) > 3800
        assert abs(asked.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)

    def test_b_is_the_continuation_or_of_another_document(self, batch):
        for row, label in zip(original(batch), batch.nsp_labels, strict=True):
            a, b = parts(row)
            if label != 1:
                # Cut at a sentence end, and the next sentence follows.
                assert b[0] == a[-1] + 1
            else:
                assert b[0] // 100 != a[0] // 100

    def test_borrowed_text_ends_with_a_sentence(self, batch):
        borrowed = [parts(row)[1] for row in original(batch)[batch.nsp_labels == 1]]
        assert all(len(b) % 5 == 0 for b in borrowed)
        assert len({b[0] // 100 for b in borrowed}) == 40  # from all documents

    def test_cuts_are_spread_over_the_sentence_ends(self, batch):
        lengths = [len(parts(row)[0]) for row in original(batch)]
        assert set(lengths) == {5, 10, 15, 20}

    def test_a_lone_sentence_is_cut_in_its_middle(self):
        batch = numbered_stream(long_documents(40, 1, 9)).batch(0, 40)
        lengths = [tuple(map(len, parts(row))) for row in original(batch)]
        assert set(lengths) == {(4, 5)}
        assert set(batch.nsp_labels.tolist()) == {0, 1}

    def test_a_lone_document_keeps_its_text_and_is_not_asked(self):
        batch = numbered_stream(long_documents(1)).batch(0, 50)
        assert (batch.nsp_labels == IGNORE).all()
        assert all(parts(row)[1][0] == parts(row)[0][-1] + 1 for row in original(batch))


@pytest.mark.parametrize("nsp", [True, False])
def test_special_tokens_in_a_text_are_neither_asked_nor_changed(nsp):
    """As shards of an older dsbert hold them: "[MASK]" in a text was encoded as one."""
    rng = np.random.default_rng(0)
    documents = [[rng.integers(0, 40, 9).tolist() for _ in range(20)] for _ in range(40)]
    stream = numbered_stream(TokenStore.from_documents(documents), nsp=nsp, mask_fraction=0.5)
    batch = stream.batch(0, stream.num_samples)
    assert len(batch.mlm_labels) > 1000
    assert batch.mlm_labels.min() > MASK
    assert (original(batch) == batch.input_ids)[original(batch) <= MASK].all()
    now = batch.input_ids.reshape(-1)[batch.mlm_positions]
    assert set(now[now <= MASK].tolist()) == {MASK}


@pytest.mark.parametrize("nsp", [True, False])
def test_a_batch_may_be_empty(data_dir, nsp):
    batch = SampleStream.open(data_dir, "train", S, seed=1, nsp=nsp).batch(5, 0)
    assert batch.mlm_positions.size == batch.mlm_labels.size == batch.nsp_labels.size == 0
    assert (batch.num_tokens, batch.num_samples) == (0, 0)
    assert batch.input_ids.shape == batch.token_type_ids.shape == batch.attention_mask.shape == (0, S)


@pytest.mark.parametrize(("position", "count"), [(-1, 2), (0, -1)])
def test_impossible_requests(stream, position, count):
    with pytest.raises(ValueError, match="expected position"):
        stream.batch(position, count)


def test_mask_share(stream):
    """Whole words and rounding keep the share a little below the fraction, and never above the budget."""
    batch = stream.batch(0, stream.num_samples)
    text = batch.attention_mask.sum(axis=1) - 3
    budget = np.maximum(1, np.rint(0.15 * text))
    masked = np.bincount(batch.mlm_positions // S, minlength=len(text))
    assert (masked <= budget).all()
    assert masked.sum() > 0.9 * budget.sum()


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="the corpus is empty"):
        numbered_stream(TokenStore.from_documents([]))
    with pytest.raises(UserError, match="the corpus is empty"):
        numbered_stream(TokenStore.from_documents([[[7]]]))


def test_validation_is_its_own_stream(data_dir):
    train, validation = (SampleStream.open(data_dir, split, S, 0, nsp=False) for split in ("train", "validation"))
    rows = [{tuple(row) for row in original(s.batch(0, s.num_samples)).tolist()} for s in (train, validation)]
    assert not rows[0] & rows[1]
