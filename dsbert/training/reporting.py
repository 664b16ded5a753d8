"""What a run says while it goes: one record per logged step, and a progress bar. Speaks on rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsbert.base.errors import printable
from dsbert.base.progress import TrainingBar
from dsbert.checkpoint.state import LayerRecord, Totals
from dsbert.cluster.process_group import World
from dsbert.cluster.stragglers import StragglerWatch
from dsbert.config.recipe import Recipe
from dsbert.engine.micro_batches import cut
from dsbert.engine.step_result import StepResult
from dsbert.models.spec import model_spec
from dsbert.sparse import MaskManager, MaskUpdate
from dsbert.sparse.flops import sequence_flops
from dsbert.training.attempts import Attempt
from dsbert.training.evaluate import Evaluation, Score
from dsbert.training.metrics import RecordLogger, TensorBoardLogger, WandbLogger
from dsbert.training.run_directory import RunDirectory

_WAITS = ("data", "save", "validation")
# How long records that are not passed on yet are waited for: where the run is not done, the machine may be about to go.
_PATIENCE_S = {"done": 60.0, "failed": 5.0, "requeue": 5.0}
# Above it, and so often in a row, what is explored is thrown away before it can grow (the best runs: 0.05 to 0.1).
_WASTEFUL, _OFTEN = 0.5, 3


@dataclass(frozen=True, eq=False)
class StepReport:
    """All that happened in a step; update and validation are None where none was due."""

    step: int
    result: StepResult
    masks: MaskManager
    update: MaskUpdate | None
    validation: Evaluation | None


class Reporter:
    """Counts tokens and FLOPs, writes metrics.jsonl, moves the progress bar, and tells W&B and TensorBoard.

    FLOPs are counted as the paper does, forward and backward of encoder linears and attention products, but of the
    positions that were computed: of a sample, its tokens. hosts: by rank.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        world: World,
        layers: dict[str, LayerRecord],
        hosts: Sequence[str] = (),
    ) -> None:
        self._recipe, self._directory, self._main = recipe, directory, world.is_main
        spec = model_spec(recipe.model)
        self._objectives = spec.objectives
        self._kept = sum(layer.kept for layer in layers.values())
        self._dense = sum(math.prod(layer.shape) for layer in layers.values())
        self._totals = Totals()
        self._layers = {name: layer.to_json() for name, layer in layers.items()}
        self._loggers: tuple[RecordLogger, ...] = ()
        self._bar: TrainingBar | None = None
        self._since = (0, self._totals, 0.0)  # step, totals, time of the last record
        self._waits = dict.fromkeys(_WAITS, 0.0)
        self._positions = 0  # that layers have computed since the last record
        self._wasteful = 0
        batch, ranks = recipe.batch.on_ranks(world.world_size), range(world.world_size)
        samples = [sum(micro.count for micro in cut(batch, rank, world.world_size)) for rank in ranks]
        self._stragglers = StragglerWatch(hosts or [world.host for _ in ranks], samples)

    def begin(self, step: int, totals: Totals, attempt: Attempt) -> None:
        """Start reporting after `step` steps: cut journals back to it, show the bar."""
        self._totals, self._attempt = totals, attempt
        self._since = (step, totals, time.perf_counter())
        if not self._main:
            return
        recipe = self._recipe
        for file in (self._directory.metrics, self._directory.journal):
            file.cut_back(step, attempt.number)
        path, log = self._directory.path, recipe.log
        self._loggers = (
            WandbLogger(path, log.wandb, attempt.number, self._layers),
            TensorBoardLogger(path, log.tensorboard, step, self._layers),
        )
        self._bar = TrainingBar(recipe.optim.total_steps, step, recipe.log.lines_every_s)

    @property
    def totals(self) -> Totals:
        """Up to the last step, for the checkpoint."""
        return self._totals

    def waited(self, what: str, seconds: float) -> None:
        """Training stood still so long for one of "data", "save" (a checkpoint) and "validation"."""
        self._waits[what] += seconds

    def step(self, report: StepReport) -> None:
        """Account for a step, and log it if one of log.every_steps is due or something happened in it."""
        step, result = report.step, report.result
        before = self._totals
        in_a_row = before.skipped_in_a_row
        shape = (result.positions, self._recipe.model.hidden_size, result.pairs)
        self._positions += result.positions
        self._totals = Totals(
            tokens=before.tokens + result.tokens,
            flops=before.flops + sequence_flops(*shape, [self._kept]),
            flops_dense=before.flops_dense + sequence_flops(*shape, [self._dense]),
            skipped=before.skipped + result.skipped,
            skipped_in_a_row=in_a_row if result.rescaled else (in_a_row + 1) * result.skipped,
        )
        if not self._main:
            return
        if report.update:
            self._warn_of_waste(report.update)
        if result.own_times is not None:
            for line in self._stragglers.add(result.own_times.numpy()):
                self.say(line)
        assert self._bar is not None
        happened = report.update or report.validation or result.stop or result.skipped
        if happened or step in (1, self._recipe.optim.total_steps) or step % self._recipe.log.every_steps == 0:
            record = self._record(report)
            self._directory.assert_owner(self._attempt)
            for logger in self._loggers:
                logger.log(record)
            self._directory.metrics.append(record)
            self._bar.show(record, self._objectives[0].name)
        self._bar.advance(step, self._losses(result), result.lr, result.grad_norm)

    def _warn_of_waste(self, update: MaskUpdate) -> None:
        """Once: where most of what an update prunes is what the one before it has allocated."""
        self._wasteful = self._wasteful + 1 if update.removed_new_ratio > _WASTEFUL else 0
        if self._wasteful == _OFTEN:
            self.say(
                f"{update.removed_new_ratio:.0%} of the blocks pruned at step {update.step} were new at the one before,"
                f" more than half {_OFTEN} times in a row: they have no time to grow; lower sparsity.num_updates or "
                "sparsity.max_prune_ratio, or give sparsity.min_age_updates"
            )

    def say(self, line: str) -> None:
        """A line for people, on standard error."""
        if self._main:
            if self._bar:
                self._bar.print(line)
            else:
                print(f"dsbert: {printable(line)}", file=sys.stderr, flush=True)

    def close(self, outcome: str) -> None:
        """outcome: of the attempt, by which W&B may take longer to send what is left."""
        if self._bar:
            self._bar.close()
        for logger in self._loggers:
            logger.close(_PATIENCE_S[outcome], leave=outcome == "failed")  # of a failure, somebody should hear
        self._directory.metrics.close()
        self._directory.journal.close()

    def _losses(self, result: StepResult) -> dict[str, float]:
        return {one.name: loss for one, loss in zip(self._objectives, result.mean_losses(), strict=True)}

    def _validated(self, validation: Evaluation | None) -> dict[str, float | None]:
        """Held-out losses and accuracies, None where the step had no validation."""
        found: dict[str, float | None] = {}
        for objective in self._objectives:
            score = validation.scores[objective.name] if validation else Score(None, None)
            found[f"val_{objective.name}_loss"] = score.loss
            if objective.logs_accuracy:
                found[f"val_{objective.name}_accuracy"] = score.accuracy
        return found

    def _record(self, report: StepReport) -> dict[str, Any]:
        step, result, masks = report.step, report.result, report.masks
        update, validation = report.update, report.validation
        losses = self._losses(result)
        now = time.perf_counter()
        since_step, before, since = self._since
        totals = self._totals
        self._since = (step, totals, now)
        waits, self._waits = self._waits, dict.fromkeys(_WAITS, 0.0)
        positions, self._positions = self._positions, 0
        # What steps take: checkpoints and validations have figures of their own.
        stepping_s = now - since - waits["save"] - waits["validation"]
        return {
            "step": step,
            "time": round(time.time(), 3),
            "loss": sum(losses.values()),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            **self._validated(validation),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "skipped": totals.skipped - before.skipped,
            "tokens_total": totals.tokens,
            "tokens_per_s": (totals.tokens - before.tokens) / max(stepping_s, 1e-9),
            "padding": 1 - (totals.tokens - before.tokens) / positions if positions else 0.0,
            "flops_total": totals.flops,
            "flops_dense_total": totals.flops_dense,
            "density": masks.density,
            "dof": masks.dof,
            "pruned": update.num_pruned if update else None,
            "removed_new_ratio": update.removed_new_ratio if update else None,
            "topology_digest": masks.digest(),
            "step_s": stepping_s / max(step - since_step, 1),
            "mask_update_s": update.seconds if update else None,
            **{f"{what}_s": seconds for what, seconds in waits.items()},
            **self._stragglers.record(),
        }
