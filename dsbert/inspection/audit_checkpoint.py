"""Whether a checkpoint is right, beyond what loading asks: every file is read, and every one that is wrong is named.

Checksums say that a file is as it was written. Here it is also held against the other files: weights and moments are
there once and completely, every number is finite, each topology is one, and all files agree on step and world. What is
no damage but worth knowing (a stray file) is a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsbert.base.records import Record
from dsbert.checkpoint.fragments import fragments_name
from dsbert.checkpoint.loading import TOPOLOGY, Problem, lies_inside, step_name, verify_checkpoint
from dsbert.checkpoint.state import MANIFEST, STATE, CheckpointState, Manifest, manifest_object, state_object
from dsbert.inspection.audit_content import fragment_problems, state_problems, topology_problems

NAME = re.compile(r"step_([0-9]{8})")
ASIDE = re.compile(r"step_([0-9]{8})\.(damaged|superseded)-.+")


@dataclass
class Audit:
    """What was found. File names are relative to what was audited; nbytes: of the files that manifests name."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    nbytes: int = 0


def audit_checkpoint(path: Path, count: Callable[[int], object] = lambda nbytes: None) -> Audit:
    """Of one checkpoint directory under any name. count: told the bytes of every file that was read."""
    audit = Audit()
    if not os.path.isdir(path):
        audit.problems.append(Problem(".", "expected a directory, found something else"))
    else:
        try:
            manifest = manifest_object(path)
            found = list(_manifest_problems(path, manifest)) or _record_problems(MANIFEST, manifest, Manifest)
        except Exception as error:
            manifest, found = {}, [Problem(MANIFEST, str(error) or repr(error))]
        audit.problems += found or _file_problems(path, manifest, count)
        if not found:
            audit.nbytes = sum(entry["bytes"] for entry in manifest["files"].values())
            audit.problems += _content_problems(path, manifest, {problem.file for problem in audit.problems})
            audit.notes += _strays(path, set(manifest["files"]))
    audit.checkpoints = [{"name": path.absolute().name, "ok": not audit.problems}]
    return audit


def _manifest_problems(path: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Whether the manifest is one that the files can be held against."""
    own = path.absolute().name
    step, world_size, files = (manifest.get(key) for key in ("step", "world_size", "files"))
    if not isinstance(files, dict):
        yield Problem(MANIFEST, f"expected a table of files, found {files!r}")
        return
    for name, entry in files.items():
        if not lies_inside(name) or not name.isprintable():
            yield Problem(MANIFEST, f"expected names of files in the checkpoint, found {name!r}")
        size, xxh3 = (entry.get("bytes"), entry.get("xxh3")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(xxh3, str):
            yield Problem(MANIFEST, f"expected bytes and xxh3 of {name!r}, found {entry!r}")
    if type(world_size) is not int or not 1 <= world_size <= max(1, len(files)):
        yield Problem(MANIFEST, f"expected a world size of at most the {len(files)} files, found {world_size!r}")
    if type(step) is not int or step < 0:
        yield Problem(MANIFEST, f"expected a step, found {step!r}")
    elif (NAME.fullmatch(own) or ASIDE.fullmatch(own)) and not own.startswith(step_name(step)):
        yield Problem(MANIFEST, f"expected the step of {own}, found {step}")
    if not isinstance(manifest.get("topology_digest"), str):
        yield Problem(MANIFEST, f"expected topology_digest, found {manifest.get('topology_digest')!r}")


def _record_problems(file: str, record: dict[str, Any], model: type[Record]) -> list[Problem]:
    """What else would keep a run from going on."""
    try:
        model.from_json(record)
    except ValueError as error:
        return [Problem(file, str(error))]
    return []


def _file_problems(path: Path, manifest: dict[str, Any], count: Callable[[int], object]) -> list[Problem]:
    """`verify_checkpoint`, a file at a time."""
    files = manifest["files"]
    found: dict[Problem, None] = {}  # what concerns all files is found with each of them
    for number, name in enumerate(files):
        found |= dict.fromkeys(verify_checkpoint(path, part=(number, len(files))))
        count(files[name]["bytes"])
    found |= dict.fromkeys(verify_checkpoint(path, part=(0, 1)) if not files else ())
    return list(found)


def _content_problems(path: Path, manifest: dict[str, Any], damaged: set[str]) -> Iterator[Problem]:
    """Of the files that are as they were written: whether what was written is right."""
    if STATE in damaged:
        return
    try:
        state = state_object(path)
        found = list(state_problems(state, manifest)) or _record_problems(STATE, state, CheckpointState)
    except Exception as error:
        found = [Problem(STATE, f"unreadable: {error or repr(error)}")]
    yield from found
    if found:
        return
    fragments = [fragments_name(rank, manifest["world_size"]) for rank in range(manifest["world_size"])]
    if TOPOLOGY not in damaged:
        yield from _guarded(TOPOLOGY, lambda: topology_problems(path, state, manifest["topology_digest"]))
    if not damaged.intersection(fragments):
        yield from _guarded(fragments[0], lambda: fragment_problems(path, fragments, state))


def _guarded(file: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """What the check finds. What stops it is a problem of the file as well: bytes of any kind may stand there."""
    try:
        return list(check())
    except Exception as error:
        return [Problem(file, f"unreadable: {error or repr(error)}")]


def _strays(path: Path, named: set[str]) -> Iterator[Problem]:
    for directory, _, files in os.walk(path):
        for name in sorted(files):
            file = (Path(directory) / name).relative_to(path).as_posix()
            if file not in named | {MANIFEST}:
                yield Problem(file, "not in the manifest")
