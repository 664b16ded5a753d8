"""Records of a run and of a checkpoint that are damaged, forged, lost, or no files at all: a line, or no notice; never
a traceback, never a wait without end, and never a run that begins anew where there was one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsbert.training.attempts import Attempt
from tests.commands import ENVIRONMENT, SMALL, dsbert, dsbert_process
from tests.inspection.test_auditing import assert_found, edit_manifest, edit_state, edit_topology, enter, forge, verify

WRONG: list[Any] = [None, "x", "", [], [1, "x"], {}, {"x": None}, -1, 10**30, True, 1.5, float("inf")]
SMALL_RECORDS = ("attempt.json", "status.json")
JOURNALS = ("attempts.jsonl", "metrics.jsonl", "masks.jsonl")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    return tmp_path / "run"


@contextmanager
def bounded(seconds: float = 60.0) -> Iterator[None]:
    """Fails instead of waiting for ever."""

    def late(*unused: Any) -> None:
        raise AssertionError(f"still at work after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def says_one_line(*words: str) -> int:
    """Of a command that may find anything: no traceback, and one line if it complains."""
    with bounded():
        done = dsbert(*words)
    assert done.returncode in (0, 2, 4), (words, done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    if done.returncode and words[0] != "verify":
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("dsbert: skipped a damaged")]
        assert len(said) == 1, done.stderr
        assert said[0].startswith("dsbert: ")
    return done.returncode


def begin(run: Path, data: Path) -> Attempt:
    """What rank 0 does with the records of a run before it goes on."""
    from dsbert.training.run_directory import RunDirectory
    from tests.workbench import recipe

    directory, small = RunDirectory(run), recipe(data={"path": str(data)})
    directory.mark("again")
    checkpoint = directory.find_checkpoint("auto", 0, 1)
    assert checkpoint is not None
    identity = json.loads((checkpoint / "state.json").read_text())["identity"]
    attempt = directory.open_attempt(small, identity, checkpoint, "again", 1)
    for journal in (directory.metrics, directory.journal):
        journal.cut_back(12, attempt.number)
        journal.append({"step": 13})
        journal.close()
    directory.assert_owner(attempt)
    directory.note_saved(attempt, "step_00000013")
    assert not directory.has_ended(attempt)
    directory.set_status(attempt, "done", 13)
    return attempt


def places(record: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """Paths to every field; of tables and lists of the same kind of thing, to the first one."""
    if not depth or not isinstance(record, dict):
        return
    alike = len({type(value) for value in record.values()}) == 1 and len(record) > 8
    for key in list(record)[:1] if alike else record:
        yield (key,)
        yield from ((key, *rest) for rest in places(record[key], depth - 1))


def put(record: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        record = record[key]
    record[place[-1]] = value


# Wrong kinds of content

some_or_all = pytest.mark.parametrize(
    "share",
    [
        pytest.param(len(WRONG), marks=pytest.mark.slow, id="some"),
        pytest.param(1, marks=pytest.mark.exhaustive, id="all"),
    ],
)


@some_or_all
def test_any_field_of_a_record_may_be_anything(share: int, copy: Path, data: Path, tmp_path: Path) -> None:
    """share: every so manyth value, another one in each place."""
    for name in (*SMALL_RECORDS, *JOURNALS):
        needed = {"number", "nonce", "attempt", "step", "update", "digest", "layers"}
        needed -= {"step"} if name == "status.json" else set()  # of one that has just begun
        lines = (copy / name).read_text().splitlines()
        record = json.loads(lines[-1])
        for number, place in enumerate(places(record, 2)):
            if name == "masks.jsonl" and place[0] == "layers" and len(place) > 1:
                continue  # replayed, below
            again = tmp_path / "again"
            shutil.copytree(copy, again, ignore=shutil.ignore_patterns("checkpoints"))
            (again / "checkpoints").symlink_to(copy / "checkpoints")
            for value in WRONG[number % share :: share]:
                wrong = json.loads(lines[-1])
                put(wrong, place, value)
                text = "\n".join([*lines[:-1], json.dumps(wrong)]) + "\n"
                (again / name).write_text(text)
                assert verify(again)["ok"] is False or value is not None or place[-1] not in needed, (name, place)
                if value == WRONG[number % len(WRONG)]:
                    assert begin(again, data).number >= 1
                    shutil.copy(copy / name, again / name)
            shutil.rmtree(again)


@some_or_all
@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_any_field_of_a_checkpoint_may_be_anything(file: str, share: int, copy: Path, tmp_path: Path) -> None:
    """With right checksums, as a stranger's: the commands say a line, and a run takes the checkpoint before."""
    from dsbert.checkpoint.loading import checkpoint_problems, newest_checkpoint

    original = copy / "checkpoints" / "step_00000012"
    loaded = []
    for number, place in enumerate(places(json.loads((original / file).read_text()))):
        if share > 1 and number % 4:
            continue  # each costs several commands
        for value in WRONG[number // 4 % share :: share]:
            again = tmp_path / "again" / original.name
            shutil.copytree(original, again)
            edit = edit_state if file == "state.json" else edit_manifest
            edit(again, partial(put, place=place, value=value))
            says_one_line("verify", str(again))
            if checkpoint_problems(again):
                if number % 5 == 0 or share > 1:
                    assert says_one_line("inspect", str(again)) == 4
            else:
                loaded.append((place, value))
                for words in (("inspect",), ("inspect", "--kernels"), ("diff", str(original))):
                    says_one_line(*words, str(again))
            shutil.rmtree(again)
    free = {"recipe", "identity", "precision", "totals", "engine", "kernels", "created", "attempt"}
    free |= {"adam_step", "zero_stage", "vocab_size", "layers", "params", "deepspeed", "numerics"}
    assert {place[0] for place, _ in loaded} <= free, loaded
    edit_state(original, lambda state: state.update(step="12"))
    newest, skipped = newest_checkpoint(copy / "checkpoints")
    assert newest == copy / "checkpoints" / "step_00000006"
    assert "expected a valid step, found '12'" in skipped[0]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2]", b"a: [", b"", b"- 1\n- 2", b"\0" * 5000])
def test_other_records_may_hold_anything(content: bytes, copy: Path, data: Path) -> None:
    for name in ("config.yaml", "wandb_id", "checkpoints/latest", "companions/unigram.npy"):
        (copy / name).write_bytes(content)
    for beat in (copy / "heartbeats").rglob("0*.json"):
        beat.write_bytes(content)
    says_one_line("verify", str(copy))
    begin(copy, data)
    from dsbert.training.wandb_run import run_id

    assert len(run_id(copy)) == 8


# A checkpoint that is not what it says


def test_a_topology_of_another_checkpoint_is_not_loaded(copy: Path) -> None:
    from dsbert.checkpoint.loading import newest_checkpoint

    older, newer = (copy / "checkpoints" / name for name in ("step_00000006", "step_00000012"))
    forge(newer, "topology.safetensors", (older / "topology.safetensors").read_bytes())
    assert_found(newer, "topology.safetensors", "expected the topology ")
    found, skipped = newest_checkpoint(copy / "checkpoints")
    assert found == older
    assert "expected the topology " in skipped[0]
    done = dsbert("inspect", str(newer))
    assert done.returncode == 4
    assert "topology.safetensors: expected the topology " in done.stderr


def test_slots_that_changed_places_are_another_topology(copy: Path) -> None:
    """Each block would get the weights of another."""
    from dsbert.checkpoint.loading import checkpoint_problems

    checkpoint = copy / "checkpoints" / "step_00000012"

    def swap(tensors: dict[str, Any]) -> None:
        for part in ("rows", "cols"):
            key = next(key for key in tensors if key.endswith(part))
            tensors[key] = tensors[key][::-1].copy()

    edit_topology(checkpoint, swap)
    assert [problem.file for problem in checkpoint_problems(checkpoint)] == ["topology.safetensors"]


def test_fragments_that_overlap_do_not_count_twice(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from dsbert.base.errors import CheckpointError
    from dsbert.checkpoint.loading import fragment_reader
    from tests.inspection.test_auditing import FRAGMENTS, INDEX, index_of

    checkpoint = copy / "checkpoints" / "step_00000012"
    first, second = (checkpoint / name for name in FRAGMENTS)
    split = next(name for name in index_of(first) if name in index_of(second))
    index, tensors = index_of(second), load_file(second)
    index[split][0] -= 1
    save_file(tensors, second, {INDEX: json.dumps(index)})
    enter(checkpoint, second.name)
    reader = fragment_reader(checkpoint)
    numel = index_of(first)[split][1] + index[split][1]
    with pytest.raises(CheckpointError, match="a gap or an overlap"):
        reader.read(split, "master", 0, numel)


# The journal of mask updates


def lines_changed(change: Callable[[list[str]], object]) -> Callable[[Path], object]:
    def apply(run: Path) -> None:
        lines = (run / "masks.jsonl").read_text().splitlines()
        change(lines)
        (run / "masks.jsonl").write_text("".join(f"{line}\n" for line in lines))

    return apply


def another_coordinate(lines: list[str]) -> None:
    entry = json.loads(lines[1])
    change = max(entry["layers"].values(), key=lambda change: len(change["slots"]))
    places = list(zip(change["rows"], change["cols"], strict=True))
    assert len(places) > 1
    change["rows"], change["cols"] = zip(*places[::-1], strict=True)
    lines[1] = json.dumps(entry)


def renumbered(lines: list[str]) -> None:
    del lines[0]
    for number, line in enumerate(lines):
        lines[number] = json.dumps(json.loads(line) | {"update": number + 1, "step": 3 * (number + 1)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lines_changed(lambda lines: lines.pop(0)), "line 1: expected update 1 after step 3, found update 2"),
        (lines_changed(lambda lines: lines.pop(1)), "line 2: expected update 2 after step 6, found update 3"),
        (lines_changed(lambda lines: lines.pop()), "line 3: expected update 3 after step 9, found none"),
        (lines_changed(another_coordinate), "line 2: expected to lead to the topology "),
        (lines_changed(renumbered), "line 1: "),
        (lambda run: (run / "masks.jsonl").unlink(), "line 1: expected update 1 after step 3, found none"),
    ],
    ids=["first", "middle", "last", "changed", "renumbered", "all"],
)
def test_an_update_that_is_lost_or_changed_is_named(change: Callable[[Path], object], said: str, copy: Path) -> None:
    assert verify(copy)["ok"]
    change(copy)
    problems = [entry for entry in verify(copy)["problems"] if entry["file"] == "masks.jsonl"]
    assert len(problems) == 1, problems
    assert said in problems[0]["problem"]


def test_what_a_checkpoint_counts_as_explored_is_what_the_journal_has_explored(copy: Path) -> None:
    def explore(tensors: dict[str, Any]) -> None:
        key = next(key for key in tensors if key.endswith("explored"))
        tensors[key][:] = 255

    edit_topology(copy / "checkpoints" / "step_00000012", explore)
    assert_found(copy, "masks.jsonl", "expected to have explored what step_00000012 says")


# Checkpoints that are gone


def keep(*names: str) -> Callable[[Path], object]:
    """Of the records, only these."""

    def remove(run: Path) -> None:
        for path in run.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (lambda run: None, "while status.json names step_00000012"),
        (keep("status.json"), "while status.json names step_00000012"),
        (keep("status.json", "checkpoints"), "while status.json names step_00000012"),
        (keep("metrics.jsonl", "config.yaml"), "while metrics.jsonl reaches step 12 with a checkpoint every 6"),
        (keep("metrics.jsonl"), "while metrics.jsonl reaches step 12, and no other record can be read"),
        (keep("masks.jsonl"), "while masks.jsonl reaches step 9, and no other record can be read"),
        (keep("metrics.jsonl", "attempts.jsonl", "config.yaml"), "while metrics.jsonl reaches step 12"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    left: Callable[[Path], object], told: str, copy: Path
) -> None:
    from dsbert.base.errors import CheckpointError
    from dsbert.training.run_directory import RunDirectory

    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    left(copy)
    with pytest.raises(CheckpointError, match="remove the directory to start again") as caught:
        RunDirectory(copy).find_checkpoint("auto", 0, 1)
    assert told in str(caught.value)
    assert caught.value.exit_code == 4


def test_an_attempt_that_resumed_is_remembered(copy: Path, data: Path) -> None:
    """Killed before it saved anything itself, and then the checkpoints were removed."""
    from dsbert.base.errors import CheckpointError
    from dsbert.training.run_directory import RunDirectory

    begin(copy, data)
    keep("attempts.jsonl")(copy)
    with pytest.raises(CheckpointError, match=r"attempts.jsonl says that attempt 2 resumed from step_00000012"):
        RunDirectory(copy).find_checkpoint("auto", 0, 1)


def test_a_run_that_never_saved_begins_anew(data: Path, tmp_path: Path) -> None:
    from dsbert.training.run_directory import RunDirectory
    from tests.workbench import recipe

    directory = RunDirectory(tmp_path)
    directory.mark("first")
    first = directory.open_attempt(recipe(data={"path": str(data)}), {}, None, "first", 1)
    directory.metrics.append({"step": 5})
    directory.metrics.close()
    directory.set_status(first, "failed", 5, "killed")
    assert RunDirectory(tmp_path).find_checkpoint("auto", 0, 1) is None


@pytest.mark.slow
def test_removing_the_checkpoints_ends_the_next_start(copy: Path, data: Path) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    shutil.rmtree(copy / "checkpoints")
    done = dsbert_process("pretrain", "demo", "--run-dir", str(copy), f"data.path={data}", *SMALL)
    assert done.returncode == 4, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("dsbert: expected")]
    assert len(said) == 1
    assert "found none, while status.json names step_00000012: remove the directory to start again" in said[0]
    assert (copy / "metrics.jsonl").read_bytes() == before


