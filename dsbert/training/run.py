"""What a run is made of, and how it is opened on all ranks, each part from those before it:

agreement     recipe, data and directory that all ranks have alike, and this rank's heartbeat
Streams       samples of training and held-out text
Model         engine and mask manager, proven to train what checkpoints read
Attempt       the claim on the run directory, and the checkpoint that it goes on from
Run           all of it, at the checkpoint's step, with a reporter and a checkpoint writer
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dsbert.base.collectives import gather_json, on_main_rank, raise_on_all_ranks
from dsbert.checkpoint.loading import load_checkpoint
from dsbert.checkpoint.publisher import Retention
from dsbert.checkpoint.state import IdentityRecord, LayerRecord, RecipeRecord, RunRecord, Totals
from dsbert.checkpoint.writer import CheckpointWriter
from dsbert.cluster import process_group
from dsbert.cluster.health import Heartbeat
from dsbert.cluster.process_group import World
from dsbert.config.recipe import Recipe
from dsbert.data.stream import SAMPLES
from dsbert.engine.ds_config import what_holds, without_batches
from dsbert.engine.train_engine import TrainEngine
from dsbert.models.construction import build_model, layer_shapes
from dsbert.models.spec import model_spec
from dsbert.sparse import MaskManager
from dsbert.training.agreement import Agreement
from dsbert.training.attempts import Attempt
from dsbert.training.failures import Failures
from dsbert.training.init_from import InitFrom, init_from_of
from dsbert.training.numerics import changes, numerics, why_bits_may_differ
from dsbert.training.opening import opening_lines
from dsbert.training.reporting import Reporter
from dsbert.training.run_directory import RunDirectory
from dsbert.training.streams import Streams, open_data


@dataclass(frozen=True, eq=False)
class Model:
    """layers: of every fully connected weight. init_from: the weights of another model that it began with; None where
    they were drawn."""

    engine: TrainEngine
    masks: MaskManager
    layers: dict[str, LayerRecord]
    init_from: InitFrom | None


@dataclass(frozen=True, eq=False)
class Run:
    """All parts of a run that trains. record: what its checkpoints say alike."""

    recipe: Recipe
    world: World
    directory: RunDirectory
    heartbeat: Heartbeat
    streams: Streams
    engine: TrainEngine
    masks: MaskManager
    record: RunRecord
    attempt: Attempt
    reporter: Reporter
    writer: CheckpointWriter


def open_run(agreed: Agreement, resume: str, failures: Failures, on_failure: ExitStack) -> Run:
    """Open all parts. Collective. on_failure: gets what is to be closed if the run fails.

    Raises the same UserError, CheckpointError, DataError or StorageError on every rank.
    """
    streams = open_data(agreed)
    model = _build(agreed, streams, failures)
    record = _describe(agreed, model)
    attempt = _begin_attempt(agreed, record, resume, failures)
    if model.init_from is not None:
        model.init_from.keep_topology(agreed.directory, attempt, model.masks)
    reporter = Reporter(agreed.recipe, agreed.directory, agreed.world, model.layers, agreed.hosts)
    on_failure.callback(reporter.close, "failed")
    run = Run(
        recipe=agreed.recipe,
        world=agreed.world,
        directory=agreed.directory,
        heartbeat=agreed.heartbeat,
        streams=streams,
        engine=model.engine,
        masks=model.masks,
        record=record,
        attempt=attempt,
        reporter=reporter,
        writer=_writer(agreed, attempt),
    )
    _restore(run, agreed.hosts, model.init_from)
    _watch_bits(run)
    return run


def _build(agreed: Agreement, streams: Streams, failures: Failures) -> Model:
    recipe, world, vocab = agreed.recipe, agreed.world, agreed.manifest.tokenizer
    module, sparse_layers = raise_on_all_ranks(
        lambda: build_model(recipe, vocab.vocab_size, world.device, streams.train.vocab.pad)
    )
    init_from = init_from_of(agreed)
    if init_from is not None:
        raise_on_all_ranks(lambda: init_from.fill_(module, sparse_layers, recipe))
    layers = {
        name: LayerRecord.from_json(shape) for name, shape in layer_shapes(module, model_spec(recipe.model)).items()
    }
    engine = failures.engine = TrainEngine(recipe, module, sparse_layers, world, agreed.directory.path)
    process_group.unlimit()  # DeepSpeed's groups
    engine.on_progress = agreed.heartbeat.advance
    engine.prove_layout()
    total_steps = recipe.optim.total_steps
    masks = MaskManager(sparse_layers, recipe.sparsity, total_steps=total_steps, editor=engine, seed=recipe.seed)
    masks.verify_replicas()
    return Model(engine, masks, layers, init_from)


def _describe(agreed: Agreement, model: Model) -> RunRecord:
    recipe, manifest, engine = agreed.recipe, agreed.manifest, model.engine
    # The checkpoint is evaluated from other working directories.
    places: dict[str, Any] = {"data": recipe.data.model_copy(update={"path": recipe.data.path.resolve()})}
    identity = recipe.identity() | {"data_digest": manifest.digest, "samples": SAMPLES}
    if recipe.init_from is not None and model.init_from is not None:
        places |= {"init_from": recipe.init_from.resolve()}
        identity["init_from"] = model.init_from.digest
    absolute = recipe.model_copy(update=places)
    return RunRecord(
        recipe=RecipeRecord.from_json(absolute.model_dump(mode="json")),
        identity=IdentityRecord.from_json(identity),
        vocab_size=manifest.tokenizer.vocab_size,
        layers=model.layers,
        deepspeed=without_batches(engine.ds_config),
        numerics=numerics(recipe, agreed.world),
        params={name: list(getattr(param, "ds_shape", param.shape)) for name, param in engine.parameters.items()},
    )


def _begin_attempt(agreed: Agreement, record: RunRecord, resume: str, failures: Failures) -> Attempt:
    """Claim the directory. What the attempt before has published until then counts."""
    directory, world = agreed.directory, agreed.world
    checkpoint = directory.find_checkpoint(resume, world.rank, world.world_size)
    shown = {"deepspeed": record.deepspeed, "numerics": record.numerics}
    claimed = on_main_rank(
        lambda: directory.open_attempt(
            agreed.recipe, record.identity.whole, checkpoint, agreed.nonce, world.world_size, shown
        )
    )
    attempt = failures.attempt = Attempt.from_json(gather_json(claimed and claimed.to_json())[0])
    if gather_json(directory.has_changed())[0]:
        checkpoint = directory.find_checkpoint(resume, world.rank, world.world_size)
        attempt = attempt.model_copy(update={"checkpoint": checkpoint.name if checkpoint else None})
    return attempt


def _writer(agreed: Agreement, attempt: Attempt) -> CheckpointWriter:
    every = agreed.recipe.checkpoint
    return CheckpointWriter(
        agreed.directory.checkpoints,
        agreed.directory.assets,
        attempt=f"{attempt.number}-{agreed.nonce}",
        retention=Retention(every.keep, every.keep_every_steps),
        assert_owner=lambda: agreed.directory.assert_owner(attempt),
        max_bytes_per_s=every.max_mb_per_s * 1e6 if every.max_mb_per_s else None,
        timeout_s=agreed.timeout_s,
        watch=agreed.heartbeat.saving,
        alive=agreed.heartbeat.advance,
    )


def _restore(run: Run, hosts: list[str], init_from: InitFrom | None) -> None:
    """Load the checkpoint that the attempt goes on from, if there is one, and begin to report."""
    name, totals = run.attempt.checkpoint, Totals()
    if name is not None:
        path = run.directory.checkpoints / name
        with run.heartbeat.phase("load"):
            state = load_checkpoint(path, run.engine, run.masks)
        totals = state.totals
        run.reporter.say(f"resuming from {path}")
        for line in changes(state, run.record, since=name):
            run.reporter.say(line)
    elif init_from is not None:
        for line in init_from.lines:
            run.reporter.say(line)
    run.reporter.say(what_holds(run.recipe, run.engine.ds_config))
    for line in run.engine.kernels.lines():
        run.reporter.say(line)
    for line in opening_lines(run.recipe, run.record, hosts, run.directory.path):
        run.reporter.say(line)
    run.heartbeat.advance(run.engine.step)
    run.reporter.begin(run.engine.step, totals, run.attempt)


def _watch_bits(run: Run) -> None:
    """Have gradients computed twice as often as the recipe says, where that must give the same bits. Collective."""
    every_steps = run.recipe.health.replay_every_steps
    why = why_bits_may_differ(run.record.numerics or {})
    if why is None:
        run.engine.replay_gradients(every_steps, run.streams.train.batch)
    elif every_steps:
        run.reporter.say(f"no gradient is computed twice (health.replay_every_steps={every_steps}): {why}")
