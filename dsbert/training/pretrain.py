"""The training loop."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from dsbert.base.collectives import all_reduce, assert_replicas_agree, gather_json, on_main_rank
from dsbert.base.errors import EXIT_OK, EXIT_REQUEUE, DsbertError
from dsbert.checkpoint.writer import Saved
from dsbert.cluster import process_group
from dsbert.cluster.signals import StopRequest
from dsbert.config.recipe import Recipe
from dsbert.data.prefetch import Prefetcher
from dsbert.data.stream import Batch
from dsbert.engine.train_engine import StepResult
from dsbert.sparse.journal import journal_entry
from dsbert.training.evaluate import Evaluation, evaluate
from dsbert.training.reporting import StepReport
from dsbert.training.run import Run

_WEIGHT_CHECK_STEPS = 1000


def pretrain(
    recipe: Recipe, run_dir: Path, resume: str = "auto", timeout_s: float = 300.0, stop: StopRequest | None = None
) -> int:
    """Pre-train as `recipe` says, in `run_dir`; every rank calls this.

    resume: auto | must | never. timeout_s: how long a collective waits for a peer. stop: looked at all the time; set on
    any rank, it has all of them save the same step and return 75. Returns the exit code: 0 done, 75 saved and to be
    requeued. Raises DsbertError: the same one on every rank, or PeerError, naming the culprit, where a peer is gone.
    """
    stop = stop or StopRequest()
    world = process_group.init(timeout_s, run_dir)
    with process_group.peer_failures(world):
        run = Run(recipe, run_dir, world, timeout_s)
    code = None
    try:
        with run.failures():
            run.build(resume)
            run.restore()
            code = _finish(run, "requeue", EXIT_REQUEUE, stop) if _agreed(stop) else _train(run, stop)
            return code
    finally:
        if code is None:
            run.close()


def _train(run: Run, stop: StopRequest) -> int:
    recipe, engine, writer = run.recipe, run.engine, run.writer
    total_steps = recipe.optim.total_steps
    saved_step = engine.step if run.attempt["checkpoint"] else None
    prefetcher = Prefetcher(lambda step: _batches(run, step), engine.step)
    run.heartbeat.enter("train")
    try:
        while engine.step < total_steps:
            start = time.perf_counter()
            batches = prefetcher.next()
            run.reporter.waited("data", time.perf_counter() - start)
            result = engine.train_step(batches, stop=stop.wanted, busy=writer.busy)
            run.heartbeat.advance(engine.step)
            if not result.busy:
                _report(run, writer.advance())
            stopping = _after_step(run, result, stop)
            if stopping or _due(recipe.checkpoint.every_steps, engine.step, total_steps):
                _save(run)
                saved_step = engine.step
            if stopping and engine.step < total_steps:
                return _finish(run, "requeue", EXIT_REQUEUE, stop)
    finally:
        prefetcher.close()
    if saved_step != engine.step:
        _save(run)
    _assert_sound(run)
    return _finish(run, "done", EXIT_OK)


def _after_step(run: Run, result: StepResult, stop: StopRequest) -> bool:
    """Mask update, validation and records of the step just taken, where they are due; whether to stop after it."""
    step, recipe = run.engine.step, run.recipe
    with run.heartbeat.phase("update") if run.masks.is_due(step) else nullcontext():
        update = run.masks.maybe_update(step)
        if update and run.world.is_main:
            run.directory.assert_owner(run.attempt)
            run.directory.journal.append(journal_entry(update))
    validation, stopping = None, result.stop
    if not stopping and _due(recipe.eval.every_steps, step, recipe.optim.total_steps) and _validates(run):
        validation = _validate(run, stop)
        stopping = validation is None
    if step % recipe.log.every_steps == 0:  # on every rank: one that was left over from another attempt leaves at once
        run.directory.assert_owner(run.attempt)
    run.reporter.step(StepReport(step, result, run.masks, update, validation))
    if step % _WEIGHT_CHECK_STEPS == 0:
        assert_replicas_agree("the weights", run.engine.replica_digests())
    _assert_not_stuck(run, result)
    if validation and step == recipe.optim.total_steps and not validation.is_finite():
        raise DsbertError(
            f"expected a finite validation loss at the last step, {step}, found none; {_advice(run)}"
        ).for_all()
    return stopping


def _finish(run: Run, outcome: str, code: int, stop: StopRequest | None = None) -> int:
    """Leave together, status first: a launcher may kill all ranks as soon as one has left. W&B, which may take its
    time, comes last: nobody waits for it in a collective."""
    _report(run, run.writer.finish())
    cause = next(filter(None, gather_json(stop and stop.name)), None)
    step = run.engine.step
    run.reporter.say(f"{outcome} at step {step} of {run.recipe.optim.total_steps}: {run.directory.path}")

    def record() -> None:
        run.directory.assert_owner(run.attempt)
        try:
            run.directory.set_status(run.attempt, outcome, step, cause)
        except OSError as error:  # the checkpoint is there, and the exit code says the same
            run.reporter.say(f"status.json could not be written: {error}")

    on_main_rank(record)
    run.heartbeat.end(code)
    run.writer.close()
    run.reporter.close(patient=code == EXIT_OK)
    return code


def _save(run: Run) -> None:
    """Begin to save, after all ranks have agreed that they hold one topology and one set of weights."""
    start = time.perf_counter()
    with run.heartbeat.phase("save"):
        _report(run, run.writer.finish())
        run.masks.verify_replicas()
        assert_replicas_agree("the weights", run.engine.replica_digests())
        _assert_finite(run)
        on_main_rank(lambda: run.directory.assert_owner(run.attempt))
        if run.world.is_main:
            run.directory.journal.sync()
            run.directory.metrics.sync()
        run.writer.begin(run.engine, run.masks, run.state | {"totals": run.reporter.totals()})
    run.reporter.waited("save", time.perf_counter() - start)


def _report(run: Run, saved: Saved | None) -> None:
    if saved:
        if run.world.is_main:
            with suppress(OSError):  # what is saved is saved
                run.directory.note_saved(run.attempt, saved.path.name)
        run.reporter.say(f"saved step {saved.step}: {saved.nbytes / 1e6:.1f} MB in {saved.seconds:.2f} s")


def _validates(run: Run) -> bool:
    return run.held_out is not None and run.recipe.eval.sequences > 0


def _validate(run: Run, stop: StopRequest) -> Evaluation | None:
    """On a fixed seeded set of held-out samples, on all ranks; None if a signal cut it short."""
    assert run.held_out is not None

    def interrupted() -> bool:
        run.heartbeat.advance()
        return _agreed(stop)

    start = time.perf_counter()
    with run.heartbeat.phase("evaluate"):
        found = evaluate(
            run.engine.evaluate_batch,
            run.held_out,
            run.recipe.eval.sequences,
            run.engine.objectives,
            micro_batch=run.recipe.batch.micro_batch,
            rank=run.world.rank,
            world_size=run.world.world_size,
            interrupted=interrupted,
        )
    run.reporter.waited("validation", time.perf_counter() - start)
    return found


def _agreed(stop: StopRequest) -> bool:
    """Whether any rank has been asked to stop: the same answer on all. Collective."""
    return bool(all_reduce(torch.tensor([int(stop.wanted)])))


def _batches(run: Run, step: int) -> list[Batch]:
    """This rank's micro-batches of the step after `step` steps: one counter over the whole job says which samples."""
    start, rows = step * run.recipe.batch.global_batch, run.engine.recipe.batch.micro_batch
    return [run.train.batch(start + micro.first, micro.count, rows) for micro in run.engine.plan()]


