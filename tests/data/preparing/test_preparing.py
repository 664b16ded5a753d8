"""Preparations that are shared, interrupted and killed; input that is wrong. Real processes, real signals."""

import gzip
import json
import lzma
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsbert.data.manifest import SPLITS, Manifest, load_manifest
from dsbert.data.pairs import Pairs
from dsbert.data.preparing import pieces
from dsbert.data.preparing.prepare import prepare
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import SampleStream
from tests.commands import dsbert
from tests.data.conftest import make_text

BIN = Path(sys.executable).parent
# Small pieces, for a corpus that is prepared in seconds.
CUT = "import dsbert.data.preparing.pieces as p; p.PIECE_BYTES = 20_000; from dsbert.cli import main; main()"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files, which a piece size of 20 kB cuts into some thirty pieces; with copies across files."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(make_text(400, seed=1))
    (folder / "b.txt.xz").write_bytes(lzma.compress(make_text(200, seed=2).encode()))
    (folder / "c.txt.gz").write_bytes(gzip.compress((make_text(50, seed=1) + "\n" + make_text(100, seed=3)).encode()))
    return folder


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> dict:
    """What one process makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 20_000)
        return prepare([str(corpus)], tmp_path_factory.mktemp("alone") / "data", 400, shard_tokens=50_000)


@pytest.fixture(scope="module")
def digest(corpus, tmp_path_factory) -> str:
    """Of what one process makes of it, in whole pieces."""
    made: str = prepare([str(corpus)], tmp_path_factory.mktemp("whole") / "data", 400)["digest"]
    return made


def arguments(corpus: Path, to: Path, *more: str) -> list[str]:
    return ["prepare", "--source", str(corpus), "--to", str(to), "--vocab-size", "400", "--json", *more]


def test_piece_size_and_processes_change_nothing(corpus, alone, tmp_path):
    assert alone["duplicates"] == 50
    whole = prepare([str(corpus)], tmp_path / "whole", 400, shard_tokens=50_000)
    two = prepare([str(corpus)], tmp_path / "two", 400, shard_tokens=50_000, nproc=2)
    assert alone["digest"] == whole["digest"] == two["digest"]
    for path in (tmp_path / "two").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "two")).read_bytes()


def test_samples_are_indexed_where_their_length_is_given(corpus, tmp_path, monkeypatch):
    """Then the first start, with its many ranks, makes none."""
    to = tmp_path / "data"
    assert dsbert(*arguments(corpus, to, "--seq-len", "32", "--seq-len", "64"))[0] == 0
    made = sorted(path.name for path in to.glob("*-*-*"))
    assert made == sorted(f"{kind}-{split}-{n}" for kind in ("pairs", "spans") for split in SPLITS for n in (32, 64))
    for module in (SpanIndex, Pairs):
        monkeypatch.setattr(module, "build", None)
    for split in SPLITS:
        assert SampleStream.open(to, split, 32, seed=1).num_samples
    code, _, err = dsbert(*arguments(corpus, tmp_path / "other", "--seq-len", "5"))
    assert (code, err) == (2, "dsbert: seq_len must be in [8, 32768], got 5\n")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_under_mpiexec(corpus, digest, tmp_path):
    command = [str(BIN / "mpiexec"), "-n", "2", sys.executable, "-c", CUT, *arguments(corpus, tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # of one rank alone
    assert summary["digest"] == digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".data")] == []
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr  # no rank waits for work on data that is there
    assert json.loads(done.stdout)["up_to_date"]


def processes_of(parent: int) -> list[int]:
    """Its living children."""
    found = []
    for process in psutil.Process(parent).children():
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_for(condition, seconds: float = 100.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["read", "encode"])
def test_killed_in_the_middle_and_run_again(corpus, digest, tmp_path, stage):
    """KILL of the whole: its workers die with it, what was published stays, and is not made again."""
    command = [sys.executable, "-c", CUT, *arguments(corpus, tmp_path / "data", "--nproc", "2")]
    work = tmp_path / ".data.preparing"

    def pieces_done() -> list[Path]:
        if stage == "encode":
            return list(work.glob("*.train.arrow"))
        # The marker comes last: without it a piece is not done.
        return [path for path in work.glob("*.facts.npy") if Path(str(path).replace("facts.npy", "json")).exists()]

    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: len(pieces_done()) >= 3)
        workers = processes_of(running.pid)
        running.kill()
    finally:
        running.kill()
        running.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)
    assert not (tmp_path / "data").exists()
    before = {path: path.stat().st_mtime_ns for path in work.iterdir() if path.suffix == ".json"}
    assert before
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["digest"] == digest
    assert summary["resumed"] >= 3
    assert not work.exists()


def test_a_killed_worker_loses_nothing(corpus, digest, tmp_path):
    command = [sys.executable, "-c", CUT, *arguments(corpus, tmp_path / "data", "--nproc", "2")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        work = tmp_path / ".data.preparing"
        wait_for(lambda: list(work.glob("*.facts.npy")))
        os.kill(wait_for(lambda: processes_of(running.pid))[0], signal.SIGKILL)
        out, err = running.communicate(timeout=200)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, err
    assert json.loads(out)["digest"] == digest


@pytest.mark.slow
def test_a_killed_rank_loses_nothing(corpus, digest, tmp_path):
    """Without a launcher that ends the others: what the dead rank was at is done by those that are left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    impatient = f"import dsbert.data.preparing.work_queue as c; c.PATIENCE_S = c.LEAVE_S = 1.0; {CUT}"
    command = [sys.executable, "-c", impatient, *arguments(corpus, tmp_path / "data")]
    ranks = []
    try:
        for rank in range(2):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1"}
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        wait_for(lambda: len(list((tmp_path / ".data.preparing").glob("*.facts.npy"))) >= 4)
        ranks[1].kill()
        out, err = ranks[0].communicate(timeout=200)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 0, err
    assert json.loads(out)["digest"] == digest


