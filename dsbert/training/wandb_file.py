"""The files that `wandb sync` sends, written without wandb.

wandb writes an offline run through a program of its own, which keeps records in memory for a while and ends at TERM:
whatever stops a job costs some of them, or leaves a file without any, and one such file has `wandb sync` send nothing.
Here a record is with the operating system when `append` returns, and a file is whole or absent.

    file     ":W&B", 0xBEE1, version 0; then LevelDB's log format: blocks of 32 KiB, zlib's crc32
    record   a protobuf message, `Record` of wandb_internal.proto; fields keep their numbers for ever
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.jsonl import to_json

_MAGIC = b":W&B\xe1\xbe\x00"
_BLOCK_BYTES = 32 * 1024
_FRAME = struct.Struct("<IHB")  # checksum of what follows it, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
# Fields of Record, and of RunRecord.
_NUM, _HISTORY, _SUMMARY, _METRIC, _RUN, _EXIT = 1, 2, 3, 12, 17, 18
_RUN_FIELDS = {"id": 1, "entity": 2, "project": 3, "group": 6, "job_type": 7, "name": 8, "notes": 9}
_CONFIG, _TAGS, _HOST, _START_TIME, _RESUME = 4, 10, 13, 17, 24
_HISTORY_RECORD = re.compile(rb"\x08[\x80-\xff]*[\x00-\x7f]\x12")
# An item of it: the key "step", and the length and the digits of its value.
_STEP = re.compile(rb"\x12\x04step\x82\x01.([0-9]+)", re.DOTALL)


class OfflineRun:
    """One start of a run: a directory in `root` that appears with its first record, and that later ones continue.

    Args:
        root: where the run has a directory for each of its starts.
        run: what to call it: id, project, name; config, in JSON types; also entity, group, job_type, notes, tags.
    """

    def __init__(self, root: Path, run: Mapping[str, Any]) -> None:
        self._root, self._run = root, run
        self._file: int | None = None
        self._nbytes = self._num = 0
        self._start_time, self._began = time.time(), time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one step's record, which has that "step".

        Raises:
            OSError: the disk refuses; the file is what it was before.
            TypeError: something in the record has no JSON form.
        """
        step = record["step"]
        extra = {"_timestamp": time.time(), "_runtime": time.monotonic() - self._began, "_step": step}
        items = [_item(key, value) for key, value in {**record, **extra}.items()]
        # What W&B shows as the last values is a record of its own.
        summary = b"".join(_field(1, item) for item in items)
        history = summary + _field(2, _field(1, step))
        if self._file is None:
            self._create([*self._head(), (_SUMMARY, summary), (_HISTORY, history)])
        else:
            self._write([(_SUMMARY, summary), (_HISTORY, history)])

    def close(self) -> None:
        """Say that this start has ended by itself. Raises OSError."""
        if self._file is None:
            return
        try:
            self._write([(_EXIT, _field(2, int(time.monotonic() - self._began)))])
        finally:
            os.close(self._file)
            self._file = None

    def _head(self) -> Iterator[tuple[int, bytes]]:
        """The run, and that its charts run over "step"."""
        run = self._run
        config = b"".join(_field(1, _item(key, value, field=1)) for key, value in run["config"].items())
        fields = [_field(number, str(run[key]).encode()) for key, number in _RUN_FIELDS.items() if run.get(key)]
        fields += [_field(_TAGS, tag.encode()) for tag in run.get("tags", ())]
        fields += [_field(_CONFIG, config), _field(_HOST, socket.gethostname().encode())]
        yield _RUN, b"".join([*fields, _field(_START_TIME, _field(1, int(self._start_time))), _field(_RESUME, 1)])
        yield _METRIC, _field(1, b"step") + _field(6, _field(3, 1))
        yield _METRIC, _field(2, b"*") + _field(4, b"step") + _field(6, _field(1, 1) + _field(3, 1))

    def _create(self, records: list[tuple[int, bytes]]) -> None:
        """Make the directory, whole at once, and later than those that are there: `wandb sync` goes by their time."""
        self._root.mkdir(parents=True, exist_ok=True)
        newest = max((path.name for path in self._root.glob("offline-run-*")), default="")
        while (name := self._name()) <= newest:
            self._start_time += 1
        hidden = self._root / f".{name}.tmp"
        hidden.mkdir()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(hidden / f"run-{self._run['id']}.wandb", flags, 0o644)
        try:
            self._append(_MAGIC)
            self._write(records)
            hidden.rename(self._root / name)
        except OSError:
            os.close(self._file)
            self._file, self._nbytes = None, 0
            shutil.rmtree(hidden, ignore_errors=True)
            raise

    def _name(self) -> str:
        return f"offline-run-{time.strftime('%Y%m%d_%H%M%S', time.localtime(self._start_time))}-{self._run['id']}"

    def _write(self, records: list[tuple[int, bytes]]) -> None:
        """Append records in one go."""
        data = bytearray()
        for field, content in records:
            self._num += 1
            data += _framed(_field(_NUM, self._num) + _field(field, content), self._nbytes + len(data))
        self._append(data)

    def _append(self, data: bytes | bytearray) -> None:
        assert self._file is not None
        try:
            written = os.write(self._file, data)
            if written < len(data):  # a disk that is almost full: the rest says why
                os.write(self._file, data[written:])
                raise OSError(f"only {written} of {len(data)} bytes were written")
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._nbytes)
            raise
        self._nbytes += len(data)


