"""The pass before training that reads every picture and caption once and reports those that cannot be read."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vision_moe.data.caption_fields import captions_of
from vision_moe.data.picture import decode
from vision_moe.data.read_config import ReadConfig, all_fields
from vision_moe.data.sources import Source
from vision_moe.distributed import is_main, main_first
from vision_moe.files import write_json

logger = logging.getLogger(__name__)

# Below this many pictures, starting worker processes takes longer than decoding.
_WORTH_WORKERS = 1000
_NAMES_LOGGED = 20


def find_unreadable(source: Source, config: ReadConfig, *, check_cache: Path | None = None) -> dict[int, str]:
    """Position and reason of every picture that cannot be decoded or has no caption.

    Args:
        source: where the pictures lie.
        config: key of the captions, and the largest picture.
        check_cache: JSON file to keep the answer in, reused while no file changes name, size or time.
    """
    # Without a cache the other ranks have nothing to wait for.
    with nullcontext() if check_cache is None else main_first():
        key = f"{files_fingerprint(source.files())}-{all_fields(config)}-{config.max_pixels}"
        if check_cache is not None and check_cache.is_file():
            kept = json.loads(check_cache.read_text(encoding="utf-8"))
            if kept["fingerprint"] == key:
                return dict(kept["unreadable"])
        found = _read_all(source, config)
        if check_cache is not None and is_main():
            write_json(check_cache, {"fingerprint": key, "unreadable": sorted(found.items())})
        return found


def check_share(source: Source, unreadable: dict[int, str], max_share: float, check_cache: Path | None) -> None:
    """Reports unreadable pictures by name.

    Raises:
        ValueError: they are more than `max_share` of all.
    """
    if not unreadable:
        return
    named = [f"{source.name(position)} ({reason})" for position, reason in sorted(unreadable.items())]
    more = len(named) - _NAMES_LOGGED
    listing = "; ".join(named[:_NAMES_LOGGED]) + (f"; and {more} more" if more > 0 else "")
    share = len(unreadable) / len(source)
    message = f"{len(unreadable)} of {len(source)} pictures ({share:.2%}) cannot be read: {listing}"
    if check_cache is not None:
        message += f" (all in {check_cache})"
    if share > max_share:
        raise ValueError(f"{message}. At most {max_share:.2%} may be: mend the data or raise max_unreadable_share")
    logger.warning("skipped: %s", message)


def files_fingerprint(files: Iterable[Path]) -> str:
    """Hash of names, sizes and modification times; a missing file counts as such."""
    digest = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


def in_parallel(items: Dataset[Any], total: int, *, workers: int | None = None) -> Iterator[list[Any]]:
    """Lists of a data set's items, read by worker processes where there are many, behind a progress bar.

    Args:
        items: by position, or as a stream.
        total: number of items, for the bar and to judge whether workers are worth their start; 0 if unknown.
        workers: processes; None takes one a core for many items.
    """
    if workers is None:
        workers = (os.cpu_count() or 1) if total >= _WORTH_WORKERS else 0
    loader = DataLoader(items, batch_size=64, num_workers=workers, collate_fn=list)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=total or None, desc="checking pictures", disable=None if is_main() else True) as bar:
        for found in loader:
            yield found
            bar.update(len(found))


class _Verdicts(Dataset[tuple[int, str | None]]):
    """Item i says why picture i or its captions cannot be read, or None."""

    def __init__(self, source: Source, config: ReadConfig) -> None:
        self.source = source
        self.config = config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[int, str | None]:
        try:
            decode(self.source.picture(position), self.config.max_pixels)
            captions_of(self.source.metadata(position), all_fields(self.config), self.source.name(position))
        except (OSError, ValueError) as error:
            return position, str(error)
        return position, None


def _read_all(source: Source, config: ReadConfig) -> dict[int, str]:
    found: dict[int, str] = {}
    for verdicts in in_parallel(_Verdicts(source, config), len(source)):
        found |= {position: reason for position, reason in verdicts if reason is not None}
    return found
