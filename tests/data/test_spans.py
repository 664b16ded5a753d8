import shutil
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.base.errors import UserError
from dsbert.data.preparing.prepare import prepare
from dsbert.data.shards import TokenStore
from dsbert.data.spans import NUM_SPECIAL, SpanIndex
from tests.data.conftest import VOCAB_SIZE

SEQ_LEN = 13  # ten tokens a span


def store_of(*documents: list[int]) -> TokenStore:
    """Documents by the lengths of their sentences; token number i of the store is i."""
    counter = iter(range(10**6))
    return TokenStore.from_documents([[[next(counter) for _ in range(n)] for n in document] for document in documents])


def pack_one_by_one(documents: list[list[int]], capacity: int):
    """The definition of a span, sentence by sentence: (document, length, cuts), and the tokens dropped."""
    found, dropped = [], 0
    for number, document in enumerate(documents):
        pieces = [min(capacity, n - at) for n in document for at in range(0, n, capacity)]
        groups: list[list[int]] = []
        for piece in pieces:
            if groups and sum(groups[-1]) + piece <= capacity:
                groups[-1].append(piece)
            else:
                groups.append([piece])
        for group in groups:
            if sum(group) >= 2:
                found.append((number, sum(group), np.cumsum(group)[:-1].tolist()))
            else:
                dropped += 1
    return found, dropped


def described(index: SpanIndex):
    rows = zip(index.document.tolist(), index.length.tolist(), index.first_cut[:-1], index.first_cut[1:], strict=True)
    return [(document, length, index.cuts[first:last].tolist()) for document, length, first, last in rows]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 35), min_size=1, max_size=8), min_size=1, max_size=6),
    st.integers(8, 30),
)
def test_packs_greedily(documents, seq_len):
    index = SpanIndex.build(store_of(*documents), seq_len)
    expected, dropped = pack_one_by_one(documents, seq_len - NUM_SPECIAL)
    assert described(index) == expected
    assert index.dropped_tokens == dropped
    # Every token of the store is in exactly one span, but for the dropped ones.
    covered = [
        start + i for start, length in zip(index.start.tolist(), index.length, strict=True) for i in range(length)
    ]
    assert len(covered) == len(set(covered)) == sum(map(sum, documents)) - dropped


def test_golden():
    index = SpanIndex.build(store_of([4, 4, 4, 1], [25], [1], [10, 1, 10]), SEQ_LEN)
    assert index.start.tolist() == [0, 8, 13, 23, 33, 39, 50]
    assert index.length.tolist() == [8, 5, 10, 10, 5, 10, 10]
    assert index.document.tolist() == [0, 0, 1, 1, 1, 3, 3]
    assert index.cuts.tolist() == [4, 4]
    assert index.dropped_tokens == 2


@pytest.mark.parametrize("seq_len", [0, 7, 1 << 16])
def test_refuses_an_impossible_length(seq_len):
    with pytest.raises(UserError, match="seq_len must be in"):
        SpanIndex.build(store_of([4]), seq_len)


def test_shards_change_nothing(tmp_path, corpus_file, data_dir):
    prepare([str(corpus_file)], tmp_path / "many", VOCAB_SIZE, validation=0.2, shard_tokens=500)
    one = SpanIndex.build(TokenStore.open(data_dir, "train"), 32)
    many = SpanIndex.build(TokenStore.open(tmp_path / "many", "train"), 32)
    for name in ("start", "length", "document", "first_cut", "cuts"):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name


class TestCache:
    @pytest.fixture
    def directory(self, data_dir, tmp_path):
        return shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("spans-*"))

    def open(self, directory) -> SpanIndex:
        return SpanIndex.open(directory, "train", 32, TokenStore.open(directory, "train"))

    def test_is_written_once_and_read(self, directory, monkeypatch):
        first = self.open(directory)
        monkeypatch.setattr(SpanIndex, "build", None)  # a second call must not build
        second = self.open(directory)
        assert described(first) == described(second)
        assert sorted(path.name for path in directory.iterdir() if "spans" in path.name) == ["spans-train-32"]

    def test_of_other_data_is_replaced(self, directory, monkeypatch):
        first = described(self.open(directory))
        meta = directory / "spans-train-32" / "meta.json"
        meta.write_text(meta.read_text().replace('"data": "', '"data": "other'))
        np.save(directory / "spans-train-32" / "length.npy", np.zeros(3))
        assert described(self.open(directory)) == first
        monkeypatch.setattr(SpanIndex, "build", None)
        assert described(self.open(directory)) == first

    def test_damaged_is_replaced(self, directory):
        first = described(self.open(directory))
        (directory / "spans-train-32" / "cuts.npy").write_bytes(b"")
        assert described(self.open(directory)) == first

    def test_many_writers_at_once(self, directory):
        found = []
        threads = [threading.Thread(target=lambda: found.append(self.open(directory))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(described(index) == described(found[0]) for index in found)
        assert [path.name for path in directory.iterdir() if "spans" in path.name] == ["spans-train-32"]

    def test_a_read_only_directory_is_no_obstacle(self, directory, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError("read-only")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        assert len(self.open(directory))
        assert not (directory / "spans-train-32").exists()
