import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsbert.base.durable import sealed, unsealed
from dsbert.base.errors import DataError, UserError
from dsbert.data.manifest import ShardEntry, load_manifest
from dsbert.data.preparing.done_markers import read_marker
from dsbert.data.preparing.merging import merge_shard, plan_shards
from dsbert.data.preparing.prepare import prepare
from dsbert.data.shards import Shard, TokenStore, shard_checksum, token_dtype
from tests.data.conftest import VOCAB_SIZE

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11, 12, 13, 14, 15], [16, 17]]]


def write(directory: Path, shard_tokens: int = 1000, vocab_size: int = 100) -> list[ShardEntry]:
    """As a preparation does, from two encoded pieces."""
    pieces = []
    for number, documents in enumerate((DOCUMENTS[:2], DOCUMENTS[2:])):
        pieces.append(str(directory / f"{number}.arrow"))
        Shard.from_documents(documents, token_dtype(vocab_size)).write(Path(pieces[-1]), "abc")
    entries = []
    for number, segments in enumerate(plan_shards(pieces, shard_tokens)):
        to = directory / f"done-{number}"
        file = directory / f"train-{number:05d}.arrow"
        task = {"segments": segments, "file": str(file), "tokenizer": "abc", "vocab_size": vocab_size, "to": str(to)}
        merge_shard(task)
        entries.append(ShardEntry(**read_marker(task)["entry"]))
    return entries


def gather(store: TokenStore, start: int, length: int) -> list[int]:
    out = np.zeros((1, length), dtype=np.int64)
    store.gather(np.array([start]), np.array([length]), out, np.array([0]))
    return out[0].tolist()


@pytest.mark.parametrize(("shard_tokens", "shards"), [(1000, 1), (6, 2), (1, 3)])
def test_shards_are_cut_between_documents(tmp_path, shard_tokens, shards):
    entries = write(tmp_path, shard_tokens)
    assert len(entries) == shards
    assert (sum(entry.documents for entry in entries), sum(entry.tokens for entry in entries)) == (3, 13)
    counts = sum(np.load(path) for path in tmp_path.glob("done-*.counts.npy"))
    assert np.array_equal(counts, np.bincount(np.arange(5, 18), minlength=100))
    for shard in entries:
        assert (tmp_path / shard.file).stat().st_size == shard.bytes
        assert shard_checksum(tmp_path / shard.file) == shard.xxh3
    store = TokenStore([Shard.open(tmp_path / shard.file, shard.bytes, "abc") for shard in entries])
    memory = TokenStore.from_documents(DOCUMENTS)
    assert (store.num_documents, store.num_sentences, store.num_tokens) == (3, 5, 13)
    for start, length in [(0, 4), (1, 2), (4, 2), (6, 7), (12, 1)]:
        assert (
            gather(store, start, length) == gather(memory, start, length) == list(range(5 + start, 5 + start + length))
        )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_datasets_opens_a_shard(tmp_path, vocab_size, dtype):
    datasets = pytest.importorskip("datasets")
    (entry,) = write(tmp_path, vocab_size=vocab_size)
    dataset = datasets.Dataset.from_file(str(tmp_path / entry.file))
    assert dataset["tokens"][0] == [5, 6, 7, 8]
    assert list(dataset["sentence_lengths"]) == [[3, 1], [2], [5, 2]]
    assert dataset.features["tokens"].feature.dtype == dtype == token_dtype(vocab_size).name


def test_tokens_are_mapped_and_not_copied(tmp_path):
    (entry,) = write(tmp_path)
    tokens = Shard.open(tmp_path / entry.file, entry.bytes).tokens
    assert tokens.dtype == np.uint16
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


def test_a_large_vocabulary_keeps_its_ids(tmp_path):
    entry = Shard.from_documents([[[69_999, 5]]], token_dtype(70_000)).write(tmp_path / "large.arrow", "abc")
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
    (entry,) = write(tmp_path)
    path, size = tmp_path / entry.file, entry.bytes
    with pytest.raises(UserError, match="tokenizer xyz, as its manifest says, found abc"):
        Shard.open(path, size, "xyz")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"train-00000.arrow should have {size} bytes, found {size - 1}"):
        Shard.open(path, size)
    path.write_bytes(b"x" * size)
    with pytest.raises(DataError, match="is not a token shard"):
        Shard.open(path, size)
    path.unlink()
    with pytest.raises(DataError, match="found 0"):
        Shard.open(path, size)


def test_many_shards_hold_what_one_holds(tmp_path, corpus_file, data_dir):
    prepare([str(corpus_file)], tmp_path / "many", VOCAB_SIZE, validation=0.2, shard_tokens=500)
    one, many = TokenStore.open(data_dir, "train"), TokenStore.open(tmp_path / "many", "train")
    assert len(one.shards) == 1
    assert len(many.shards) > 3
    assert np.array_equal(one.shards[0].tokens, np.concatenate([shard.tokens for shard in many.shards]))
    assert load_manifest(data_dir).digest != load_manifest(tmp_path / "many").digest


def test_a_split_has_what_its_shards_have(data_dir, tmp_path):
    """A manifest with a seal of its own, but without its shards."""
    directory = shutil.copytree(data_dir, tmp_path / "data")
    document = unsealed(json.loads((directory / "manifest.json").read_text()))
    document["splits"]["train"]["shards"] = []
    (directory / "manifest.json").write_text(json.dumps(sealed(document)))
    with pytest.raises(DataError, match=r"documents and .* tokens in train of .*, found 0 and 0 in its shards"):
        TokenStore.open(directory, "train")
