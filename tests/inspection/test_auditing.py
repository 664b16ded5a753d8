"""verify, checkpoints, diff: every kind of damage is named, none raises, and what is whole is called so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsbert.checkpoint.loading import checkpoint_problems
from tests.commands import ENVIRONMENT, complaint, dsbert, dsbert_process

FRAGMENTS = ["fragments-00000-of-00002.safetensors", "fragments-00001-of-00002.safetensors"]
INDEX = "dsbert-fragments-1"
KINDS = ("master", "exp_avg", "exp_avg_sq")
LAYER = "bert.encoder.layer.0.attention.self.query"
BIAS = f"{LAYER}.bias"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "heartbeats"))
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run / "checkpoints" / "step_00000012", tmp_path / "step_00000012")
    return tmp_path / "step_00000012"


def verify(path: Path) -> dict[str, Any]:
    """One JSON document, and an exit code that agrees with it."""
    done = dsbert("verify", str(path), "--json")
    assert "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 4)
    assert report["ok"] == (not report["problems"])
    assert all(entry["file"] and entry["problem"] for entry in report["problems"])
    return report


def assert_found(path: Path, file: str, problem: str) -> None:
    problems = verify(path)["problems"]
    assert any(entry["file"] == file and problem in entry["problem"] for entry in problems), problems


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Other content with the right checksum: what only a look inside can find."""
    (checkpoint / name).write_bytes(content)
    enter(checkpoint, name)


