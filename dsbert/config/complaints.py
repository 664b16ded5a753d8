"""What is wrong with values that people wrote, for all of them in one line: pydantic's findings in plain words."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Key = tuple[str, ...]

# Below, a name is no misspelling of another.
_NEAR = 0.7
_AT_ONCE = 8
_SHOWN = 60
_WORDS = {None: "null", True: "true", False: "false"}
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text (a number or a word of YAML as text stands in quotes)",
    "model": "a section of keys",
    "dict": "a section of keys",
    "tuple": "a list",
    "list": "a list",
    "path": "a path",
}

# What other trainers call the keys of a recipe.
RECIPE_SYNONYMS = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "max_lr": "optim.lr",
    "peak_lr": "optim.lr",
    "batch_size": "batch.global_batch",
    "train_batch_size": "batch.global_batch",
    "global_batch_size": "batch.global_batch",
    "micro_batch_size": "batch.micro_batch",
    "per_device_train_batch_size": "batch.micro_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "steps": "optim.total_steps",
    "max_steps": "optim.total_steps",
    "num_steps": "optim.total_steps",
    "train_steps": "optim.total_steps",
    "num_train_steps": "optim.total_steps",
    "epochs": "optim.total_steps",
    "num_epochs": "optim.total_steps",
    "num_train_epochs": "optim.total_steps",
    "warmup": "optim.warmup_steps",
    "num_warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "lr_scheduler_type": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "scheduler": "optim.schedule",
    "wd": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "epsilon": "optim.eps",
    "seq_length": "data.seq_len",
    "sequence_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len",
    "mlm_probability": "data.mask_fraction",
    "hidden": "model.hidden_size",
    "hidden_dim": "model.hidden_size",
    "d_model": "model.hidden_size",
    "layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "heads": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "max_position_embeddings": "model.max_positions",
    "hidden_dropout_prob": "model.dropout",
    "initializer_range": "model.initializer_std",
    "density": "sparsity.sparsity",
    "block": "sparsity.block_size",
    "save_steps": "checkpoint.every_steps",
    "save_interval": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "eval_interval": "eval.every_steps",
    "logging_steps": "log.every_steps",
    "log_interval": "log.every_steps",
    "zero_stage": "deepspeed.config",
    "precision": "deepspeed.config",
    "gradient_clipping": "deepspeed.overrides",
    "max_grad_norm": "deepspeed.overrides",
    "clip_grad": "deepspeed.overrides",
}


def in_one_line(complaints: Sequence[str]) -> str:
    """All of them, or as many as one line can hold."""
    more = len(complaints) - _AT_ONCE
    return "; ".join(complaints[:_AT_ONCE]) + (f"; and {more} more" if more > 0 else "")


def explain(
    error: ValidationError,
    model: type[BaseModel],
    subject: str,
    synonyms: Mapping[str, str],
    place: Callable[[Key], str] = lambda key: "",
) -> list[str]:
    """A complaint for every value that does not fit.

    subject: what has the keys, as "recipe". synonyms: what others call a key. place: where a key stands, to be put
    behind its name.
    """
    found: dict[Key, list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_key(problem["loc"], model), []).append(problem)
    return [_complaint(key, problems, model, subject, synonyms, place(key)) for key, problems in found.items()]


def nearest(key: Key, model: type[BaseModel], synonyms: Mapping[str, str]) -> str | None:
    """The known key that was meant, dotted; None if nothing is near."""
    dotted, name = ".".join(key), key[-1].lower().replace("-", "_")
    if name in synonyms:
        return synonyms[name]

    def likeness(known: str) -> tuple[float, bool]:
        section, _, last = known.rpartition(".")
        beside = section == ".".join(key[:-1])
        return max(_ratio(name, last), 0.0 if beside else _ratio(dotted, known)), beside

    best = max((one for one in _names(model) if one != ".".join(key[:-1])), key=likeness)
    return best if likeness(best)[0] >= _NEAR else None


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not for ever."""
    text = _WORDS.get(value, "") if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _complaint(
    key: Key, problems: list[Any], model: type[BaseModel], subject: str, synonyms: Mapping[str, str], place: str
) -> str:
    first = problems[0]
    dotted = ".".join(key)
    if first["type"] == "extra_forbidden":
        near = nearest(key, model, synonyms)
        known = f"the nearest known key is {near!r}" if near else f"known here: {', '.join(_siblings(key, model))}"
        return f"unknown {subject} key {dotted!r}{place}: {known}"
    if first["type"] == "missing":
        return f"expected a value for {subject} key {dotted!r}{place}, found none"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{subject}{' ' + dotted if dotted else ''}: {message}"
    expected = " or ".join(dict.fromkeys(map(_expected, problems)))
    return f"{subject} key {dotted!r}{place}: expected {expected}, found {shown(first['input'])}"


def _expected(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    bounds = {
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
        "literal_error": "{expected}",
        "string_too_short": "text, and not none",
        "multiple_of": "a multiple of {multiple_of}",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    return _EXPECTED.get(kind.partition("_")[0]) or str(problem["msg"])


def _key(location: tuple[int | str, ...], model: type[BaseModel]) -> Key:
    """The part of pydantic's location that names keys, without the branches of a union that it tried."""
    key: list[str] = []
    here: type[BaseModel] | None = model
    for part in location:
        if here is None and isinstance(part, str):
            break
        key.append(str(part))
        here = _section(here, str(part)) if here else None
    return tuple(key)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of the section `name`, if it is one."""
    field = model.model_fields.get(name)
    annotation: Any = field.annotation if field else None
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield prefix + name
        section = _section(model, name)
        if section:
            yield from _names(section, f"{prefix}{name}.")


def _siblings(key: Key, model: type[BaseModel]) -> list[str]:
    for part in key[:-1]:
        model = _section(model, part) or model
    return list(model.model_fields)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
