"""Where recipes are, and what their files hold before it is looked at."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.config.documents import Lines, read_mapping

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with dsbert."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str) -> tuple[Path, dict[str, Any], Lines]:
    """The file of a recipe, by its name or as a path; its values; and the line of each key. Raises UserError."""
    names = recipe_names()
    path = RECIPES / f"{recipe}.yaml" if recipe in names else Path(recipe)
    try:
        values, lines = read_mapping(path, "a recipe")
    except FileNotFoundError:
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f": do you mean {near[0]}?" if near else ""
        known = ", ".join(names)
        raise UserError(f"expected a YAML file or one of {known} as recipe, found {recipe!r}{hint}") from None
    return path, values, lines
