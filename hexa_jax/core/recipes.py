"""Find the recipes: files with a get_config() function that come with the package, by name.

In a clone they are `configs/*.py`, to which `hexa_jax/configs` is a link; a wheel has them inside.
"""

import ast
import difflib
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"
NOT_RECIPES = {"__init__", "common"}


class RecipeError(ValueError):
    """No such recipe or config file; the message is one line."""


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted: "moco_v2" of pre-training, "eval/knn" of tasks."""
    names = []
    for folder in (FOLDER, FOLDER / "eval"):
        for path in sorted(folder.glob("*.py")):
            if path.stem not in NOT_RECIPES:
                names.append(path.relative_to(FOLDER).with_suffix("").as_posix())
    return names


def recipe_file(text: str) -> str:
    """Return the file, and arguments after a colon, of what the user gave as a config.

    Args:
        text: a path or the name of a recipe: `configs/moco_v2.py:epochs=800`, `moco_v2:epochs=800`
            or `eval/knn`. A file that exists goes before a recipe of that name.

    Raises:
        RecipeError: neither a file nor a recipe; with the nearest name.
    """
    name, colon, arguments = text.partition(":")
    if pathlib.Path(name).is_file():
        return text
    known = recipe_names()
    if name in known:
        return f"{FOLDER / name}.py{colon}{arguments}"
    bare = name.removesuffix(".py").removeprefix("configs/")
    near = [bare] if bare in known else difflib.get_close_matches(bare, known, n=1, cutoff=0.6)
    near = near or [each for each in known if each.rpartition("/")[2] == bare]
    hint = f"; did you mean --config={near[0]}?" if near else "; `hexa recipes` lists what there is"
    if name.endswith(".py") or ("/" in name and not name.startswith("eval/")):
        raise RecipeError(f"config file {name!r} does not exist{hint if near else ''}")
    raise RecipeError(f"recipe {name!r} is not known{hint}")


def summary(name: str) -> str:
    """Return the first sentence of a recipe's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return docstring.splitlines()[0] if docstring else ""
