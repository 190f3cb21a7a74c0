"""Where pictures and captions lie: WebDataset shards, a JSON list beside a folder of pictures, or img2dataset's files.

A source gives random access by position, keeps no open files, and can be pickled: MCL draws its batches from
anywhere in the data, in worker processes.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from vision_moe.data.read_config import ReadConfig
from vision_moe.data.samples import PICTURES, json_object, metadata_of
from vision_moe.data.shard_source import ShardSource, find_shards
from vision_moe.data.urls import is_remote


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
