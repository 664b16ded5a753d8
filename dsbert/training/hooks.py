"""What happens after a step, in one order: `after_step_hooks` lists it. A further hook is a class and a line there."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from dsbert.base.collectives import assert_replicas_agree, on_main_rank
from dsbert.cluster.signals import StopRequest
from dsbert.engine.step_result import StepResult
from dsbert.sparse import MaskUpdate
from dsbert.sparse.journal import journal_entry
from dsbert.training.evaluate import Evaluation, evaluate
from dsbert.training.reporting import StepReport
from dsbert.training.run import Run
from dsbert.training.saving import finish_save, note_saved
from dsbert.training.soundness import assert_finite, assert_not_stuck, assert_validated

_WEIGHT_CHECK_STEPS = 1000


@dataclass
class StepContext:
    """A step that was taken, and what hooks have made of it so far.

    step: counted from 1. update, validation: None where none was due. stop_agreed: all ranks leave after this step.
    """

    step: int
    result: StepResult
    stop_agreed: bool
    update: MaskUpdate | None = None
    validation: Evaluation | None = None


class Hook(Protocol):
    """Called on every rank after every step. What it raises ends the run: on all ranks the same error, or a peer's."""

    def after_step(self, context: StepContext) -> None:
        """May write down in the context what the hooks behind it need."""


def after_step_hooks(run: Run, stop: StopRequest) -> tuple[Hook, ...]:
    """All of them, in their order."""
    return (
        PublishCheckpoint(run),  # one that an earlier step has begun
        UpdateMasks(run),
        Validate(run, stop),  # with the new masks
        AssertOwner(run),  # before anything is written
        Report(run),
        CompareWeights(run),
        AssertSound(run),
        SaveCheckpoint(run),  # of a step whose records are written, and which was found sound
    )


@dataclass(frozen=True)
class PublishCheckpoint:
    """Take the next step of a save in flight, once no rank's writer is at work."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        if not context.result.busy:
            note_saved(self.run, self.run.writer.advance())


@dataclass(frozen=True)
class UpdateMasks:
    """Prune and regrow where it is due, and write it into masks.jsonl."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        run = self.run
        with run.heartbeat.phase("update") if run.masks.is_due(context.step) else nullcontext():
            context.update = run.masks.maybe_update(context.step)
            if context.update and run.world.is_main:
                run.directory.assert_owner(run.attempt)
                run.directory.journal.append(journal_entry(context.update))


@dataclass(frozen=True)
class Validate:
    """Every eval.every_steps, on a fixed seeded set of held-out samples, on all ranks. A signal cuts it short, and then
    it is left out."""

    run: Run
    stop: StopRequest

    def after_step(self, context: StepContext) -> None:
        run, held_out = self.run, self.run.streams.held_out
        due = is_due(run.recipe.eval.every_steps, context.step, run.recipe.optim.total_steps)
        if context.stop_agreed or not due or held_out is None or run.recipe.eval.sequences == 0:
            return
        start = time.perf_counter()
        with run.heartbeat.phase("evaluate"):
            context.validation = evaluate(
                run.engine.evaluate_batch,
                held_out,
                run.recipe.eval.sequences,
                run.engine.objectives,
                micro_batch=run.recipe.batch.micro_batch,
                rank=run.world.rank,
                world_size=run.world.world_size,
                stop_agreed=self._stop_agreed,
            )
        run.reporter.waited("validation", time.perf_counter() - start)
        context.stop_agreed = context.validation is None

    def _stop_agreed(self) -> bool:
        self.run.heartbeat.advance()
        return self.stop.agreed()


@dataclass(frozen=True)
class AssertOwner:
    """On every rank: one that was left over from another attempt leaves at once."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        if context.step % self.run.recipe.log.every_steps == 0:
            self.run.directory.assert_owner(self.run.attempt)


@dataclass(frozen=True)
class Report:
    """To metrics.jsonl, W&B and the bar."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        self.run.reporter.step(
            StepReport(context.step, context.result, self.run.masks, context.update, context.validation)
        )


@dataclass(frozen=True)
class CompareWeights:
    """Replicated weights are the same on all ranks; looked at beside every save as well."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        if context.step % _WEIGHT_CHECK_STEPS == 0:
            assert_replicas_agree("the weights", self.run.engine.replica_digests())


@dataclass(frozen=True)
class AssertSound:
    """A run whose gradients, or last validation, are not finite ends here."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        assert_not_stuck(self.run, context.result)
        if context.validation and context.step == self.run.recipe.optim.total_steps:
            assert_validated(self.run, context.validation)


@dataclass(frozen=True)
class SaveCheckpoint:
    """Every checkpoint.every_steps, at the last step, and where the run is to stop."""

    run: Run

    def after_step(self, context: StepContext) -> None:
        every_steps, total_steps = self.run.recipe.checkpoint.every_steps, self.run.recipe.optim.total_steps
        if context.stop_agreed or is_due(every_steps, context.step, total_steps):
            start = time.perf_counter()
            with self.run.heartbeat.phase("save"):
                self._begin()
            self.run.reporter.waited("save", time.perf_counter() - start)

    def _begin(self) -> None:
        """After all ranks have agreed that they hold one topology and one set of weights, and own the run."""
        run = self.run
        finish_save(run)
        run.masks.verify_replicas()
        assert_replicas_agree("the weights", run.engine.replica_digests())
        assert_finite(run)
        on_main_rank(lambda: run.directory.assert_owner(run.attempt))
        if run.world.is_main:
            run.directory.journal.sync()
            run.directory.metrics.sync()
        run.writer.begin(run.engine, run.masks, run.record, run.reporter.totals)


def is_due(every_steps: int, step: int, total_steps: int) -> bool:
    """At every so-manyth step, and at the last."""
    return step % every_steps == 0 or step == total_steps
