"""Where pictures and captions lie: WebDataset shards, or a JSON list beside a folder of pictures.

A source gives random access by position, keeps no open files, and can be pickled: MCL draws its batches from
anywhere in the data, in worker processes.
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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


@dataclass(frozen=True)
class Member:
    """Bytes of one file inside a shard."""

    offset: int
    size: int


class ShardSource:
    """WebDataset shards of KEY.jpg + KEY.json, indexed once and read by offset.

    Args:
        folder: holds `{split}-*.tar`.
        split: first part of the shards' names.

    Raises:
        FileNotFoundError: the folder has no such shard.
        ValueError: a shard is damaged, repeats a key, or has a picture without JSON.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.shards = sorted(folder.glob(f"{split}-*.tar"))
        if not self.shards:
            found = sorted(path.name for path in folder.glob("*.tar"))
            raise FileNotFoundError(f"no {split}-*.tar in {folder}; tar files there: {found[:10]}")
        self._samples: list[tuple[int, str, Member | None, Member]] = []
        for number, shard in enumerate(self.shards):
            for key, members in index_shard(shard).items():
                if ".json" not in members:
                    raise ValueError(f"{shard}: {key} has {sorted(members)} but no .json with its captions")
                picture = next((members[suffix] for suffix in _PICTURES if suffix in members), None)
                self._samples.append((number, key, picture, members[".json"]))

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, position: int) -> str:
        number, key, _, _ = self._samples[position]
        return f"{self.shards[number].name}/{key}"

    def picture(self, position: int) -> bytes:
        number, key, picture, _ = self._samples[position]
        if picture is None:
            raise FileNotFoundError(f"{self.shards[number]}: {key} has no picture ({', '.join(_PICTURES)})")
        return self._read(number, picture)

    def metadata(self, position: int) -> dict[str, Any]:
        number, _, _, member = self._samples[position]
        return _object(self._read(number, member).decode("utf-8"), self.name(position))

    def files(self) -> list[Path]:
        return self.shards

    def _read(self, number: int, member: Member) -> bytes:
        # Opened for each read: microseconds beside the milliseconds of decoding, and nothing to lose in a
        # fork.
        with self.shards[number].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


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


def open_source(path: Path, split: str, image_dir: Path | None) -> Source:
    """The source that a path stands for.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: the path is neither a folder nor .json nor .jsonl.
    """
    if path.is_dir():
        return ShardSource(path, split)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: give a folder of {split}-*.tar shards, or a .json or .jsonl list")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"data must be a folder of shards, a .json or a .jsonl list, but got {path}")
    return ListSource(path, path.parent if image_dir is None else image_dir)


def captions_of(metadata: dict[str, Any], fields: str, name: str) -> list[str]:
    """Captions of one picture, each on one line.

    Args:
        metadata: the picture's JSON.
        fields: key of the captions, or several joined by "+", whose captions are pooled; "captions" also finds a
            "caption", and the second turn of ShareGPT4V's form.
        name: what to call the picture in messages.

    Raises:
        ValueError: a field has none, or they are not text.
    """
    return [line for field in fields.split("+") for line in _field(metadata, field, name)]


def _field(metadata: dict[str, Any], field: str, name: str) -> list[str]:
    found = metadata.get(field)
    if found is None and field == "captions":
        found = metadata.get("caption", _described(metadata))
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError(
            f"{name}: {field!r} must be a string or a list of strings, but got {found!r}; "
            f"its keys are {sorted(metadata)}"
        )
    lines = [" ".join(text.splitlines()).strip() for text in captions]
    if not all(lines):
        raise ValueError(f"{name}: {field!r} holds an empty caption")
    return lines


def _described(metadata: dict[str, Any]) -> str | None:
    """The caption of ShareGPT4V's form: what the assistant answers first."""
    turns = metadata.get("conversations")
    if isinstance(turns, list) and len(turns) > 1 and isinstance(turns[1], dict):
        return turns[1].get("value")
    return None


def index_shard(shard: Path) -> dict[str, dict[str, Member]]:
    """Files of a shard by key, which is the name up to the first dot, and suffix."""
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                members = found.setdefault(folder + slash + stem, {})
                if f".{suffix.lower()}" in members:
                    raise ValueError(f"{shard}: {member.name} is there twice")
                members[f".{suffix.lower()}"] = Member(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is damaged or not a plain tar file: {error}") from error
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), start=1)
        return [_object(line, f"{path}:{number}") for number, line in lines if line.strip()]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a JSON list of objects; for one object a line, name it .jsonl")
    return rows


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, but got {type(value).__name__}")
    return value
