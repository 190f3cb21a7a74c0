"""Pictures with captions, of which one is drawn anew each epoch."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vision_moe.data.caption_fields import captions_of, draw_caption
from vision_moe.data.picture import decode
from vision_moe.data.read_config import ReadConfig, all_fields
from vision_moe.data.readable import check_share, files_fingerprint, find_unreadable
from vision_moe.data.sources import Source, open_source


class CaptionSample(TypedDict):
    """One picture with one of its captions."""

    image: Image.Image
    """RGB."""
    caption: str
    """The caption drawn."""
    index: int
    """Position in the data set; in a stream, a hash of the picture's name."""


class CaptionDataset(Dataset[CaptionSample]):
    """Readable pictures of a source with their captions.

    `dataset[(i, epoch)]` gives the picture and one of its captions, drawn from (seed, epoch, i); `dataset[i]`
    is `dataset[(i, 0)]`.

    Args:
        source: where pictures and JSON lie.
        config: captions and their weights, largest picture.
        seed: decides which caption is drawn.
        unreadable: position in the source and reason of each picture to leave out.

    Attributes:
        unreadable: name and reason of each picture left out.

    Raises:
        ValueError: no picture remains, or the first one has no captions where `config` looks.
    """

    def __init__(
        self,
        source: Source,
        config: ReadConfig,
        *,
        seed: int = 0,
        unreadable: dict[int, str] | None = None,
    ) -> None:
        skipped = unreadable or {}
        self.source = source
        self.config = config
        self.seed = seed
        self.unreadable = {source.name(position): reason for position, reason in sorted(skipped.items())}
        # An array and not a list: workers share its pages after a fork.
        self._positions = np.array([i for i in range(len(source)) if i not in skipped], dtype=np.int64)
        if len(self) == 0:
            raise ValueError(
                f"no readable picture among the {len(source)} listed, of which {source.name(0)} is the first"
            )
        self.captions(0)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, key: int | tuple[int, int]) -> CaptionSample:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        return {"image": self.image(index), "caption": self.caption(index, epoch), "index": index}

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, in its own size."""
        return decode(self.source.picture(self._position(index)), self.config.max_pixels)

    def caption(self, index: int, epoch: int = 0) -> str:
        """The caption drawn for an epoch."""
        position = self._position(index)
        key = (self.seed, epoch, index)
        return draw_caption(self.source.metadata(position), self.config, self.source.name(position), key)

    def captions(self, index: int) -> list[str]:
        """All captions of a picture.

        Raises:
            ValueError: there are none, or they are not text.
        """
        position = self._position(index)
        return captions_of(self.source.metadata(position), all_fields(self.config), self.source.name(position))

    def metadata(self, index: int) -> dict[str, Any]:
        """The JSON that belongs to a picture, as it was written."""
        return self.source.metadata(self._position(index))

    def name(self, index: int) -> str:
        """Key or file name of a picture."""
        return self.source.name(self._position(index))

    @property
    def fingerprint(self) -> str:
        """Changes with the files (names, sizes, times), the pictures left out, captions and seed."""
        captions = self.config.caption_weights or self.config.caption_field
        return f"{files_fingerprint(self.source.files())[:16]}-{len(self)}-{captions}-{self.seed}"

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
    """`open_dataset` with the fields of `ReadConfig` that evaluation needs."""
    config = ReadConfig(
        caption_field=caption_field,
        image_dir=None if image_dir is None else Path(image_dir),
        max_unreadable_share=max_unreadable_share,
    )
    return open_dataset(path, config, split=split, seed=seed, check_cache=check_cache)


def open_dataset(
    path: Path | str,
    config: ReadConfig,
    *,
    split: str = "train",
    seed: int = 0,
    check_cache: Path | None = None,
) -> CaptionDataset:
    """Opens captioned pictures after reading all of them once; those that cannot be read are skipped and reported.

    Args:
        path: a folder of WebDataset shards `{split}-*.tar` (KEY.jpg with KEY.json, KEY.txt or both) or of img2dataset's
            numbered shards; a .json or .jsonl list in ShareGPT4V's form ({"image", "conversations"}: the second turn is
            the caption) or with {"image", "caption"} or {"image", "captions"}; a folder of img2dataset's "files" form;
            or, with format "hf", a Hugging Face data set.
        config: form, captions, and what becomes of damaged input.
        split: which shards, or which split of a Hugging Face data set; the other forms have one.
        seed: decides which of several captions is drawn in which epoch.
        check_cache: JSON file that keeps the result of the check.

    Raises:
        FileNotFoundError: there is no such path or split.
        ValueError: data of another form, no captions, or too many unreadable pictures.
    """
    source = open_source(path, split, config)
    if len(source) == 0:
        raise ValueError(f"no picture is listed in {path}")
    check_field(source, config)
    unreadable = find_unreadable(source, config, check_cache=check_cache)
    check_share(source, unreadable, config.max_unreadable_share, check_cache)
    return CaptionDataset(source, config, seed=seed, unreadable=unreadable)


def check_field(source: Source, config: ReadConfig) -> None:
    """Refuses a wrong field before a million pictures are decoded: one of the first few must have captions there."""
    errors = []
    for position in range(min(len(source), 8)):
        try:
            captions_of(source.metadata(position), all_fields(config), source.name(position))
        except ValueError as error:
            errors.append(error)
        else:
            return
    raise errors[0]
