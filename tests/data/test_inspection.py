"""Looking at prepared data: `dsbert verify`, `dsbert data`, and copies on a node's own disk."""

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from dsbert.auditing.data import audit_data
from dsbert.data import staging
from dsbert.data.inspection import inspect_data, report_lines
from dsbert.data.manifest import load_manifest
from dsbert.data.shards import TokenStore
from dsbert.data.staging import stage
from dsbert.data.stream import SampleStream
from dsbert.data.tokenizer import load_tokenizer, save_tokenizer
from dsbert.data.wordpiece import train_tokenizer
from dsbert.errors import DataError, UserError
from tests.commands import dsbert, dsbert_process
from tests.data.conftest import make_text


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


@pytest.fixture
def copy(data_dir, tmp_path) -> Path:
    return shutil.copytree(data_dir, tmp_path / "data")


def test_verify_says_ok(data_dir):
    code, out, _ = dsbert("verify", str(data_dir), "--json")
    report = json.loads(out)
    assert (code, report["kind"], report["ok"], report["problems"]) == (0, "data", True, [])
    shards = [shard for split in load_manifest(data_dir).splits.values() for shard in split.shards]
    assert report["bytes"] == sum(shard.bytes for shard in shards)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-00000.arrow", flip, "checksum differs"),
        ("validation-00000.arrow", lambda path: path.unlink(), "missing"),
        ("validation-00000.arrow", lambda path: path.write_bytes(b""), "checksum differs"),
        ("unigram.npy", lambda path: np.save(path, np.load(path) + 1), "how often each token"),
        ("unigram.npy", lambda path: path.write_bytes(b"x"), "unreadable"),
        ("tokenizer/tokenizer.json", lambda path: path.unlink(), "no tokenizer"),
        ("manifest.json", lambda path: path.write_text("{"), "unreadable"),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace('t": "', 't": "a')), "digest"),
    ],
)
def test_verify_names_what_is_damaged(copy, file, damage, message):
    damage(copy / file)
    code, out, _ = dsbert("verify", str(copy), "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (4, False)
    assert any(entry["file"] == file and message in entry["problem"] for entry in report["problems"]), report


def test_verify_sees_a_flipped_bit_in_any_file(copy):
    inspect_data(copy, 32)  # makes the sample indices
    assert not audit_data(copy).problems
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        for share in (0.3, 0.99):
            flip(path, share)
            assert str(path.relative_to(copy)) in {problem.file for problem in audit_data(copy).problems}, (path, share)
            path.write_bytes(content)
    shutil.rmtree(copy / "spans-train-32")  # nothing but time is lost
    assert not audit_data(copy).problems


def test_a_damaged_shard_does_not_train(copy):
    flip(copy / "train-00000.arrow")
    code, _, err = dsbert_process("pretrain", "demo", f"data.path={copy}", "--run-dir", str(copy.parent / "run"))
    assert code == 4, err
    assert "train-00000.arrow as it was prepared" in err
    assert "Traceback" not in err


def test_shards_of_another_tokenizer_do_not_train(copy):
    save_tokenizer(train_tokenizer(make_text(30, seed=9).split("\n"), 250), copy / "tokenizer")
    with pytest.raises(UserError, match=r"expected the tokenizer .* with which its shards were encoded"):
        SampleStream.open(copy, "train", 32, 1)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["digest"] = "0" * 32
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="shards of two preparations were mixed"):
        TokenStore.open(copy, "train")


def test_what_data_shows(data_dir):
    code, out, _ = dsbert("data", str(data_dir), "--seq-len", "32", "--examples", "2", "--json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads(json.dumps(inspect_data(data_dir, 32, 2)))
    train = report["splits"]["train"]
    store = TokenStore.open(data_dir, "train")
    assert (train["documents"], train["tokens"]) == (store.num_documents, store.num_tokens)
    lengths = np.concatenate([shard.sentence_lengths for shard in store.shards])
    assert train["sentence_tokens"][0] == lengths.min()
    assert train["sentence_tokens"][-1] == lengths.max()
    stream = SampleStream.open(data_dir, "train", 32, 1)
    batch = stream.batch(0, stream.num_samples)
    assert 1 - batch.attention_mask.mean() == pytest.approx(train["padding"])
    assert len(report["examples"]) == 2
    assert all("->" in example["text"] and example["text"].startswith("[CLS]") for example in report["examples"])
    lines = list(report_lines(report))
    assert any("documents" in line for line in lines)
    assert dsbert("data", str(data_dir.parent / "nowhere"))[0] == 2


def test_examples_give_the_text_back(data_dir):
    stream = SampleStream.open(data_dir, "train", 32, 1, nsp=False)
    example = inspect_data(data_dir, 32, 1, seed=1, nsp=False)["examples"][0]["text"]
    batch = stream.batch(0, 1)
    ids = batch.input_ids.copy()
    ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
    expected = load_tokenizer(data_dir / "tokenizer").decode(ids[0].tolist())
    shown = re.sub(r"\[([^\[\]]*)->(?:\[MASK\]|[^\]]*)\]", r"\1", example).removeprefix("[CLS]").removesuffix("[SEP]")
    assert shown.replace(" ", "") == expected.replace(" ", "")
    assert example.count("->") == len(batch.mlm_labels)


class TestStaging:
    def test_copies_once_and_reads_the_same(self, data_dir, tmp_path, monkeypatch):
        SampleStream.open(data_dir, "train", 32, 1)  # so that there is an index to copy
        target = stage(data_dir, tmp_path / "local")
        assert target.parent == tmp_path / "local"
        assert np.array_equal(
            SampleStream.open(target, "train", 32, 1).batch(3, 9).input_ids,
            SampleStream.open(data_dir, "train", 32, 1).batch(3, 9).input_ids,
        )
        monkeypatch.setattr(staging, "_copy", None)  # a second call must not copy
        assert stage(data_dir, tmp_path / "local") == target
        assert stage(data_dir, None) == data_dir

    def test_many_at_once(self, data_dir, tmp_path, monkeypatch):
        copied = []
        real = staging._copy
        monkeypatch.setattr(staging, "_copy", lambda *args: copied.append(args[1].name) or real(*args))
        threads = [threading.Thread(target=stage, args=(data_dir, tmp_path / "local")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(copied) == ["train-00000.arrow", "validation-00000.arrow"]

    def test_a_changed_shard_is_not_copied(self, copy, tmp_path):
        flip(copy / "train-00000.arrow")
        with pytest.raises(DataError, match=r"expected .*train-00000\.arrow as it was prepared"):
            stage(copy, tmp_path / "local")

    def test_a_disk_that_cannot_be_written(self, data_dir, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"expected to stage .* leave out data\.stage_to"):
            stage(data_dir, tmp_path / "file" / "local")
