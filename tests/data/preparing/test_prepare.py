import errno
import json
import shutil
import subprocess
import sys
from itertools import count, pairwise

import numpy as np
import pytest

from dsbert.base.errors import DataError, StorageError, UserError
from dsbert.base.progress import stage_bars
from dsbert.data.manifest import Manifest, load_manifest, load_unigram_counts
from dsbert.data.preparing import learning, merging, spool
from dsbert.data.preparing.corpus import read_documents
from dsbert.data.preparing.prepare import prepare
from dsbert.data.shards import TokenStore
from dsbert.data.tokenizer import load_tokenizer, tokenizer_digest
from tests.data.conftest import VOCAB_SIZE, make_text
from tests.data.preparing.test_split_assignment import is_held_out


def texts(data_dir, split: str) -> set[str]:
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    found = set()
    for shard in TokenStore.open(data_dir, split).shards:
        edges = shard.document_offsets.tolist()
        found |= {tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in pairwise(edges)}
    return found


def test_what_a_data_directory_says(data_dir, corpus_file):
    manifest = load_manifest(data_dir)
    document = json.loads((data_dir / "manifest.json").read_text())
    assert (document["kind"], document["version"]) == ("dsbert-data", 2)
    assert manifest.request.sources[0].name == str(corpus_file)
    assert manifest.tokenizer.digest == tokenizer_digest(load_tokenizer(data_dir / "tokenizer"))
    assert manifest.tokenizer.vocab_size == VOCAB_SIZE
    for split, entry in manifest.splits.items():
        store = TokenStore.open(data_dir, split)
        assert (store.num_documents, store.num_sentences, store.num_tokens) == (
            entry.documents,
            entry.sentences,
            entry.tokens,
        )
        assert sum(shard.tokens for shard in entry.shards) == entry.tokens
    counts = load_unigram_counts(data_dir)
    train = TokenStore.open(data_dir, "train")
    assert np.array_equal(counts, np.bincount(train.shards[0].tokens, minlength=VOCAB_SIZE))


def test_validation_documents_are_never_in_train(data_dir, corpus_file):
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    expected: dict[bool, set[str]] = {True: set(), False: set()}
    for document in read_documents([str(corpus_file)]):
        ids = [number for sentence in document for number in tokenizer.encode(sentence, add_special_tokens=False).ids]
        expected[is_held_out(document, 0.2)].add(tokenizer.decode(ids))
    assert texts(data_dir, "validation") == expected[True]
    assert texts(data_dir, "train") == expected[False]
    assert expected[True]
    assert expected[False]


def test_the_tokenizer_never_sees_the_validation_documents(tmp_path):
    common = [document for n in range(40) if not is_held_out([document := f"common words {n}"], 0.1)]
    held_out = next(document for n in count() if is_held_out([document := f"zebra {n}"], 0.1))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*common, held_out]))
    prepare([str(path)], tmp_path / "data", 200, validation=0.1)
    vocab = load_tokenizer(tmp_path / "data" / "tokenizer").get_vocab()
    assert "common" in vocab
    assert "z" not in vocab


def test_equal_requests_give_equal_bytes(tmp_path, data_dir, corpus_file):
    again = tmp_path / "again"
    result = prepare([str(corpus_file)], again, VOCAB_SIZE, validation=0.2)
    assert result["digest"] == load_manifest(data_dir).digest
    for path in again.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (data_dir / path.relative_to(again)).read_bytes(), path.name


def test_a_second_call_skips(tmp_path, corpus_file):
    target = tmp_path / "data"
    first = prepare([str(corpus_file)], target, VOCAB_SIZE)
    written = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    second = prepare([str(corpus_file)], target, VOCAB_SIZE)
    assert not first.pop("up_to_date")
    assert second.pop("up_to_date")
    assert first.pop("seconds") > second.pop("seconds")
    assert first == second
    keys = {
        *("documents", "sentences", "tokens", "duplicates", "shards", "digest", "dropped", "sources", "resumed"),
        *("mended", "mended_in", "unknown", "left_out"),
    }
    assert set(first) == keys
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 250}, "vocab_size 300 instead of 250"),
        ({"validation": 0.3}, r"validation 0\.2 instead of 0\.3"),
        ({"shard_tokens": 77}, "shard_tokens .* instead of 77"),
    ],
)
def test_another_request_is_refused(data_dir, corpus_file, changed, message):
    request = {"vocab_size": VOCAB_SIZE, "validation": 0.2, **changed}
    with pytest.raises(UserError, match=message + ".*--to"):
        prepare([str(corpus_file)], data_dir, **request)


