"""What `a.b=value` on the command line does to the values of a recipe."""

from __future__ import annotations

from typing import Any, TypeGuard

from dsbert.config.complaints import Key
from dsbert.config.documents import DocumentError, load_yaml


def override_value(values: dict[str, Any], override: str) -> Key:
    """Apply one override, and return its key. Raises DocumentError."""
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.split("."))
    if not equals or not all(key):
        raise DocumentError(f"expected an override a.b=value, found {override!r}")
    for parent in key[:-1]:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise DocumentError(
                f"expected a section at {parent!r} in override {override!r}, found the value {nested!r}"
            )
        values = nested
    try:
        values[key[-1]], _ = load_yaml(text)
    except DocumentError as error:
        raise DocumentError(f"expected a YAML value in override {override!r}, found {error.found}") from None
    return key


def keep_shares(values: dict[str, Any], before: int | None, given: set[Key], num_updates: int) -> None:
    """After an override of optim.total_steps alone, which was `before`: warm-up keeps its share of the run, and there
    are no more mask updates than steps. num_updates: how many there are where the recipe does not say it."""
    total = total_steps(values)
    if ("optim", "total_steps") not in given or total is None:
        return
    optim, sparsity = values["optim"], values.setdefault("sparsity", {})
    warmup = optim.get("warmup_steps")
    if before and _is_count(warmup) and warmup < before and ("optim", "warmup_steps") not in given:
        optim["warmup_steps"] = min(round(warmup * total / before), total - 1)
    if isinstance(sparsity, dict) and ("sparsity", "num_updates") not in given:
        updates = sparsity.get("num_updates", num_updates)
        if _is_count(updates) and updates > total:
            sparsity["num_updates"] = total


def total_steps(values: dict[str, Any]) -> int | None:
    """optim.total_steps of values that nobody has validated; None unless it is a number of steps."""
    optim = values.get("optim")
    total = optim.get("total_steps") if isinstance(optim, dict) else None
    return int(total) if _is_count(total) and total >= 1 else None


def _is_count(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
