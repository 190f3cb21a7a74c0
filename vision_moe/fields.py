"""The fields of a configuration as its dataclasses and their docstrings tell them: for `--help` and the reference."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from docstring_parser import parse_from_object


@dataclass(frozen=True)
class Field:
    """One field, or one group of fields."""

    name: str
    """Dotted, as on the command line: mcl.learning_rate."""
    kind: str
    """Type for readers; "" for a group."""
    default: str | None
    """As in YAML; None where the field is required, "" for a group."""
    text: str
    """The string below the field."""
    part: type | None
    """Dataclass of a group."""


def fields_of(cls: type, prefix: str = "", instance: Any = None) -> list[Field]:
    """The fields of a dataclass, in order, groups as one entry.

    Args:
        cls: the dataclass.
        prefix: what stands before the names, with its dot.
        instance: where the defaults are read; the dataclass's own if None.
    """
    texts, hints = _docstrings(cls), typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        part = _part(hints[field.name])
        default = getattr(instance, field.name) if instance is not None else _default(field)
        shown = "" if part else None if default is MISSING else _shown(default)
        kind = "" if part else _kind(hints[field.name])
        found.append(Field(prefix + field.name, kind, shown, texts.get(field.name, ""), part))
    return found


def all_fields(cls: type, prefix: str = "", instance: Any = None) -> Iterator[Field]:
    """The same with the fields of each group behind it."""
    for field in fields_of(cls, prefix, instance):
        yield field
        if field.part is not None:
            name = field.name.removeprefix(prefix)
            given = getattr(instance, name) if instance is not None else _default_of(cls, name)
            yield from all_fields(field.part, f"{field.name}.", given if dataclasses.is_dataclass(given) else None)


def summary(cls: type) -> str:
    """First paragraph of a dataclass's docstring."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def example(cls: type) -> list[str]:
    """Lines below `Example:` in a dataclass's docstring."""
    _, _, rest = (cls.__doc__ or "").partition("Example:\n")
    return [line.strip() for line in rest.splitlines() if line.strip()]


def _docstrings(cls: type) -> dict[str, str]:
    """The strings below the fields, inherited ones too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            parsed = parse_from_object(base).params
            found |= {param.arg_name: " ".join((param.description or "").split()) for param in parsed}
    return found


def _part(hint: Any) -> type | None:
    """The dataclass that a field holds, also where it may be null."""
    options = [option for option in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(option)]
    return options[0] if options and isinstance(options[0], type) else None


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _default_of(cls: type, name: str) -> Any:
    return next(_default(field) for field in dataclasses.fields(cls) if field.name == name)


def _kind(hint: Any) -> str:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if option is type(None) else _kind(option) for option in arguments)
    if origin in (list, tuple):
        return f"[{_kind(arguments[0])}, ...]"
    if origin is dict:
        return f"{{{_kind(arguments[0])}: {_kind(arguments[1])}}}"
    names = {str: "text", bool: "true|false", Path: "path"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _shown(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        value = list(value)
    # Two lines for a plain value: it ends with "...".
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
