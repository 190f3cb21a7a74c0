"""Folders of a run that survive a kill: finished models appear at once, interrupted stages go on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete Trainer checkpoint of `folder`, if any.

    The Trainer writes `trainer_state.json` last, so a checkpoint without it, or with half of it, was cut short by a
    kill and is passed over.
    """
    found = [(int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    for _, path in sorted(found, reverse=True):
        if _is_json(path / "trainer_state.json"):
            return str(path)
    return None


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary folder beside `folder` and renames it, replacing what was there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
