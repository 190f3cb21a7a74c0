"""Which pictures and captions a published retrieval number is over, by name; anything else is refused.

A recall falls as the gallery grows, so that numbers over other pictures, or another number of them, compare nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval.caption_lists import CaptionList, coco_captions, karpathy_captions, read_json, token_captions
from vision_moe.data.captions import CaptionDataset, open_captions
from vision_moe.data.read_config import ReadConfig

NUM_CAPTIONS = 5


class Protocol(NamedTuple):
    """The pictures of a benchmark.

    Attributes:
        num_images: how many.
        form: of the file that lists them: "karpathy", "coco" or "token".
        splits: of a Karpathy file.
        dataset: what a Karpathy file calls itself.
        about: one line for `--help`.
    """

    num_images: int
    form: str
    splits: tuple[str, ...] = ()
    dataset: str = ""
    about: str = ""


PROTOCOLS = {
    "coco5k": Protocol(5_000, "karpathy", ("test",), "coco", "COCO's Karpathy test split"),
    "coco2017": Protocol(5_000, "coco", about="COCO val2017, what CLIP-MoE's paper and Long-CLIP's report"),
    "flickr1k": Protocol(1_000, "karpathy", ("test",), "flickr30k", "Flickr30k's Karpathy test split"),
    "flickr31k": Protocol(31_014, "karpathy", ("train", "val", "test"), "flickr30k", "all of Karpathy's Flickr30k"),
    "flickr31783": Protocol(31_783, "token", about="all of results_20130124.token, as CLIP-MoE's own code evaluates"),
}


class Captioned:
    """A caption data set of which the first so many captions of each picture count.

    Args:
        dataset: the pictures.
        num_captions: how many; None = all.
    """

    def __init__(self, dataset: CaptionDataset, num_captions: int | None = None) -> None:
        self._dataset = dataset
        self._num_captions = num_captions
        self.fingerprint = dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return {"image": self._dataset.image(index)}
        except OSError as error:
            # Skipping it would give a number over other pictures than the benchmark's.
            raise OSError(f"{self.name(index)} cannot be read ({error}); mend or replace it") from error

    def captions(self, index: int) -> list[str]:
        """The captions that count."""
        return self._dataset.captions(index)[: self._num_captions]

    def metadata(self, index: int) -> dict[str, Any]:
        """The picture's raw JSON."""
        return self._dataset.metadata(index)

    def name(self, index: int) -> str:
        """Key or file name of a picture."""
        return self._dataset.name(index)


def open_retrieval(
    data: Path,
    *,
    split: str,
    caption_field: str,
    image_dir: Path | None,
    protocol: str | None,
    cache: Path | None = None,
) -> Captioned:
    """Opens pictures with their captions, held to a protocol if one is named.

    Args:
        data: shards or a list (see `vision_moe.data.captions.open_captions`), Karpathy's dataset_*.json, COCO's
            captions_*.json, or Flickr30k's .token file.
        split: of shards, or of Karpathy's file where no protocol is named.
        caption_field: of shards and lists.
        image_dir: folder of the pictures; None = the file's own.
        protocol: a key of `PROTOCOLS`.
        cache: folder that keeps which pictures of shards and lists can be read.

    Raises:
        FileNotFoundError: a file or a picture is not there.
        ValueError: the data have another form, or are not those of the protocol.
    """
    wanted = None if protocol is None else PROTOCOLS[protocol]
    folder = data.parent if image_dir is None else image_dir
    content = read_json(data) if data.suffix == ".json" and data.is_file() else None
    if data.suffix == ".token":
        form, source = "token", CaptionList(data, folder, token_captions(data))
    elif isinstance(content, dict) and "annotations" in content:
        form, source = "coco", CaptionList(data, folder, coco_captions(data, content))
    elif isinstance(content, dict):
        form = "karpathy"
        named = content.get("dataset")
        if wanted is not None and wanted.dataset and named not in (None, wanted.dataset):
            raise ValueError(f"protocol {protocol} is over {wanted.dataset}, but {data} calls itself {named!r}")
        splits = wanted.splits if wanted is not None and wanted.splits else (split,)
        source = CaptionList(data, folder, karpathy_captions(data, content, splits))
    else:
        # Shards and lists do not say what they were made from: their number alone is checked.
        form = wanted.form if wanted is not None else ""
        check = None if cache is None else cache / f"readable-{data.name}-{split}.json"
        dataset = open_captions(data, split=split, caption_field=caption_field, image_dir=image_dir, check_cache=check)
        return _held_to(protocol, form, dataset, data)
    return _held_to(protocol, form, CaptionDataset(source, ReadConfig()), data)


def _held_to(protocol: str | None, form: str, dataset: CaptionDataset, data: Path) -> Captioned:
    if protocol is None:
        return Captioned(dataset)
    wanted = PROTOCOLS[protocol]
    if form != wanted.form:
        raise ValueError(
            f"protocol {protocol} ({wanted.about}) is listed by a file of {wanted.form}'s form, but {data} has {form}'s"
        )
    if len(dataset) != wanted.num_images:
        raise ValueError(
            f"protocol {protocol} ({wanted.about}) has {wanted.num_images:,} pictures, but {data} gives "
            f"{len(dataset):,}; without --protocol any set is measured, and not to be compared with published numbers"
        )
    short = [dataset.name(i) for i in range(len(dataset)) if len(dataset.captions(i)) < NUM_CAPTIONS]
    if short:
        raise ValueError(
            f"protocol {protocol} takes the first {NUM_CAPTIONS} captions of a picture, but {len(short)} pictures of "
            f"{data} have fewer, first {short[0]}"
        )
    return Captioned(dataset, NUM_CAPTIONS)
