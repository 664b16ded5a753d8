"""The training loop, and what a run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsbert import distributed
from dsbert.checkpoint import load_checkpoint, save_checkpoint
from dsbert.config import Recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.prefetch import Prefetcher
from dsbert.data.stream import Batch, SampleStream
from dsbert.distributed import World, assert_replicas_agree, gather_json, together
from dsbert.ds_config import load_ds_config
from dsbert.engine import StepResult, TrainEngine
from dsbert.errors import EXIT_OK, EXIT_REQUEUE, DsbertError, UserError
from dsbert.evaluate import EVAL_SEED, Evaluation, evaluate
from dsbert.model import build_model, encoder_linears
from dsbert.reporting import Reporter, StepReport
from dsbert.run_directory import RunDirectory, first_difference
from dsbert.sparse import BlockSparseLinear, MaskManager
from dsbert.sparse.journal import journal_entry
from dsbert.stopping import StopRequest

_WEIGHT_CHECK_STEPS = 1000


def pretrain(
    recipe: Recipe, run_dir: Path, resume: str = "auto", timeout_s: float = 300.0, stop: StopRequest | None = None
) -> int:
    """Pre-train as `recipe` says, in `run_dir`; every rank calls this.

    resume: auto | must | never. timeout_s: how long a collective waits for a peer. stop: looked at in every step; set
    on any rank, it has all of them save the same step and return 75. Returns the exit code: 0 done, 75 saved and to be
    requeued. Raises DsbertError: the same one on every rank, or PeerError where a peer is gone.
    """
    world = distributed.init(timeout_s)
    with distributed.peer_failures(world):
        run = _Run.open(recipe, run_dir, resume, world)
        code = None
        try:
            with distributed.peer_failures(world):
                run.restore()
                code = _train(run, stop or StopRequest())
                return code
        except Exception as error:
            if world.is_main and run.directory.owner()["nonce"] == run.attempt["nonce"]:
                run.directory.set_status(run.attempt["number"], "failed", run.engine.step, str(error))
            raise
        finally:
            run.reporter.close(patient=code == EXIT_OK)


@dataclass(eq=False)
class _Run:
    recipe: Recipe
    world: World
    directory: RunDirectory
    attempt: dict[str, Any]
    engine: TrainEngine
    masks: MaskManager
    train: SampleStream
    held_out: SampleStream | None
    reporter: Reporter
    state: dict[str, Any]  # what state.json holds beside the counters

    @classmethod
    def open(cls, recipe: Recipe, run_dir: Path, resume: str, world: World) -> _Run:
        """Open the data, build model and engine, and begin an attempt in the run directory."""
        data = recipe.data
        directory = RunDirectory(run_dir)
        manifest = together(lambda: load_manifest(data.path))
        assert manifest is not None
        _assert_same_everywhere(recipe, manifest.digest)
        # One rank builds the sample indices, the others then find them.
        together(lambda: _open_streams(recipe), only_main=True)
        streams = together(lambda: _open_streams(recipe))
        vocab_size = manifest.tokenizer.vocab_size
        built = together(lambda: build_model(recipe, vocab_size, world.device))
        assert streams is not None
        assert built is not None
        model, layers = built
        shapes = _layer_shapes(model)
        engine = TrainEngine(recipe, model, layers, world)
        masks = MaskManager(
            layers, recipe.sparsity, total_steps=recipe.optim.total_steps, editor=engine, seed=recipe.seed
        )
        masks.verify_replicas()
        identity = recipe.identity() | {"data_digest": manifest.digest}
        attempt = together(lambda: directory.open_attempt(recipe, identity, resume), only_main=True)
        attempt = gather_json(attempt)[0]
        reporter = Reporter(recipe, directory, world, shapes)
        state = {
            "recipe": _with_absolute_path(recipe).model_dump(mode="json"),
            "identity": identity,
            "vocab_size": vocab_size,
            "layers": shapes,
            "params": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.parameters.items()},
        }
        return cls(recipe, world, directory, attempt, engine, masks, streams[0], streams[1], reporter, state)

    def restore(self) -> None:
        """Load the checkpoint that the attempt found, if it found one, and begin to report."""
        name = self.attempt["checkpoint"]
        totals: dict[str, int] = {}
        if name is not None:
            path = self.directory.checkpoints / name
            totals = load_checkpoint(path, self.engine, self.masks)["totals"]
            self.reporter.say(f"resuming from {path}")
        self.reporter.begin(self.engine.step, totals, self.attempt["number"])


def _train(run: _Run, stop: StopRequest) -> int:
    recipe, engine = run.recipe, run.engine
    total_steps = recipe.optim.total_steps
    saved_step = engine.step if run.attempt["checkpoint"] else None
    prefetcher = Prefetcher(lambda step: _batches(run, step), engine.step)
    try:
        while engine.step < total_steps:
            result = engine.train_step(prefetcher.next(), stop=stop.wanted)
            _assert_finite(engine, result)
            update = run.masks.maybe_update(engine.step)
            if update and run.world.is_main:
                run.directory.assert_owner(run.attempt)
                run.directory.journal.append(journal_entry(update))
            validation = _validate(run) if _due(recipe.eval.every_steps, engine.step, total_steps) else None
            run.reporter.step(StepReport(engine.step, result, run.masks, update, validation))
            if engine.step % _WEIGHT_CHECK_STEPS == 0:
                assert_replicas_agree("the weights", engine.replica_digests())
            if result.stop or _due(recipe.checkpoint.every_steps, engine.step, total_steps):
                _save(run)
                saved_step = engine.step
            if result.stop and engine.step < total_steps:
                return _finish(run, "requeue", EXIT_REQUEUE, stop.name)
    finally:
        prefetcher.close()
    if saved_step != engine.step:
        _save(run)
    return _finish(run, "done", EXIT_OK)


def _finish(run: _Run, outcome: str, code: int, cause: str | None = None) -> int:
    step = run.engine.step
    if run.world.is_main:
        run.directory.assert_owner(run.attempt)
        run.directory.set_status(run.attempt["number"], outcome, step, cause)
    run.reporter.say(f"{outcome} at step {step} of {run.recipe.optim.total_steps}: {run.directory.path}")
    return code


def _save(run: _Run) -> None:
    """Save, after all ranks have agreed that they hold one topology and one set of weights."""
    run.masks.verify_replicas()
    assert_replicas_agree("the weights", run.engine.replica_digests())
    together(lambda: run.directory.assert_owner(run.attempt), only_main=True)
    if run.world.is_main:
        run.directory.journal.sync()
    save_checkpoint(
        run.directory.checkpoints,
        run.engine,
        run.masks,
        run.state | {"totals": run.reporter.totals()},
        run.directory.companions,
        attempt=f"{run.attempt['number']}-{run.attempt['nonce']}",
        keep=run.recipe.checkpoint.keep,
    )


def _validate(run: _Run) -> Evaluation | None:
    """On a fixed seeded set of held-out samples, on all ranks."""
    if run.held_out is None or not run.recipe.eval.sequences:
        return None
    return evaluate(
        run.engine.evaluate_batch,
        run.held_out,
        run.recipe.eval.sequences,
        micro_batch=run.recipe.batch.micro_batch,
        rank=run.world.rank,
        world_size=run.world.world_size,
    )


def _batches(run: _Run, step: int) -> list[Batch]:
    """This rank's micro-batches of the step after `step` steps: one counter over the whole job says which samples."""
    start, rows = step * run.recipe.batch.global_batch, run.recipe.batch.micro_batch
    return [run.train.batch(start + micro.first, micro.count, rows) for micro in run.engine.plan()]


