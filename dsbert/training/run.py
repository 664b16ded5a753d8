"""What a run is made of, how it is opened on all ranks, and how it is accounted for when it fails."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsbert.base.collectives import gather_json, on_main_rank, raise_on_all_ranks, run_with_keepalive
from dsbert.base.errors import (
    EXIT_INTERNAL,
    EXIT_PEER,
    DsbertError,
    LostPeerError,
    PeerError,
    StorageError,
    UserError,
    is_storage_failure,
    printable,
)
from dsbert.checkpoint.loading import load_checkpoint
from dsbert.checkpoint.publisher import Retention
from dsbert.checkpoint.writer import CheckpointWriter
from dsbert.cluster import process_group
from dsbert.cluster.health import Heartbeat
from dsbert.cluster.heartbeats import Culprit
from dsbert.cluster.process_group import World
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.staging import stage
from dsbert.data.stream import SAMPLES, SampleStream
from dsbert.data.verification import verify_data
from dsbert.engine.ds_config import what_holds, without_batches
from dsbert.engine.train_engine import TrainEngine
from dsbert.models.construction import build_model, layer_shapes
from dsbert.models.spec import model_spec
from dsbert.sparse import MaskManager
from dsbert.training.numerics import changes, numerics
from dsbert.training.opening import assert_same_everywhere, open_streams, with_absolute_path
from dsbert.training.reporting import Reporter
from dsbert.training.run_directory import RunDirectory

# A rank whose file system hangs as well must still leave.
_LEAVE_S = 15.0
# The first so many ranks, and every so-manyth of the others, read all heartbeats: not a thousand ranks as many files.
_WATCHMEN = 16


class Run:
    """Opened in three steps, each collective: the constructor (ranks agree on what they run, and where), `build`,
    `restore`. `failures` goes around what comes after the first.

    engine, masks, train and held_out (streams), writer, reporter: there after `build`.
    """

    engine: TrainEngine
    masks: MaskManager
    train: SampleStream
    held_out: SampleStream | None
    writer: CheckpointWriter
    reporter: Reporter
    attempt: dict[str, Any]
    state: dict[str, Any]  # what state.json holds beside the counters

    def __init__(self, recipe: Recipe, run_dir: Path, world: World, timeout_s: float) -> None:
        """Raises UserError on every rank if they differ in recipe, data or configuration, or share no directory."""
        self.recipe, self.world, self.timeout_s = recipe, world, timeout_s
        self._last_resort = threading.Timer(0, lambda: None)
        self.directory = RunDirectory(run_dir)
        manifest = self._manifest = raise_on_all_ranks(lambda: load_manifest(recipe.data.path))
        assert_same_everywhere(recipe, manifest.digest, run_dir)
        everybody = gather_json([secrets.token_hex(8), world.host])
        self.nonce: str = everybody[0][0]
        self.hosts: list[str] = [host for _, host in everybody]
        self._assert_shared(run_dir)
        self.heartbeat = Heartbeat(self.directory.heartbeats(self.nonce), world.rank, self.hosts, timeout_s)
        self.heartbeat.on_hang = lambda: threading.Thread(target=self._leave_hung).start()
        self.heartbeat.start()
        process_group.unlimit()

    def build(self, resume: str) -> None:
        """Open the data, build model and engine, and begin an attempt in the run directory.

        Raises the same UserError or CheckpointError on every rank.
        """
        recipe, world = self.recipe, self.world
        data = recipe.data
        damaged = raise_on_all_ranks(lambda: verify_data(data.path, data.seq_len, part=(world.rank, world.world_size)))
        suspect = {name for names in gather_json(damaged) for name in names}
        # One rank builds the sample indices, the others then find them.
        built_here = on_main_rank(lambda: open_streams(recipe, data.path, suspect), keepalive=True)
        run_with_keepalive(lambda: stage(data.path, data.stage_to))
        neighbours = [rank for rank, host in enumerate(self.hosts) if host == world.host]
        share = (neighbours.index(world.rank), len(neighbours))
        path = run_with_keepalive(lambda: stage(data.path, data.stage_to, share))
        kept = built_here if path == data.path else None
        self.train, self.held_out = raise_on_all_ranks(lambda: kept or open_streams(recipe, path, suspect))
        vocab_size = self._manifest.tokenizer.vocab_size
        model, layers = raise_on_all_ranks(lambda: build_model(recipe, vocab_size, world.device, self.train.vocab.pad))
        shapes = layer_shapes(model, model_spec(recipe.model))
        self.engine = TrainEngine(recipe, model, layers, world, self.directory.path)
        process_group.unlimit()  # DeepSpeed's groups
        self.engine.on_progress = self.heartbeat.advance
        self.engine.prove_layout()
        total_steps = recipe.optim.total_steps
        self.masks = MaskManager(layers, recipe.sparsity, total_steps=total_steps, editor=self.engine, seed=recipe.seed)
        self.masks.verify_replicas()
        self.state = {
            "recipe": with_absolute_path(recipe).model_dump(mode="json"),
            "identity": recipe.identity() | {"data_digest": self._manifest.digest, "samples": SAMPLES},
            "vocab_size": vocab_size,
            "layers": shapes,
            "deepspeed": without_batches(self.engine.ds_config),
            "numerics": numerics(recipe, world),
            "params": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.engine.parameters.items()},
        }
        self._open_attempt(resume)
        self.reporter = Reporter(recipe, self.directory, world, shapes)
        every = recipe.checkpoint
        self.writer = CheckpointWriter(
            self.directory.checkpoints,
            self.directory.companions,
            attempt=f"{self.attempt['number']}-{self.nonce}",
            retention=Retention(every.keep, every.keep_every_steps),
            assert_owner=lambda: self.directory.assert_owner(self.attempt),
            max_bytes_per_s=every.max_mb_per_s * 1e6 if every.max_mb_per_s else None,
            timeout_s=self.timeout_s,
            watch=self.heartbeat.saving,
            alive=self.heartbeat.advance,
        )

    def restore(self) -> None:
        """Load the checkpoint that the attempt found, if it found one, and begin to report."""
        name = self.attempt["checkpoint"]
        totals: dict[str, int] = {}
        if name is not None:
            path = self.directory.checkpoints / name
            with self.heartbeat.phase("load"):
                state = load_checkpoint(path, self.engine, self.masks)
            totals = state["totals"]
            self.reporter.say(f"resuming from {path}")
            for line in changes(state, self.state, since=name):
                self.reporter.say(line)
        self.reporter.say(what_holds(self.recipe, self.engine.ds_config))
        for line in self.engine.kernels.lines():
            self.reporter.say(line)
        self.heartbeat.advance(self.engine.step)
        self.reporter.begin(self.engine.step, totals, self.attempt)

    @property
    def step(self) -> int | None:
        """Optimizer steps taken; None before there is an engine."""
        return self.engine.step if hasattr(self, "engine") else None

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Account for what goes wrong inside: in heartbeats, in status.json, and by a culprit in the message."""
        try:
            with self._said_plainly(), process_group.peer_failures(self.world):
                yield
        except LostPeerError as error:
            self._leave_at_last(EXIT_PEER)
            self.heartbeat.leave()
            if not _watches(self.world.rank):
                self.heartbeat.end(EXIT_PEER, str(error))
                raise
            raise PeerError(self._account_for_lost(str(error), self.heartbeat.culprits())) from error
        except Exception as error:
            culprits = [
                Culprit(rank, self.hosts[rank], self.step, None, "is at fault")
                for rank in (error.ranks if isinstance(error, DsbertError) else (self.world.rank,))
            ]
            code = error.exit_code if isinstance(error, DsbertError) else EXIT_INTERNAL
            self._leave_at_last(code)
            self.heartbeat.end(code, str(error))
            if self.world.is_main:
                self._record_failure(str(error), culprits)
            elif isinstance(error, DsbertError) and not error.shared:  # by each for itself, but perhaps by all
                error.shared = self.directory.has_said(self.nonce, code, str(error))
            if isinstance(error, DsbertError) and culprits:
                error.args = ("; ".join([str(error), *map(str, culprits)]),)
            raise

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """Where another attempt has taken the run over, that is what went wrong, whatever it looks like here; and what
        a disk refuses is no bug."""
        try:
            yield
        except (DsbertError, OSError) as error:
            self._leave_at_last(EXIT_PEER)
            if hasattr(self, "attempt") and self.directory.owns(self.attempt) is False:
                self.directory.assert_owner(self.attempt)
            if isinstance(error, DsbertError) or not is_storage_failure(error):
                raise
            found = f"{error.filename or 'a file'}: {error.strerror}"
            plain = StorageError(f"could not read or write on {self.world.host}, found {found}; checkpoints are intact")
            plain.ranks = (self.world.rank,)
            raise plain from error

    def _account_for_lost(self, found: str, culprits: list[Culprit]) -> str:
        """Record whose fault it is, and say it."""
        named = ", ".join(map(str, culprits[:8])) or "no rank is silent: see to the network between the nodes"
        self.heartbeat.end(EXIT_PEER, found)
        watchmen = {rank for rank in range(self.world.world_size) if _watches(rank)}
        watchmen -= {culprit.rank for culprit in culprits if culprit.rank != self.world.rank}
        is_first = self.world.rank == min(watchmen, default=self.world.rank)
        self._record_failure(named, culprits, patience_s=0.0 if is_first else 2 * self.heartbeat.interval_s)
        return f"{named}; {found}"

    def _record_failure(self, cause: str, culprits: list[Culprit], patience_s: float = 0.0) -> None:
        """patience_s: how long another rank may take to do it, which may be at fault and not be known to be."""
        if not hasattr(self, "attempt"):
            return
        deadline = time.monotonic() + patience_s
        while not self.directory.has_ended(self.attempt) and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.directory.owns(self.attempt) and not self.directory.has_ended(self.attempt):
            culprit = None
            if culprits:
                first = culprits[0]
                culprit = {"rank": first.rank, "host": first.host, "step": first.step, "phase": first.phase}
            with suppress(OSError):  # what has failed is said all the same
                self.directory.set_status(self.attempt, "failed", self.step, cause, culprit)

    def _leave_at_last(self, code: int) -> None:
        """Whatever hangs on the way out, the rank leaves in bounded time."""
        self._last_resort.cancel()
        self._last_resort = threading.Timer(2.5 * self.heartbeat.interval_s + _LEAVE_S, os._exit, [code])
        self._last_resort.daemon = True
        self._last_resort.start()

    def close(self) -> None:
        """The end of a run that failed, after all that could hang."""
        if hasattr(self, "reporter"):
            self.reporter.close(patient=False)
        self._last_resort.cancel()

    def _leave_hung(self) -> None:
        """The main thread makes no progress, and its collectives do not end by themselves either."""
        self._leave_at_last(EXIT_PEER)
        found = f"rank {self.world.rank} on {self.world.host} made no progress for {self.timeout_s:g} s"
        if not _watches(self.world.rank):
            self.heartbeat.end(EXIT_PEER, found)
            print(f"dsbert: {found}", file=sys.stderr, flush=True)
            os._exit(EXIT_PEER)
        own = Culprit(self.world.rank, self.world.host, self.step, None, "lives but does not go on")
        culprits = self.heartbeat.culprits() or [own]
        print(f"dsbert: {printable(self._account_for_lost(found, culprits))}", file=sys.stderr, flush=True)
        os._exit(EXIT_PEER)

    def _assert_shared(self, run_dir: Path) -> None:
        """Raise UserError on every rank unless all see the directory that rank 0 makes."""
        on_main_rank(lambda: self.directory.share(self.nonce))
        patience_s = min(5.0, self.timeout_s / 2)
        seen = gather_json([self.directory.sees(self.nonce, patience_s), str(run_dir.resolve())])
        for rank, (sees, path) in enumerate(seen):
            if not sees:
                raise UserError(
                    f"run directory is not shared: rank {rank} on {self.hosts[rank]} does not see in {path} what rank "
                    f"0 on {self.hosts[0]} wrote to {seen[0][1]}: choose a --run-dir on a file system of all nodes, "
                    "the same on all ranks"
                ).for_all()

    def _open_attempt(self, resume: str) -> None:
        directory, world = self.directory, self.world
        checkpoint = directory.find_checkpoint(resume, world.rank, world.world_size)
        shown = {name: self.state[name] for name in ("deepspeed", "numerics")}
        found = on_main_rank(
            lambda: directory.open_attempt(
                self.recipe, self.state["identity"], checkpoint, self.nonce, world.world_size, shown
            )
        )
        self.attempt = gather_json(found)[0]
        if gather_json(directory.has_changed())[0]:
            checkpoint = directory.find_checkpoint(resume, world.rank, world.world_size)
            self.attempt["checkpoint"] = checkpoint.name if checkpoint else None


def _watches(rank: int) -> bool:
    return rank < _WATCHMEN or rank % _WATCHMEN == 0