# What is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


SPECIAL: list[Callable[[Path], object]] = [
    pipe,
    listening,
    hole,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/nowhere"),
    lambda path: path.mkdir(),
]
IDS = ["pipe", "socket", "hole", "device", "dangling", "directory"]


@pytest.mark.parametrize("special", SPECIAL, ids=IDS)
def test_what_is_no_file_ends_every_command(special: Callable[[Path], object], copy: Path, tmp_path: Path) -> None:
    checkpoint = copy / "checkpoints" / "step_00000012"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 9
    for path in files:
        aside = path.rename(tmp_path / "aside")
        special(path)
        for whole in (checkpoint, copy):
            assert says_one_line("verify", str(whole)) == 4
        assert says_one_line("checkpoints", str(copy)) == 0
        assert says_one_line("inspect", str(checkpoint)) in (2, 4)
        assert says_one_line("inspect", str(copy)) == 0, "the older one is whole"
        if path.name in ("manifest.json", "topology.safetensors"):
            for words in (("diff", str(copy / "checkpoints" / "step_00000006")), ("evaluate",)):
                assert says_one_line(*words, str(checkpoint)) in (2, 4)
            assert says_one_line("export", str(checkpoint), "--to", str(tmp_path / "to")) in (2, 4)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rename(path)


@pytest.mark.parametrize("special", SPECIAL, ids=IDS)
def test_a_record_that_is_no_file_is_named(
    special: Callable[[Path], object], copy: Path, data: Path, tmp_path: Path
) -> None:
    from dsbert.base.collectives import raise_on_all_ranks
    from dsbert.base.errors import DsbertError
    from dsbert.training.run_directory import RunDirectory

    names = (*SMALL_RECORDS, *JOURNALS, "config.yaml", "wandb_id", "checkpoints/latest")
    for name in names:
        path, aside = copy / name, tmp_path / "aside"
        aside.unlink(missing_ok=True)
        if path.exists():
            path.rename(aside)
        special(path)
        gone = path.is_symlink() and not path.exists()
        says_one_line("verify", str(copy))
        says_one_line("checkpoints", str(copy))
        begins = gone or name == "checkpoints/latest"  # which nobody needs to go on
        with bounded(), nullcontext() if begins else pytest.raises(DsbertError, match=path.name):
            raise_on_all_ranks(lambda: RunDirectory(copy).find_checkpoint("auto", 0, 1))
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if aside.exists():
            aside.rename(path)