def _open_streams(recipe: Recipe) -> tuple[SampleStream, SampleStream | None]:
    data = recipe.data
    options = (data.nsp, data.mask_fraction)
    train = SampleStream.open(data.path, "train", data.seq_len, recipe.seed, *options)
    held_out = None
    if load_manifest(data.path).splits["validation"].documents:
        held_out = SampleStream.open(data.path, "validation", data.seq_len, EVAL_SEED, *options)
    return train, held_out


def _layer_shapes(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Shape [out, in], block size (None where dense) and kept weights of every fully connected encoder weight."""
    shapes: dict[str, dict[str, Any]] = {}
    for name, module in encoder_linears(model).items():
        if isinstance(module, BlockSparseLinear):
            shapes[name] = {"shape": list(module.shape), "block_size": module.block_size, "kept": module.blocks.numel()}
        else:
            assert isinstance(module, torch.nn.Linear)
            shape = [module.out_features, module.in_features]
            shapes[name] = {"shape": shape, "block_size": None, "kept": shape[0] * shape[1]}
    return shapes


def _assert_finite(engine: TrainEngine, result: StepResult) -> None:
    """Raise DsbertError on every rank if the gradient is NaN or infinite: nothing of it may reach a checkpoint.

    In fp16 an overflow is DeepSpeed's to handle: it skips the step.
    """
    if engine.precision != "fp16" and not math.isfinite(result.grad_norm):
        raise DsbertError(
            f"expected a finite gradient, found norm {result.grad_norm} at step {engine.step}: checkpoints of earlier "
            "steps are intact; lower the learning rate"
        )


def _with_absolute_path(recipe: Recipe) -> Recipe:
    """For the checkpoint, which is evaluated from other working directories."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": recipe.data.path.resolve()})})


def _assert_same_everywhere(recipe: Recipe, data_digest: str) -> None:
    """Raise UserError on every rank, naming a key and a rank, unless all ranks have the same recipe, data and DeepSpeed
    configuration."""
    ds_config = together(lambda: load_ds_config(recipe, 1, 1))
    mine = recipe.model_dump(mode="json") | {"data_digest": data_digest, "DeepSpeed": ds_config}
    everything = gather_json(mine)
    for rank, other in enumerate(everything):
        difference = first_difference(everything[0], other)
        if difference:
            key, first, found = difference
            raise UserError(
                f"expected one recipe on all ranks, found {key} = {found!r} on rank {rank} and {first!r} on "
                "rank 0: start all ranks with the same command"
            )


def _due(every_steps: int, step: int, total_steps: int) -> bool:
    return step % every_steps == 0 or step == total_steps
