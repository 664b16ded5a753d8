"""`dsbert finetune`: a model on a task, by transformers' Trainer, which has the loop, evaluation, DeepSpeed and W&B."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from dsbert.base.collectives import on_main_rank, raise_on_all_ranks
from dsbert.base.durable import checksum
from dsbert.base.errors import EXIT_OK, EXIT_REQUEUE
from dsbert.cluster import process_group
from dsbert.cluster.ranks import ranks_from_environment
from dsbert.cluster.signals import StopRequest
from dsbert.hf.finetuning.answer_tasks import AnswerTask
from dsbert.hf.finetuning.finetune_settings import Settings, sparsity_config, training_arguments
from dsbert.hf.finetuning.result_files import LOG, begin, draw_confusion, finish, finished, write_lines
from dsbert.hf.finetuning.sequence_tasks import SequenceTask
from dsbert.hf.finetuning.starting_model import StartingModel, load_model, load_tokenizer, resolve_model
from dsbert.hf.finetuning.task_file import TARGET, TRAIN, VALIDATION, Task
from dsbert.hf.finetuning.task_tables import Split, class_names, read_splits
from dsbert.hf.finetuning.token_tasks import TokenTask
from dsbert.hf.finetuning.trainer_callbacks import (
    MaskUpdates,
    ProgressLines,
    StopOnSignals,
    WholeCheckpoints,
    newest_whole,
)

AnyTask = SequenceTask | TokenTask | AnswerTask


def finetune(
    source: Path, task: Task, to: Path, settings: Settings, stop: StopRequest | None = None, timeout_s: float = 300.0
) -> tuple[int, dict[str, Any]]:
    """Fine-tune the model at `source` into the directory `to`; every rank calls this.

    Returns the exit code, 0 or 75 (saved and to be requeued: the same call goes on), and what metrics.json holds. Of a
    fine-tuning that is done, nothing is done again. Raises DsbertError: the same one on every rank.
    """
    stop = stop or StopRequest()
    ranks = ranks_from_environment()
    if ranks is None:
        return _finetune(source, task, to, settings, stop, world_size=1)
    world = process_group.init(timeout_s, to)
    with process_group.peer_failures(world):
        return _finetune(source, task, to, settings, stop, world.world_size)


def _finetune(
    source: Path, task: Task, to: Path, settings: Settings, stop: StopRequest, world_size: int
) -> tuple[int, dict[str, Any]]:
    _be_quiet()
    path, splits, tokenizer, work = raise_on_all_ranks(lambda: _prepare(source, task, settings))
    on_main_rank(lambda: begin(to, _record(path, task, settings)))
    if (metrics := finished(to)) is not None:
        return EXIT_OK, metrics
    arguments = raise_on_all_ranks(lambda: training_arguments(settings, task, to, world_size))
    transformers.set_seed(arguments.seed)
    start = raise_on_all_ranks(lambda: load_model(path, task.kind, settings.pattern, **work.model_changes))
    resumed = newest_whole(Path(arguments.output_dir))
    stopping = StopOnSignals(stop)
    callbacks = [*_mask_updates(start, settings, arguments.seed, resumed), stopping]
    trainer = _trainer(start, work, splits, arguments, callbacks)
    if resumed and trainer.is_world_process_zero():
        print(f"dsbert: goes on from {resumed}", file=sys.stderr)
    trained = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if stopping.stopped:
        if trainer.is_world_process_zero():
            print(f"dsbert: saved step {trainer.state.global_step} of {trainer.state.max_steps}: {to}", file=sys.stderr)
        return EXIT_REQUEUE, {}
    metrics = {
        "task": task.name,
        "kind": task.kind,
        "model": str(path),
        "pattern": start.pattern,
        "density": start.density,
        "parameters": sum(param.numel() for param in start.model.parameters()),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "training_loss": trained.training_loss,
        "seconds": trained.metrics["train_runtime"],
        "best_step": trainer.state.best_global_step,
    }
    outputs = _predict(trainer, work, splits)
    on_main_rank(lambda: _write(trainer, tokenizer, work, splits, outputs, metrics, to))
    return EXIT_OK, finished(to) or {}


def _record(path: Path, task: Task, settings: Settings) -> dict[str, Any]:
    """What must be the same where a fine-tuning goes on. Raises OSError."""
    return {
        "model": str(path.absolute()),
        "task": task.model_dump(mode="json"),
        "files": {file: checksum(Path(file)) for files in task.files.values() for file in files},
        "settings": asdict(settings),
    }


def _be_quiet() -> None:
    """What libraries say beside what we say: not on standard output, where a script may read."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Trainer imports DeepSpeed, which says on standard output which of the two it has found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _prepare(source: Path, task: Task, settings: Settings) -> tuple[Path, dict[str, Split], Any, AnyTask]:
    """What can be wrong before a model is loaded. Raises DsbertError."""
    path = resolve_model(source)
    splits = read_splits(task)
    tokenizer = load_tokenizer(path)
    longest = tokenizer.model_max_length
    max_length = min(settings.max_length or (384 if task.kind == "question-answering" else 128), longest)
    if task.kind == "question-answering":
        answers = splits[TRAIN].columns["answers"]
        work: AnyTask = AnswerTask(tokenizer, max_length, may_have_none=not all(answers))
        for split in splits.values():
            work.dataset(split)  # raises what is wrong with a question
    elif task.kind == "token-classification":
        work = TokenTask(tokenizer, class_names(splits, TARGET[task.kind]), max_length)
    else:
        classes = class_names(splits, TARGET[task.kind]) if task.kind == "classification" else []
        work = SequenceTask(tokenizer, classes, max_length)
    return path, splits, tokenizer, work


