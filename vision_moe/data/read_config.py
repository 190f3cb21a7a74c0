"""How captioned pictures are read: the fields that every command over a data set shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Where Pillow itself begins to warn of decompression bombs (Image.MAX_IMAGE_PIXELS); at twice as many it refuses.
MAX_PIXELS = 89_478_485
_PILLOW_LIMIT = 2 * MAX_PIXELS

DataFormat = Literal["auto", "shards", "list", "files", "hf"]


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """Form of a data set, its captions, and what becomes of damaged input."""

    format: DataFormat = "auto"
    """"shards" (WebDataset), "list" (JSON, JSONL), "files" (img2dataset's folders of KEY.jpg, KEY.json, KEY.txt), "hf"
    (Hugging Face datasets: a name, or a folder of parquet or arrow); "auto" tells all but "hf" by the path."""
    subset: str | None = None
    """Configuration of a Hugging Face data set."""
    image_field: str = "image"
    """Column of the pictures of a Hugging Face data set."""
    caption_field: str = "captions"
    """Field of a sample's JSON or row: a list of captions (one is drawn per epoch) or one string; "a+b" pools two
    fields; "txt" is KEY.txt."""
    caption_weights: dict[str, float] | None = None
    """Fields with weights, in place of caption_field: each epoch one field is drawn by its weight, and one of its
    captions evenly."""
    image_dir: Path | None = None
    """Folder that the picture names of a list are relative to; None takes the list's own."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are unreadable: a small file can unpack to gigabytes."""
    max_unreadable_share: float = 0.01
    """Unreadable pictures are skipped and counted; more than this share of all is an error."""
    damaged_shards: Literal["error", "skip"] = "error"
    """Whether a shard that cannot be read to its end is an error, or is left at the damage, and counted."""
    allow_pipe: bool = False
    """Lets "pipe:COMMAND" run its shell command with your rights; allow it only for sources that you wrote."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _PILLOW_LIMIT:
            raise ValueError(f"max_pixels must be in [1, {_PILLOW_LIMIT}] (Pillow's limit), but got {self.max_pixels}")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(f"max_unreadable_share must be in [0, 1], but got {self.max_unreadable_share}")
        weights = self.caption_weights
        if weights is not None and (not weights or any("+" in field or not w > 0 for field, w in weights.items())):
            raise ValueError(f"caption_weights must give single fields a weight above 0, but got {weights}")


def all_fields(config: ReadConfig) -> str:
    """All fields that captions are taken from, joined by "+"."""
    # No property: the command line takes those of a configuration for subcommands.
    return config.caption_field if config.caption_weights is None else "+".join(config.caption_weights)
