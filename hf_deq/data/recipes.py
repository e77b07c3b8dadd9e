"""recipe.yaml: every argument of a training run, by the names of the flags.

A recipe is an input of training, and training leaves one in the model's folder, so that evaluation knows what the model
was trained on.
"""

from pathlib import Path

import yaml
from transformers.utils import cached_file

_PACKAGE = Path(__file__).parents[1]
# In an installed wheel the recipes lie in the package, in a clone beside it.
RECIPES = _PACKAGE / "model_cards" if (_PACKAGE / "model_cards").is_dir() else _PACKAGE.parent / "model_cards"


def read_recipe(model: str | Path) -> dict:
    """Read the recipe of a model's folder or Hub repository; empty if it has none."""
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(model), "recipe.yaml", **optional)
    return parse_recipe(Path(file)) if file else {}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one of the recipes of this package, such as `deq-transformer-small`.

    Raises:
        ValueError: if there is neither such a file nor such a recipe.
    """
    for file in (Path(name), RECIPES / name / "recipe.yaml"):
        if file.is_file():
            return file
    known = sorted(folder.parent.name for folder in RECIPES.glob("*/recipe.yaml"))
    raise ValueError(f"there is no recipe {name!r}: name a file, or one of {', '.join(known)}.")


def parse_recipe(file: Path) -> dict:
    """Read the names and values of a recipe.

    Raises:
        ValueError: if the file is not YAML in UTF-8, or holds something other than names and values.
    """
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {file} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {file} must be lines of `name: value`, but it is a {type(recipe).__name__}.")
    return recipe
