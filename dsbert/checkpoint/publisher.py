"""What rank 0 does so that a checkpoint is there at once or not at all: room, manifest, rename, `latest`, retention."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from dsbert.base.durable import SHOWN_WITHIN_S, is_shown, read_regular, sync_directory, write_durably
from dsbert.base.errors import DsbertError, StorageError, printable
from dsbert.checkpoint.loading import LATEST, published, verify_checkpoint
from dsbert.checkpoint.state import MANIFEST, FileRecord, Manifest

_SPARE_BYTES = 1 << 20  # for state, manifest, directories


@dataclass(frozen=True)
class Retention:
    """What stays: the `keep` newest checkpoints that verify, those of every `keep_every_steps` steps (None: no more),
    and the one that `latest` names."""

    keep: int
    keep_every_steps: int | None = None


class Publisher:
    """Turns the directories that ranks have written into checkpoints of `root`.

    attempt: goes into the names of what is moved aside. assert_owner: raises if this attempt may not write any more;
    asked before every act that others can see. patience_s: for what other ranks have written to be seen here.
    """

    def __init__(
        self,
        root: Path,
        attempt: str,
        retention: Retention,
        assert_owner: Callable[[], object],
        patience_s: float = SHOWN_WITHIN_S,
    ) -> None:
        self._root, self._attempt, self._retention, self._assert_owner = root, attempt, retention, assert_owner
        self._patience_s = patience_s
        self._verified: set[str] = set()  # by this process, which has read them

    def make_room(self, temporary: Path, needed_bytes: int) -> None:
        """Make a directory for the ranks' files, on a disk that has room for them. Raises StorageError."""
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            sync_directory(self._root.parent)
            free = shutil.disk_usage(temporary).free
        except OSError as error:
            raise StorageError(
                f"could not make {temporary}: {error.strerror}; earlier checkpoints are intact"
            ) from None
        if free < needed_bytes + _SPARE_BYTES:
            temporary.rmdir()
            raise StorageError(
                f"expected {needed_bytes + _SPARE_BYTES} bytes free in {self._root} for a checkpoint, found {free}: "
                "make room and start again; earlier checkpoints are intact"
            )

    def publish(
        self,
        temporary: Path,
        target: Path,
        manifest: Manifest,
        count: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        """Publish what the ranks say they have written. Raises DsbertError or OSError.

        manifest: with every file, each read back by the rank that wrote it. count: told the bytes of
        every piece that was read.
        """
        self._assert_owner()
        text = (json.dumps(manifest.to_json(), indent=1) + "\n").encode()
        write_durably(temporary / MANIFEST, text)
        sync_directory(temporary)
        deadline = time.monotonic() + self._patience_s  # of both looks: no byte moves meanwhile
        self._assert_sizes(temporary, manifest.files, deadline)
        self._assert_owner()
        _move_aside(target, self._attempt, count)
        os.replace(temporary, target)
        sync_directory(self._root)
        self._assert_sizes(target, manifest.files, deadline)  # once more: nobody can have touched them under this name
        if (target / MANIFEST).read_bytes() != text:
            raise StorageError(f"expected {target / MANIFEST} as it was written, found something else")
        self._assert_owner()
        pointer = self._root / f".{LATEST}.{self._attempt}.tmp"
        write_durably(pointer, f"{target.name} {xxhash.xxh3_128_hexdigest(text)}\n".encode())
        os.replace(pointer, self._root / LATEST)
        sync_directory(self._root)
        self._verified.add(target.name)

    def sees(self, look: Callable[[], bool], patience_s: float | None = None) -> bool:
        """As `is_shown`, of this attempt's own files: the next one removes them. Raises DsbertError where it has."""

        def look_or_leave() -> bool:
            shown = False
            try:
                shown = look()
            finally:
                if not shown:
                    self._assert_owner()
            return shown

        return is_shown(look_or_leave, self._patience_s if patience_s is None else patience_s)

    def remove_old(self) -> None:
        """Remove what retention does not keep. What cannot be removed costs a line on standard error."""
        try:
            self._remove_old(read_regular(self._root / LATEST).decode("utf-8", "replace").split()[0])
        except DsbertError:  # another attempt owns the run, and removes what it likes
            return
        except (OSError, IndexError) as error:
            print(
                f"dsbert: old checkpoints in {self._root} were not removed: {printable(error)}",
                file=sys.stderr,
                flush=True,
            )

    def _remove_old(self, latest: str) -> None:
        self._assert_owner()
        kept = 0
        for path in reversed(published(self._root)):
            if kept < self._retention.keep:
                kept += self._verifies(path)
                continue
            every = self._retention.keep_every_steps
            if path.name == latest or (every and int(path.name.removeprefix("step_")) % every == 0):
                continue
            # By another name first: what is half removed must not look like a checkpoint.
            removed = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
            os.replace(path, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _assert_sizes(self, directory: Path, files: dict[str, FileRecord], deadline: float) -> None:
        """As rank 0 sees what the others wrote, which may be late."""
        for name, entry in files.items():
            path, size = directory / name, entry.bytes
            if not self.sees(partial(_has_size, path, size), deadline - time.monotonic()):
                raise StorageError(f"expected {size} bytes in {path}, found {path.stat().st_size}")

    def _verifies(self, path: Path) -> bool:
        if path.name not in self._verified and not verify_checkpoint(path):
            self._verified.add(path.name)
        return path.name in self._verified


def _has_size(path: Path, size: int) -> bool:
    return path.stat().st_size == size


def _move_aside(target: Path, attempt: str, count: Callable[[int], object]) -> None:
    """What stands where the new checkpoint belongs is kept: under a name that says whether it was whole."""
    if target.exists():
        kind = "damaged" if verify_checkpoint(target, count=count) else "superseded"
        os.replace(target, target.with_name(f"{target.name}.{kind}-{attempt}"))
