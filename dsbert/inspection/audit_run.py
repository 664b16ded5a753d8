"""Whether a run or a checkpoint is what it should be: everything is read, and every file that is wrong is named.

What is no damage but worth knowing (a torn last line, `latest` one checkpoint behind) is a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from dsbert.base.durable import checksum, read_regular
from dsbert.base.errors import UserError
from dsbert.checkpoint.loading import LATEST, TOPOLOGY, Problem
from dsbert.checkpoint.state import KIND, MANIFEST, STATE, manifest_object
from dsbert.inspection.audit_checkpoint import ASIDE, NAME, Audit, audit_checkpoint
from dsbert.inspection.audit_data import audit_data
from dsbert.inspection.audit_records import audit_records
from dsbert.inspection.special_files import special, special_files

CHECKPOINTS = "checkpoints"
_RUN_FILES = (CHECKPOINTS, "attempt.json", "attempts.jsonl", "status.json", "masks.jsonl")
_MESSAGE = 300  # characters of a message: what is quoted in it may be garbage of any length


def audit(path: Path, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> dict[str, Any]:
    """Read everything of a checkpoint, of prepared data, or of all published checkpoints of a run with its records.

    Returns {kind, path, ok, problems: [{file, problem}], notes: [{file, problem}], checkpoints: [{name, ok}], bytes}.
    Raises UserError if the path is neither; no damage raises anything.
    """
    kind = kind_of(path)
    done, total = 0, bytes_below(path / CHECKPOINTS if kind == "run" else path)

    def count(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        progress("verify", done, total)

    unreadable = special_files(path, only=CHECKPOINTS if kind == "run" else None)
    found = Audit(unreadable) if unreadable else _AUDITS[kind](path, count)
    progress("verify", total, total)
    return {
        "kind": kind,
        "path": str(path),
        "ok": not found.problems,
        "problems": [_plain(problem) for problem in found.problems],
        "notes": [_plain(note) for note in found.notes],
        "checkpoints": found.checkpoints,
        "bytes": found.nbytes,
    }


def kind_of(path: Path) -> str:
    """ "checkpoint", "run" or "data": of damaged ones, too, by what is left of them. Raises UserError if it is none."""
    if any(os.path.lexists(path / name) for name in _RUN_FILES):
        return "run"
    name = path.absolute().name
    if os.path.lexists(path) and (NAME.fullmatch(name) or ASIDE.fullmatch(name)):
        return "checkpoint"
    found = "neither"
    try:
        if any(re.fullmatch(r"(train|validation)-\d{5,}\.arrow", name) for name in os.listdir(path)):
            return "data"
        if any(name in (STATE, TOPOLOGY) or name.startswith("fragments-") for name in os.listdir(path)):
            return "checkpoint"
        if special(path / MANIFEST) or manifest_object(path)["kind"] == KIND:
            return "checkpoint"
    except OSError as error:
        found = str(error.strerror)
    except Exception:  # no manifest, or that of something else
        pass
    raise UserError(
        f"expected a run directory, a checkpoint or prepared data at {path}, found: {found}: give one of the three"
    )


def audit_run(path: Path, count: Callable[[int], object] = lambda nbytes: None) -> Audit:
    """Of all published checkpoints of a run, of `latest`, and of the records beside them; not of the directories that
    were moved aside or belong to a writer."""
    audit = Audit()
    root = path / CHECKPOINTS
    try:
        names = sorted(name for name in os.listdir(root) if NAME.fullmatch(name))
    except FileNotFoundError:
        names = []
    except OSError as error:
        names = []
        audit.problems.append(Problem(CHECKPOINTS, f"unreadable: {error.strerror}"))
    for name in list(names):
        own = audit_checkpoint(root / name, count)
        if own.problems and not os.path.lexists(root / name):  # a run that goes on removes old ones
            names.remove(name)
            continue
        audit.problems += [_below(f"{CHECKPOINTS}/{name}", problem) for problem in own.problems]
        audit.notes += [_below(f"{CHECKPOINTS}/{name}", note) for note in own.notes]
        audit.checkpoints += own.checkpoints
        audit.nbytes += own.nbytes
    if not names and not audit.problems:
        message = "expected a checkpoint, found none: nothing was saved yet, or it was removed"
        audit.problems.append(Problem(CHECKPOINTS, message))
    _audit_latest(root, names, audit)
    audit_records(path, [root / entry["name"] for entry in audit.checkpoints if entry["ok"]], audit)
    return audit


_AUDITS: dict[str, Callable[[Path, Callable[[int], object]], Audit]] = {
    "checkpoint": audit_checkpoint,
    "run": audit_run,
    "data": audit_data,
}


def read_latest(root: Path) -> tuple[str, str] | None:
    """(name, checksum of the manifest) that `latest` holds; None if it holds anything else. Raises OSError."""
    words = read_regular(root / LATEST).decode("utf-8", "replace").split()
    if len(words) == 2 and NAME.fullmatch(words[0]) and re.fullmatch("[0-9a-f]{32}", words[1]):
        return words[0], words[1]
    return None


def _audit_latest(root: Path, names: list[str], audit: Audit) -> None:
    """Tools follow it, so that it must name a checkpoint as it is; that a newer one is there is no damage: a crash
    between rename and `latest` leaves it so, and resuming looks for the newest by itself."""
    file = f"{CHECKPOINTS}/{LATEST}"
    try:
        latest = read_latest(root)
        if latest is None:
            content = read_regular(root / LATEST)
            found = f"found {content[:80]!r}" if content.strip() else "found it empty"
            audit.problems.append(Problem(file, f"expected a checkpoint's name and a checksum, {found}"))
            return
    except FileNotFoundError:
        if names:
            audit.problems.append(Problem(file, f"missing: expected it to name {names[-1]}; the next save writes it"))
        return
    except OSError as error:
        audit.problems.append(Problem(file, f"unreadable: {error.strerror}"))
        return
    name, expected = latest
    if name not in names:
        audit.problems.append(Problem(file, f"expected the name of a checkpoint, found {name}, which is not there"))
        return
    try:
        if checksum(root / name / MANIFEST) != expected:
            audit.problems.append(Problem(file, f"the checksum of {name}/{MANIFEST} differs"))
        elif name != names[-1]:
            audit.notes.append(Problem(file, f"names {name}, while {names[-1]} is newer; the next save mends it"))
    except OSError:
        pass  # the checkpoint's own problem


def bytes_below(path: Path) -> int:
    """Bytes of all files of a directory and below; 0 where there is none."""
    sizes = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                sizes += (Path(directory) / name).stat().st_size
            except OSError:
                continue
    return sizes


def _below(directory: str, problem: Problem) -> Problem:
    return Problem((PurePosixPath(directory) / problem.file).as_posix(), problem.problem)


def _plain(problem: Problem) -> dict[str, str]:
    """As printable text on one line."""
    file, message = (
        " ".join(text.encode("utf-8", "backslashreplace").decode().split()) for text in (problem.file, problem.problem)
    )
    return {"file": file, "problem": message if len(message) <= _MESSAGE else message[:_MESSAGE] + " ..."}


def report_lines(report: dict[str, Any]) -> list[str]:
    """What `audit` returned, for people."""
    count = len(report["checkpoints"])
    size = f"{count} checkpoint{'' if count == 1 else 's'}, " if report["kind"] != "data" else "data, "
    size += f"{report['bytes']:,} bytes"
    return [
        f"{report['path']}: {'ok' if report['ok'] else 'not ok'} ({size})",
        *(f"  {entry['file']}: {entry['problem']}" for entry in report["problems"]),
        *(f"  note: {entry['file']}: {entry['problem']}" for entry in report["notes"]),
    ]
