"""The training loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from dsbert.base.collectives import gather_json, on_main_rank
from dsbert.base.errors import EXIT_OK, EXIT_REQUEUE
from dsbert.cluster import process_group
from dsbert.cluster.signals import StopRequest
from dsbert.config.recipe import Recipe
from dsbert.data.prefetch import Prefetcher
from dsbert.data.stream import Batch
from dsbert.training.agreement import agree
from dsbert.training.failures import Failures
from dsbert.training.hooks import StepContext, after_step_hooks
from dsbert.training.run import Run, open_run
from dsbert.training.saving import finish_save
from dsbert.training.soundness import assert_trained


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
        agreed = agree(recipe, run_dir, world, timeout_s)
        failures = Failures(agreed)
        failures.watch()
    with ExitStack() as on_failure:
        on_failure.callback(failures.close)
        with failures.accounted_for():
            run = open_run(agreed, resume, failures, on_failure)
            code = _finish(run, "requeue", EXIT_REQUEUE, stop) if stop.agreed() else _train(run, stop)
        on_failure.pop_all()
    return code


def _train(run: Run, stop: StopRequest) -> int:
    engine, total_steps = run.engine, run.recipe.optim.total_steps
    hooks = after_step_hooks(run, stop)
    prefetcher = Prefetcher(lambda step: _batches(run, step), engine.step)
    run.heartbeat.enter("train")
    try:
        while engine.step < total_steps:
            start = time.perf_counter()
            with engine.own_clock.phase("data"):
                batches = prefetcher.next()
            run.reporter.waited("data", time.perf_counter() - start)
            result = engine.train_step(batches, stop=stop.requested, busy=run.writer.busy)
            run.heartbeat.advance(engine.step)
            context = StepContext(engine.step, result, stop_agreed=result.stop)
            for hook in hooks:
                hook.after_step(context)
            if context.stop_agreed and engine.step < total_steps:
                return _finish(run, "requeue", EXIT_REQUEUE, stop)
    finally:
        prefetcher.close()
    assert_trained(run)
    return _finish(run, "done", EXIT_OK)


def _finish(run: Run, outcome: str, code: int, stop: StopRequest | None = None) -> int:
    """Leave together, status first: a launcher may kill all ranks as soon as one has left. W&B, which may take its
    time, comes last: nobody waits for it in a collective."""
    finish_save(run)
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
    run.reporter.close(outcome)
    return code


def _batches(run: Run, step: int) -> list[Batch]:
    """This rank's micro-batches of the step after `step` steps: one counter over the whole job says which samples."""
    start = step * run.recipe.batch.global_batch
    return [run.streams.train.batch(start + micro.first, micro.count) for micro in run.engine.plan()]
