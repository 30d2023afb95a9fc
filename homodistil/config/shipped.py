"""Files that are shipped with the package, by name: recipes, sets of students (YAML) and DeepSpeed configs (JSON).

The DeepSpeed configs are in a folder ds_configs/, next to the package in a source checkout, or inside an installed
package.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from homodistil.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
STUDENT_SETS = Path(__file__).parent / "student_sets"
"""A folder for each set, with a file for each student."""
DEFAULT_ENGINE = "zero2"
_PACKAGE = Path(__file__).parents[1]
ENGINES = _PACKAGE / "ds_configs" if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent / "ds_configs"
"""Folder of the DeepSpeed configs."""


def recipe_names() -> list[str]:
    """Names of all recipes, sorted. The name of a recipe in a subfolder includes the folder: baselines/distilbert."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises `UserError` if there is no recipe of this name."""
    if name not in recipe_names():
        raise UserError(
            f"recipe: found {name!r}, allowed: {', '.join(recipe_names())}{nearest(name, recipe_names())}; "
            f"for a file of your own use --config FILE"
        )
    return RECIPES / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """The first sentence of the comment at the beginning of a recipe, without the full stop."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(comment))[0].removesuffix(".")


def student_set_names() -> list[str]:
    """Names of the shipped sets of students."""
    return sorted(path.name for path in STUDENT_SETS.iterdir())


def student_files(name: str) -> list[Path]:
    """The files of a set of students, the widest student first. `name`: of `student_set_names`."""
    files = (STUDENT_SETS / name).glob("*.yaml")
    return sorted(files, key=lambda path: -yaml.safe_load(path.read_text(encoding="utf-8"))["student"]["hidden_size"])


def engine_names() -> list[str]:
    """Names of the DeepSpeed configs: zero2, zero3_offload, ..."""
    return sorted(path.stem for path in ENGINES.glob("*.json"))


def engine_path(given: str | None) -> Path:
    """The path of the DeepSpeed JSON for the value of `--deepspeed`.

    Args:
        given: a path; the name of a shipped config (zero2); ds_configs/NAME.json, which is the shipped config if there
            is no such file in the working directory; or None for the default.

    Raises:
        UserError: `given` is neither a path nor the name of a shipped config.
    """
    if given is None:
        return ENGINES / f"{DEFAULT_ENGINE}.json"
    path = Path(given)
    if not _is_bare_name(given):
        is_ours = str(path.parent) == "ds_configs" and path.suffix == ".json" and path.stem in engine_names()
        return ENGINES / path.name if is_ours and not path.exists() else path
    if given not in engine_names() and not path.exists():
        raise UserError(
            f"--deepspeed: found {given!r}, which is neither a file nor one of {', '.join(engine_names())}"
            f"{nearest(given, engine_names())}; give the path of DeepSpeed's JSON, or one of these names"
        )
    return ENGINES / f"{given}.json" if given in engine_names() else path


def _is_bare_name(text: str) -> bool:
    return bool(re.fullmatch(r"\w{1,100}", text))
