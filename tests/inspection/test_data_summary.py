"""Looking at prepared data: `dsbert verify`, `dsbert data`, and copies on a node's own disk."""

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsbert.base.durable import sealed
from dsbert.base.errors import DataError, UserError
from dsbert.data import staging
from dsbert.data.manifest import load_manifest
from dsbert.data.preparing.wordpiece import train_tokenizer
from dsbert.data.shards import Shard, TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.staging import stage
from dsbert.data.stream import SampleStream
from dsbert.data.tokenizer import load_tokenizer, save_tokenizer
from dsbert.data.verification import verify_data
from dsbert.inspection.audit_data import audit_data
from dsbert.inspection.data_summary import inspect_data, report_lines
from tests.commands import dsbert, dsbert_process
from tests.data.conftest import make_text


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


def unsealed_by_force(document: dict) -> dict:
    return {key: value for key, value in document.items() if key != "xxh3"}


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
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('t": "', 't": "a')),
            "not what was written",
        ),
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
    (copy / "manifest.json").write_text(json.dumps(sealed(unsealed_by_force(manifest))))
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


def test_a_damaged_index_does_not_train_but_is_made_again(copy, capsys):
    """pretrain and evaluate open their data by the same calls."""
    stream = SampleStream.open(copy, "train", 32, 1)
    whole = stream.batch(0, stream.num_samples)
    for path in sorted(copy.glob("*-train-32/*.npy")):
        if not path.stat().st_size > 200:
            continue
        flip(path, 0.99)
        suspect = verify_data(copy, 32)
        assert suspect == [path.parent.name]
        again = SampleStream.open(copy, "train", 32, 1, suspect=suspect)
        assert np.array_equal(again.batch(0, again.num_samples).input_ids, whole.input_ids)
        assert "is not what was written: made again from the shards" in capsys.readouterr().err
        assert verify_data(copy, 32) == []


def test_ranks_share_the_reading(copy):
    SampleStream.open(copy, "train", 32, 1)
    for path in (copy / "tokenizer" / "vocab.txt", copy / "unigram.npy", copy / "validation-00000.arrow"):
        content = path.read_bytes()
        flip(path, 0.99)
        complaints = []
        for rank in range(3):
            try:
                verify_data(copy, 32, part=(rank, 3))
            except DataError as error:
                complaints.append(str(error))
        assert len(complaints) == 1
        assert path.name in complaints[0]
        path.write_bytes(content)
    flip(copy / "spans-train-32" / "start.npy", 0.9)
    assert [name for rank in range(3) for name in verify_data(copy, 32, part=(rank, 3))] == ["spans-train-32"]


class TestOfAStranger:
    """A directory whose checksums all fit, since its maker made them."""

    def changed(self, copy: Path, change: Callable[[dict], object]) -> tuple[int, str]:
        manifest = unsealed_by_force(json.loads((copy / "manifest.json").read_text()))
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
        for command in (["data", str(copy)], ["verify", str(copy)]):
            code, out, err = dsbert(*command)
            assert code in (2, 4), (command, out, err)
            assert "Traceback" not in err
        return code, out + err

    @pytest.mark.parametrize(
        "name", ["../../authorized_keys", "/etc/passwd", "a/b", ".hidden", "manifest.json", "", "x\n"]
    )
    def test_names_stay_inside(self, copy, tmp_path, name):
        def change(manifest: dict) -> None:
            manifest["splits"]["train"]["shards"][0]["file"] = name

        assert "plain name" in self.changed(copy, change)[1]
        with pytest.raises(UserError, match="plain name"):
            stage(copy, tmp_path / "stage" / "here")
        assert not (tmp_path / "stage").exists()

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m["files"].update({"../x": "0"}),
            lambda m: m.update(digest="../../x"),
            lambda m: m["splits"]["train"].update(tokens="many"),
            lambda m: m["splits"]["train"].update(tokens=-1),
            lambda m: m["splits"]["train"].update(tokens=1e9),
            lambda m: m["splits"]["train"].update(tokens=None),
            lambda m: m["splits"]["train"].update(shards={}),
            lambda m: m["splits"]["train"]["shards"][0].update(bytes=1 << 70),
            lambda m: m["splits"]["train"]["shards"][0].update(bytes=1 << 40),
            lambda m: m["splits"]["train"]["shards"][0].update(tokens=5),
            lambda m: m.update(tokenizer=[[]]),
            lambda m: m.update(more=1),
            lambda m: m.pop("splits"),
            lambda m: m.update(dropped=[1]),
        ],
    )
    def test_values_are_what_they_should_be(self, copy, change):
        self.changed(copy, change)

    @pytest.mark.parametrize("lengths", [[0, 10], [-5, 15], [2**31 - 1, 2], [3, 3], [10, 10]])
    def test_sentences_make_up_their_documents(self, copy, lengths):
        path = copy / "train-00000.arrow"
        digest = load_manifest(copy).tokenizer.digest
        shard = Shard(np.full(10, 9, np.uint16), np.array([0, 10]), np.array([0, 2]), np.array(lengths, np.int32))
        entry = shard.write(path, digest)
        with pytest.raises(DataError, match="sentences that make up"):
            SpanIndex.build(TokenStore([Shard.open(path)]), 32)

        def change(manifest: dict) -> None:
            manifest["splits"]["train"].update(shards=[vars(entry)], documents=1, sentences=2, tokens=10)

        assert "sentences that make up" in self.changed(copy, change)[1]

    def test_an_index_that_leaves_the_data(self, copy):
        store = TokenStore.open(copy, "train")
        for wrong in (-7, 1 << 50, store.num_tokens - 1):
            index = SpanIndex.build(store, 32)
            broken = dataclasses.replace(index, start=np.full_like(index.start, wrong))
            vocab = SampleStream.open(copy, "train", 32, 1).vocab
            pairs = SampleStream.open(copy, "train", 32, 1)._pairs
            with pytest.raises(DataError, match="found an index that leaves it"):
                SampleStream(store, broken, vocab=vocab, seq_len=32, seed=1, pairs=pairs).batch(0, 8)

    @pytest.mark.parametrize("kind", ["fifo", "folder", "device", "hole"])
    def test_whatever_stands_there_instead_of_a_file(self, copy, kind):
        SampleStream.open(copy, "train", 128, 1)
        for path in sorted(path for path in copy.rglob("*") if path.is_file()):
            content = path.read_bytes()
            path.unlink()
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "device":
                path.symlink_to("/dev/zero")
            else:
                with path.open("wb") as file:
                    file.truncate(1 << 40)
            problems = audit_data(copy).problems
            assert any(path.name in str(problem) for problem in problems), (path, problems)
            if not path.parent.name.startswith(("spans-", "pairs-")):
                with pytest.raises((UserError, DataError)):
                    inspect_data(copy)
            else:
                assert inspect_data(copy)["digest"]
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(content)


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

    def test_what_is_staged_is_read_before_it_is_used(self, copy, tmp_path):
        SampleStream.open(copy, "train", 32, 1)
        target = stage(copy, tmp_path / "local")
        for path in sorted(path for path in target.rglob("*") if path.is_file()):
            content = path.read_bytes()
            flip(path, 0.9)
            for rank in range(2):
                stage(copy, tmp_path / "local", (rank, 2))
            assert path.read_bytes() == content, path

    def test_a_disk_that_cannot_be_written(self, data_dir, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"expected to stage .* leave out data\.stage_to"):
            stage(data_dir, tmp_path / "file" / "local")
