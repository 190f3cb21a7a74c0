"""Where each sample of a LLaVA file lies, so that a sample is parsed when it is asked for and none is kept.

LLaVA's mix665k is one JSON list of a gigabyte, which Python objects make several of in every loader process. Here a
process keeps 22 bytes a sample, and forked loader processes share them.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from vision_moe.distributed import is_main, main_first
from vision_moe.files import replacing

# Characters read from the file at one time.
_WINDOW = 1 << 20
# An object that does not end within so many characters is taken for broken JSON, not for a sample.
_LONGEST = 64 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# Part of a kept index's fingerprint; raise it when the arrays change.
_FORMAT = 1


class _Place(NamedTuple):
    """One sample: where its JSON lies in the file, in bytes, and what it holds."""

    offset: int
    size: int
    num_words: int
    num_images: int


class SampleIndex:
    """The samples of a LLaVA file by number.

    Args:
        path: a JSON list, or JSON lines if it ends in .jsonl.
        cache: file to keep the index in, used again while the data keeps its path, size and time; rank 0 writes it
            and all ranks must come here. None builds the index anew.

    Attributes:
        num_words: int32[N], words of each sample's turns.
        num_images: int16[N], pictures of each sample.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no such list, or a sample is no object with "conversations".
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        with nullcontext() if cache is None else main_first():
            arrays = None if cache is None else _read_cache(cache, path)
            if arrays is None:
                arrays = _build(path)
                if cache is not None and is_main():
                    _write_cache(cache, path, arrays)
        self._offsets: NDArray[np.int64] = arrays["offsets"]
        self._sizes: NDArray[np.int64] = arrays["sizes"]
        self.num_words: NDArray[np.int32] = arrays["num_words"]
        self.num_images: NDArray[np.int16] = arrays["num_images"]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The sample as it stands in the file.

        Raises:
            ValueError: the file is no longer the one that was indexed.
        """
        # Opened for each read: microseconds beside what a picture takes, and nothing that a fork could share.
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            content = file.read(int(self._sizes[number]))
        try:
            sample = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{self.path} has changed since it was indexed; start again ({error})") from error
        return dict(sample)


def image_names(sample: Mapping[str, Any]) -> list[str]:
    """Names of a sample's pictures, from "image" (a name, as in LLaVA, or a list) or "images" (a list).

    Raises:
        ValueError: they are neither, or both fields are there.
    """
    image, images = sample.get("image"), sample.get("images")
    if image and images:
        raise ValueError('it has both "image" and "images"; keep one of them')
    names = [image] if isinstance(image, str) and image else (image or images or [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" must be a file name and "images" a list of them, but got {names!r:.80}')
    return names


def _build(path: Path) -> dict[str, NDArray[Any]]:
    places: list[NDArray[np.int64]] = []
    # Rows go into arrays block by block: a tuple of Python numbers takes ten times an array's row.
    block: list[_Place] = []
    with tqdm(
        total=path.stat().st_size, desc=f"indexing {path.name}", unit="B", unit_scale=True, disable=_quiet()
    ) as bar:
        for place in _places(path):
            block.append(place)
            if len(block) == 10_000:
                places.append(np.array(block, dtype=np.int64))
                bar.update(place.offset + place.size - bar.n)
                block = []
    places.append(np.array(block, dtype=np.int64).reshape(-1, len(_Place._fields)))
    table = np.concatenate(places)
    if not len(table):
        raise ValueError(f"{path} must hold a list of at least one sample, but it is empty")
    columns = dict(zip(("offsets", "sizes", "num_words", "num_images"), table.T, strict=True))
    types = {"offsets": np.int64, "sizes": np.int64, "num_words": np.int32, "num_images": np.int16}
    return {name: np.ascontiguousarray(columns[name], dtype=kind) for name, kind in types.items()}


def _places(path: Path) -> Iterator[_Place]:
    rows = _json_lines(path) if path.suffix == ".jsonl" else _json_list(path)
    for number, (offset, size, sample) in enumerate(rows):
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise ValueError(f'sample {number} of {path} must be an object with a list "conversations"')
        try:
            num_images = len(image_names(sample))
        except ValueError as error:
            raise ValueError(f"sample {number} of {path}: {error}") from error
        values = (turn.get("value") for turn in sample["conversations"] if isinstance(turn, dict))
        num_words = sum(len(value.split()) for value in values if isinstance(value, str))
        yield _Place(offset, size, num_words, num_images)


def _json_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield offset, len(line), json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path} is no JSON in line {number}: {error}") from error
            offset += len(line)


def _json_list(path: Path) -> Iterator[tuple[int, int, Any]]:
    # newline="": a line end keeps its number of bytes.
    with path.open(encoding="utf-8", newline="") as file:
        window = _Window(file)
        if window.peek() != "[":
            raise ValueError(
                f"{path} must hold a list of samples, but it begins with {window.peek()!r}; for one sample a line, "
                f"name it .jsonl"
            )
        window.skip()
        if window.peek() == "]":
            return
        for number in itertools.count():
            try:
                yield window.value()
            except ValueError as error:
                raise ValueError(f"{path} is no JSON in sample {number}: {error}") from error
            if window.peek() == "]":
                return
            if window.peek() != ",":
                raise ValueError(f"{path} is no JSON behind sample {number}: got {window.peek()!r}, not a comma")
            window.skip()


class _Window:
    """A stretch of a text file that slides forward over JSON values and knows at which byte it stands."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.position = 0
        self.offset = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self._advance(match.end())
            if self.position < len(self.text) or not self._read_on():
                return self.text[self.position : self.position + 1]

    def skip(self) -> None:
        """Goes on by one character."""
        self._advance(self.position + 1)

    def value(self) -> tuple[int, int, Any]:
        """The object that comes next: its first byte, its size in bytes, and itself."""
        if self.peek() != "{":
            raise ValueError(f"expected an object, but got {self.peek()!r}")
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Either the window ends within the object, or the object is broken: more text tells.
                if len(self.text) - self.position > _LONGEST or not self._read_on():
                    raise ValueError(f"{error.msg} (it begins at byte {self.offset})") from error
                continue
            offset = self.offset
            self._advance(end)
            return offset, self.offset - offset, value

    def _read_on(self) -> bool:
        rest = self.text[self.position :]
        more = self.file.read(max(_WINDOW, len(rest)))
        self.text, self.position = rest + more, 0
        return bool(more)

    def _advance(self, position: int) -> None:
        self.offset += len(self.text[self.position : position].encode("utf-8"))
        self.position = position


def _fingerprint(path: Path) -> dict[str, str]:
    stat = path.stat()
    return {"source": f"{_FORMAT} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"}


def _read_cache(cache: Path, path: Path) -> dict[str, NDArray[Any]] | None:
    if not cache.is_file():
        return None
    with safe_open(cache, framework="np") as file:
        if file.metadata() != _fingerprint(path):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write_cache(cache: Path, path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with replacing(cache) as temporary:
        save_file(arrays, temporary, metadata=_fingerprint(path))


def _quiet() -> bool | None:
    # None: no bar where stderr is not a terminal.
    return None if is_main() else True
