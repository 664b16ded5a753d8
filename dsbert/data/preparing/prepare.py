"""`dsbert prepare`: from sources of text to a data directory, complete or not there at all.

Four passes over pieces, each shared by all ranks and their workers (work_queue.py): look at the files, read and clean,
encode, put shards together. Between them rank 0 decides what becomes of each document, trains the tokenizer and cuts
the shards. Everything is kept in a directory beside the target, by names that follow from the content, until the last
rename: whatever ends a preparation, the next one goes on from there. Equal requests give equal bytes, on any number
of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout, UnixFileLock

from dsbert.base.durable import sync_directory
from dsbert.base.errors import UserError, disk_error
from dsbert.cluster.ranks import RankInfo
from dsbert.cluster.secret import SECRET_FILE
from dsbert.data.manifest import SPLITS, Manifest, Request, TokenizerEntry, data_digest, load_manifest
from dsbert.data.preparing.assembly import assemble, files_without_text, find_existing, split_entry, summarize
from dsbert.data.preparing.done_markers import drop_torn_markers, read_marker
from dsbert.data.preparing.folders import NO_TEXT, LeftOut, summarized
from dsbert.data.preparing.learning import make_tokenizer, unknown_fraction
from dsbert.data.preparing.merging import plan_shards
from dsbert.data.preparing.options import Options, chosen_normalizer, make_request
from dsbert.data.preparing.plan import cut_tasks, empty_files, files_by_source, read_tasks
from dsbert.data.preparing.sources import TextSource, resolve
from dsbert.data.preparing.split_assignment import assign_splits
from dsbert.data.preparing.spool import MAX_EXAMPLES, key_of, save_array
from dsbert.data.preparing.tasks import Task, disk_trouble
from dsbert.data.preparing.work_queue import Progress, WorkQueue, do_all
from dsbert.data.preparing.worker_pool import WorkerPool


def prepare(
    sources: Sequence[str],
    to: str | Path,
    vocab_size: int | None = None,
    *,
    progress: Progress | None = None,
    nproc: int = 1,
    queue: WorkQueue | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Make the data directory `to`, or find that it is already there. Collective over the ranks of the queue.

    Args:
        sources: SOURCES, as sources.py says.
        to: the directory to make; on a file system that all ranks share.
        vocab_size: this and `options` are the fields of `Options`.
        progress: told how far each stage is, on rank 0.
        nproc: processes of this rank.
        queue: that of this rank and its peers; None: this process is alone.

    Returns:
        documents, sentences, tokens (both splits together), duplicates (exact copies dropped), shards, digest,
        seconds; up_to_date: whether nothing had to be done; dropped: documents by cause; mended, mended_in: documents
        whose sentences were found another way, and where; left_out: files by reason, as `folders.summarized` gives
        them; unknown: the fraction of [UNK] among the tokens; sources: the grouping of each; resumed: pieces of work
        that an interrupted call had done.

    Raises:
        UserError: a source cannot be read, a number is out of bounds, or `to` holds something else.
        StorageError: the disk is full, or fails.
        DataError: `to` holds this data, damaged.
        PeerError: a rank or a worker was lost.
    """
    began = time.monotonic()
    chosen = Options(vocab_size, **options)
    chosen.check()
    queue = queue or WorkQueue(RankInfo(0, 1, 0))
    workers = WorkerPool(nproc)
    report = progress if progress and queue.is_main else lambda stage, done, total: None
    try:
        summary = _Preparation(queue, workers, Path(os.path.realpath(to)), report, chosen).run(sources)
    except OSError as error:
        raise disk_error(error, disk_trouble(error)) from error
    finally:
        workers.close()
    return summary | {"seconds": time.monotonic() - began}


def work_directory(to: str | Path) -> Path:
    """Where a preparation of `to` keeps all that it does, until it is done. A link to a directory elsewhere is no name
    that could be given to the one that is made here."""
    target = Path(os.path.realpath(to))
    return target.with_name(f".{target.name}.preparing")


