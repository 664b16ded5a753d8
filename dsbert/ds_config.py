"""The DeepSpeed JSON: found by name, merged with the recipe, refused where it reaches into what the recipe owns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from dsbert.config import Recipe
from dsbert.errors import UserError

_PACKAGE = Path(__file__).parent
# In a checkout the files lie beside the package; a wheel carries them inside it (setup.py).
_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
_RECIPE_OWNS = {
    "optimizer": "optim",
    "scheduler": "optim",
    "train_batch_size": "batch.global_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.micro_batch",
}
# Each of these keeps a further copy of the weights, in which a re-pointed slot would live on.
_UNTESTED = ("offload_optimizer", "offload_param", "zero_hpz_partition_size", "mics_shard_size")


def ds_config_names() -> list[str]:
    """The configurations that come with dsbert."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})


def load_ds_config(recipe: Recipe, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """The configuration for deepspeed.initialize. Raises UserError for what does not fit."""
    config = merged_config(recipe)
    for key, owner in _RECIPE_OWNS.items():
        if config.get(key, "auto") != "auto":
            raise UserError(
                f'expected {key!r} absent or "auto" in DeepSpeed configuration {config_label(recipe)!r}, found '
                f"{config[key]!r}: the recipe owns it as {owner}"
            )
        config.pop(key, None)
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"expected a section {key!r} in the DeepSpeed configuration, found {config[key]!r}")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"expected a ZeRO stage 0 to 3 in the DeepSpeed configuration, found {zero['stage']!r}")
    for key in _UNTESTED:
        if zero.get(key) not in (None, False, 0, 1, -1, {"device": "none"}):
            raise UserError(f"expected no {key!r} in the DeepSpeed configuration, found it: dsbert does not support it")
    micro_batch = recipe.batch.micro_batch
    return config | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch * accumulation_steps * world_size,
        "steps_per_print": None,
    }


def merged_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration as the recipe has it, from its file or its own lines. Raises UserError."""
    config = _read(recipe.deepspeed.config)
    _merge(config, recipe.deepspeed.overrides)
    return config


def config_label(recipe: Recipe) -> str:
    """What to call the configuration in a line."""
    config = recipe.deepspeed.config
    return config if isinstance(config, str) else "a DeepSpeed configuration of its own"


def zero_stage(config: dict[str, Any]) -> int:
    """0 to 3."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> str:
    """fp32 | bf16 | fp16."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            return name
    return "fp32"


def _read(name: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(name, dict):
        return copy.deepcopy(name)
    candidates = [folder / f"{name}.json" for folder in _FOLDERS] + [Path(name)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(
            f"expected a JSON file or one of {', '.join(ds_config_names())} as deepspeed.config, found {name!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"expected JSON in {path}, found: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(config).__name__}")
    return config


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
