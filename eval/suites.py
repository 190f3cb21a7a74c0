"""Suites: lists of tasks in YAML files, those of `eval/suites` by name."""

from dataclasses import dataclass
from pathlib import Path

from vision_moe.config import parse

FOLDER = Path(__file__).resolve().parent / "suites"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are run together."""

    tasks: list[str]
    """lmms-eval's names."""
    limit: int | None = None
    """The first so many questions of each task."""
    max_new_tokens: int | None = None
    """Cap on what the tasks ask for."""


def read_suite(name: str) -> Suite:
    """The suite of a name, or of a file.

    Raises:
        FileNotFoundError: it is neither.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    file = FOLDER / f"{name}.yaml" if name in names else Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"no suite {name!r}: give {', '.join(names)} or a YAML file with tasks")
    return parse(Suite, [str(file)])
