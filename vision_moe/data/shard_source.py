"""WebDataset shards in a folder, or by path, at random access."""

import logging
import re
from pathlib import Path
from typing import Any

from vision_moe.data.archive import DamagedShardError, Member, index
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.samples import PICTURES, metadata_of
from vision_moe.data.urls import expand, is_remote

logger = logging.getLogger(__name__)

# img2dataset numbers its shards and names no split.
_NUMBERED = re.compile(r"\d+\.tar")


class ShardSource:
    """WebDataset shards of KEY.jpg with KEY.json, KEY.txt or both, indexed once and read by offset.

    Args:
        shards: the tar files.
        skip_damaged: keep what lies before the damage in a damaged shard.

    Attributes:
        damaged: what is wrong with each damaged shard, by name.

    Raises:
        DamagedShardError: a shard is damaged.
        ValueError: a shard repeats a key.
    """

    def __init__(self, shards: list[Path], *, skip_damaged: bool = False) -> None:
        self.shards = shards
        self.damaged: dict[str, str] = {}
        self._samples: list[tuple[int, str, dict[str, Member]]] = []
        for number, shard in enumerate(shards):
            found, damage = index(shard)
            if damage is not None:
                self.damaged[str(shard)] = damage
                if not skip_damaged:
                    raise DamagedShardError(
                        f"{shard} is damaged or not a plain tar file: {damage} (after {len(found)} samples); "
                        'set damaged_shards to "skip" to go on without the rest of it'
                    )
                logger.warning("%s is damaged after %d samples, the rest is left out: %s", shard, len(found), damage)
            self._samples += [(number, key, members) for key, members in found.items()]

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, position: int) -> str:
        number, key, _ = self._samples[position]
        return f"{self.shards[number].name}/{key}"

    def picture(self, position: int) -> bytes:
        picture = next((found for suffix in PICTURES if (found := self._part(position, suffix)) is not None), None)
        if picture is None:
            raise FileNotFoundError(f"{self.name(position)} has no picture ({', '.join(PICTURES)})")
        return picture

    def metadata(self, position: int) -> dict[str, Any]:
        return metadata_of(self._part(position, ".json"), self._part(position, ".txt"), self.name(position))

    def files(self) -> list[Path]:
        return self.shards

    def _part(self, position: int, suffix: str) -> bytes | None:
        number, _, members = self._samples[position]
        if suffix not in members:
            return None
        # Opened for each read: microseconds beside the milliseconds of decoding, and nothing to lose in a
        # fork.
        with self.shards[number].open("rb") as file:
            file.seek(members[suffix].offset)
            return file.read(members[suffix].size)


def find_shards(path: str, split: str) -> list[str]:
    """Places of the shards that a path stands for.

    Args:
        path: a folder of `{split}-*.tar`, or of img2dataset's numbered tar files, which have no split; or tar files, by
            path or URL, with ranges such as {00000..00123}; or a "pipe:" command with such ranges.
        split: first part of the names of a folder's shards.

    Raises:
        FileNotFoundError: a folder has no such shard, or a local one is missing.
    """
    folder = Path(path)
    if not is_remote(path) and folder.is_dir():
        tars = sorted(folder.glob("*.tar"))
        found = [tar for tar in tars if tar.name.startswith(f"{split}-")]
        if not found and all(_NUMBERED.fullmatch(tar.name) for tar in tars):
            found = tars
        if not found:
            names = [tar.name for tar in tars[:10]]
            raise FileNotFoundError(f"no {split}-*.tar in {folder}; tar files there: {names}")
        return [str(tar) for tar in found]
    places = expand(path)
    missing = [place for place in places if not is_remote(place) and not Path(place).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(places)} shards of {path} are missing: {missing[:10]}")
    return places


def has_splits(path: str, config: ReadConfig) -> bool:
    """Whether a split chooses among the data at a path; lists, files, numbered shards and patterns have but one."""
    if config.format == "hf":
        return True
    folder = Path(path)
    return folder.is_dir() and any(not _NUMBERED.fullmatch(tar.name) for tar in folder.glob("*.tar"))
