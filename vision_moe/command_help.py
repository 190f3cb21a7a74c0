"""What a command says about itself: `--help` on one screen, and the nearest name to one that does not exist."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from vision_moe.fields import Field, all_fields, example, fields_of, summary

_WIDTH = 118
_NAMES = 30
_DEFAULTS = 40


def program() -> str:
    """How the running command was started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def screen(cls: type, smoke: bool) -> str:
    """Help of a command whose configuration is `cls`: a line a field, groups as one line.

    Args:
        cls: dataclass; below `Example:` its docstring has a command.
        smoke: whether the command takes --smoke.
    """
    usage = f"{program()} [RECIPE.yaml ...] [--FIELD VALUE ...]{' [--smoke]' if smoke else ''}"
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary(cls), _WIDTH), "", *_examples(example(cls))]
    lines += ["fields, in recipes by the same names (* is required):"]
    lines += [_line(field) for field in fields_of(cls)]
    lines += ["", "--help FIELD or GROUP tells all about it, --help all about everything" + _smoke(smoke)]
    return "\n".join(lines) + "\n"


def details(cls: type, name: str) -> str | None:
    """Everything about a field, about a group, or about "all"; None where there is no such name."""
    name = name.lstrip("-").removesuffix(".*").replace("-", "_")
    chosen = [field for field in all_fields(cls) if name == "all" or f"{field.name}.".startswith(f"{name}.")]
    return "\n".join(line for field in chosen for line in _paragraph(field)) + "\n" if chosen else None


def nearest(message: str, names: Iterable[str]) -> list[str]:
    """What the names that an error message complains about may have meant, at most three for each.

    Args:
        message: of argparse or jsonargparse.
        names: all options, with their hyphens.
    """
    options = [name for name in names if name.startswith("--")]
    found: list[str] = []
    for wrong in _unknown(message):
        same_leaf = [name for name in options if _leaf(name) == _leaf(wrong)]
        found += same_leaf[:3] or difflib.get_close_matches(wrong, options, n=1, cutoff=0.6)
    choices = re.search(r"(?:Got value: |invalid choice: )'?([^\s']+)", message)
    if choices:
        allowed = re.findall(r"[\w./-]+", " ".join(re.findall(r"Literal\[[^]]*\]|choose from .*", message)))
        found += difflib.get_close_matches(choices[1], allowed, n=1, cutoff=0.6)
    return found


def complain(message: str, names: Iterable[str]) -> NoReturn:
    """Ends the command with an error, the nearest names, and where all of them stand."""
    close = nearest(message, names)
    hint = f"\ndid you mean {' or '.join(close)}?" if close else ""
    sys.stderr.write(f"error: {message}{hint}\n{program()} --help shows what there is\n")
    raise SystemExit(2)


class CommandParser(argparse.ArgumentParser):
    """argparse for commands without recipes: an example in the help, and the nearest name to an unknown one.

    Args:
        about: the module's docstring, of which the first paragraph is shown.
        example: a command that works.
    """

    def __init__(self, about: str | None, example: str) -> None:
        super().__init__(
            prog=program(),
            usage=f"{program()} [OPTION VALUE ...]",
            description=" ".join((about or "").split("\n\n")[0].split()),
            epilog=f"example:\n  {example}",
            formatter_class=_Formatter,
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and what was perhaps meant."""
        complain(message, self._option_string_actions)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        needed = " (required)" if action.required and action.option_strings else ""
        return f"{action.help or ''}{needed}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # The example stays as it is, the description is wrapped.
        return text if text.startswith("example:") else textwrap.fill(text, width)


def _unknown(message: str) -> list[str]:
    """The option names that a message does not know, with hyphens and underscores as ours."""
    if "unrecognized arguments: " in message:
        words = message.partition("unrecognized arguments: ")[2].split()
        return [word.partition("=")[0] for word in words if word.startswith("--")]
    if grouped := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return [f"--{grouped[1]}.{grouped[2]}"]
    group = re.match(r'Parser key "([\w.]+)"', message)
    return [f"--{group[1] + '.' if group else ''}{name}" for name in re.findall(r"Option '([\w.]+)' is not", message)]


def _leaf(option: str) -> str:
    return option.lstrip("-").rsplit(".", 1)[-1].replace("-", "_")


def _examples(commands: list[str]) -> list[str]:
    return ["example:", *(f"  {line}" for line in commands), ""] if commands else []


def _smoke(smoke: bool) -> str:
    return "; --smoke: a tiny form of the run" if smoke else ""


def _line(field: Field) -> str:
    name = f"  --{field.name}{'.*' if field.part else ''}{' *' if field.default is None else ''}"
    default = f" ({textwrap.shorten(field.default, _DEFAULTS, placeholder=' ...')})" if field.default else ""
    room = _WIDTH - max(_NAMES, len(name) + 2) - len(default)
    return f"{name:<{_NAMES - 2}}  {textwrap.shorten(field.text, max(room, 20), placeholder=' ...')}{default}"


def _paragraph(field: Field) -> list[str]:
    if field.part:
        head = f"--{field.name}.*"
    else:
        head = f"--{field.name}  {field.kind}, {'required' if field.default is None else 'default ' + field.default}"
    return [head, *textwrap.wrap(field.text, _WIDTH, initial_indent="    ", subsequent_indent="    ")]
