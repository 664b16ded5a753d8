"""What a fine-tuning is asked to do, and what of it transformers' TrainingArguments are told."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import TrainingArguments

from dsbert.base.errors import UserError
from dsbert.config.complaints import explain, in_one_line, shown
from dsbert.config.documents import DocumentError, load_yaml
from dsbert.engine.ds_config import read_ds_json, zero_stage
from dsbert.hf.finetuning.task_file import SMALLER_IS_BETTER, Task
from dsbert.sparse import SparsityConfig

_SPARSITY = "sparsity."
# What is set in another way, or would be undone.
_ELSEWHERE = {
    "output_dir": "give --to",
    "per_device_train_batch_size": "give --batch-size, which counts the samples of a step on all ranks together",
    "resume_from_checkpoint": "the same command again resumes",
    "do_train": "leave it out",
    "do_eval": "leave it out",
    "do_predict": "leave it out",
    "load_best_model_at_end": "give --best",
    "metric_for_best_model": "name it in the task's file",
    "greater_is_better": "leave it out",
    "remove_unused_columns": "leave it out",
    "label_names": "leave it out",
    "save_total_limit": "leave it out",
    "save_only_model": "leave it out",
    "push_to_hub": "upload the result with huggingface_hub",
    "local_rank": "leave it out",
}
# In place of transformers' own: what BERT is fine-tuned with (Devlin et al. 2019, appendix A.3).
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "warmup_steps": 0.1,  # below 1: of all steps
    "weight_decay": 0.01,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 50,
    "report_to": "none",
}
# Of sparsity.*, where it differs from pre-training: a trained pattern moves less.
_SPARSITY_DEFAULTS: dict[str, Any] = {"num_updates": 10, "max_prune_ratio": 0.1}


@dataclass(frozen=True)
class Settings:
    """batch_size: samples of a step, on all ranks together. max_length: tokens of an example, None: as the kind of task
    has it. best: keep the model of the best validation, not of the last step. trainer: of TrainingArguments; sparsity:
    of SparsityConfig."""

    pattern: str | None
    batch_size: int
    max_length: int | None
    best: bool
    trainer: dict[str, Any]
    sparsity: dict[str, Any]


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`name=value` of TrainingArguments, and `sparsity.name=value` without that prefix.

    Raises UserError for unknown names and values of another type.
    """
    trainer: dict[str, Any] = {}
    sparsity: dict[str, Any] = {}
    for word in words:
        name, found, text = word.partition("=")
        if not found:
            raise UserError(f"expected name=value, found {word!r}")
        try:
            value, _ = load_yaml(text)
        except DocumentError as error:
            raise UserError(f"{name}: expected a value, found {error}") from None
        if name.startswith(_SPARSITY):
            sparsity[name.removeprefix(_SPARSITY)] = value
        else:
            _check(name, value)
            trainer[name] = value
    return trainer, sparsity


def _check(name: str, value: Any) -> None:
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    if name in _ELSEWHERE:
        raise UserError(f"expected no {name} here: {_ELSEWHERE[name]}")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"the nearest is {near[0]!r}" if near else "see transformers.TrainingArguments, or sparsity.*"
        raise UserError(f"unknown name {name!r}: {hint}")
    default = known[name].default
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    for kind, words in kinds.items():
        allowed = (int, float) if kind is float or name == "warmup_steps" else (kind,)
        if type(default) is kind and type(value) not in allowed:
            raise UserError(f"expected {words} as {name}, found {shown(value)}")


def sparsity_config(settings: Settings, block_size: int, low_rank: int) -> SparsityConfig:
    """Of a model with sparse layers, whose pattern is dynamic. Raises UserError."""
    if settings.trainer.get("deepspeed"):
        raise UserError("expected --pattern keep or dense beside deepspeed, found dynamic: leave deepspeed out")
    asked = _SPARSITY_DEFAULTS | settings.sparsity | {"pattern": "dynamic", "block_size": block_size}
    if "update_every_steps" in settings.sparsity and "num_updates" not in settings.sparsity:
        del asked["num_updates"]
    for name in ("block_size", "sparsity", "pattern", "modules", "initial_scale", "low_rank", "group_lasso", "kernels"):
        if name in settings.sparsity:
            raise UserError(f"expected no sparsity.{name} here, found one: the model has its own")
    try:
        return SparsityConfig(**asked, low_rank=low_rank)
    except ValidationError as error:
        raise UserError(in_one_line(explain(error, SparsityConfig, "sparsity", {}))) from None


def _deepspeed(name: str) -> dict[str, Any]:
    """What Trainer is told of a configuration of ds_configs, or of a file. Raises UserError."""
    config = read_ds_json(name)
    if zero_stage(config) > 2:
        raise UserError(f"expected ZeRO stage 0 to 2 as deepspeed, found {zero_stage(config)} in {name}")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    found: dict[str, Any] = {"deepspeed": dict.fromkeys(batches, "auto") | config}
    found |= {dtype: True for dtype in ("bf16", "fp16") if (config.get(dtype) or {}).get("enabled") is True}
    if isinstance(config.get("gradient_clipping"), int | float):
        found["max_grad_norm"] = config["gradient_clipping"]
    return found


def training_arguments(settings: Settings, task: Task, to: Path, world_size: int) -> TrainingArguments:
    """Raises UserError for what does not go together, or for what Trainer's packages are not there."""
    asked = _DEFAULTS | settings.trainer
    share = world_size * int(asked.get("gradient_accumulation_steps", 1))
    if settings.batch_size % share:
        raise UserError(
            f"expected --batch-size divisible by the ranks times gradient_accumulation_steps, {share}, found "
            f"{settings.batch_size}"
        )
    if isinstance(asked.get("deepspeed"), str):
        asked |= _deepspeed(asked["deepspeed"])
    on_cards = torch.cuda.is_available()
    values = (
        {"dataloader_pin_memory": on_cards, "use_cpu": not on_cards}
        | asked
        | {
            "output_dir": str(to / "checkpoints"),
            "per_device_train_batch_size": settings.batch_size // share,
            "remove_unused_columns": False,
            "save_total_limit": 2,
            "load_best_model_at_end": settings.best,
            "metric_for_best_model": f"eval_{task.main_metric}" if settings.best else None,
            "greater_is_better": task.main_metric not in SMALLER_IS_BETTER if settings.best else None,
            # Coordinates are the ranks' own, and are compared: rank 0's would only cover up a difference.
            "ddp_broadcast_buffers": False,
            "ddp_find_unused_parameters": False,
            "disable_tqdm": asked.get("disable_tqdm", True),
        }
    )
    try:
        return TrainingArguments(**values)
    except ImportError as error:
        raise UserError(
            f"expected the packages of transformers' Trainer, found: {' '.join(str(error).split())[:120]}: pip install "
            "'dsbert[trainer]'"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"expected settings that transformers' Trainer takes, found: {' '.join(str(error).split())}"
        ) from None
