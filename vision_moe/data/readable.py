"""The pass before training that reads every picture and caption once and reports those that cannot be read."""

import hashlib
import io
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vision_moe.data.sources import Source, captions_of
from vision_moe.distributed import is_main, main_first
from vision_moe.files import write_json

logger = logging.getLogger(__name__)

# Below this many pictures, starting worker processes takes longer than decoding.
_WORTH_WORKERS = 1000
_NAMES_LOGGED = 20


def decode(encoded: bytes) -> Image.Image:
    """Decodes a picture fully, to RGB.

    Raises:
        OSError: the bytes are no picture, or only part of one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise these beside OSError for damaged files.
        raise OSError(f"{type(error).__name__}: {error}") from error


def find_unreadable(source: Source, caption_field: str, *, check_cache: Path | None = None) -> dict[int, str]:
    """Position and reason of every picture that cannot be decoded or has no caption.

    Args:
        source: where the pictures lie.
        caption_field: key of the captions.
        check_cache: JSON file to keep the answer in, reused while no file changes name, size or time.
    """
    # Without a cache the other ranks have nothing to wait for.
    with nullcontext() if check_cache is None else main_first():
        key = f"{files_fingerprint(source)}-{caption_field}"
        if check_cache is not None and check_cache.is_file():
            kept = json.loads(check_cache.read_text(encoding="utf-8"))
            if kept["fingerprint"] == key:
                return dict(kept["unreadable"])
        found = _read_all(source, caption_field)
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


def files_fingerprint(source: Source) -> str:
    """Hash of names, sizes and modification times of all files of a source; a missing file counts as such."""
    digest = hashlib.sha256()
    for path in source.files():
        try:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


class _Verdicts(Dataset[tuple[int, str | None]]):
    """Item i says why picture i or its captions cannot be read, or None."""

    def __init__(self, source: Source, caption_field: str) -> None:
        self.source = source
        self.caption_field = caption_field

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[int, str | None]:
        try:
            decode(self.source.picture(position))
            captions_of(self.source.metadata(position), self.caption_field, self.source.name(position))
        except (OSError, ValueError) as error:
            return position, str(error)
        return position, None


def _read_all(source: Source, caption_field: str) -> dict[int, str]:
    workers = (os.cpu_count() or 1) if len(source) >= _WORTH_WORKERS else 0
    loader = DataLoader(_Verdicts(source, caption_field), batch_size=64, num_workers=workers, collate_fn=list)
    found = {}
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=len(source), desc="checking pictures", disable=None if is_main() else True) as bar:
        for verdicts in loader:
            found.update({position: reason for position, reason in verdicts if reason is not None})
            bar.update(len(verdicts))
    return found
