"""Recipes: frozen dataclasses filled from YAML files and flags. The only file that knows the CLI library.

Precedence, low to high: field default, first recipe, next recipe, ..., flags.
"""

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, auto_cli, set_parsing_settings

from vision_moe.command_help import complain, details, screen
from vision_moe.fields import all_fields
from vision_moe.files import write_text

Config = TypeVar("Config")


def parse(cls: type[Config], args: Sequence[str] | None = None, *, smoke: Path | None = None) -> Config:
    """Builds `cls` from `RECIPE.yaml [RECIPE2.yaml ...] [--field value ...] [--part.field value ...]`.

    Args:
        cls: a dataclass; nested dataclasses become groups of flags; attribute docstrings become `--help` (on one
            screen; `--help FIELD`, `--help GROUP` and `--help all` tell more).
        args: command line without the program's name; `sys.argv[1:]` if None.
        smoke: overlay recipe that the flag `--smoke` applies after the others.

    Raises:
        SystemExit: after `--help`; or a recipe does not exist, or an option or value is not accepted, which the message
            on stderr names, with the nearest name there is.
    """
    rest = list(sys.argv[1:] if args is None else args)
    _help(cls, rest, smoke is not None)
    recipes: list[Path] = []
    while rest and not rest[0].startswith("-"):
        recipes.append(Path(rest.pop(0)))
    if smoke is not None and "--smoke" in rest:
        rest = [flag for flag in rest if flag != "--smoke"]
        recipes.append(smoke)
    flags: list[str] = []
    for recipe in recipes:
        if not recipe.is_file():
            complain(f"no recipe {recipe}{_nearest(recipe)}", [])
        flags += ["--config", str(recipe)]
    # The strings below the fields of a dataclass are the help of its flags.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        built: Config = auto_cli(cls, args=flags + rest, as_positional=False, exit_on_error=False)
    except ArgumentError as error:
        complain(str(error), _flags(cls))
    return built


def _flags(cls: type) -> list[str]:
    return [f"--{field.name}" for field in all_fields(cls)]


def _help(cls: type, args: Sequence[str], smoke: bool) -> None:
    asked = next((position for position, word in enumerate(args) if word in ("-h", "--help")), None)
    if asked is None:
        return
    name = args[asked + 1] if asked + 1 < len(args) else None
    if name is None:
        sys.stdout.write(screen(cls, smoke))
    elif (text := details(cls, name)) is not None:
        sys.stdout.write(text)
    else:
        complain(f"unrecognized arguments: --{name.lstrip('-')}", _flags(cls))
    raise SystemExit(0)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain YAML values (paths as strings, tuples as lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def write_yaml(config: Any, path: Path) -> None:
    """Writes the resolved configuration; reading it back by `parse` gives an equal one."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _nearest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.glob("*.yaml")], n=1)
    return f"; did you mean {folder / close[0]}?" if close else ""
