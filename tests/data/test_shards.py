from pathlib import Path

import numpy as np
import pytest

from dsbert.data.manifest import load_manifest
from dsbert.data.prepare import prepare
from dsbert.data.shards import Shard, ShardWriter, TokenStore, checksum, token_dtype
from dsbert.errors import UserError
from tests.data.conftest import VOCAB_SIZE

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12, 13, 14, 15], [16, 17]]]


def write(directory: Path, shard_tokens: int, vocab_size: int = 100):
    writer = ShardWriter(directory, "train", vocab_size, shard_tokens)
    for document in DOCUMENTS:
        writer.add(document)
    return writer.close(), writer.counts


def gather(store: TokenStore, start: int, length: int) -> list[int]:
    out = np.zeros((1, length), dtype=np.int64)
    store.gather(np.array([start]), np.array([length]), out, np.array([0]))
    return out[0].tolist()


@pytest.mark.parametrize(("shard_tokens", "shards"), [(1000, 1), (6, 2), (1, 3)])
def test_shards_are_cut_between_documents(tmp_path, shard_tokens, shards):
    entry, counts = write(tmp_path, shard_tokens)
    assert (entry.documents, entry.sentences, entry.tokens, len(entry.shards)) == (3, 5, 13, shards)
    assert np.array_equal(counts, np.bincount(np.arange(5, 18), minlength=100))
    for shard in entry.shards:
        assert (tmp_path / shard.file).stat().st_size == shard.bytes
        assert checksum(tmp_path / shard.file) == shard.xxh3
    store = TokenStore([Shard.open(tmp_path / shard.file, shard.bytes) for shard in entry.shards])
    memory = TokenStore.from_documents(DOCUMENTS)
    assert (store.num_documents, store.num_sentences, store.num_tokens) == (3, 5, 13)
    for start, length in [(0, 4), (1, 2), (4, 2), (6, 7), (12, 1)]:
        assert (
            gather(store, start, length) == gather(memory, start, length) == list(range(5 + start, 5 + start + length))
        )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_datasets_opens_a_shard(tmp_path, vocab_size, dtype):
    datasets = pytest.importorskip("datasets")
    entry, _ = write(tmp_path, 1000, vocab_size)
    dataset = datasets.Dataset.from_file(str(tmp_path / entry.shards[0].file))
    assert dataset["tokens"][0] == [5, 6, 7, 8]
    assert list(dataset["sentence_lengths"]) == [[3, 1], [2], [5, 2]]
    assert dataset.features["tokens"].feature.dtype == dtype == token_dtype(vocab_size).name


def test_tokens_are_mapped_and_not_copied(tmp_path):
    entry, _ = write(tmp_path, 1000)
    tokens = Shard.open(tmp_path / entry.shards[0].file, entry.shards[0].bytes).tokens
    assert tokens.dtype == np.uint16
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


def test_a_large_vocabulary_keeps_its_ids(tmp_path):
    writer = ShardWriter(tmp_path, "train", 70_000)
    writer.add([[69_999, 5]])
    (entry,) = writer.close().shards
    assert gather(TokenStore([Shard.open(tmp_path / entry.file, entry.bytes)]), 0, 2) == [69_999, 5]


def test_gather_fills_rows_at_columns():
    out = np.full((2, 5), -1, dtype=np.int64)
    store = TokenStore.from_documents(DOCUMENTS)
    store.gather(np.array([2, 6]), np.array([3, 1]), out, np.array([1, 4]))
    assert out.tolist() == [[-1, 7, 8, 9, -1], [-1, -1, -1, -1, 11]]


def test_documents_in_memory_may_have_empty_parts():
    store = TokenStore.from_documents([[], [[]], [[5], [], [6]]])
    assert (store.num_documents, store.num_sentences, store.num_tokens) == (1, 2, 2)


def test_damaged_shards_are_named(tmp_path):
    entry, _ = write(tmp_path, 1000)
    path = tmp_path / entry.shards[0].file
    size = entry.shards[0].bytes
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"train-00000.arrow should have {size} bytes, found {size - 1}"):
        Shard.open(path, size)
    path.write_bytes(b"x" * size)
    with pytest.raises(UserError, match="is not a token shard"):
        Shard.open(path, size)
    path.unlink()
    with pytest.raises(UserError, match="found 0"):
        Shard.open(path, size)


def test_many_shards_hold_what_one_holds(tmp_path, corpus_file, data_dir):
    prepare([str(corpus_file)], tmp_path / "many", VOCAB_SIZE, validation=0.2, shard_tokens=500)
    one, many = TokenStore.open(data_dir, "train"), TokenStore.open(tmp_path / "many", "train")
    assert len(one.shards) == 1
    assert len(many.shards) > 3
    assert np.array_equal(one.shards[0].tokens, np.concatenate([shard.tokens for shard in many.shards]))
    assert load_manifest(data_dir).digest != load_manifest(tmp_path / "many").digest
