"""Pictures with captions, of which one is drawn anew each epoch."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vision_moe.data.readable import check_share, decode, files_fingerprint, find_unreadable
from vision_moe.data.sources import Source, captions_of, open_source


class CaptionSample(TypedDict):
    """One picture with one of its captions."""

    image: Image.Image
    """RGB."""
    caption: str
    """The caption drawn."""
    index: int
    """Position in the data set."""


class CaptionDataset(Dataset[CaptionSample]):
    """Readable pictures of a source with their captions.

    `dataset[(i, epoch)]` gives the picture and one of its captions, drawn from (seed, epoch, i); `dataset[i]`
    is `dataset[(i, 0)]`.

    Args:
        source: where pictures and JSON lie.
        caption_field: key of the captions in the JSON, one string or a list of them; "a+b" pools two fields.
        seed: decides which caption is drawn.
        unreadable: position in the source and reason of each picture to leave out.

    Attributes:
        unreadable: name and reason of each picture left out.

    Raises:
        ValueError: no picture remains, or the first one has no captions under `caption_field`.
    """

    def __init__(
        self,
        source: Source,
        *,
        caption_field: str = "captions",
        seed: int = 0,
        unreadable: dict[int, str] | None = None,
    ) -> None:
        skipped = unreadable or {}
        self.source = source
        self.caption_field = caption_field
        self.seed = seed
        self.unreadable = {source.name(position): reason for position, reason in sorted(skipped.items())}
        # An array and not a list: workers share its pages after a fork.
        self._positions = np.array([i for i in range(len(source)) if i not in skipped], dtype=np.int64)
        if len(self) == 0:
            raise ValueError(f"no readable picture in {source.files()[0]} ({len(source)} listed)")
        self.captions(0)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, key: int | tuple[int, int]) -> CaptionSample:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        return {"image": self.image(index), "caption": self.caption(index, epoch), "index": index}

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, in its own size."""
        return decode(self.source.picture(self._position(index)))

    def caption(self, index: int, epoch: int = 0) -> str:
        """The caption drawn for an epoch."""
        captions = self.captions(index)
        if len(captions) == 1:
            return captions[0]
        return captions[int(np.random.default_rng([self.seed, epoch, index]).integers(len(captions)))]

    def captions(self, index: int) -> list[str]:
        """All captions of a picture.

        Raises:
            ValueError: there are none, or they are not text.
        """
        position = self._position(index)
        return captions_of(self.source.metadata(position), self.caption_field, self.source.name(position))

    def metadata(self, index: int) -> dict[str, Any]:
        """The JSON that belongs to a picture, as it was written."""
        return self.source.metadata(self._position(index))

    def name(self, index: int) -> str:
        """Key or file name of a picture."""
        return self.source.name(self._position(index))

    @property
    def fingerprint(self) -> str:
        """Changes with the files (names, sizes, times), the pictures left out, caption field and seed."""
        return f"{files_fingerprint(self.source)[:16]}-{len(self)}-{self.caption_field}-{self.seed}"

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            # IndexError also ends plain iteration over the data set.
            raise IndexError(f"index {index} is outside a data set of {len(self)} pictures")
        return int(self._positions[index])


def open_captions(
    path: Path | str,
    *,
    split: str = "train",
    caption_field: str = "captions",
    image_dir: Path | str | None = None,
    seed: int = 0,
    max_unreadable_share: float = 0.01,
    check_cache: Path | None = None,
) -> CaptionDataset:
    """Opens captioned pictures after reading all of them once; those that cannot be read are skipped and reported.

    Args:
        path: a folder of WebDataset shards `{split}-*.tar` (KEY.jpg + KEY.json), or a .json or .jsonl list in
            ShareGPT4V's form ({"image", "conversations"}: the second turn is the caption) or with {"image",
            "caption"} or {"image", "captions"}.
        split: which shards; a list has one split.
        caption_field: key of the captions, a string or a list of strings; "a+b" pools two fields.
        image_dir: folder of a list's pictures; the list's own folder if None.
        seed: decides which of several captions is drawn in which epoch.
        max_unreadable_share: more pictures without a readable image or caption than this share are an error.
        check_cache: JSON file that keeps the result of the check.

    Raises:
        FileNotFoundError: there is no such path or split.
        ValueError: data of another form, no captions, or too many unreadable pictures.
    """
    source = open_source(Path(path), split, None if image_dir is None else Path(image_dir))
    if len(source) == 0:
        raise ValueError(f"no picture is listed in {path}")
    _check_field(source, caption_field)
    unreadable = find_unreadable(source, caption_field, check_cache=check_cache)
    check_share(source, unreadable, max_unreadable_share, check_cache)
    return CaptionDataset(source, caption_field=caption_field, seed=seed, unreadable=unreadable)


def _check_field(source: Source, caption_field: str) -> None:
    """Refuses a wrong field before a million pictures are decoded: one of the first few must have captions there."""
    errors = []
    for position in range(min(len(source), 8)):
        try:
            captions_of(source.metadata(position), caption_field, source.name(position))
        except ValueError as error:
            errors.append(error)
        else:
            return
    raise errors[0]
