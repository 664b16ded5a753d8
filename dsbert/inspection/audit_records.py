"""Whether the records of a run are what they should be, and whether the journal of mask updates leads from the first
topology to that of each checkpoint: an update that is lost, doubled or changed is named by its line.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsbert.base.durable import open_regular, read_regular
from dsbert.base.errors import DsbertError
from dsbert.base.jsonl import lines_of, parse_object
from dsbert.base.records import Record
from dsbert.checkpoint.loading import Problem, read_topology
from dsbert.checkpoint.state import LayerRecord, read_manifest, read_state
from dsbert.config.recipe import Recipe, recipe_from_dict
from dsbert.inspection.audit_checkpoint import Audit
from dsbert.sparse.journal import replay
from dsbert.sparse.schedule import UpdateSchedule
from dsbert.sparse.topology import combined_digest, unpack_bits
from dsbert.training.attempts import Attempt, Status, StepRecord, UpdateRecord
from dsbert.training.topology_media import first_topologies

MASKS = "masks.jsonl"
_JOURNALS: dict[str, type[Record]] = {
    "metrics.jsonl": StepRecord,
    MASKS: UpdateRecord,
    "attempts.jsonl": Attempt,
}
_RECORDS: dict[str, type[Record]] = {"attempt.json": Attempt, "status.json": Status}


def audit_records(run: Path, whole: list[Path], audit: Audit) -> None:
    """Add to `audit` what is wrong. whole: the checkpoints that are, oldest first."""
    for name, model in _JOURNALS.items():
        before = len(audit.problems)
        _audit_journal(run / name, model, audit)
        if name == MASKS and len(audit.problems) == before and whole:
            audit.problems += _replayed(run / MASKS, whole)
    for name, model in _RECORDS.items():
        try:
            record = parse_object(read_regular(run / name))
            if record is None:
                audit.problems.append(Problem(name, "expected a JSON object, found none"))
            else:
                model.from_json(record)
        except FileNotFoundError:
            continue
        except OSError as error:
            audit.problems.append(Problem(name, f"unreadable: {error.strerror}"))
        except ValueError as error:
            audit.problems.append(Problem(name, str(error)))


def _audit_journal(file: Path, model: type[Record], audit: Audit) -> None:
    """JSON objects, one per line, and where they have steps, each later than the one before. None is no problem."""
    has_steps = "step" in model.model_fields
    torn, before = 0, -1
    try:
        with open_regular(file) as lines:
            for number, line in enumerate(lines_of(lines), start=1):
                ended = line.endswith(b"\n")
                record = parse_object(line) if ended and not torn else None
                if torn or (ended and record is None and not has_steps):
                    torn = torn or number
                    audit.problems.append(Problem(file.name, f"line {torn}: expected a JSON object, found none"))
                    return
                if record is None:
                    torn = number
                    continue
                try:
                    step = getattr(model.from_json(record), "step", before)
                except ValueError as error:
                    audit.problems.append(Problem(file.name, f"line {number}: {error}"))
                    return
                if has_steps and step <= before:
                    message = f"line {number}: expected a step beyond {before}, found {step}"
                    audit.problems.append(Problem(file.name, message))
                    return
                before = step
    except FileNotFoundError:
        return
    except OSError as error:
        audit.problems.append(Problem(file.name, f"unreadable: {error.strerror}"))
    if torn:
        audit.notes.append(Problem(file.name, f"the last line, {torn}, is torn; the next attempt drops it"))


def _replayed(file: Path, whole: list[Path]) -> Iterator[Problem]:
    """What of the journal does not lead to the checkpoints; the first such place."""
    try:
        state = read_state(whole[-1])
        recipe = recipe_from_dict(state.recipe.whole)
        replayed = _Replay(recipe, state.layers)
        if replayed.schedule is None:
            return
        for checkpoint in whole:
            replayed.read_up_to(file, read_state(checkpoint).step)
            replayed.assert_equals(checkpoint)
    except (DsbertError, ValueError, KeyError, TypeError, IndexError) as error:
        yield Problem(file.name, " ".join(str(error).split()))


class _Replay:
    """The topologies of a run after the updates read so far. schedule: None where none is due."""

    def __init__(self, recipe: Recipe, layers: dict[str, LayerRecord]) -> None:
        self.topologies = first_topologies(recipe, layers)
        self.schedule = None
        if recipe.sparsity.pattern == "dynamic" and self.topologies:
            self.schedule = UpdateSchedule.of(recipe.sparsity, recipe.optim.total_steps)
        self._explored: dict[str, Tensor] = {name: topology.mask() for name, topology in self.topologies.items()}
        self._lines = self._offset = 0  # of the journal, whose line n is update n

    def read_up_to(self, file: Path, last: int) -> None:
        """Take every update after the steps up to `last`. Raises ValueError for one that is missing or is another."""
        assert self.schedule is not None
        with open_regular(file) if file.exists() else BytesIO() as lines:
            lines.seek(self._offset)
            for number in range(self._lines + 1, self.schedule.num_updates):
                step = self.schedule.step_of(number)
                if step > last:
                    break
                line = next(lines_of(lines), b"")
                entry = parse_object(line) if line.endswith(b"\n") else None
                self._lines += 1
                self._offset += len(line)
                if entry is None or (entry["update"], entry["step"]) != (number, step):
                    found = f"update {entry['update']} after step {entry['step']}" if entry else "none"
                    raise ValueError(f"line {self._lines}: expected update {number} after step {step}, found {found}")
                try:
                    self._take(entry)
                except (ValueError, KeyError, TypeError, IndexError, RuntimeError, zlib.error) as error:
                    raise ValueError(f"line {self._lines}: {' '.join(str(error).split())}") from None

    def assert_equals(self, checkpoint: Path) -> None:
        """Raises ValueError unless the checkpoint has these topologies, and counts as explored what they have been."""
        digest, expected = self._digest(), read_manifest(checkpoint).topology_digest
        if digest != expected:
            raise ValueError(f"expected to lead to the topology of {checkpoint.name}, {expected}, found {digest}")
        tensors = read_topology(checkpoint)
        for name, topology in self.topologies.items():
            if not torch.equal(unpack_bits(tensors[f"{name}.explored"], topology.grid), self._explored[name]):
                raise ValueError(
                    f"expected to have explored what {checkpoint.name} says for {name}, found another part"
                )

    def _take(self, entry: dict[str, Any]) -> None:
        self.topologies = replay(self.topologies, [entry])
        for name in entry["layers"]:
            self._explored[name] |= self.topologies[name].mask()
        if (digest := self._digest()) != entry["digest"]:
            raise ValueError(f"expected to lead to the topology {entry['digest']}, found {digest}")

    def _digest(self) -> str:
        return combined_digest({name: topology.digest() for name, topology in self.topologies.items()})
