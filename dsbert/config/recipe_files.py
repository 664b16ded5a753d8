"""Where recipes are, and what their files hold before it is looked at."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.config.complaints import shown
from dsbert.config.documents import DocumentError, Lines, load_yaml, read_document

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with dsbert."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str) -> tuple[Path, dict[str, Any], Lines]:
    """The file of a recipe, by its name or as a path; its values; and the line of each key. Raises UserError."""
    names = recipe_names()
    path = RECIPES / f"{recipe}.yaml" if recipe in names else Path(recipe)
    try:
        values, lines = load_yaml(read_document(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f": do you mean {near[0]}?" if near else ""
        known = ", ".join(names)
        raise UserError(f"expected a YAML file or one of {known} as recipe, found {recipe!r}{hint}") from None
    except DocumentError as error:
        raise UserError(f"expected a recipe in YAML in {path}, found {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of recipe keys in {path}, found {shown(values)}")
    return path, values, lines
