"""Nothing vanishes: every file of a folder is read as what its name says, or named as left out with the reason."""

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from dsbert.base.errors import UserError
from dsbert.data.manifest import Manifest, load_manifest
from dsbert.data.preparing.folders import summarized
from dsbert.data.preparing.kinds import kind_of
from dsbert.data.preparing.plan import source_fingerprint
from dsbert.data.preparing.prepare import prepare
from dsbert.data.preparing.sources import resolve
from tests.commands import complaint, dsbert
from tests.data.conftest import make_text


def arguments(source: Path, to: Path, *more: str) -> list[str]:
    words = ["--vocab-size", "300", "--validation", "0.2", "--nproc", "1"]
    return ["prepare", "--source", str(source), "--to", str(to), *words, *more]


@pytest.fixture
def motley(tmp_path: Path) -> Path:
    """Five files with ten documents each, and one of everything else that stands in folders."""
    folder, elsewhere = tmp_path / "motley", tmp_path / "elsewhere"
    (folder / "Sub").mkdir(parents=True)
    elsewhere.mkdir()
    texts = [make_text(10, seed=seed) for seed in range(5)]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.TXT").write_text(texts[1])
    (folder / "c.Text").write_text(texts[2])
    (folder / "Sub" / "d.TXT.GZ").write_bytes(gzip.compress(texts[3].encode()))
    (elsewhere / "0123abcd").write_bytes(gzip.compress(texts[4].encode()))  # a blob, as in the hub's cache
    (folder / "e.txt.gz").symlink_to(elsewhere / "0123abcd")
    for name in ("notes.md", "archive.tar.gz", "page.html", "part-00000", "packed.gz", "a.txt~"):
        (folder / name).write_text("some words to be left out")
    (folder / "dataset_infos.json").write_text("{}")
    for name in (".hidden.txt", "_SUCCESS"):
        (folder / name).write_text("some words to be left out")
    (folder / ".git").mkdir()
    (folder / "gone.txt").symlink_to(elsewhere / "nothing")
    (folder / "ring.txt").symlink_to("ring.txt")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "empty.txt").touch()
    (folder / "empty.txt.xz").touch()
    (folder / "blank.txt").write_text(" \n\n\t\n")
    (folder / "tiny.txt.gz").write_bytes(gzip.compress(b"two words\n"))
    (folder / "bad\x1b[31mname\udcff.doc").write_text("some words to be left out")
    return folder


MOTLEY = {
    "description of a data set": ["dataset_infos.json"],
    "empty": ["empty.txt", "empty.txt.xz"],
    "folder read already": ["again/"],
    "hidden": [".git", ".hidden.txt", "_SUCCESS"],
    "link to nothing": ["gone.txt", "ring.txt"],
    "no regular file": ["pipe.txt", "zero.txt"],
    "no text": ["blank.txt", "tiny.txt.gz"],
    "unknown kind": [
        "a.txt~", "archive.tar.gz", "bad\\x1b[31mname\\udcff.doc", "notes.md", "packed.gz", "page.html", "part-00000",
    ],
}  # fmt: skip