class _Preparation:
    """One call, on one rank. What rank 0 works out between the passes it publishes to the others."""

    def __init__(
        self, queue: WorkQueue, workers: WorkerPool, target: Path, progress: Progress, options: Options
    ) -> None:
        self.queue, self.workers, self.target, self.progress = queue, workers, target, progress
        self.options = options
        self.directory = work_directory(target)
        self.resumed = 0
        self.sources: list[TextSource] = []
        self.left_out: list[LeftOut] = []

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """The whole preparation; the summary, without its seconds."""
        options = self.options
        with self._alone():
            goal: Request | None = None
            existing: Manifest | None = None

            def look() -> list[Task]:
                self.sources = resolve(names, options.documents)
                return cut_tasks(self.sources, options.text_column, self.directory)

            def request() -> list[Task]:
                nonlocal goal, existing
                files = files_by_source(cut, len(self.sources))
                for source, own in zip(self.sources, files, strict=True):
                    self.left_out += [*source.left_out, *empty_files(own)]
                goal = make_request(self.sources, files, options)
                existing = find_existing(self.target, goal)
                if existing:
                    return []
                near, normalizer = goal.near_duplicates, chosen_normalizer(options)
                return read_tasks(files, self.directory, options.min_words, near, normalizer)

            cut = self._pass("look", look, count=False)
            read = self._pass("read", request)
            if self.queue.is_main and existing is None:
                assert goal is not None
                self._encode(goal, read)
            else:  # the others are told what to do; of data that is there already, nothing
                self._pass("encode", list)
                self._pass("shards", list)
            return self._finish(goal, existing)

    def _pass(self, stage: str, make: Callable[[], list[Task]], count: bool = True) -> list[Task]:
        """Have the tasks done that rank 0 makes."""
        if self.queue.is_main:
            tasks = make()
            drop_torn_markers(tasks)
            self.queue.publish(stage, json.dumps(tasks).encode())
        else:
            tasks = json.loads(self.queue.wait_for(stage))
        done = do_all(self.queue, self.workers, stage, tasks, self.progress) if tasks else 0
        self.resumed += done if count else 0
        return tasks

    def _encode(self, goal: Request, read: list[Task]) -> None:
        """Rank 0, from spooled pieces to a directory that only needs its name."""
        pieces = [Path(task["to"]) for task in read]
        counts = [read_marker(task) for task in read]
        self.left_out += files_without_text([source.name for source in self.sources], read, counts)
        self.progress("decide", 0, 0)
        assignment = assign_splits(
            pieces, [count["documents"] for count in counts], goal.validation, bool(goal.near_duplicates)
        )
        key = key_of([piece.name for piece in pieces], goal.validation, goal.near_duplicates)
        split_file = self.directory / f"splits-{key}.npy"
        save_array(split_file, assignment.splits)
        # By its digest as well: since an interrupted call, the directory that is given may hold another one.
        named = key_of(key, goal.tokenizer)
        folder, entry = make_tokenizer(self.directory, pieces, assignment, self.options, named, self.progress)
        tasks = [
            {
                "do": "encode",
                "piece": str(piece),
                "tokenizer": str(folder),
                "splits": str(split_file),
                "first": int(first),
                # By its place as well: of two equal pieces the second holds nothing but copies.
                "to": str(self.directory / key_of("encode", key, piece.name, int(first), entry.digest)),
                "weight": count["bytes"] + 1,
            }
            for piece, first, count in zip(pieces, assignment.offsets, counts, strict=False)
        ]
        self._pass("encode", lambda: tasks)
        made = self.directory / "data"
        made.mkdir(exist_ok=True)
        shards = {split: self._shards(split, tasks, goal, entry, made) for split in SPLITS}
        self._pass("shards", lambda: [task for split in SPLITS for task in shards[split]])
        splits = {split: split_entry(shards[split]) for split in SPLITS}
        dropped = {
            "duplicates": assignment.duplicates,
            "near_duplicates": assignment.near_duplicates,
            **{cause: sum(count[cause] for count in counts) for cause in ("empty", "tiny")},
            "tokenless": sum(read_marker(task)["tokenless"] for task in tasks),
        }
        mended = sum(count["mended"] for count in counts)
        examples = tuple([example for count in counts for example in count["examples"]][:MAX_EXAMPLES])
        files = assemble(made, folder, shards, entry.vocab_size)
        digest = data_digest(entry.digest, splits)
        left_out = summarized(self.left_out)
        Manifest(goal, entry, splits, dropped, digest, files, mended, examples, left_out).save(made)

    def _shards(self, split: str, encoded: list[Task], goal: Request, entry: TokenizerEntry, made: Path) -> list[Task]:
        files = [f"{task['to']}.{split}.arrow" for task in encoded]
        plan = plan_shards([file for file in files if os.path.exists(file)], goal.shard_tokens)
        return [
            {
                "do": "merge",
                "segments": segments,
                "file": str(made / f"{split}-{number:05d}.arrow"),
                "tokenizer": entry.digest,
                "vocab_size": entry.vocab_size,
                "to": str(self.directory / key_of("merge", split, number, segments, entry.digest)),
                "weight": sum(last - first for _, first, last in segments),
            }
            for number, segments in enumerate(plan)
        ]

    def _finish(self, goal: Request | None, existing: Manifest | None) -> dict[str, Any]:
        """Put the directory in its place; the summary, on all ranks."""
        if self.queue.is_main:
            assert goal is not None
            if existing is None:
                self._rename()
            manifest = load_manifest(self.target)
            summary = summarize(manifest) | {"unknown": unknown_fraction(self.target)}
            summary |= {"up_to_date": existing is not None, "resumed": self.resumed}
            if existing is not None:  # what is in the folders now, and what was found when they were read
                without = {reason: entry for reason, entry in manifest.left_out.items() if reason == NO_TEXT}
                summary["left_out"] = dict(sorted((summarized(self.left_out) | without).items()))
            self.queue.publish("summary", json.dumps(summary).encode())
            shutil.rmtree(self.directory, ignore_errors=True)
            return summary
        published: dict[str, Any] = json.loads(self.queue.wait_for("summary"))
        return published

    def _rename(self) -> None:
        try:
            os.rename(self.directory / "data", self.target)  # fails on a target that somebody else filled meanwhile
        except OSError as error:
            raise UserError(f"cannot write {self.target}: {error}; check whether another prepare ran") from error
        sync_directory(self.target.parent)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The work directory, there for all ranks, and no other preparation at work in it."""
        if not self.queue.is_main:
            self.queue.wait_for("directory")
            yield
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # A lock of the kernel's, which ends with the process: never a file that a killed one would leave behind.
        lock = UnixFileLock(self.directory / "lock", blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"expected no other preparation of {self.target} at work, found one: wait for it, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            self.queue.publish("directory", b"there")
            yield
        finally:
            if self.directory.exists() and not any(
                path.name not in ("lock", SECRET_FILE) for path in self.directory.iterdir()
            ):
                shutil.rmtree(self.directory, ignore_errors=True)
            lock.release()
