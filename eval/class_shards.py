"""CLIP_benchmark's WebDataset folders, as https://huggingface.co/clip-benchmark publishes them."""

from pathlib import Path
from typing import Any

import numpy as np

from eval.labelled import SUFFIXES, decoded
from vision_moe.data.archive import Member, index
from vision_moe.data.readable import files_fingerprint


class ClassShards:
    """A data set as CLIP_benchmark's WebDataset folders hold it.

    `classnames.txt` with a class a line, `zeroshot_classification_templates.txt` with a template a line and "{c}" for
    the class, and `{split}/*.tar` of KEY.webp (or another picture) + KEY.cls, the class's line counted from 0.

    Args:
        folder: the folder.
        split: "test" or "train".

    Raises:
        FileNotFoundError: one of these is missing, or there are fewer shards than nshards.txt says.
        ValueError: a shard is damaged, a sample has no picture or no label, a label is no class, or a line of the text
            files is empty.
    """

    def __init__(self, folder: Path, split: str = "test") -> None:
        self.classes = _lines(folder / "classnames.txt")
        self.templates = tuple(
            line.replace("{c}", "{}") for line in _lines(folder / "zeroshot_classification_templates.txt")
        )
        self._shards = sorted((folder / split).glob("*.tar"), key=lambda path: (len(path.name), path.name))
        expected = folder / split / "nshards.txt"
        if not self._shards or (expected.is_file() and int(expected.read_text()) != len(self._shards)):
            raise FileNotFoundError(
                f"{folder / split} has {len(self._shards)} *.tar files"
                + (f", but nshards.txt says {expected.read_text().strip()}" if expected.is_file() else "")
            )
        self._samples: list[tuple[int, str, Member]] = []
        labels = []
        for number, shard in enumerate(self._shards):
            samples, damage = index(shard)
            if damage is not None:
                raise ValueError(f"{shard} is damaged: {damage}")
            for key, members in samples.items():
                picture = next((members[suffix] for suffix in sorted(members) if suffix in SUFFIXES), None)
                if picture is None or ".cls" not in members:
                    raise ValueError(f"{shard}: {key} has {sorted(members)}; needs a picture and a .cls")
                self._samples.append((number, key, picture))
                labels.append(_label(_read(shard, members[".cls"]), len(self.classes), f"{shard}: {key}.cls"))
        self.labels_N = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, key, picture = self._samples[index]
        shard = self._shards[number]
        return {"image": decoded(_read(shard, picture), f"{shard}: {key}")}

    def name(self, index: int) -> str:
        """Shard and key."""
        number, key, _ = self._samples[index]
        return f"{self._shards[number].name}/{key}"

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times of the shards."""
        return files_fingerprint(self._shards)


def _read(shard: Path, member: Member) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _label(encoded: bytes, num_classes: int, where: str) -> int:
    text = encoded.decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise ValueError(f"{where} must hold a class in [0, {num_classes}), but holds {text[:20]!r}")
    return int(text)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    if not all(lines):
        # Leaving it out would give every later class another number.
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty")
    return lines