def test_changed_text_is_another_request(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(10))
    prepare([str(path)], tmp_path / "data", VOCAB_SIZE)
    path.write_text(make_text(10, seed=1))
    with pytest.raises(UserError, match=r"sources .*text\.txt \(xxh3_128:"):
        prepare([str(path)], tmp_path / "data", VOCAB_SIZE)


def test_a_damaged_target_is_named(tmp_path, data_dir, corpus_file):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    shard = copy / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.arrow is missing or damaged"):
        prepare([str(corpus_file)], copy, VOCAB_SIZE, validation=0.2)


def test_other_peoples_directories_are_left_alone(tmp_path, corpus_file):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare([str(corpus_file)], tmp_path, VOCAB_SIZE)
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare([str(corpus_file)], corpus_file, VOCAB_SIZE)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_directory_is_filled(tmp_path, corpus_file):
    prepare([str(corpus_file)], tmp_path, VOCAB_SIZE)
    assert load_manifest(tmp_path)


def test_what_a_failure_leaves_is_gone_on_with(tmp_path, corpus_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
        with pytest.raises(StorageError, match=r"disk full.*run the same command again"):
            prepare([str(corpus_file)], tmp_path / "data", VOCAB_SIZE)
    assert [path.name for path in tmp_path.iterdir()] == [".data.preparing"]
    with monkeypatch.context() as patch:
        for name in ("spool_piece", "encode_piece", "merge_shard", "train_tokenizer"):
            module = next(m for m in (spool, merging, learning) if hasattr(m, name))
            patch.setattr(module, name, None)  # nothing of it must be done again
        result = prepare([str(corpus_file)], tmp_path / "data", VOCAB_SIZE)
    assert result["resumed"] == 4  # a piece read and encoded, and two shards
    assert load_manifest(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_duplicates_are_dropped_and_counted(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(10) + "\n" + make_text(10))
    result = prepare([str(path), str(path)], tmp_path / "data", VOCAB_SIZE)
    assert (result["documents"], result["duplicates"]) == (10, 30)


@pytest.mark.parametrize("validation", [1e-12, 1 - 1e-12])
def test_each_split_gets_a_document(tmp_path, validation):
    path = tmp_path / "text.txt"
    path.write_text(make_text(4))
    prepare([str(path)], tmp_path / "data", 60, validation=validation)
    splits = load_manifest(tmp_path / "data").splits
    assert sorted(split.documents for split in splits.values()) == [1, 3]


def test_one_document_is_not_split(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(1))
    with pytest.raises(UserError, match="one document"):
        prepare([str(path)], tmp_path / "data", 60)
    prepare([str(path)], tmp_path / "data", 60, validation=0)
    assert load_manifest(tmp_path / "data").splits["validation"].shards == ()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"validation": 1.0}, "validation fraction"),
        ({"validation": -0.1}, "validation fraction"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"vocab_size": 10}, "vocab_size 10 is too small"),
        ({"vocab_size": 1 << 70}, "vocab_size of at most"),
    ],
)
def test_impossible_requests(tmp_path, corpus_file, request_, message):
    with pytest.raises(UserError, match=message):
        prepare([str(corpus_file)], tmp_path / "data", **{"vocab_size": VOCAB_SIZE, **request_})
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no prepared data in .* dsbert prepare --source .* --to .* --vocab-size"),
        ("{", "is unreadable"),
        ("[]", "does not describe prepared data"),
        ('{"kind": "dsbert-data", "version": 99}', "version 99, expected 2"),
        ('{"kind": "dsbert-data", "version": 2, "request": {}}', "is damaged"),
    ],
)
def test_bad_manifests(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_names_the_command(tmp_path):
    with pytest.raises(UserError, match="dsbert prepare"):
        TokenStore.open(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="unreadable"):
        load_unigram_counts(tmp_path / "nowhere")


def test_progress_goes_to_standard_error(tmp_path, corpus_file, capfd):
    with stage_bars() as progress:
        prepare([str(corpus_file)], tmp_path / "data", VOCAB_SIZE, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert "encode" in err


def test_the_package_imports_nothing_heavy():
    program = (
        "import sys, dsbert.data.preparing.prepare, dsbert.data.prefetch;"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow', 'pandas', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