def enter(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    entry = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    edit_manifest(checkpoint, lambda manifest: manifest["files"].update({name: entry}))


def edit_manifest(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    edit(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def edit_state(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    edit(state)
    forge(checkpoint, "state.json", json.dumps(state).encode())


def edit_topology(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(checkpoint / "topology.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "topology.safetensors")
    enter(checkpoint, "topology.safetensors")


def edit_fragments(checkpoint: Path, rank: int, edit: Callable[[dict[str, Any], dict[str, list[int]]], object]) -> None:
    path = checkpoint / FRAGMENTS[rank]
    tensors, index = load_file(path), index_of(path)
    edit(tensors, index)
    save_file(tensors, path, {INDEX: json.dumps(index)})
    enter(checkpoint, path.name)


def index_of(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="numpy") as file:
        index: dict[str, list[int]] = json.loads(file.metadata()[INDEX])
        return index


def whole_parameters(checkpoint: Path) -> dict[str, Any]:
    """Every "parameter/kind" in one piece, put together without dsbert."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for path in checkpoint.glob("fragments-*"):
        tensors = load_file(path)
        for name, (offset, _) in index_of(path).items():
            for kind in KINDS:
                pieces.setdefault(f"{name}/{kind}", []).append((offset, tensors[f"{name}/{kind}"]))
    return {
        key: np.concatenate([tensor for _, tensor in sorted(own, key=lambda one: one[0])])
        for key, own in pieces.items()
    }


def rank_with(checkpoint: Path, name: str) -> int:
    return next(rank for rank in (0, 1) if name in index_of(checkpoint / FRAGMENTS[rank]))


# verify: a checkpoint


def test_what_is_whole_is_ok(run: Path, checkpoint: Path) -> None:
    assert verify(checkpoint)["kind"] == "checkpoint"
    report = verify(run)
    assert (report["kind"], report["path"], report["notes"]) == ("run", str(run), [])
    names = ["step_00000006", "step_00000012"]
    assert report["checkpoints"] == [{"name": name, "ok": True} for name in names]
    size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    others = [run / "checkpoints" / "latest", *(run / "checkpoints" / name / "manifest.json" for name in names)]
    assert report["bytes"] == size - sum(file.stat().st_size for file in others)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        replace_by_directory,
    ],
    ids=["flipped", "truncated", "empty", "missing", "garbage", "directory"],
)
def test_damage_of_any_file_names_it(damage: Callable[[Path], object], checkpoint: Path, tmp_path: Path) -> None:
    names = [file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()]
    assert len(names) == 9
    for name in names:
        copy = tmp_path / "again" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        damage(copy / name)
        assert [entry["file"] for entry in verify(copy)["problems"]] == [name]
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b"null",
        b'{"kind": "dsbert-checkpoint", "format": 1}',
        b'{"kind": []}',
    ],
)
def test_a_manifest_of_any_content_is_named(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(content)
    assert_found(checkpoint, "manifest.json", "")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"world_size": 10**12}, "expected a world size of at most the 8 files"),
        ({"world_size": 0}, "expected a world size"),
        ({"world_size": 3}, "fragments-00002-of-00003.safetensors"),
        ({"step": 6}, "expected the step of step_00000012, found 6"),
        ({"step": None}, "expected a step"),
        ({"topology_digest": 5}, "expected topology_digest"),
        ({"topology_digest": "0" * 32}, "topology.safetensors"),
        ({"files": {}}, "expected a world size"),
        ({"files": []}, "expected a table of files"),
        ({"files": {"../outside": {"bytes": 1, "xxh3": ""}}}, "expected names of files in the checkpoint"),
        ({"files": {"\ud800\n": {"bytes": 1, "xxh3": ""}}}, "expected names of files in the checkpoint"),
        ({"files": {"state.json": {"bytes": float("inf"), "xxh3": ""}}}, "expected bytes and xxh3 of 'state.json'"),
        ({"files": {"state.json": 7}}, "expected bytes and xxh3 of 'state.json'"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_nonsense_is_named(entry: dict[str, Any], problem: str, checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(entry))
    if problem.endswith(".safetensors"):
        assert_found(checkpoint, problem, "")
    else:
        assert_found(checkpoint, "manifest.json", problem)


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries.update({key: value})


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (set_to("step", 6), "expected step = 12 as in manifest.json, found 6"),
        (set_to("world_size", 3), "expected world_size = 2"),
        (set_to("format", 2), "expected checkpoint format"),
        (set_to("adam_step", None), "expected adam_step"),
        (set_to("params", {}), "expected the shapes"),
        (lambda state: state["params"].update({BIAS: [-1]}), f"expected a shape of {BIAS}"),
        (lambda state: state["params"].pop(f"{LAYER}.blocks"), f"expected {LAYER}.blocks to fit its layer"),
        (lambda state: state["layers"][LAYER].update(block_size=7), "divides 32 x 32, found 7"),
        (lambda state: state["layers"].update({LAYER: 1}), "unreadable"),
    ],
)
def test_a_state_that_does_not_fit_is_named(
    edit: Callable[[dict[str, Any]], object], problem: str, checkpoint: Path
) -> None:
    edit_state(checkpoint, edit)
    assert_found(checkpoint, "state.json", problem)


def swap_slots(tensors: dict[str, Any]) -> None:
    for part in ("rows", "cols"):
        tensors[f"{LAYER}.{part}"][[0, 1]] = tensors[f"{LAYER}.{part}"][[1, 0]]


def double_a_slot(tensors: dict[str, Any]) -> None:
    for part in ("rows", "cols"):
        tensors[f"{LAYER}.{part}"][1] = tensors[f"{LAYER}.{part}"][0]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (swap_slots, "expected the topology"),
        (double_a_slot, "distinct blocks"),
        (lambda tensors: tensors[f"{LAYER}.cols"].__setitem__(0, 4), "expected cols in 0..3"),
        (lambda tensors: tensors[f"{LAYER}.rows"].__setitem__(0, -1), "expected rows in 0..3"),
        (lambda tensors: tensors.pop(f"{LAYER}.born"), f"{LAYER}.born: missing"),
        (set_to("stranger", np.zeros(1)), "stranger: belongs to no layer"),
        (set_to(f"{LAYER}.rows", np.zeros(3, np.int32)), "expected 4 slots"),
        (set_to(f"{LAYER}.explored", np.zeros(2, np.uint8)), "to count as explored"),
    ],
)
def test_a_topology_that_is_wrong_is_named(
    edit: Callable[[dict[str, Any]], object], problem: str, checkpoint: Path
) -> None:
    edit_topology(checkpoint, edit)
    assert_found(checkpoint, "topology.safetensors", problem)


def count_own_steps(checkpoint: Path, edit: Callable[[dict[str, Any]], object] = lambda tensors: None) -> None:
    """Make it one of a run whose blocks count their own steps."""

    def add(tensors: dict[str, Any]) -> None:
        for name in [key for key in tensors if key.endswith(".born")]:
            tensors[f"{name}_step"] = np.where(tensors[name] > 0, 3 * tensors[name], 0).astype(np.int32)
        edit(tensors)

    edit_state(checkpoint, lambda state: state["recipe"]["sparsity"].update(fresh_moments="count"))
    edit_topology(checkpoint, add)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors: None, None),
        (lambda tensors: tensors.pop(f"{LAYER}.born_step"), f"{LAYER}.born_step"),
        (set_to(f"{LAYER}.born_step", np.zeros(3, np.int32)), "expected 4 slots"),
        (set_to(f"{LAYER}.born_step", np.full(4, 13, np.int32)), f"{LAYER}: expected blocks of Adam's steps 0..12"),
        (set_to(f"{LAYER}.born_step", np.full(4, -1, np.int32)), f"{LAYER}: expected blocks of Adam's steps 0..12"),
    ],
)
def test_own_step_counts_are_there_and_no_older_than_the_run(
    edit: Callable[[dict[str, Any]], object], problem: str | None, checkpoint: Path
) -> None:
    count_own_steps(checkpoint, edit)
    if problem is None:
        assert verify(checkpoint)["ok"]
        assert checkpoint_problems(checkpoint) == []
    else:
        assert_found(checkpoint, "topology.safetensors", problem)
    if problem == f"{LAYER}.born_step":
        assert [found.file for found in checkpoint_problems(checkpoint)] == ["topology.safetensors"]


def drop_piece(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
    del index[BIAS]
    for kind in KINDS:
        del tensors[f"{BIAS}/{kind}"]


def shorten_piece(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
    index[BIAS][1] -= 1
    for kind in KINDS:
        tensors[f"{BIAS}/{kind}"] = tensors[f"{BIAS}/{kind}"][:-1].copy()


def drop_first_element(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
    index[BIAS] = [1, 31]
    for kind in KINDS:
        tensors[f"{BIAS}/{kind}"] = tensors[f"{BIAS}/{kind}"][1:].copy()


def drop_moments(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
    for kind in KINDS[1:]:
        del tensors[f"{BIAS}/{kind}"]


def add_stranger(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
    index["stranger"], tensors["stranger/master"] = [0, 1], np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop_piece, f"{BIAS}: expected elements 0..32, found them in no file"),
        (shorten_piece, f"{BIAS}: expected elements 31..32, found them in no file"),
        (drop_first_element, f"{BIAS}: expected elements 0..1, found them in no file"),
        (drop_moments, "expected both moments"),
        (lambda tensors, index: tensors.pop(f"{BIAS}/exp_avg"), "expected master and moments"),
        (lambda tensors, index: tensors.pop(f"{BIAS}/master"), "expected master and moments"),
        (lambda tensors, index: index.pop(BIAS), "not in the file's index"),
        (lambda tensors, index: index.update({BIAS: [1, 32]}), "expected pieces of the parameters"),
        (lambda tensors, index: index.update({BIAS: [0, 31]}), "expected F32 [31], found F32 [32]"),
        (lambda tensors, index: index.update({BIAS: 3}), "unreadable"),
        (lambda tensors, index: tensors[f"{BIAS}/exp_avg"].__setitem__(31, np.nan), "expected finite numbers"),
        (lambda tensors, index: tensors.update({f"{BIAS}/master": np.zeros(32)}), "found F64"),
        (add_stranger, "elements 0..+1 of stranger"),
    ],
)
def test_fragments_that_do_not_fit_are_named(edit: Callable[..., object], problem: str, checkpoint: Path) -> None:
    rank = rank_with(checkpoint, BIAS)
    edit_fragments(checkpoint, rank, edit)
    if edit in (drop_piece, drop_first_element):  # before the first piece: any file may be named
        assert any(problem in entry["problem"] for entry in verify(checkpoint)["problems"])
    else:
        assert_found(checkpoint, FRAGMENTS[rank], problem)


def test_elements_that_stand_in_two_files_are_named(checkpoint: Path) -> None:
    rank = rank_with(checkpoint, BIAS)
    donor = load_file(checkpoint / FRAGMENTS[rank])

    def add(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
        index[BIAS] = [0, 32]
        tensors.update({f"{BIAS}/{kind}": donor[f"{BIAS}/{kind}"] for kind in KINDS})

    edit_fragments(checkpoint, 1 - rank, add)
    (problem,) = verify(checkpoint)["problems"]
    assert problem["file"] in FRAGMENTS
    assert f"{BIAS}: expected elements 0..32 once" in problem["problem"]


def test_moments_may_be_missing_altogether_before_adams_first_step(checkpoint: Path) -> None:
    def drop(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
        for key in [key for key in tensors if not key.endswith("/master")]:
            del tensors[key]

    edit_fragments(checkpoint, 0, drop)
    edit_state(checkpoint, set_to("adam_step", 0))
    assert_found(checkpoint, FRAGMENTS[0], "expected both moments")
    edit_fragments(checkpoint, 1, drop)
    assert verify(checkpoint)["ok"]
    edit_state(checkpoint, set_to("adam_step", 12))
    assert_found(checkpoint, FRAGMENTS[1], "expected both moments")


def test_a_header_of_absurd_length_in_a_process_of_its_own(checkpoint: Path) -> None:
    for name in (FRAGMENTS[1], "topology.safetensors"):
        forge(checkpoint, name, b"\xff" * 7 + b"\x7f" + (checkpoint / name).read_bytes()[8:])
    done = dsbert_process("verify", str(checkpoint), "--json")
    assert (done.returncode, "Traceback" in done.stderr) == (4, False)
    report = json.loads(done.stdout)
    assert [entry["file"] for entry in report["problems"]] == ["topology.safetensors", FRAGMENTS[1]]


def test_a_stray_file_is_a_note_and_harms_nobody(run: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer" / "stray").write_text("")
    report = verify(checkpoint)
    assert report["ok"]
    assert report["notes"] == [{"file": "tokenizer/stray", "problem": "not in the manifest"}]
    (checkpoint / "tokenizer" / "stray").rename(checkpoint / os.fsdecode(b"\xff"))
    assert verify(checkpoint)["notes"][0]["file"] == "\\udcff"  # not UTF-8, yet printable
    shutil.copy(checkpoint / FRAGMENTS[0], checkpoint / "fragments-00002-of-00003.safetensors")
    assert "fragments-00002-of-00003.safetensors" in [entry["file"] for entry in verify(checkpoint)["notes"]]
    assert diff(checkpoint, run / "checkpoints" / checkpoint.name)["identical"], "readers take what the manifest names"


def test_a_file_that_may_not_be_read_is_named(copy: Path) -> None:
    open_file = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    below = "checkpoints/step_00000012/"
    expected = {f"{below}unigram.npy", "metrics.jsonl", "status.json", "checkpoints/latest"}
    refused = {Path(name).name for name in expected}
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    with mock.patch("os.open", refuse):
        problems = verify(copy)["problems"]
        assert {entry["file"] for entry in problems} == expected
        assert all("Permission denied" in entry["problem"] for entry in problems)
        refused = {"manifest.json"}
        assert_found(copy, f"{below}manifest.json", "Permission denied")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_neither_is_the_users_mistake(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["verify", str(tmp_path / name)], ["checkpoints", str(tmp_path / name)]):
        assert "expected a run directory, a checkpoint or prepared data" in complaint(dsbert(*command))


def test_prepared_data_has_no_checkpoints(data: Path) -> None:
    assert "expected a run directory" in complaint(dsbert("checkpoints", str(data)))


# verify: a run


def write_over(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


def append(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + content)


def keep_only_oldest_in_latest(run: Path) -> None:
    own = xxhash.xxh3_128_hexdigest((run / "checkpoints" / "step_00000006" / "manifest.json").read_bytes())
    (run / "checkpoints" / "latest").write_text(f"step_00000006 {own}\n")


def replace_checkpoint_by_file(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "checkpoints" / "step_00000006").write_text("")


def replace_checkpoints_by_file(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


def double_last_line(run: Path) -> None:
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content + content.splitlines(keepends=True)[-1])


LATEST = "checkpoints/latest"


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (lambda run: (run / LATEST).unlink(), LATEST, "missing: expected it to name step_00000012"),
        (write_over(LATEST, b""), LATEST, "found it empty"),
        (write_over(LATEST, b"\xff\xfe \n"), LATEST, "expected a checkpoint's name and a checksum, found b'"),
        (write_over(LATEST, b"step_00000012 ?\n"), LATEST, "expected a checkpoint's name and a checksum"),
        (write_over(LATEST, b"step_00000012\n"), LATEST, "expected a checkpoint's name and a checksum"),
        (write_over(LATEST, b"step_00000099 " + b"0" * 32), LATEST, "found step_00000099, which is not there"),
        (write_over(LATEST, b"step_00000012 " + b"0" * 32), LATEST, "step_00000012/manifest.json differs"),
        (lambda run: replace_by_directory(run / LATEST), LATEST, "unreadable: Is a directory"),
        (lambda run: flip_a_bit(run / "checkpoints/step_00000006/unigram.npy"),
         "checkpoints/step_00000006/unigram.npy", "the checksum differs"),
        (lambda run: replace_by_directory(run / "checkpoints/step_00000006/state.json"),
         "checkpoints/step_00000006/state.json", "expected a file, found something else"),
        (replace_checkpoint_by_file, "checkpoints/step_00000006", "expected a directory"),
        (lambda run: (run / "checkpoints/step_00000099").mkdir(), "checkpoints/step_00000099/manifest.json", "missing"),
        (lambda run: (run / "checkpoints/step_00000099").symlink_to("/no"), "checkpoints/step_00000099", "expected"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints", "expected a checkpoint, found none"),
        (replace_checkpoints_by_file, "checkpoints", "unreadable: Not a directory"),
        (write_over("attempt.json", b'{"number": 1, "no'), "attempt.json", "expected a JSON object"),
        (write_over("status.json", b"[" * 200_000), "status.json", "expected a JSON object"),
        (write_over("metrics.jsonl", b'{"step": 1}\n{"ste\n{"step": 2}\n'), "metrics.jsonl", "line 2: expected a JSON"),
        (write_over("masks.jsonl", b'\xff\n{"step": 1}\n'), "masks.jsonl", "line 1: expected a JSON object"),
        (write_over("masks.jsonl", b'{"step": 3}\n{}\n'), "masks.jsonl", "line 1: expected a valid update"),
        (double_last_line, "metrics.jsonl", "line 13: expected a step beyond 12, found 12"),
        (write_over("attempts.jsonl", b"nonsense\n"), "attempts.jsonl", "line 1: expected a JSON object"),
        (lambda run: replace_by_directory(run / "masks.jsonl"), "masks.jsonl", "unreadable: Is a directory"),
    ],
)  # fmt: skip
def test_damage_of_a_run_is_named(damage: Callable[[Path], object], file: str, problem: str, copy: Path) -> None:
    damage(copy)
    assert_found(copy, file, problem)


@pytest.mark.parametrize(
    ("harm", "file", "note"),
    [
        (keep_only_oldest_in_latest, LATEST, "names step_00000006, while step_00000012 is newer"),
        (append("metrics.jsonl", b'{"step": 13, "lo'), "metrics.jsonl", "line, 13, is torn"),
        (append("masks.jsonl", b"\0" * 40 + b"\n"), "masks.jsonl", "line, 4, is torn"),
        (append("attempts.jsonl", b'{"num'), "attempts.jsonl", "line, 2, is torn"),
    ],
)  # fmt: skip
def test_what_a_crash_may_leave_is_a_note(harm: Callable[[Path], object], file: str, note: str, copy: Path) -> None:
    harm(copy)
    report = verify(copy)
    assert report["ok"], report["problems"]
    ((found, problem),) = [(entry["file"], entry["problem"]) for entry in report["notes"]]
    assert found == file
    assert note in problem


def test_a_checkpoint_that_retention_removes_meanwhile_is_no_damage(copy: Path) -> None:
    from dsbert.checkpoint.state import state_object
    from dsbert.inspection import audit_checkpoint as checkpoint_audit

    old = copy / "checkpoints" / "step_00000006"

    def remove(path: Path) -> dict[str, Any]:
        if path == old:
            shutil.rmtree(old)
        return state_object(path)

    with mock.patch.object(checkpoint_audit, "state_object", remove):
        report = verify(copy)
    assert report["checkpoints"] == [{"name": "step_00000012", "ok": True}]


def test_people_read_lines(copy: Path) -> None:
    done = dsbert("verify", str(copy))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{copy}: ok (2 checkpoints, ")
    (copy / LATEST).unlink()
    assert "  checkpoints/latest: missing: " in dsbert("verify", str(copy)).stdout


# checkpoints


def test_checkpoints_are_listed_with_those_moved_aside(copy: Path) -> None:
    root = copy / "checkpoints"
    shutil.copytree(root / "step_00000006", root / "step_00000012.superseded-2-ab")
    edit_manifest(root / "step_00000012.superseded-2-ab", lambda manifest: manifest.pop("created"))
    (root / "step_00000006").rename(root / "step_00000006.damaged-2-ab")
    flip_a_bit(root / "step_00000006.damaged-2-ab" / FRAGMENTS[0])
    shutil.copytree(root / "step_00000012", root / ".step_00000018.3-ab.tmp")
    listing = json.loads(dsbert("checkpoints", str(copy), "--json").stdout)
    assert (listing["run"], listing["latest"]) == (str(copy), "step_00000012")
    first, second, third = listing["checkpoints"]
    keys = "name step created age_s bytes world zero_stage verified digest status"
    assert set(keys.split()) <= first.keys()
    names = ["step_00000006.damaged-2-ab", "step_00000012.superseded-2-ab", "step_00000012"]
    assert [entry["name"] for entry in (first, second, third)] == names
    assert [entry["status"] for entry in (first, second, third)] == ["damaged", "superseded", "published"]
    assert [entry["verified"] for entry in (first, second, third)] == [False, False, True]
    assert first["problem"] == f"{FRAGMENTS[0]}: the checksum differs"
    assert second["problem"].endswith("expected the step of step_00000012.superseded-2-ab, found 6")
    assert (second["created"], second["age_s"]) == (None, None)
    assert (third["step"], third["world"], third["zero_stage"], third["problem"]) == (12, 2, 1, None)
    assert 0 <= time.time() - third["created"] - third["age_s"] < 5
    files = [file for file in (root / "step_00000012").rglob("*") if file.is_file()]
    assert third["bytes"] == sum(file.stat().st_size for file in files)
    assert third["digest"] == json.loads(dsbert("inspect", str(root / "step_00000012"), "--json").stdout)["digest"]
    quick = json.loads(dsbert("checkpoints", str(copy), "--json", "--quick").stdout)["checkpoints"]
    assert [entry["verified"] for entry in quick] == [None] * 3
    heads, *rows = dsbert("checkpoints", str(copy)).stdout.splitlines()
    assert heads.split() == ["name", "age", "MB", "world", "stage", "verified", "status", "digest"]
    assert [row.split()[0] for row in rows[:3]] == names
    assert rows[-1] == "latest: step_00000012"


def test_a_list_survives_any_damage(copy: Path) -> None:
    root = copy / "checkpoints"
    (root / "latest").unlink()
    replace_checkpoint_by_file(copy)
    (root / "step_00000012" / "manifest.json").write_bytes(b"[" * 200_000)
    (root / "step_00000012" / "state.json").write_bytes(b"\xff")
    done = dsbert("checkpoints", str(copy), "--json")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    listing = json.loads(done.stdout)
    assert listing["latest"] is None
    assert [(entry["verified"], entry["digest"]) for entry in listing["checkpoints"]] == [(False, None)] * 2
    shutil.rmtree(root)
    assert json.loads(dsbert("checkpoints", str(copy), "--json").stdout)["checkpoints"] == []
    assert dsbert("checkpoints", str(copy)).stdout.endswith("latest: none\n")


# diff


def diff(a: str | Path, b: str | Path, *options: str) -> dict[str, Any]:
    done = dsbert("diff", str(a), str(b), "--json", *options)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if options and not report["identical"] else 0), done.stderr
    return report


def test_a_checkpoint_is_identical_with_itself(run: Path) -> None:
    report = diff(run, run / "checkpoints" / "step_00000012", "--exit-code")
    assert report["identical"]
    assert (report["identity"], report["counters"]) == ([], {})
    assert report["topology"]["jaccard"] == 1.0
    for layer in report["layers"]:
        for kind in KINDS:
            own = layer[kind]
            assert own["compared"] == np.prod(layer["shape"])
            assert (own["bit_identical"], own["max_abs"], own["l2_relative"]) == (True, 0.0, 0.0)


def test_two_steps_of_a_run(run: Path) -> None:
    paths = run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000012"
    report = diff(*paths, "--exit-code")
    assert not report["identical"]
    assert report["counters"] == {"step": {"a": 6, "b": 12}, "adam_step": {"a": 6, "b": 12}}
    assert [report[side]["step"] for side in "ab"] == [6, 12]
    moved = [json.loads(line) for line in (run / "masks.jsonl").read_text().splitlines()][-1]
    assert moved["step"] == 9
    assert report["topology"]["only_a"] == report["topology"]["only_b"] == moved["pruned"] > 0
    kept = report["topology"]["common"]
    assert report["topology"]["jaccard"] == pytest.approx(kept / (kept + 2 * moved["pruned"]))
    assert report["topology"]["digest_a"] != report["topology"]["digest_b"]
    (a, b), slots = [whole_parameters(path) for path in paths], [load_file(p / "topology.safetensors") for p in paths]
    for layer in report["layers"]:
        weight, sparse = layer["name"].removesuffix(".blocks"), layer["topology"] is not None
        for kind in KINDS:
            mine, theirs = (one[f"{layer['name']}/{kind}"].astype(np.float64) for one in (a, b))
            if sparse:
                (mine, theirs), mask = (
                    (one.reshape(layer["shape"]) for one in (mine, theirs)),
                    np.ones(layer["shape"][0]),
                )
                for part in ("rows", "cols"):
                    mask *= slots[0][f"{weight}.{part}"] == slots[1][f"{weight}.{part}"]
                mine, theirs = mine[mask > 0], theirs[mask > 0]
                assert len(mine) == layer["topology"]["common"]
            assert layer[kind]["max_abs"] == np.abs(mine - theirs).max()
            relative = np.linalg.norm(mine - theirs) / np.linalg.norm(mine)
            assert layer[kind]["l2_relative"] == pytest.approx(relative, rel=1e-9)  # order of summation
    lines = dsbert("diff", *map(str, paths)).stdout.splitlines()
    assert f"a: {paths[0]} at step 6" in lines
    assert f"    and {len(report['layers']) - 10} more, by less: see --json" in lines


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_weight_is_found(kind: str, run: Path, checkpoint: Path) -> None:
    def flip(tensors: dict[str, Any], index: dict[str, list[int]]) -> None:
        tensors[f"{BIAS}/{kind}"].view(np.uint32)[7] ^= 1

    edit_fragments(checkpoint, rank_with(checkpoint, BIAS), flip)
    assert verify(checkpoint)["ok"]
    report = diff(run, checkpoint, "--exit-code")
    assert not report["identical"]
    changed = [(layer["name"], own) for layer in report["layers"] for own in KINDS if not layer[own]["bit_identical"]]
    assert changed == [(BIAS, kind)]
    (layer,) = [layer for layer in report["layers"] if layer["name"] == BIAS]
    before = whole_parameters(run / "checkpoints" / "step_00000012")[f"{BIAS}/{kind}"].astype(np.float64)
    after = whole_parameters(checkpoint)[f"{BIAS}/{kind}"].astype(np.float64)
    assert layer[kind]["max_abs"] == abs(before[7] - after[7]) > 0


def test_slots_in_another_order_are_the_same_weights_but_not_identical(run: Path, checkpoint: Path) -> None:

    edit_topology(checkpoint, swap_slots)
    for rank in (0, 1):
        edit_fragments(checkpoint, rank, lambda tensors, index: swap_blocks(tensors, index, run))
    (problem,) = checkpoint_problems(checkpoint)
    edit_manifest(checkpoint, lambda manifest: manifest.update(topology_digest=problem.problem.split()[-1]))
    report = diff(run, checkpoint)
    assert not report["identical"]
    assert all(layer[kind]["bit_identical"] for layer in report["layers"] for kind in KINDS)
    topology = report["topology"]
    assert (topology["moved"], topology["only_a"], topology["only_b"], topology["same_slots"]) == (2, 0, 0, False)


def test_slots_of_another_age_are_not_identical(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """They would go on otherwise: another step of Adam's, or another block that is pruned."""

    def older(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.born_step"][2] = 1

    def younger(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.born"][2] = 3

    count_own_steps(checkpoint)
    other = shutil.copytree(checkpoint, tmp_path / "other" / checkpoint.name)
    assert diff(checkpoint, other)["identical"]
    edit_topology(other, older)
    report = diff(checkpoint, other)
    assert (report["identical"], report["topology"]["same_slots"], report["topology"]["same_ages"]) == (
        False,
        True,
        False,
    )
    assert any(line.startswith("  ages: ") for line in dsbert("diff", str(checkpoint), str(other)).stdout.splitlines())
    original = run / "checkpoints" / "step_00000012"
    edit_topology(shutil.copytree(original, tmp_path / "another" / original.name), younger)
    assert not diff(original, tmp_path / "another" / original.name)["identical"]


def swap_blocks(tensors: dict[str, Any], index: dict[str, list[int]], run: Path) -> None:
    name = f"{LAYER}.blocks"
    if name not in index:
        return
    offset, length = index[name]
    whole = whole_parameters(run / "checkpoints" / "step_00000012")
    for kind in KINDS:
        blocks = whole[f"{name}/{kind}"].reshape(-1, 64)
        blocks[[0, 1]] = blocks[[1, 0]]
        tensors[f"{name}/{kind}"] = blocks.reshape(-1)[offset : offset + length].copy()


def test_the_cut_into_files_does_not_matter(run: Path, checkpoint: Path) -> None:
    """The same checkpoint as three ranks would have written it, each a part of every parameter."""
    whole = whole_parameters(checkpoint)
    for name in FRAGMENTS:
        (checkpoint / name).unlink()
    edit_manifest(checkpoint, lambda manifest: [manifest["files"].pop(name) for name in FRAGMENTS])
    for rank in range(3):
        tensors, index = {}, {}
        for key, tensor in whole.items():
            start, stop = len(tensor) * rank // 3, len(tensor) * (rank + 1) // 3
            if start < stop:
                tensors[key], index[key.rpartition("/")[0]] = tensor[start:stop].copy(), [start, stop - start]
        path = checkpoint / f"fragments-{rank:05d}-of-00003.safetensors"
        save_file(tensors, path, {INDEX: json.dumps(index)})
        enter(checkpoint, path.name)
    edit_manifest(checkpoint, set_to("world_size", 3))
    edit_state(checkpoint, lambda state: state.update(world_size=3, zero_stage=2))
    assert verify(checkpoint)["ok"]
    report = diff(run, checkpoint, "--exit-code")
    assert report["identical"]
    assert report["counters"] == {"world_size": {"a": 2, "b": 3}, "zero_stage": {"a": 1, "b": 2}}


def test_pieces_do_not_matter(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsbert.inspection import comparison

    paths = run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000012"
    expected = diff(*paths)
    monkeypatch.setattr(comparison, "_CHUNK", 100)
    found = diff(*paths)
    for mine, theirs in zip(expected["layers"], found["layers"], strict=True):
        for kind in KINDS:
            assert mine[kind] == pytest.approx(theirs[kind], rel=1e-9)  # order of summation


def test_identity_and_counters_are_told(run: Path, checkpoint: Path) -> None:
    edit_state(checkpoint, lambda state: state["identity"].update(seed=99))
    report = diff(run, checkpoint)
    assert [(entry["key"], entry["b"]) for entry in report["identity"]] == [("seed", 99)]
    assert report["identical"]  # of state; that they belong to two runs stands beside it
    edit_state(checkpoint, set_to("adam_step", 11))
    report = diff(run, checkpoint)
    assert (report["identical"], report["counters"]) == (False, {"adam_step": {"a": 12, "b": 11}})
    edit_state(checkpoint, set_to("adam_step", 0))
    assert all(layer["exp_avg"] is None for layer in diff(run, checkpoint)["layers"])


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["params"].update({BIAS: [31]}),
        lambda state: state["params"].pop(BIAS),
    ],
)
def test_models_of_different_shapes_are_refused(
    edit: Callable[[dict[str, Any]], object], run: Path, checkpoint: Path
) -> None:
    edit_state(checkpoint, edit)
    for pair in ((run, checkpoint), (checkpoint, run)):
        assert "expected two models of the same shapes" in complaint(dsbert("diff", *map(str, pair)))


def test_a_state_that_contradicts_its_topology_is_no_checkpoint(run: Path, checkpoint: Path) -> None:
    edit_state(checkpoint, lambda state: state["layers"][LAYER].update(block_size=4))
    done = dsbert("diff", str(run), str(checkpoint))
    assert (done.returncode, "Traceback" in done.stderr) == (4, False)
    assert f"topology.safetensors: expected {LAYER} with the blocks of state.json" in done.stderr


def test_a_damaged_side_is_refused_by_name(run: Path, checkpoint: Path) -> None:
    edit_fragments(checkpoint, rank_with(checkpoint, BIAS), lambda tensors, index: tensors.pop(f"{BIAS}/exp_avg"))
    done = dsbert("diff", str(run), str(checkpoint), "--json")
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (4, "", False)
    assert f"{BIAS}/exp_avg" in done.stderr
    flip_a_bit(checkpoint / "topology.safetensors")
    done = dsbert("diff", str(run), str(checkpoint))
    assert done.returncode == 4
    assert "topology.safetensors: the checksum differs" in done.stderr


def test_help_imports_nothing_slow() -> None:
    listing = (
        "import sys\nfrom dsbert.cli.app import run\n"
        "for name in ('verify', 'checkpoints', 'diff'):\n    assert run([name, '--help']) == 0\n"
        "print([name for name in ('torch', 'numpy', 'rich', 'pydantic') if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", listing], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
