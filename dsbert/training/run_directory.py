"""The run directory: who owns it, what it is a run of, and how the last attempt ended.

config.yaml        resolved recipe, identity, DeepSpeed's configuration, versions and git revision
attempt.json       the attempt that owns the run; attempts.jsonl is the history, with how each one before it ended
status.json        how the last attempt ended: done | requeue | failed, with cause and culprit
metrics.jsonl      one object per logged step; masks.jsonl: one per mask update
checkpoints/       checkpoint/loading.py
companions/        assets: tokenizer and unigram counts, which go into every checkpoint
heartbeats/        health.py, a directory per attempt
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from dsbert.base.collectives import on_main_rank
from dsbert.base.durable import copy_tree, is_shown, remove_tree, replace_durably
from dsbert.base.errors import CheckpointError, PeerError, UserError, printable
from dsbert.base.jsonl import JsonlFile, first_difference, to_json
from dsbert.base.records import JsonObject, RecordT, read_record, valid_records
from dsbert.checkpoint.loading import LATEST, newest_checkpoint, published
from dsbert.checkpoint.state import read_state
from dsbert.cluster.heartbeats import Beat, beats_in
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import TOKENIZER, UNIGRAM
from dsbert.data.stream import assert_samples
from dsbert.training.attempts import Attempt, CulpritRecord, Ending, Status, slurm_array_task, slurm_start
from dsbert.training.history import assert_files, read_config, saved_before
from dsbert.training.provenance import git_revision, versions

INITIAL_TOPOLOGY = "initial_topology.safetensors"  # of a run that began with weights of another
_MARK = "shared"
_LEFT_OVER = (".step_*.tmp", ".step_*.removed*", ".latest.*.tmp", ".trash-*")


class RunDirectory:
    """Paths and records of one run. Rank 0 writes; of a run whose rank 0 is gone, a survivor writes status.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.assets = path / "companions"
        self.metrics = JsonlFile(path / "metrics.jsonl")
        self.journal = JsonlFile(path / "masks.jsonl")
        self._seen: list[str] = []
        self._saved: str | None = None  # the newest checkpoint that this attempt knows of

    def heartbeats(self, nonce: str) -> Path:
        """Where the ranks of an attempt say that they live."""
        return self.path / "heartbeats" / nonce

    def mark(self, nonce: str) -> None:
        """Make the directory, with a mark in it that every rank must see. Raises OSError."""
        self.heartbeats(nonce).mkdir(parents=True)
        (self.heartbeats(nonce) / _MARK).write_text(nonce)

    def sees(self, nonce: str, patience_s: float) -> bool:
        """Whether this rank sees the mark that rank 0 made, at once or within the patience that caches may need."""
        return is_shown(lambda: (self.heartbeats(nonce) / _MARK).read_text() == nonce, patience_s)

    def has_said(self, nonce: str, code: int, cause: str, patience_s: float = 3.0) -> bool:
        """Whether rank 0 has left with these words, or does so within the patience: then nobody need repeat them."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError):
                ended = read_record(self.heartbeats(nonce) / "00000.json", Beat).ended
                if ended:
                    return ended.code == code and ended.cause == cause[:300]
            time.sleep(0.05)
        return False

    def find_checkpoint(self, resume: str, rank: int, world_size: int) -> Path | None:
        """The newest checkpoint that verifies on all ranks, or None for a fresh start. Collective.

        Raises on every rank UserError if the directory holds a run and resume is "never", CheckpointError if resume is
        "must" and nothing valid is there, or if checkpoints are there and none is valid.
        """
        has_some = on_main_rank(lambda: self._has_checkpoints(resume))
        told = on_main_rank(lambda: saved_before(self.path))
        newest, skipped = newest_checkpoint(self.checkpoints, rank, world_size)

        def judge() -> None:
            for line in skipped:
                print(f"dsbert: skipped a damaged checkpoint: {printable(line)}", file=sys.stderr)
            if newest is None and (has_some or told or resume == "must"):
                raise CheckpointError(
                    f"expected a valid checkpoint in {self.checkpoints} to resume from, found none"
                    + ("" if has_some or not told else f", while {told}")
                    + (": remove the directory to start again" if has_some or told else "")
                )
            if newest is None and self._has_steps():
                print(f"dsbert: no checkpoint was saved before in {self.path}: starts at step 0", file=sys.stderr)

        on_main_rank(judge)
        return newest

    def open_attempt(
        self,
        recipe: Recipe,
        identity: JsonObject,
        checkpoint: Path | None,
        nonce: str,
        world_size: int,
        shown: Mapping[str, JsonObject | None] | None = None,
    ) -> Attempt:
        """Begin an attempt, which goes on from the checkpoint. Rank 0.

        identity: what must be as in the run that is already there. shown: what else config.yaml is to show.
        Raises UserError if it is a run of another identity.
        """
        self._check_identity(identity, checkpoint)
        history = JsonlFile(self.path / "attempts.jsonl")
        before = valid_records(history.read(skip_garbled=True), Attempt)
        restart_count, start = slurm_start()
        attempt = Attempt(
            number=1 + max((entry.number for entry in before), default=0),
            nonce=nonce,
            job_id=os.environ.get("SLURM_JOB_ID"),
            array_task=slurm_array_task(),
            restart_count=restart_count,
            start=start,
            started=time.time(),
            world_size=world_size,
            checkpoint=checkpoint.name if checkpoint else None,
            previous=self._previous(),
        )
        # The claim comes first: whatever an attempt that still lives does from now on, it has lost the run.
        history.append(attempt.to_json())
        self._replace("attempt.json", to_json(attempt.to_json()) + "\n")
        self._saved = attempt.checkpoint
        self.set_status(attempt, None, None)
        self._clean_up(nonce, {entry.nonce for entry in before})
        config = {
            "recipe": recipe.model_dump(mode="json"),
            "identity": identity,
            **(shown or {}),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        self._replace("config.yaml", yaml.safe_dump(config, sort_keys=False))
        self._collect_assets(recipe.data.path)
        return attempt

    def has_changed(self) -> bool:
        """Whether something was published since `find_checkpoint`: the attempt before could, until ours was opened."""
        return self._names() != self._seen

    def assert_owner(self, attempt: Attempt) -> None:
        """Raise PeerError if another attempt has taken the run over: this one must not write to it any more."""
        owner = self._record("attempt.json", Attempt)
        if owner is None:
            path = self.path / "attempt.json"
            raise PeerError(f"expected {path} to name the attempt that owns the run, found nothing that can be read")
        if owner.nonce != attempt.nonce:
            raise PeerError(
                f"expected attempt {attempt.number} to own the run in {self.path}, found attempt {owner.number}: "
                "this one leaves"
            )

    def owns(self, attempt: Attempt) -> bool | None:
        """Whether the attempt still owns the run; None where that cannot be seen."""
        owner = self._record("attempt.json", Attempt)
        return None if owner is None else owner.nonce == attempt.nonce

    def has_ended(self, attempt: Attempt) -> bool:
        """Whether status.json says already how this attempt ended."""
        status = self._record("status.json", Status)
        return status is not None and status.outcome is not None and status.attempt == attempt.number

    def set_status(
        self,
        attempt: Attempt,
        outcome: str | None,
        step: int | None,
        cause: str | None = None,
        culprit: CulpritRecord | None = None,
    ) -> None:
        """Record how the attempt ended: done | requeue | failed; None while it goes on."""
        status = Status(
            attempt=attempt.number,
            job_id=attempt.job_id,
            restart_count=attempt.restart_count,
            start=attempt.start,
            outcome=outcome,
            step=step,
            cause=cause,
            culprit=culprit,
            saved=self._saved,
            time=time.time(),
        )
        self._replace("status.json", to_json(status.to_json()) + "\n")

    def note_saved(self, attempt: Attempt, name: str) -> None:
        """Record that a checkpoint was published, where it is not lost with the checkpoints. Raises OSError."""
        self.assert_owner(attempt)
        self._saved = name
        self.set_status(attempt, None, None)

    def _previous(self) -> Ending | None:
        """How the attempt before this one ended: its status, or where its ranks were seen last."""
        before, status = self._record("attempt.json", Attempt), self._record("status.json", Status)
        if before is None or status is None or status.attempt != before.number:
            return None
        if status.outcome is not None:
            return status.ending
        beats = beats_in(self.heartbeats(before.nonce))
        return Ending(
            outcome=None,
            step=max((seen.beat.step for seen in beats), default=None),
            cause="ended without a word",
            time=max((seen.time for seen in beats), default=None),
        )

    def _record(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """What a small file says; None unless it is a record of this kind, for the file may be damaged."""
        with suppress(OSError, ValueError):
            return read_record(self.path / name, kind)
        return None

    def _clean_up(self, nonce: str, before: set[str]) -> None:
        """Remove what attempts that were killed have left half done, and the heartbeats of those before.

        By another name first: an attempt that still lives must not publish a directory that is being emptied.
        """
        for leftover in [path for pattern in _LEFT_OVER for path in self.checkpoints.glob(pattern)]:
            trash = leftover.with_name(f".trash-{nonce}-{leftover.name.lstrip('.')}")
            with suppress(OSError):
                os.replace(leftover, trash)
                remove_tree(trash) if trash.is_dir() else trash.unlink()
        for old in (self.path / "heartbeats").glob("*"):
            if old.name in before:
                remove_tree(old)

    def _names(self) -> list[str]:
        return [path.name for path in published(self.checkpoints)]

    def _has_checkpoints(self, resume: str) -> bool:
        assert_files(self.path)
        self._seen = self._names()
        try:
            # `latest` without the one that it names: it was there, and is lost.
            has_some = any(name == LATEST or name.startswith("step_") for name in os.listdir(self.checkpoints))
        except FileNotFoundError:  # and nothing else: what cannot be read is not empty
            has_some = False
        if resume == "never" and (has_some or self._has_steps()):
            raise UserError(f"expected no run in {self.path} with --resume never, found one: choose another --run-dir")
        return has_some

    def _has_steps(self) -> bool:
        path = self.metrics.path
        return path.is_file() and path.stat().st_size > 0

    def _check_identity(self, identity: JsonObject, checkpoint: Path | None) -> None:
        """Against the checkpoint, which is what would be trained on; without one, against what the steps were taken."""
        path = self.path / "config.yaml"
        if checkpoint is not None:
            before: JsonObject = read_state(checkpoint).identity.whole
        elif path.is_file() and self._has_steps():
            try:
                before = dict(read_config(self.path)["identity"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"expected the identity of the run in {path}, found: {error}") from None
        else:
            return
        assert_samples(before, self.path)
        difference = first_difference(before, identity)
        if difference:
            key, old, new = difference
            raise UserError(
                f"expected {key} = {old!r} as in the run in {self.path}, found {new!r}: choose another --run-dir"
            )

    def _collect_assets(self, data_path: Path) -> None:
        """Anew at every attempt: an earlier one may have failed on other data before its first step."""
        temporary = self.path / ".companions.tmp"
        remove_tree(temporary)
        copy_tree(data_path / TOKENIZER, temporary / TOKENIZER)
        shutil.copyfile(data_path / UNIGRAM, temporary / UNIGRAM)
        remove_tree(self.assets)
        os.replace(temporary, self.assets)

    def _replace(self, name: str, text: str) -> None:
        """Write a small file so that a reader sees the old or the new one, never a part."""
        replace_durably(self.path / name, text.encode())
