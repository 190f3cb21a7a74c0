"""Where pictures and captions lie: WebDataset shards, a JSON list beside a folder of pictures, or img2dataset's files.

A source gives random access by position, keeps no open files, and can be pickled: MCL draws its batches from
anywhere in the data, in worker processes.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any, Protocol

from vision_moe.data.archive import DamagedShardError, Member, index
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.samples import PICTURES, json_object, metadata_of
from vision_moe.data.urls import expand, is_remote

logger = logging.getLogger(__name__)

# img2dataset numbers its shards and names no split.
_NUMBERED = re.compile(r"\d+\.tar")


class Source(Protocol):
    """Pictures with their JSON, by position."""

    def __len__(self) -> int:
        """Number of pictures, unreadable ones included."""

    def name(self, position: int) -> str:
        """What to call the picture in messages."""

    def picture(self, position: int) -> bytes:
        """Encoded picture; an OSError if there is none."""

    def metadata(self, position: int) -> dict[str, Any]:
        """The JSON that belongs to the picture."""

    def files(self) -> list[Path]:
        """All files that the data are read from."""


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


class ListSource:
    """A .json list or .jsonl of objects that each name a picture: ShareGPT4V's form, or with captions.

    Args:
        path: the list.
        image_dir: folder that the picture names are relative to.

    Raises:
        ValueError: the file is not a list of objects with an "image".
    """

    def __init__(self, path: Path, image_dir: Path) -> None:
        self.path = path
        self.image_dir = image_dir
        self._rows = _rows(path)
        for number, row in enumerate(self._rows):
            if not isinstance(row.get("image"), str):
                raise ValueError(f'{path}: row {number} has no "image" file name; its keys are {sorted(row)}')

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, position: int) -> str:
        return str(self._rows[position]["image"])

    def picture(self, position: int) -> bytes:
        return (self.image_dir / self.name(position)).read_bytes()

    def metadata(self, position: int) -> dict[str, Any]:
        return self._rows[position]

    def files(self) -> list[Path]:
        return [self.path, *(self.image_dir / self.name(position) for position in range(len(self)))]


class FilesSource:
    """Pictures KEY.jpg in a folder and its subfolders, each with KEY.json, KEY.txt or both beside it.

    img2dataset writes this with `--output_format files`.

    Args:
        folder: holds the pictures, at any depth.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, position: int) -> str:
        return str(self._pictures[position].relative_to(self.folder))

    def picture(self, position: int) -> bytes:
        return self._pictures[position].read_bytes()

    def metadata(self, position: int) -> dict[str, Any]:
        picture = self._pictures[position]
        found = [_bytes_of(picture.with_suffix(suffix)) for suffix in (".json", ".txt")]
        return metadata_of(found[0], found[1], self.name(position))

    def files(self) -> list[Path]:
        return self._pictures


def open_source(path: Path | str, split: str, config: ReadConfig) -> Source:
    """The source that a path stands for.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: the path has none of the forms, or can only be streamed.
    """
    if config.format == "hf":
        from vision_moe.data.hf import open_hf

        return open_hf(str(path), split, config)
    if is_remote(str(path)):
        raise ValueError(f"{path} can only be streamed, but random access is needed: download it, and name its folder")
    form = _form(Path(path), split) if config.format == "auto" else config.format
    if form == "files":
        return FilesSource(Path(path))
    if form == "list":
        return ListSource(Path(path), Path(path).parent if config.image_dir is None else config.image_dir)
    shards = [Path(shard) for shard in find_shards(str(path), split)]
    return ShardSource(shards, skip_damaged=config.damaged_shards == "skip")


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


def _form(path: Path, split: str) -> str:
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return "list"
    if path.is_dir() and not any(path.glob("*.tar")):
        if any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
            return "files"
        if any(file.suffix in (".parquet", ".arrow") for file in path.rglob("*")):
            raise ValueError(f'{path} holds parquet or arrow files; read them with format "hf"')
    elif not path.is_dir() and path.suffix != ".tar":
        if path.exists():
            raise ValueError(f"data must be a folder of shards, a .json or a .jsonl list, but got {path}")
        raise FileNotFoundError(
            f'no data at {path}: give a folder of {split}-*.tar shards, a .json or .jsonl list, or set format to "hf"'
        )
    return "shards"


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), start=1)
        return [json_object(line, f"{path}:{number}") for number, line in lines if line.strip()]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a JSON list of objects; for one object a line, name it .jsonl")
    return rows


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