def steps_on_disk(root: Path) -> set[int]:
    """The steps that the offline files in `root` hold. What a power cut has left behind whole records is cut off, and a
    file without any is removed: one of these keeps `wandb sync` from sending the others.

    Raises:
        OSError: a file cannot be read or mended.
    """
    for hidden in root.glob(".offline-run-*.tmp"):
        shutil.rmtree(hidden, ignore_errors=True)
    steps: set[int] = set()
    for path in _parts(root):
        own, whole, size = _steps_in(path)
        steps |= own
        if not whole:
            path.unlink()
        elif whole < size:
            os.truncate(path, whole)
    return steps


def mark_synced(root: Path, last_step: int) -> None:
    """Have `wandb sync` pass over the files of which a server has every step, as it does over those that it has sent
    itself: it would send them again. Raises OSError."""
    for path in _parts(root):
        if max(_steps_in(path)[0], default=0) <= last_step:
            path.with_suffix(".wandb.synced").touch()


def _parts(root: Path) -> list[Path]:
    return list(root.glob("offline-run-*/run-*.wandb"))


def _steps_in(path: Path) -> tuple[set[int], int, int]:
    """The steps that a file holds, where its last whole record ends, and how long it is, in bytes."""
    data, whole = path.read_bytes(), 0
    steps = set()
    for record, end in _records(data):
        whole = end
        if _HISTORY_RECORD.match(record) and (found := _STEP.search(record)):
            steps.add(int(found[1]))
    return steps, whole, len(data)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each whole record, and where it ends."""
    position, record = len(_MAGIC) if data.startswith(_MAGIC) else len(data), b""
    while position + _FRAME.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _FRAME.size:  # no room for a frame: the block ends in zeros
            position += left
            continue
        checksum, length, kind = _FRAME.unpack_from(data, position)
        position += _FRAME.size
        content = data[position : position + length]
        if len(content) < length or checksum != zlib.crc32(content, zlib.crc32(bytes([kind]))):
            return
        position += length
        record = content if kind in (_FULL, _FIRST) else record + content
        if kind in (_FULL, _LAST):
            yield record, position


def _framed(record: bytes, position: int) -> bytes:
    """A record as it stands in a file from `position` on."""
    out, first = bytearray(), True
    while True:
        left = _BLOCK_BYTES - (position + len(out)) % _BLOCK_BYTES
        if left < _FRAME.size:
            out += bytes(left)
            left = _BLOCK_BYTES
        content, record = record[: left - _FRAME.size], record[left - _FRAME.size :]
        kind = (_FIRST if record else _FULL) if first else (_MIDDLE if record else _LAST)
        out += _FRAME.pack(zlib.crc32(content, zlib.crc32(bytes([kind]))), len(content), kind) + content
        first = False
        if not record:
            return bytes(out)


def _item(key: str, value: Any, field: int = 2) -> bytes:
    """A value by name, as JSON. field: 2, a nested key of one part, as in history and summary; 1, a plain one."""
    return _field(field, key.encode()) + _field(16, to_json(value).encode())


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a number, or what has a length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