def test_every_file_is_read_or_named(motley, tmp_path):
    done = dsbert(*arguments(motley, tmp_path / "data", "--json"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["documents"] == 50
    expected = {
        reason: {"files": len(names), "names": [f"{motley}/{name}" for name in names]}
        for reason, names in MOTLEY.items()
    }
    assert summary["left_out"] == expected
    assert load_manifest(tmp_path / "data").left_out == expected
    shown = dsbert("data", str(tmp_path / "data"))
    assert f"left out     2 no text: {motley}/blank.txt, {motley}/tiny.txt.gz\n" in shown.stdout
    (motley / "new.docx").touch()
    again = dsbert(*arguments(motley, tmp_path / "data"))
    assert again.returncode == 0, again.stderr
    assert "is up to date" in again.stdout
    assert f"2 empty: {motley}/empty.txt, {motley}/empty.txt.xz\n" in again.stdout
    assert "8 unknown kind: " in again.stdout
    assert "and 3 more" in again.stdout
    assert "\x1b" not in again.stdout


def test_where_nothing_is_left_out_that_is_said(corpus_file, tmp_path):
    done = dsbert(*arguments(corpus_file, tmp_path / "data"))
    assert "left_out       no file" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(motley):
    (motley / "b.TXT").chmod(0)
    (motley / "Sub").chmod(0)
    left_out = summarized(resolve([str(motley)])[0].left_out)
    assert left_out["unreadable"]["names"] == [f"{motley}/Sub/", f"{motley}/b.TXT"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"), ("a.TXT", "text"), ("a.Txt.Zst", "text"), ("a.JSONL", "json"), ("a.ndjson", "json"),
        ("a.JSONL.GZ", "json"), ("a.csv", "csv"), ("a.TSV.bz2", "csv"), ("a.PARQUET", "parquet"),
        ("a.parquet.gz", None), ("a.tar.gz", None), ("a.tgz", None), ("a.gz", None), ("a", None), (".txt", None),
        ("a.txt.gz.gz", None), ("txt", None), ("a.arrow", None), ("a.md", None),
    ],
)  # fmt: skip
def test_the_name_says_the_kind(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("name", ["a.md", "a.tar.gz", "a.zip", "corpus", "a.gz", "a.pdf", "a.parquet.gz"])
def test_a_file_of_an_unknown_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text(make_text(10))
    line = complaint(dsbert(*arguments(tmp_path / name, tmp_path / "data")))
    assert f"found {tmp_path / name}, whose name does not say what it is" in line
    (tmp_path / "link.txt").symlink_to(name)
    assert resolve([str(tmp_path / "link.txt")])[0].files[0].kind == "text"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "found an empty name"),
        (" \t", "found an empty name"),
        ("gone.txt", "check where the link leads to"),
        ("pipe", "found a pipe, a socket or a device"),
        ("socket", "found a pipe, a socket or a device"),
        ("/dev/zero", "found a pipe, a socket or a device"),
        ("a" * 5000, "neither a text file"),
        ("barren", r"without a text file: .*found 1 hidden: .*; 2 unknown kind: .*barren/a.md, .*barren/b.md"),
        ("hollow", r"hollow is empty: expected a document of enough words"),
    ],
)
def test_what_is_no_source_is_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(make_text(10))  # which an empty name once took
    (tmp_path / "gone.txt").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.close()
    for folder, names in (("barren", (".x.txt", "a.md", "b.md")), ("hollow", ("a.txt", "b.txt"))):
        (tmp_path / folder).mkdir()
        for file in names:
            (tmp_path / folder / file).touch()
    with pytest.raises(UserError, match=message) as caught:
        prepare([name, "a.txt"], tmp_path / "data", 300)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_named_twice_is_read_twice_and_dropped_once(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(10))
    (tmp_path / "b.txt").symlink_to("a.txt")
    made = prepare([str(tmp_path), str(tmp_path / "a.txt")], tmp_path / "data", 300)
    assert (made["documents"], made["duplicates"]) == (10, 20)


def test_documents_without_a_token_are_counted(tmp_path):
    """Characters that the tokenizer takes for none: three words for us, and nothing for it."""
    path = tmp_path / "a.txt"
    path.write_text(make_text(20) + "\n\u200d\u200d \u200d \u200d\u200d\u200d\n")
    made = prepare([str(path)], tmp_path / "data", 300, validation=0)
    assert (made["documents"], made["dropped"]["tokenless"], made["dropped"]["tiny"]) == (20, 1, 0)
    assert "1 tokenless" in dsbert("data", str(tmp_path / "data")).stdout


def test_the_fingerprint_of_several_files_never_changes():
    """It stands in manifests: data that was prepared is to be found up to date. Empty files are not part of it."""
    files = [
        {"fingerprint": f"xxh3_128:{name}", "pieces": pieces} for name, pieces in (("aa", [1]), ("", []), ("bb", [1]))
    ]
    assert source_fingerprint(files) == "2 files: 0c86564f7ba856d4319d53e03fabf504"
    assert source_fingerprint(files[:2]) == "xxh3_128:aa"


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for number, document in enumerate(make_text(600, seed=3).strip().split("\n\n")):
        (folder / f"{number:04d}.txt").write_text(document + "\n")
    (folder / "0300.txt").write_text("")
    (folder / "0301.txt").write_text("two words")
    return folder


def test_small_files_share_tasks_and_change_nothing(small_files, tmp_path, monkeypatch):
    """What each task costs would add up; the digest is that of one file with the same text."""
    one = tmp_path / "one.txt"
    one.write_text("\n\n".join(path.read_text() for path in sorted(small_files.iterdir())))
    whole = prepare([str(one)], tmp_path / "whole", 400)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([str(small_files)], tmp_path / "data", 400)
    assert len(list((tmp_path / ".data.preparing").glob("*.facts.npy"))) == 3
    made = prepare([str(small_files)], tmp_path / "data", 400, nproc=2)
    assert made["digest"] == whole["digest"]
    assert made["resumed"] >= 6
    assert made["left_out"] == {
        "empty": {"files": 1, "names": [str(small_files / "0300.txt")]},
        "no text": {"files": 1, "names": [str(small_files / "0301.txt")]},
    }
    assert made["dropped"]["tiny"] == whole["dropped"]["tiny"] == 1
