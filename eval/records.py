"""Records of measurements as a report reads them: found in files and folders, each with a name of its own."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """A record that a command of `eval` wrote.

    Attributes:
        file: its JSON.
        name: of the model, and of the pictures it was shown if they were not its own.
        content: of the file, see `eval.record.record`.
    """

    file: Path
    name: str
    content: dict[str, Any]

    @property
    def benchmark(self) -> str:
        """Which command wrote it."""
        return self.content["benchmark"]

    @property
    def result(self) -> dict[str, Any]:
        """Its numbers."""
        return self.content["result"]

    @property
    def settings(self) -> dict[str, Any]:
        """What the command was given."""
        return self.content["settings"]

    @property
    def pictures(self) -> str:
        """What was shown: "own" but for the controls of eval.run."""
        return self.settings.get("pictures", "own")

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of an eval.run's samples.jsonl, by task.

        Raises:
            FileNotFoundError: it is not beside the record.
        """
        lines: dict[str, list[dict[str, Any]]] = {}
        with (self.file.parent / "samples.jsonl").open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                lines.setdefault(line["task"], []).append(line)
        return lines


def read_records(paths: Sequence[Path]) -> list[Found]:
    """The records of these files, and of all JSON files in these folders.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: there is no record, or a file that was named is none.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "benchmark" in content:
                found.append((file, content))
            elif file == path:
                raise ValueError(f"{file} is no record; name the JSON that a command of eval wrote")
    if not found:
        raise ValueError(f"no record in {', '.join(map(str, paths))}; name the JSON that a command of eval wrote")
    names = [_name(content) for _, content in found]
    labels = [f"{content['benchmark']} {name}" for (_, content), name in zip(found, names, strict=True)]
    return [
        # Two runs of one model are told by where they lie.
        Found(file, f"{name} ({file.parent})" if labels.count(label) > 1 else name, content)
        for (file, content), name, label in zip(found, names, labels, strict=True)
    ]


def of_benchmark(records: Iterable[Found], benchmark: str) -> list[Found]:
    """Those that one command wrote."""
    return [record for record in records if record.benchmark == benchmark]


def _name(content: dict[str, Any]) -> str:
    path = Path(content["model"]["path"])
    name = content["model"].get("name") or (path.parent.name if path.name == "model" else path.name) or str(path)
    pictures = content["settings"].get("pictures", "own")
    return name if pictures == "own" else f"{name}, {pictures} pictures"
