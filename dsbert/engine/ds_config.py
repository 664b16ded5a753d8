"""The DeepSpeed JSON: found by name, merged with the recipe, refused where it reaches into what the recipe owns."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbert.base.errors import UserError
from dsbert.config.complaints import explain, in_one_line, shown
from dsbert.config.documents import DocumentError, load_json, read_document
from dsbert.config.recipe import Recipe
from dsbert.engine.ds_schema import OFF, RECIPE_OWNS, REFUSED, SYNONYMS, DeepSpeedJson, Fp16

_PACKAGE = Path(__file__).parents[1]
# In a checkout the files lie beside the package; a wheel carries them inside it (setup.py).
_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")


_DEFAULTS = DeepSpeedJson()
# In the run directory: what DeepSpeed writes by itself.
_FOLDER = "deepspeed"


def ds_config_names() -> list[str]:
    """The configurations that come with dsbert."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})


def load_ds_config(
    recipe: Recipe, world_size: int, accumulation_steps: int, run_dir: Path | None = None
) -> dict[str, Any]:
    """The configuration for deepspeed.initialize, with the clipping that holds where the JSON names none.

    run_dir: what DeepSpeed writes goes to the folder `deepspeed` in it. Raises UserError, one line, for all that does
    not fit.
    """
    merged = merged_config(recipe)
    complaints = [*_leave_to_the_recipe(merged), *_leave_out_what_is_off(merged)]
    try:
        config = DeepSpeedJson.model_validate(merged).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        complaints += explain(error, DeepSpeedJson, "DeepSpeed", SYNONYMS)
    if not complaints:
        complaints += _keep_inside(config, run_dir)
    if complaints:
        raise UserError(f"DeepSpeed configuration {config_label(recipe)!r}: {in_one_line(complaints)}")
    micro_batch = recipe.batch.micro_batch
    return {"gradient_clipping": _DEFAULTS.gradient_clipping, "steps_per_print": None} | config | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch * accumulation_steps * world_size,
    }  # fmt: skip


def what_holds(recipe: Recipe, config: dict[str, Any]) -> str:
    """A line for people about what `load_ds_config` returned."""
    dtype, clipping = precision(config), config["gradient_clipping"]
    if dtype == "fp16":
        scale = Fp16.model_validate(config["fp16"])
        dtype += f" at loss scale {scale.loss_scale:g}" if scale.loss_scale else (
            f" at a dynamic loss scale from {2**scale.initial_scale_power}, at least {scale.min_loss_scale}"
        )  # fmt: skip
    clipped = f"gradients clipped at norm {clipping:g}" if clipping else "gradients not clipped"
    if "gradient_clipping" not in merged_config(recipe):
        clipped += " (DeepSpeed's default: the JSON has no gradient_clipping)"
    return f"{config_label(recipe)}: ZeRO stage {zero_stage(config)}, {dtype}, {clipped}, nothing offloaded"


def without_batches(config: dict[str, Any]) -> dict[str, Any]:
    """What stands in the JSON, for records: batches follow from the recipe and the number of ranks."""
    return {key: value for key, value in config.items() if key not in RECIPE_OWNS}


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


def read_ds_json(name: str | dict[str, Any]) -> dict[str, Any]:
    """A configuration by its name in ds_configs or its file, not yet looked at. Raises UserError."""
    if isinstance(name, dict):
        return copy.deepcopy(name)
    candidates = [folder / f"{name}.json" for folder in _FOLDERS] + [Path(name)]
    path = next((path for path in candidates if os.path.isfile(path)), None)
    if path is None:
        raise UserError(
            f"expected a JSON file or one of {', '.join(ds_config_names())} as deepspeed.config, found {name!r}"
        )
    try:
        config = load_json(read_document(path))
    except DocumentError as error:
        raise UserError(f"expected JSON in {path}, found {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(config).__name__}")
    return config


def merged_config(recipe: Recipe) -> dict[str, Any]:
    """The configuration as the recipe has it, from its file or its own lines, not yet looked at. Raises UserError."""
    config = read_ds_json(recipe.deepspeed.config)
    _merge(config, copy.deepcopy(recipe.deepspeed.overrides))
    return config


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _leave_to_the_recipe(config: dict[str, Any]) -> Iterator[str]:
    """Take out what the recipe owns; a complaint where the JSON says it as well."""
    for key, owner in RECIPE_OWNS.items():
        value = config.pop(key, "auto")
        if value != "auto":
            yield f'expected {key!r} absent or "auto", found {shown(value)}: the recipe owns it as {owner}'


def _leave_out_what_is_off(config: dict[str, Any]) -> Iterator[str]:
    """Take out what dsbert does not do; a complaint where it is switched on. What is "auto" is DeepSpeed's choice."""
    for dotted, why in REFUSED.items():
        section: Any = config
        *parents, key = dotted.split(".")
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section:
            value = section.pop(key)
            if not _is_off(dotted, value):
                yield f"expected no {dotted!r}, found {shown(value)}: {why}"
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        for key in [key for key, value in zero.items() if value == "auto" and key != "stage"]:
            del zero[key]


def _is_off(dotted: str, value: Any) -> bool:
    if value in OFF.get(dotted, ()) or value in (None, False):
        return True
    if isinstance(value, dict) and "device" in value:
        return value["device"] in (None, "none")
    if isinstance(value, dict):
        return not value.get("enabled", any(not _is_off("", entry) for entry in value.values()))
    return bool(value == [])


def _keep_inside(config: dict[str, Any], run_dir: Path | None) -> Iterator[str]:
    """What DeepSpeed writes, below one folder of the run; a complaint where it would lie elsewhere."""
    root = Path(os.path.abspath(run_dir or ".")) / _FOLDER
    profiler = config.get("flops_profiler", {})
    if profiler.get("enabled") and profiler.get("output_file"):
        path = profiler["output_file"]
        profiler["output_file"] = str(root / path)
        if not _lies_in(root, root / path) and (run_dir or not Path(path).is_absolute()):
            yield _outside("flops_profiler.output_file", path)
    for name in ("tensorboard", "csv_monitor"):
        monitor = config.get(name, {})
        if monitor.get("enabled"):
            path = monitor.get("output_path") or name
            monitor["output_path"] = str(root / path)
            target = root / path / monitor.get("job_name", _DEFAULTS.tensorboard.job_name)
            if not _lies_in(root, target) and (run_dir or not Path(path).is_absolute()):
                yield _outside(f"{name}.output_path", path)
    if config.get("tensorboard", {}).get("enabled") and importlib.util.find_spec("tensorboard") is None:
        install = "pip install 'dsbert[tensorboard]', or use csv_monitor"
        yield f"expected the package tensorboard for 'tensorboard.enabled', found none: {install}"


def _lies_in(root: Path, path: Path) -> bool:
    """Links count as what they lead to."""
    return root.resolve() in path.resolve().parents


def _outside(key: str, path: str) -> str:
    return (
        f"expected {key!r} inside the folder {_FOLDER!r} of the run directory, to which it is relative, found {path!r}"
    )
