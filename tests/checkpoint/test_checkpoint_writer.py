"""Writing in the background, retention, room on the disk: through DeepSpeed, on real ranks."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsbert.base import durable
from dsbert.base.collectives import raise_on_all_ranks
from dsbert.base.durable import checksum, replace_durably, write_and_read_back
from dsbert.base.errors import DsbertError, StorageError
from dsbert.checkpoint.loading import newest_checkpoint, verify_checkpoint
from dsbert.checkpoint.publisher import Publisher, Retention
from dsbert.checkpoint.state import FileRecord, Manifest, Totals, read_manifest
from tests.helpers import run_distributed


def fifty_steps_beside_a_slow_writer(directory: str) -> dict[str, Any]:
    """Snapshot, 50 steps while a throttled writer works, then compare what is on disk with what was snapshot."""
    import torch

    from dsbert.checkpoint.loading import load_checkpoint
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    recipe = bench.recipe(optim={"total_steps": 80}, sparsity={"num_updates": 20})
    source = bench.stream()
    engine, masks = bench.engine_and_masks(recipe, world)

    def train(steps: int, busy: bool = False) -> list[bool]:
        said = []
        for _ in range(steps):
            said.append(engine.train_step(bench.step_batches(engine, source, engine.step), busy=busy).busy)
            masks.maybe_update(engine.step)
        return said

    train(3)
    companions = Path(directory) / "companions"
    companions.mkdir(exist_ok=True)
    (companions / "unigram.npy").write_bytes(b"counts")
    snapshot = bench.held_elements(engine), masks.digest()
    root = Path(directory) / "checkpoints"
    writer = CheckpointWriter(root, companions, attempt="1-test", retention=Retention(2), max_bytes_per_s=1.0)
    writer.begin(engine, masks, bench.run_record(engine.recipe), Totals())
    said = []
    for _ in range(50):
        assert writer.busy, "the writer must still be at work"
        said += train(1, busy=writer.busy)
    assert all(said), "the answer of all ranks rides on the step's own message"
    assert masks.digest() != snapshot[1]
    assert not list(root.glob("step_*")), "nothing is published before all is written"
    memory = writer.buffer_bytes
    saved = writer.finish()  # in a hurry
    assert saved is not None
    assert saved.step == 3
    assert not writer.in_flight
    files = sorted(root.glob("step_00000003/fragments-*"))
    assert memory == files[world.rank].stat().st_size, "the snapshot takes as much memory as the file"
    buffer = writer._buffer._memory.data_ptr()
    assert writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).step == 53
    assert writer._buffer._memory.data_ptr() == buffer, "the memory is reused"

    engine, masks = bench.engine_and_masks(recipe, world)
    load_checkpoint(saved.path, engine, masks)
    assert masks.digest() == snapshot[1]
    for name, tensors in snapshot[0].items():
        again = bench.held_elements(engine)[name]
        for kind, (offset, tensor) in tensors.items():
            assert torch.equal(tensor, again[kind][1]), (name, kind, offset)
    return {"digest": masks.digest()}


@pytest.mark.slow
def test_fifty_steps_run_while_a_slow_writer_works(tmp_path: Path) -> None:
    first, second = run_distributed(fifty_steps_beside_a_slow_writer, 2, {"directory": str(tmp_path)})
    assert first == second
    assert (tmp_path / "checkpoints" / "latest").read_text().startswith("step_00000053 ")


def _make(root: Path, step: int, content: bytes = b"x") -> Path:
    """A checkpoint that verifies, made by the publisher's own hand."""
    import xxhash

    from dsbert.checkpoint.fragments import fragments_name

    publisher = Publisher(root, "1-test", Retention(100), lambda: None)
    temporary, target = root / f".step_{step:08d}.1-test.tmp", root / f"step_{step:08d}"
    publisher.make_room(temporary, 100)
    files = {}
    for name in (fragments_name(0, 1), "state.json", "topology.safetensors"):
        (temporary / name).write_bytes(content)
        files[name] = FileRecord(bytes=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))
    publisher.publish(temporary, target, _manifest(step, files))
    assert verify_checkpoint(target) == []
    return target