def test_what_a_power_cut_has_torn_is_made_again(corpus, digest, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus)], tmp_path / "data", 400)
    work = tmp_path / ".data.preparing"
    spooled, encoded = (sorted(work.glob(f"*.{kind}"))[0] for kind in ("facts.npy", "train.arrow"))
    spooled.write_bytes(b"")
    content = bytearray(encoded.read_bytes())
    content[len(content) // 2] ^= 1
    encoded.write_bytes(content)
    sorted(path for path in work.glob("*.json"))[-1].write_text("{")
    assert prepare([str(corpus)], tmp_path / "data", 400)["digest"] == digest


def test_a_given_tokenizer_that_changed_meanwhile_is_the_one_used(corpus_file, data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    shutil.copytree(data_dir / "tokenizer", folder)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus_file)], tmp_path / "data", tokenizer=str(folder))
    prepare([str(corpus_file)], tmp_path / "other", 80)
    shutil.copy(tmp_path / "other" / "tokenizer" / "tokenizer.json", folder)
    prepare([str(corpus_file)], tmp_path / "data", tokenizer=str(folder))
    manifest = load_manifest(tmp_path / "data")
    assert manifest.tokenizer.digest == manifest.request.tokenizer


def test_what_an_interrupted_call_left_is_not_kept(corpus_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([str(corpus_file)], tmp_path / "data", 300, validation=0.5)
    (tmp_path / ".data.preparing" / "data" / ".train-00000.arrow.123.tmp").write_bytes(b"of a merge that was killed")
    prepare([str(corpus_file)], tmp_path / "data", 300, validation=0)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "manifest.json", "tokenizer", "train-00000.arrow", "unigram.npy",
    }  # fmt: skip


def test_a_link_to_an_empty_directory_is_filled(corpus_file, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "large disk")
    prepare([str(corpus_file)], tmp_path / "data", 300)
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "large disk" / "manifest.json").exists()


def test_two_at_once_are_told_apart(corpus, tmp_path):
    import fcntl

    work = tmp_path / ".data.preparing"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = dsbert(*arguments(corpus, tmp_path / "data"))
    assert code == 2
    assert "expected no other preparation" in err


def complaint(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("dsbert: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def truncated_xz(folder: Path) -> tuple[Path, str]:
    path = folder / "cut.txt.xz"
    path.write_bytes(lzma.compress(make_text(50).encode())[:-300])
    return path, "cannot read .*cut.txt.xz: .*expected a whole file"


def truncated_gz(folder: Path) -> tuple[Path, str]:
    path = folder / "cut.txt.gz"
    path.write_bytes(gzip.compress(make_text(50).encode())[:-300])
    return path, "cannot read .*cut.txt.gz"


def truncated_zst(folder: Path) -> tuple[Path, str]:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(make_text(50).encode())
    path = folder / "cut.txt.zst"
    path.write_bytes(sink.getvalue().to_pybytes()[:-300])
    return path, "cannot read .*cut.txt.zst"


def no_column(folder: Path) -> tuple[Path, str]:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"content": ["One. Two."], "id": [1]}), path)
    return path, "expected a column 'text' in .*a.parquet, found content, id: give --text-column"


