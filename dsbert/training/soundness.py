"""A run whose numbers are not finite does not go on, is not saved, and is not called done.

Each function raises DsbertError on every rank.
"""

from __future__ import annotations

from dsbert.base.collectives import gather_json
from dsbert.base.errors import DsbertError
from dsbert.engine.step_result import StepResult
from dsbert.training.evaluate import Evaluation
from dsbert.training.run import Run
from dsbert.training.saving import finish_save


def assert_not_stuck(run: Run, result: StepResult) -> None:
    """Not too many steps in a row without a finite gradient; steps by which fp16 finds its loss scale do not count."""
    in_a_row = run.reporter.totals.skipped_in_a_row
    if in_a_row < run.recipe.optim.max_skipped_steps:
        return
    finish_save(run)  # of a step before: skipped steps have moved nothing
    error = DsbertError(
        f"expected a finite gradient, found none in {in_a_row} steps in a row, the last of them step "
        f"{run.engine.step}: checkpoints are intact; {_advice(run)}"
    )
    error.ranks = result.nonfinite_ranks
    raise error.for_all()


def assert_trained(run: Run) -> None:
    """Not a run that is saved at its last step, and was not trained up to it."""
    if in_a_row := run.reporter.totals.skipped_in_a_row:
        finish_save(run)
        raise DsbertError(
            f"expected a finite loss and gradient at the last step, {run.engine.step}, found none in the last "
            f"{in_a_row} steps: the run is saved as it was before them, and is not done; {_advice(run)}"
        ).for_all()


def assert_finite(run: Run) -> None:
    """Not weights or moments from which no run could go on."""
    found = gather_json(run.engine.nonfinite_parameters()[:1])
    ranks = tuple(rank for rank, names in enumerate(found) if names)
    if ranks:
        error = DsbertError(
            f"expected finite weights and moments at step {run.engine.step}, found others in {found[ranks[0]][0]}: "
            f"checkpoints are intact; {_advice(run)}"
        )
        error.ranks = ranks
        raise error.for_all()


def assert_validated(run: Run, validation: Evaluation) -> None:
    """Not a validation of the last step without a loss."""
    if not validation.is_finite():
        raise DsbertError(
            f"expected a finite validation loss at the last step, {run.engine.step}, found none; {_advice(run)}"
        ).for_all()


def _advice(run: Run) -> str:
    scale = f" or the loss scale, now {run.engine.loss_scale():g}" if run.engine.precision == "fp16" else ""
    return f"lower the learning rate{scale}"
