"""Folders of a run that survive a kill: finished models appear at once, interrupted stages go on."""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vision_moe.distributed import barrier, from_main, gather_objects, is_main, rank, world_size
from vision_moe.files import write_json

logger = logging.getLogger(__name__)

_MANIFEST = "complete.json"
_SET_ASIDE = "damaged-"
_READ_BYTES = 1 << 20


class CheckpointMarker(TrainerCallback):
    """Ends each checkpoint with a list of its files, sizes and checksums, once every rank has written its share.

    A kill before that leaves the checkpoint without the list, and `last_checkpoint` passes it over. Stands behind every
    callback that writes into checkpoints. The ranks must share a file system, as the Trainer's checkpoints want it.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = from_main([name for name in found if name != _MANIFEST])
        # The ranks share the reading: under DeepSpeed each has written a large file.
        own = {name: _contents(folder / name) for name in names[rank() :: world_size()]}
        parts = gather_objects(own)
        if is_main():
            listed = {name: contents for part in parts for name, contents in part.items()}
            write_json(folder / _MANIFEST, {"step": state.global_step, "files": listed})


def last_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint below `folder` whose files all are as `CheckpointMarker` saw them, if any.

    Newer ones that are unfinished or damaged are named in a warning and renamed to `damaged-*`, out of the way of those
    to come; what was set aside so before is deleted. Rank 0 decides for all ranks, which must call this together.
    """
    return from_main(_newest_whole(folder) if is_main() else None)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary folder beside `folder` and renames it, replacing what was there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _newest_whole(folder: Path) -> str | None:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    chosen, problems = None, {}
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        problem = _problem(path)
        if problem is None:
            chosen = path
            break
        problems[path] = problem
    if problems:
        logger.warning(
            "cannot go on from %s in %s, kept as %s*: %s",
            ", ".join(f"{path.name} ({problem})" for path, problem in problems.items()),
            folder,
            _SET_ASIDE,
            f"going back to {chosen.name}" if chosen else "no checkpoint is left, the training begins anew",
        )
        _set_aside(folder, list(problems))
    return str(chosen) if chosen else None


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    manifest = checkpoint / _MANIFEST
    if not manifest.is_file():
        return "not written to its end"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is unreadable"
    # Sizes first: they cost nothing, and a full disk shows in them.
    for name, contents in files.items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if size != contents["bytes"]:
            now = "is missing" if size is None else f"has {size} bytes"
            return f"{name} {now}, {contents['bytes']} were written"
    damaged = [name for name, contents in files.items() if _contents(checkpoint / name) != contents]
    return f"{', '.join(damaged)}: not the bytes that were written" if damaged else None


def _contents(path: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def _set_aside(folder: Path, checkpoints: list[Path]) -> None:
    """Renames checkpoints: the Trainer counts them by their names when it deletes the oldest."""
    for old in folder.glob(f"{_SET_ASIDE}*"):
        shutil.rmtree(old)
    for path in checkpoints:
        path.rename(path.with_name(_SET_ASIDE + path.name))