def _mask_updates(start: StartingModel, settings: Settings, seed: int, resumed: Path | None) -> list[TrainerCallback]:
    if start.pattern != "dynamic":
        return []
    sizes = {layer.block_size for layer in start.layers.values()}
    ranks = {layer.low_rank for layer in start.layers.values()}
    return [MaskUpdates(start.layers, sparsity_config(settings, max(sizes), max(ranks)), seed, resumed)]


def _trainer(
    start: StartingModel,
    work: AnyTask,
    splits: dict[str, Split],
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    # Means over tokens are taken over the whole step by `loss`: what models make of Trainer's count differs.
    start.model.accepts_loss_kwargs = False
    validation = splits[VALIDATION]
    trainer = Trainer(
        start.model,
        arguments,
        data_collator=work.collate,
        train_dataset=work.dataset(splits[TRAIN]),
        eval_dataset=work.dataset(validation),
        compute_metrics=lambda found: work.metrics(validation, found.predictions),
        compute_loss_func=work.loss,
        callbacks=[*callbacks, ProgressLines(), WholeCheckpoints()],
        preprocess_logits_for_metrics=work.reduce,
    )
    trainer.label_names = list(work.label_columns)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _predict(trainer: Trainer, work: AnyTask, splits: dict[str, Split]) -> dict[str, Any]:
    """By split the model's outputs for all rows, in their order; collective."""
    trainer.compute_metrics = None
    return {name: trainer.predict(work.dataset(split)).predictions for name, split in splits.items() if name != TRAIN}


def _write(
    trainer: Trainer,
    tokenizer: Any,
    work: AnyTask,
    splits: dict[str, Split],
    outputs: dict[str, Any],
    metrics: dict[str, Any],
    to: Path,
) -> None:
    """The whole result. Raises OSError."""
    # Not with Trainer's own, which adds a pickle of its arguments.
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(to)
    tokenizer.save_pretrained(to)
    for name, found in outputs.items():
        split = splits[name]
        write_lines(to / f"predictions_{name}.jsonl", work.predictions(split, found))
        if not split.labelled:
            continue
        metrics[name] = {"rows": len(split)} | work.metrics(split, found)
        if (counts := work.confusion(split, found)) is not None:
            metrics[name]["confusion"] = {"classes": list(work.classes), "counts": counts.tolist()}
            draw_confusion(counts.tolist(), work.classes, f"{metrics['task']}, {name}", to / f"confusion_{name}.png")
    write_lines(to / LOG, trainer.state.log_history)
    finish(to, metrics)