def _manifest(step: int, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(kind="dsbert-checkpoint", format=1, step=step, world_size=1, topology_digest="0" * 32, files=files)


def _publish(root: Path, step: int, retention: Retention, attempt: str = "2-other") -> None:
    target = _make(root, step + 1000)  # stands for what the ranks have written
    temporary = root / f".step_{step:08d}.{attempt}.tmp"
    os.replace(target, temporary)
    manifest = read_manifest(temporary).model_copy(update={"step": step})
    publisher = Publisher(root, attempt, retention, lambda: None)
    publisher.publish(temporary, root / f"step_{step:08d}", manifest)
    publisher.remove_old()


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_retention_counts_what_verifies_and_keeps_every_nth(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        _make(tmp_path, step)
    (tmp_path / "step_00000050" / "state.json").write_bytes(b"y")  # damaged: must not count
    _publish(tmp_path, 60, Retention(keep=2, keep_every_steps=30))
    kept = [int(name[5:]) for name in _names(tmp_path) if name.startswith("step_")]
    assert kept == [30, 40, 50, 60], "60 and 40 verify; 50 is newer than the second of them; 30 is an n-th"
    assert verify_checkpoint(tmp_path / "step_00000060") == []


def test_what_stands_in_the_way_is_moved_aside(tmp_path: Path) -> None:
    _make(tmp_path, 10)
    (tmp_path / "step_00000010" / "state.json").write_bytes(b"y")
    _make(tmp_path, 20)
    _publish(tmp_path, 10, Retention(5))
    _publish(tmp_path, 20, Retention(5))
    assert _names(tmp_path) == [
        "latest",
        "step_00000010",
        "step_00000010.damaged-2-other",
        "step_00000020",
        "step_00000020.superseded-2-other",
    ]
    assert verify_checkpoint(tmp_path / "step_00000010") == []


def test_what_is_seen_is_whole_and_on_disk_at_every_moment_of_a_publication(tmp_path: Path) -> None:
    """A power cut cannot be tried here: so each act that others can see must follow the syncs of what it relies on."""
    _make(tmp_path, 10)
    acts: list[str] = []
    fsync, replace = os.fsync, os.replace

    def look() -> None:
        name, manifest = (tmp_path / "latest").read_text().split()
        assert verify_checkpoint(tmp_path / name) == [], acts
        assert checksum(tmp_path / name / "manifest.json") == manifest

    def sync(descriptor: int) -> None:
        look()
        fsync(descriptor)
        acts.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def rename(source: Path, target: Path) -> None:
        look()
        replace(source, target)
        acts.append(f"rename to {target.name}")
        look()

    with mock.patch("os.fsync", sync), mock.patch("os.replace", rename):
        _make(tmp_path, 20)
    assert acts == [
        "sync ..",  # the directory of checkpoints may be new
        "sync .step_00000020.1-test.tmp/manifest.json",
        "sync .step_00000020.1-test.tmp",
        "rename to step_00000020",
        "sync .",
        "sync .latest.1-test.tmp",
        "rename to latest",
        "sync .",
    ]
    acts.clear()
    with mock.patch("os.fsync", sync):
        assert write_and_read_back(tmp_path / "file", b"content") == checksum(tmp_path / "file")
    assert acts == ["sync file"]


def test_a_disk_that_is_full_is_named_by_the_file_that_it_has_no_room_for(tmp_path: Path) -> None:
    """What a write raises knows no file."""
    full = mock.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(StorageError, match=rf"write {tmp_path}/\.status\.json\..*, found: No space left"):
        raise_on_all_ranks(lambda: replace_durably(tmp_path / "status.json", b"{}"))


def test_an_attempt_that_lost_the_run_publishes_nothing(tmp_path: Path) -> None:
    _make(tmp_path, 10)
    asked = []

    def assert_owner() -> None:
        asked.append(1)
        if len(asked) == 2:  # lost while the manifest was written
            raise DsbertError("another one owns the run")

    publisher = Publisher(tmp_path, "1-old", Retention(1), assert_owner)
    temporary = tmp_path / ".step_00000020.1-old.tmp"
    publisher.make_room(temporary, 1)
    before = (tmp_path / "latest").read_text()
    with pytest.raises(DsbertError, match="another one"):
        publisher.publish(temporary, tmp_path / "step_00000020", _manifest(20, {}))
    assert not (tmp_path / "step_00000020").exists()
    assert (tmp_path / "latest").read_text() == before


def test_room_is_asked_for_before_a_byte_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    publisher = Publisher(tmp_path / "root", "1-test", Retention(1), lambda: None)
    with pytest.raises(DsbertError, match=r"expected \d+ bytes free in .*root for a checkpoint, found \d+"):
        publisher.make_room(tmp_path / "root" / ".step_00000001.1-test.tmp", free)
    assert _names(tmp_path / "root") == []


def test_what_is_being_read_by_others_costs_a_line_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        _make(tmp_path, step)
    publisher = Publisher(tmp_path, "1-test", Retention(1), lambda: None)
    with mock.patch("os.replace", side_effect=PermissionError(13, "Permission denied")):
        publisher.remove_old()
    assert "were not removed" in capsys.readouterr().err
    publisher.remove_old()
    assert [name for name in _names(tmp_path) if name.startswith("step_")] == ["step_00000020"]


def a_save_that_somebody_waits_for_longer_than_the_timeout(directory: str) -> list[float]:
    """It goes on as long as bytes move; where none does, every rank leaves."""
    import time

    from dsbert.base.errors import PeerError
    from dsbert.checkpoint import writer as writing
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    engine, masks = bench.engine_and_masks(bench.recipe(), world)
    companions = Path(directory) / "companions"
    companions.mkdir(exist_ok=True)
    alive: list[float] = []
    writer = writing.CheckpointWriter(
        Path(directory) / "checkpoints", companions, attempt="1-test", retention=Retention(2), timeout_s=1.0,
        alive=lambda: alive.append(time.monotonic()),
    )  # fmt: skip
    original = durable.write_and_read_back

    def slow(path: Path, data: Any, count: Any, *more: Any) -> str:
        for _ in range(10 if world.rank == 1 else 0):
            time.sleep(0.3)
            count(1)
        return original(path, data, count, *more)

    with mock.patch.object(writing, "write_and_read_back", slow):
        start = time.monotonic()
        assert writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).step == 0
        took = time.monotonic() - start
    assert took > 3
    assert len(alive) >= 8, "heartbeats must hear that the wait goes on"

    def stuck(*_: Any) -> str:
        time.sleep(1000)
        return ""

    with mock.patch.object(writing, "write_and_read_back", stuck):
        engine.step = 1
        start = time.monotonic()
        with pytest.raises(PeerError, match="write nothing for 1 s"):
            writer.save(engine, masks, bench.run_record(engine.recipe), Totals())
        assert time.monotonic() - start < 5
    return []


def test_a_slow_save_is_waited_for_and_a_stuck_one_is_not(tmp_path: Path) -> None:
    run_distributed(a_save_that_somebody_waits_for_longer_than_the_timeout, 2, {"directory": str(tmp_path)})
    assert (tmp_path / "checkpoints" / "latest").read_text().startswith("step_00000000 ")


def test_an_older_attempt_cannot_publish_what_its_successor_cleans_up(tmp_path: Path) -> None:
    """Between the successor's claim and its clean-up the older one renames: it finds nothing under the old name."""
    from dsbert.training.run_directory import RunDirectory

    directory = RunDirectory(tmp_path)
    root = directory.checkpoints
    temporary = root / ".step_00000020.1-old.tmp"
    _make(root, 10)
    os.replace(_make(root, 20), temporary)
    renamed = []
    rmtree = shutil.rmtree

    def in_the_middle(path: Any, **options: Any) -> None:
        with suppress(FileNotFoundError):
            os.replace(temporary, root / "step_00000020")
            renamed.append(path)
        rmtree(path, **options)

    with mock.patch("shutil.rmtree", in_the_middle):
        directory._clean_up("new", set())
    assert not renamed
    assert [name for name in _names(root) if name.startswith((".", "step"))] == ["step_00000010"]


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path: Path) -> None:
    _make(tmp_path, 10)
    with mock.patch("os.listdir", side_effect=PermissionError(13, "Permission denied")), pytest.raises(PermissionError):
        newest_checkpoint(tmp_path)