def test_a_hole_behind_some_data_is_seen_and_a_sparse_tail_is_not(tmp_path: Path) -> None:
    from dsbert.base.durable import read_regular

    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"x" * 100_000)
        file.truncate(1 << 35)
    with bounded(), pytest.raises(OSError, match="with a hole of"):
        read_regular(path)
    with path.open("wb") as file:
        file.truncate(5000)
    assert read_regular(path) == b"\0" * 5000
    with pytest.raises(OSError, match="more than the 100 bytes"):
        read_regular(path, 100)


def test_a_header_of_any_length_is_refused(tmp_path: Path) -> None:
    from dsbert.base.errors import CheckpointError
    from dsbert.inspection.summary import tensor_bytes

    path = tmp_path / "x.safetensors"
    for text in (b"", b"[]", b'{"a": 1}', b'{"a": {"b": 1}}', b'{"a": {"data_offsets": "x"}}', b"[" * 10**6):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match="expected safetensors"):
            tensor_bytes(path)
    for content in (b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="expected safetensors"):
            tensor_bytes(path)
    with path.open("wb") as file:
        file.write((1 << 39).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with bounded(), pytest.raises(CheckpointError, match="expected safetensors"):
        tensor_bytes(path)


# Data that nobody may write


def under_modes(*words: str, program: tuple[str, ...] = ("-m", "dsbert")) -> subprocess.CompletedProcess[str]:
    """The command in a process to which modes apply, as they do to everybody but root."""
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    return subprocess.run(
        [*powerless, sys.executable, *program, *words],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def forbid_writing(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


apply_modes = pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="modes do not apply to root")


@apply_modes
def test_assets_are_collected_again_from_data_that_nobody_may_write(data: Path, tmp_path: Path) -> None:
    shared, run_dir = tmp_path / "shared", tmp_path / "run"
    shutil.copytree(data, shared, ignore=shutil.ignore_patterns("spans-*"))
    run_dir.mkdir()
    shutil.copytree(shared / "tokenizer", run_dir / "companions" / "tokenizer")
    forbid_writing(shared)
    forbid_writing(run_dir / "companions")  # as they were copied once
    collect = (
        "import sys, pathlib; from dsbert.training.run_directory import RunDirectory\n"
        "for _ in range(3): RunDirectory(pathlib.Path(sys.argv[1]))._collect_assets(pathlib.Path(sys.argv[2]))"
    )
    done = under_modes(str(run_dir), str(shared), program=("-c", collect))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in run_dir.iterdir()] == ["companions"]
    assert all(path.stat().st_mode & 0o200 for path in run_dir.rglob("*"))


@pytest.mark.slow
@apply_modes
def test_data_that_nobody_may_write_is_trained_on_and_resumed(data: Path, tmp_path: Path) -> None:
    shared, run_dir, staged = tmp_path / "shared", tmp_path / "run", tmp_path / "staged"
    shutil.copytree(data, shared, ignore=shutil.ignore_patterns("spans-*"))
    forbid_writing(shared)
    words = ["pretrain", "demo", "--run-dir", str(run_dir), f"data.path={shared}", *SMALL,
             "sparsity.kernels=reference", f"data.stage_to={staged}"]  # fmt: skip
    for number in (1, 2):
        done = under_modes(*words)
        assert done.returncode == 0, f"start {number}: {done.stderr}"
        for folder in (run_dir, staged):
            assert all(path.stat().st_mode & 0o200 for path in folder.rglob("*"))
        shutil.copytree(run_dir / "companions", run_dir / ".companions.tmp")
        for folder in (run_dir / "companions", run_dir / ".companions.tmp"):  # as they were copied once
            forbid_writing(folder)
    exported = under_modes("export", str(run_dir), "--to", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "exported").iterdir())
