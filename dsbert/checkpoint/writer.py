"""Writing checkpoints in the background, published at once or not at all.

`begin` snapshots and returns; a thread of each rank then writes, checksums and reads back its own files. No collective
runs in a thread. The engine's control message says when every rank's thread is idle; `advance` then takes the next
step, on all ranks at once:

    writing      each rank writes into .step_X.<attempt>.tmp: write, fsync, drop from the cache, read back
    publishing   rank 0 writes the manifest from what the ranks say they wrote (the listing of a network file system
                 may be stale), renames, reads back, and only then replaces `latest` (publisher.py)
    idle

One checkpoint is in flight at most. A directory that was not published has a dot in front and is no checkpoint.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsbert.base.awake import AwakeClock
from dsbert.base.collectives import all_reduce, gather_json, on_main_rank, raise_on_all_ranks
from dsbert.base.durable import SHOWN_WITHIN_S, sync_directory, write_and_read_back
from dsbert.base.errors import DsbertError, PeerError, StorageError
from dsbert.checkpoint.fragments import FragmentBuffer, fragment_bytes, fragments_name
from dsbert.checkpoint.loading import TOPOLOGY, step_name
from dsbert.checkpoint.publisher import Publisher, Retention
from dsbert.checkpoint.state import (
    FORMAT,
    KIND,
    STATE,
    CheckpointState,
    EngineRecord,
    FileRecord,
    Manifest,
    RunRecord,
    Totals,
)
from dsbert.engine.zero_shards import adam_step
from dsbert.sparse import MaskManager

if TYPE_CHECKING:
    from dsbert.engine.train_engine import TrainEngine


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been published. nbytes: of all its files; seconds: since `begin`, in the background."""

    step: int
    path: Path
    nbytes: int
    seconds: float


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has one, and calls its collective methods at the same step.

    root: the run's `checkpoints` directory. assets: a directory whose files go into every checkpoint unchanged
    (tokenizer, unigram counts). attempt: goes into the names of what is not yet, or no longer, a checkpoint.
    assert_owner: raises if this attempt may not write any more. max_bytes_per_s: how fast a rank may write in the
    background. timeout_s: how long `finish` waits while no rank writes or reads a byte. watch: told what the writer is
    at, for heartbeats; alive: called while `finish` waits and something moves. Memory: a copy of this rank's fragments,
    held from the first save on.
    """

    def __init__(
        self,
        root: Path,
        assets: Path,
        *,
        attempt: str,
        retention: Retention,
        assert_owner: Callable[[], object] = lambda: None,
        max_bytes_per_s: float | None = None,
        timeout_s: float = 300.0,
        watch: Callable[[str | None], object] = lambda activity: None,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        self._root, self._assets, self._attempt = root, assets, attempt
        # No byte moves meanwhile: less than `finish` waits for one.
        self._publisher = Publisher(root, attempt, retention, assert_owner, min(SHOWN_WITHIN_S, 0.9 * timeout_s))
        self._watch, self._alive = watch, alive
        self._tidying: threading.Thread | None = None
        self._max_bytes_per_s, self._timeout_s = max_bytes_per_s, timeout_s
        self._buffer = FragmentBuffer()
        self._job: _Job | None = None

    @property
    def in_flight(self) -> bool:
        """A checkpoint was begun and is not published yet: the same on all ranks."""
        return self._job is not None

    @property
    def busy(self) -> bool:
        """This rank's thread is at work."""
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    @property
    def buffer_bytes(self) -> int:
        """Memory that snapshots take on this rank."""
        return self._buffer.nbytes

    def begin(self, engine: TrainEngine, masks: MaskManager, run: RunRecord, totals: Totals) -> None:
        """Snapshot the engine's present step and have it written. Collective; nothing else may be in flight.

        run, totals: what state.json holds beside the counters. Raises the same StorageError on every rank where room
        is lacking.
        """
        assert not self.in_flight
        world, shards = engine.world, engine.shards()
        manifest = Manifest(
            kind=KIND, format=FORMAT, step=engine.step, world_size=world.world_size, topology_digest=masks.digest(),
            attempt=self._attempt, created=time.time(), files={},
        )  # fmt: skip
        job = _Job(self._root, manifest, world.rank, world.host)
        shared = _shared_files(engine, masks, run, totals, self._assets) if world.is_main else {}
        own_bytes = fragment_bytes(shards) + sum(len(data) for data in shared.values())
        needed = int(all_reduce(torch.tensor([own_bytes])))
        on_main_rank(lambda: self._publisher.make_room(job.temporary, needed))
        job.files = {fragments_name(world.rank, world.world_size): self._buffer.fill(shards), **shared}
        self._job = job
        self._watch("writing")
        job.start(lambda: self._write_own(job))

    def advance(self) -> Saved | None:
        """Take the next step, now that no rank is busy; what was published, if that was the last one. Collective.

        Raises the same DsbertError on every rank if any rank could not write; nothing is published then.
        """
        job = self._job
        if job is None:
            return None
        try:
            if not job.publishing:
                written = {name: entry.to_json() for name, entry in raise_on_all_ranks(job.result).items()}
                files = {
                    name: FileRecord.from_json(entry) for own in gather_json(written) for name, entry in own.items()
                }
                job.publishing = True
                job.nbytes = sum(entry.bytes for entry in files.values())
                if job.rank == 0:
                    self._watch("publishing")
                    job.start(lambda: self._publish(job, files))
                return None
            on_main_rank(job.result)
        except DsbertError:
            self._job = None
            self._watch(None)
            if job.rank == 0:
                shutil.rmtree(job.temporary, ignore_errors=True)
            raise
        self._job = None
        self._watch(None)
        if job.rank == 0 and not (self._tidying and self._tidying.is_alive()):  # nobody waits for it
            self._tidying = threading.Thread(target=self._publisher.remove_old, name="dsbert-retention", daemon=True)
            self._tidying.start()
        return Saved(job.step, job.target, job.nbytes, time.perf_counter() - job.started)

    def finish(self) -> Saved | None:
        """Wait until what is in flight is published. Collective.

        Raises PeerError on every rank if no rank writes or reads a byte for the timeout, or if a peer is gone.
        """
        clock = AwakeClock(1.0)
        saved, moved, since = None, (-1, False), clock.now()
        while self._job is not None:
            job = self._job
            job.hurry.set()
            if job.thread is not None:
                job.thread.join(0.05)
            stalled = clock.now() - since > self._timeout_s
            busy, total, late = all_reduce(torch.tensor([int(self.busy), job.written, int(stalled)])).tolist()
            if not busy:
                saved = self.advance()
            elif late:
                raise PeerError(
                    f"expected the checkpoint {job.target} to be written, found {busy} ranks that write nothing for "
                    f"{self._timeout_s:g} s: see whether the file system of the run directory answers"
                ).for_all()
            if (total, job.publishing) != moved:
                moved, since = (total, job.publishing), clock.now()
                self._alive()
        return saved

    def close(self, patience_s: float = 5.0) -> None:
        """Give the removal of old checkpoints a moment; the next attempt removes what is left of it. Not collective."""
        if self._tidying:
            self._tidying.join(patience_s)

    def save(self, engine: TrainEngine, masks: MaskManager, run: RunRecord, totals: Totals) -> Saved:
        """`begin` and `finish`."""
        self.begin(engine, masks, run, totals)
        saved = self.finish()
        assert saved is not None
        return saved

    # In a thread: files and checksums only

    def _write_own(self, job: _Job) -> dict[str, FileRecord]:
        """This rank's files: size and checksum of what was read back, by name."""
        written = {}
        self._publisher.sees(job.temporary.is_dir)  # rank 0 has made it; else the first file says what is wrong
        for name, data in job.files.items():
            path = job.temporary / name
            path.parent.mkdir(exist_ok=True)
            xxh3 = write_and_read_back(path, data, job.count, self._max_bytes_per_s, job.hurry)
            written[name] = FileRecord(bytes=len(data), xxh3=xxh3)
            self._watch("written")
        for directory in {(job.temporary / name).parent for name in job.files}:
            sync_directory(directory)
        return written

    def _publish(self, job: _Job, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        manifest = job.manifest.model_copy(update={"files": files})
        self._publisher.publish(job.temporary, job.target, manifest, job.count)
        return files


class _Job:
    """One checkpoint on its way, as one rank sees it."""

    def __init__(self, root: Path, manifest: Manifest, rank: int, host: str) -> None:
        self.manifest, self.step, self.rank, self.host = manifest, manifest.step, rank, host
        self.target = root / step_name(manifest.step)
        self.temporary = root / f".{self.target.name}.{manifest.attempt}.tmp"
        self.files: dict[str, bytes | memoryview] = {}
        self.thread: threading.Thread | None = None
        self.publishing = False
        self.hurry = threading.Event()  # somebody waits: write as fast as the disk can
        self.written = self.nbytes = 0
        self.started = time.perf_counter()
        self._result: dict[str, FileRecord] = {}
        self._failure: Exception | None = None

    def count(self, nbytes: int) -> None:
        """So many more bytes were written or read."""
        self.written += nbytes

    def start(self, work: Callable[[], dict[str, FileRecord]]) -> None:
        """Run `work` in a thread; `result` gives what it returned or raised."""

        def run() -> None:
            try:
                self._result = work()
            except DsbertError as error:
                self._failure = error
            except OSError as error:
                self._failure = StorageError(
                    f"could not write the checkpoint {self.target} on {self.host}: {error.strerror or error}; earlier "
                    "ones are intact"
                )
            except BaseException as error:  # a thread's traceback would be lost
                self._failure = DsbertError(f"writing the checkpoint {self.target} failed: {error!r}")

        self.thread = threading.Thread(target=run, name="dsbert-checkpoint", daemon=True)
        self.thread.start()

    def result(self) -> dict[str, FileRecord]:
        """Of the thread, which has ended or is about to. Raises DsbertError."""
        if self.thread is not None:
            self.thread.join()
        if self._failure is not None:
            raise self._failure
        return self._result


def _shared_files(
    engine: TrainEngine, masks: MaskManager, run: RunRecord, totals: Totals, assets: Path
) -> dict[str, bytes | memoryview]:
    """What rank 0 writes beside its fragments."""
    from safetensors.torch import save

    state = CheckpointState(
        format=FORMAT,
        step=engine.step,
        adam_step=adam_step(engine.deepspeed_engine),
        engine=EngineRecord.from_json(engine.counters()),
        world_size=engine.world.world_size,
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        kernels=engine.kernels.record,
        totals=totals,
        **dict(run),
    )
    files: dict[str, bytes | memoryview] = {
        TOPOLOGY: save(masks.state_dict()),
        STATE: (json.dumps(state.to_json(), indent=1) + "\n").encode(),
    }
    for source in sorted(path for path in assets.rglob("*") if path.is_file()):
        files[source.relative_to(assets).as_posix()] = source.read_bytes()
    return files