def _assert_not_stuck(run: Run, result: StepResult) -> None:
    """Raise DsbertError on every rank after too many steps in a row without a finite gradient.

    Steps by which fp16 finds its loss scale do not count.
    """
    in_a_row, limit = run.reporter.totals()["skipped_in_a_row"], run.recipe.optim.max_skipped_steps
    if in_a_row < limit:
        return
    _report(run, run.writer.finish())  # of a step before: skipped steps have moved nothing
    error = DsbertError(
        f"expected a finite gradient, found none in {in_a_row} steps in a row, the last of them step "
        f"{run.engine.step}: checkpoints are intact; {_advice(run)}"
    )
    error.ranks = result.nonfinite_ranks
    raise error.for_all()


def _assert_sound(run: Run) -> None:
    """Raise DsbertError on every rank if the run, saved at its last step, was not trained up to it."""
    in_a_row = run.reporter.totals()["skipped_in_a_row"]
    if in_a_row:
        _report(run, run.writer.finish())
        raise DsbertError(
            f"expected a finite loss and gradient at the last step, {run.engine.step}, found none in the last "
            f"{in_a_row} steps: the run is saved as it was before them, and is not done; {_advice(run)}"
        ).for_all()


def _assert_finite(run: Run) -> None:
    """Raise DsbertError on every rank if a weight or a moment is not finite: no run could go on from there."""
    found = gather_json(run.engine.nonfinite_parameters()[:1])
    ranks = tuple(rank for rank, names in enumerate(found) if names)
    if ranks:
        error = DsbertError(
            f"expected finite weights and moments at step {run.engine.step}, found others in {found[ranks[0]][0]}: "
            f"checkpoints are intact; {_advice(run)}"
        )
        error.ranks = ranks
        raise error.for_all()


def _advice(run: Run) -> str:
    scale = f" or the loss scale, now {run.engine.loss_scale():g}" if run.engine.precision == "fp16" else ""
    return f"lower the learning rate{scale}"


def _due(every_steps: int, step: int, total_steps: int) -> bool:
    return step % every_steps == 0 or step == total_steps
