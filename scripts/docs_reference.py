"""Hooks of mkdocs: what commands say on --help and the fields of the recipes become pages when the site is built."""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("vision_moe", "mllm", "eval", "demo")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in what is generated, and turns links that leave the pages, which only a checkout has, into plain names."""
    generated = {"<!-- generated: commands -->": commands_page, "<!-- generated: recipes -->": recipes_page}
    for mark, write in generated.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return re.sub(r"\[([^]]+)\]\(\.\./((?:vision_moe|mllm|eval|demo|scripts)/[^)]*)\)", r"\1 (`\2`)", markdown)


def commands_page() -> str:
    """The help of every command of the project."""
    parts = []
    for module in commands():
        name = module.removesuffix(".__main__")
        parts.append(f"## {name}\n\n```text\n{help_of(module).rstrip()}\n```\n")
    return "\n".join(parts)


def commands() -> list[str]:
    """Modules that are commands, in the order of their packages."""
    files = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]
    found = [path for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in found]


def help_of(module: str) -> str:
    """What a command prints on --help."""
    sys.path.insert(0, str(CHECKOUT))
    said, argv = io.StringIO(), sys.argv
    columns = os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = [f"python -m {module.removesuffix('.__main__')}", "--help"], "120"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(module).main()
    finally:
        sys.argv = argv
        sys.path.remove(str(CHECKOUT))
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return said.getvalue()


def recipes_page() -> str:
    """The fields of both kinds of recipes."""
    from mllm.recipe import LlavaConfig
    from vision_moe.recipe import TrainConfig

    parts = []
    for title, cls in (
        ("Encoder: `vision_moe.train`", TrainConfig),
        ("LLaVA: `mllm.train`", LlavaConfig),
    ):
        parts += [f"## {title}", "", *_tables(cls), ""]
    return "\n".join(parts)


def _tables(cls: type) -> list[str]:
    from vision_moe.fields import all_fields

    fields = list(all_fields(cls))
    single = [field for field in fields if field.part is None and "." not in field.name]
    lines = _table(single)
    for group in (field for field in fields if field.part is not None):
        own = [field for field in fields if field.name.rpartition(".")[0] == group.name and field.part is None]
        lines += ["", f"### `{group.name}`", "", group.text, "", *_table(own)]
    return lines


def _table(fields: list[Any]) -> list[str]:
    lines = ["| field | | default | |", "| --- | --- | --- | --- |"]
    for field in fields:
        default = "required" if field.default is None else f"`{field.default}`"
        kind = field.kind.replace("|", "\\|")
        text = field.text.replace("|", "\\|")
        lines.append(f"| `{field.name}` | {kind} | {default} | {text} |")
    return lines
