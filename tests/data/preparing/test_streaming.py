"""Without preparing: the same sample at a position always, each span of an epoch once."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from dsbert.base.errors import UserError
from dsbert.data.preparing import streaming
from dsbert.data.preparing.streaming import StreamingSamples, store_of
from dsbert.data.stream import Batch
from tests.data.preparing.test_sources import hub


@pytest.fixture
def make(data_dir, corpus_file, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_DOCUMENTS", 16)  # of 60 documents

    def opened(nsp: bool = True, seed: int = 3) -> StreamingSamples:
        return StreamingSamples([str(corpus_file)], str(data_dir / "tokenizer"), seq_len=32, seed=seed, nsp=nsp)

    return opened


def rows(batch: Batch) -> list[tuple[int, ...]]:
    ids = batch.input_ids.copy()
    ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
    return [tuple(row) for row in ids.tolist()]


def test_any_cut_and_any_start_gives_the_same(make):
    whole = make().batch(0, 1000)
    again = make()
    parts = [again.batch(first, 100) for first in range(0, 1000, 100)]
    assert [row for part in parts for row in rows(part)] == rows(whole)
    late = make().batch(777, 20)
    for field in dataclasses.fields(Batch):
        assert np.array_equal(getattr(late, field.name), getattr(again.batch(777, 20), field.name)), field.name
    assert rows(late) == rows(whole)[777:797]
    assert rows(make(seed=4).batch(777, 20)) != rows(late)


def test_an_epoch_has_each_span_once(make):
    stream = make(nsp=False)
    N = _epoch(stream)
    first, second = rows(stream.batch(0, N)), rows(stream.batch(N, N))
    assert Counter(first) == Counter(second)
    assert first != second


def _epoch(stream: StreamingSamples) -> int:
    from dsbert.data.spans import SpanIndex

    return sum(len(SpanIndex.build(store_of(texts, stream._encoder), 32)) for texts in stream._text_windows())


def test_no_samples_and_errors(make, tmp_path, data_dir):
    batch = make().batch(5, 0)
    assert (batch.num_samples, batch.input_ids.shape) == (0, (0, 32))
    for wrong in ((-1, 2), (0, -1)):
        with pytest.raises(ValueError, match="expected position >= 0"):
            make().batch(*wrong)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="corpus is empty"):
        StreamingSamples([str(tmp_path / "blank.txt")], str(data_dir / "tokenizer"), seq_len=32, seed=1)


def test_the_hubs_layout(data_dir, tmp_path, monkeypatch):
    hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    stream = StreamingSamples(["wikibooks"], str(data_dir / "tokenizer"), seq_len=32, seed=1)
    assert stream.batch(10, 4).num_samples == 4
