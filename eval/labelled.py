"""Pictures of one class each: what zero-shot classification is measured on.

Shapes: N pictures, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision_moe.data.picture import decode
from vision_moe.data.readable import files_fingerprint

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


class LabelledPictures(Protocol):
    """Pictures with their class.

    Attributes:
        classes: names of the C classes.
        labels_N: int64[N], class of each picture.
    """

    classes: list[str]
    labels_N: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Changes when a picture's file does."""
        ...

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """A mapping with the PIL picture, RGB, under "image"."""
        ...

    def name(self, index: int) -> str:
        """What to call a picture; the same on every machine."""
        ...


class LabelledFiles:
    """Pictures in files: one list of files a class.

    Args:
        root: folder of all of them.
        classes: names of the C classes.
        files: each class's pictures.
        border: pixels to cut off on every side.

    Raises:
        ValueError: if there are fewer than two classes, or one has no picture.
    """

    def __init__(self, root: Path, classes: Sequence[str], files: Sequence[Sequence[Path]], border: int = 0) -> None:
        empty = [name for name, of in zip(classes, files, strict=True) if not of]
        if empty or len(classes) < 2:
            raise ValueError(f"{root} needs at least two class folders, each with pictures; empty: {empty[:5]}")
        self.classes = list(classes)
        self.labels_N = np.repeat(np.arange(len(classes)), [len(of) for of in files])
        self._root = root
        self._files = [file for of in files for file in of]
        self._border = border

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = decoded(self._files[index].read_bytes(), self._files[index])
        border = self._border
        return {"image": image.crop((border, border, image.width - border, image.height - border))}

    def name(self, index: int) -> str:
        """The file below the root."""
        return self._files[index].relative_to(self._root).as_posix()

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times of all files."""
        return f"{files_fingerprint(self._files)}-{self._border}"


def class_folders(folder: Path) -> LabelledFiles:
    """Pictures in folders named after their class ("_" stands for a space), in the order of the names."""
    folders = subfolders(folder)
    return LabelledFiles(folder, [path.name.replace("_", " ") for path in folders], [pictures(p) for p in folders])


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def decoded(encoded: bytes, where: object) -> Image.Image:
    """The picture, RGB.

    Raises:
        OSError: it cannot be read; the message says where it lies.
    """
    try:
        return decode(encoded)
    except OSError as error:
        # Skipping it would give a number over other pictures than the benchmark's.
        raise OSError(f"{where} cannot be read ({error}); mend or replace it") from error