def wrong_type(folder: Path) -> tuple[Path, str]:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    return path, "expected text in column 'text' of .*a.parquet, found int64"


def truncated_parquet(folder: Path) -> tuple[Path, str]:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["One. Two."] * 99}), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path, "cannot read .*a.parquet: .*expected a parquet file"


def latin(folder: Path) -> tuple[Path, str]:
    path = folder / "latin.txt"
    path.write_bytes(b"plain words here\n\ncaf\xe9 is open\n")
    return path, r"latin.txt is not UTF-8 text at byte 21 \(.* 0xe9\): convert it"


def empty(folder: Path) -> tuple[Path, str]:
    path = folder / "empty.txt"
    path.write_bytes(b"")
    return path, "empty.txt is empty: expected text in it"


def blank(folder: Path) -> tuple[Path, str]:
    path = folder / "blank.txt.gz"
    path.write_bytes(gzip.compress(b" \n\n a b\n"))
    return path, "blank.txt.gz is empty: expected a document of enough words, found 1 with too few"


def no_json(folder: Path) -> tuple[Path, str]:
    path = folder / "a.jsonl"
    path.write_text('{"text": "One two three four."}\n{"text": \n')
    return path, "expected one JSON object a line in .*a.jsonl"


MISTAKES = [
    truncated_xz, truncated_gz, truncated_zst, no_column, wrong_type, truncated_parquet, latin, empty, blank, no_json,
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_bad_input_is_one_line_and_nothing_is_lost(tmp_path, mistake):
    """Beside a good file, whose work stays: the second call, without the bad one, finds it done."""
    good = tmp_path / "good.txt"
    good.write_text(make_text(30))
    bad, message = mistake(tmp_path)
    words = ["--to", str(tmp_path / "data"), "--vocab-size", "300", "--json", "--nproc", "1"]
    code, out, err = dsbert("prepare", "--source", str(good), "--source", str(bad), *words)
    assert code == 2, err
    assert out == ""
    assert re.search(message, complaint(err)), err
    code, out, err = dsbert("prepare", "--source", str(good), *words)
    assert code == 0, err
    if mistake in (truncated_xz, latin, no_json, blank):  # found when read, not when looked at
        assert json.loads(out)["resumed"] >= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_is_gone_on_with(corpus, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        command = [sys.executable, "-c", CUT, *arguments(corpus, disk / "data", "--nproc", "2")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 74, done.stderr
        line = complaint(done.stderr)
        assert "No space left on device" in line
        assert "run the same command again" in line
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["resumed"] >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_near_copies_are_dropped_if_asked_for(tmp_path, monkeypatch):
    documents = make_text(20, seed=5, longest=25).strip().split("\n\n")
    long = max(documents, key=len)
    near = long.replace(long.split()[40], "quaqua", 1)
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress("\n\n".join([*documents, near]).encode()))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)  # so that there are pieces without a document, too
    plain = prepare([str(path)], tmp_path / "plain", 300)
    assert (plain["documents"], plain["dropped"]["near_duplicates"]) == (21, 0)
    result = prepare([str(path)], tmp_path / "near", 300, near_duplicates=True)
    assert (result["documents"], result["dropped"]["near_duplicates"]) == (20, 1)
    assert result["digest"] == prepare([str(path)], tmp_path / "again", 300, near_duplicates=True)["digest"]


def test_a_given_tokenizer_is_kept(tmp_path, data_dir, corpus_file):
    made = prepare([str(corpus_file)], tmp_path / "data", tokenizer=str(data_dir / "tokenizer"), validation=0.2)
    assert made["digest"] == load_manifest(data_dir).digest
    code, _, err = dsbert(
        "prepare", "--source", str(corpus_file), "--to", str(tmp_path / "x"), "--tokenizer", "no/such"
    )
    assert (code, "expected a directory with tokenizer.json, or a name on the hub" in err) == (2, True)
